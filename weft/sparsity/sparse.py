"""What sparse layers share: stored weights in one vector, derivatives of their products, and changes of the mask.

    y = W x + b,   S(x, v, g) = sum over stored k of v_k <x[column_k], g[row_k]>
    dL/dx = dS/dx (v, g),   dL/dv = dS/dv (x, g)   for g = dL/dy, and second derivatives by the same three products

as S is linear in each of the three. Each costs a multiplication for each stored weight, sample (and pixel).
"""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from weft.convert import Convertible
from weft.errors import DataError, Unsupported, UsageError
from weft.kernels import sparse as kernels
from weft.ops.sparse_masks import magnitude_mask, random_mask
from weft.ops.token_layers import own_weights

__all__ = ["SparseLayer", "dense_gradients", "product", "starts_of"]

How = tuple[tuple[int, ...], ...] | None  # kernel, stride, padding and dilation of a filter; None: a matrix


def product(x: Tensor, values: Tensor, bias: Tensor | None, how: How, *index: Tensor) -> Tensor:
    """``[B, I] -> [B, O]``, or ``[B, C, H, W] -> [B, O, H', W']``, with derivatives of every order.

    Args:
        x: in the dtype of the values.
        values: the stored weights, row by row.
        bias: ``[O]`` or None.
        how: of a filter.
        index: starts and columns of the rows, and, for a matrix, of its transpose, with the order of its values.
    """
    kind = _Product if torch.compiler.is_compiling() else _Both  # which takes no function with a jvp
    # Nor one of any number of tensors, where no gradient is asked for.
    found: Tensor = kind.apply(x, values, bias, how, *index, *[None] * (5 - len(index)))
    return found


def _run(x: Tensor, values: Tensor, bias: Tensor | None, how: How, index: tuple[Tensor, ...]) -> Tensor:
    found: Tensor
    if how is None:
        found = kernels.sparse_linear(x, values, bias, *index[:2])
    else:
        found = kernels.sparse_conv2d(x, values, bias, *index, *map(list, how))
    return found


class _Product(Function):
    @staticmethod
    def forward(
        x: Tensor, values: Tensor, bias: Tensor | None, how: How, starts: Tensor, columns: Tensor,
        other_starts: Tensor | None, other_rows: Tensor | None, order: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return _run(x, values, bias, how, (starts, columns))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, ctx.how, *given = inputs
        index = given if ctx.how is None else given[:2]
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *index)
        ctx.save_for_forward(x, values, *index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, values, *index = ctx.saved_tensors
        x = grad.new_zeros(()).expand(ctx.shape) if x is None else x
        flags = tuple(ctx.needs_input_grad[:3])
        run = _Backward.apply if torch.is_grad_enabled() else _Backward.forward  # or nothing differentiates it again
        found = run(grad, x, values, ctx.how, flags, *index)
        return *(t if wanted else None for t, wanted in zip(found, flags, strict=True)), *[None] * 6


class _Both(_Product):
    """And forward mode."""

    @staticmethod
    def jvp(ctx: Any, by_x: Tensor | None, by_values: Tensor | None, by_bias: Tensor | None, *_: None) -> Tensor | None:
        x, values, *index = ctx.saved_tensors
        parts = [product(by_x, values, None, ctx.how, *index)] if by_x is not None else []
        parts += [product(x, by_values, None, ctx.how, *index)] if by_values is not None else []
        if by_bias is not None:
            parts.append(by_bias.view(-1, *[1] * (x.ndim - 2)).expand_as(_run(x, values, None, ctx.how, tuple(index))))
        return sum(parts[1:], parts[0]) if parts else None


class _Backward(Function):
    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, values: Tensor, how: How, flags: tuple[bool, bool, bool], *index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor]
        if how is None:
            found = kernels.sparse_linear_backward(grad, x, values, *index, *flags)
        else:
            found = kernels.sparse_conv2d_backward(grad, x, values, *index, *map(list, how), *flags)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, values, ctx.how, ctx.flags, *index = inputs
        ctx.save_for_backward(grad, x, values, *index)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor, by_values: Tensor, by_bias: Tensor) -> tuple[Any, ...]:
        (grad, x, values, *index), flags, needs = ctx.saved_tensors, ctx.flags, ctx.needs_input_grad
        back = functools.partial(_Backward.apply, grad)
        of_grad = of_x = of_values = None
        if needs[0]:
            parts = [product(by_x, values, None, ctx.how, *index)] if flags[0] else []
            parts += [product(x, by_values, None, ctx.how, *index)] if flags[1] else []
            parts += [by_bias.view(-1, *[1] * (grad.ndim - 2)).expand_as(grad)] if flags[2] else []
            of_grad = sum(parts[1:], parts[0])
        if needs[1] and flags[1]:
            of_x = back(x, by_values, ctx.how, (True, False, False), *index)[0]
        if needs[2] and flags[0]:
            of_values = back(by_x, values, ctx.how, (False, True, False), *index)[1]
        return of_grad, of_x, of_values, None, None, *[None] * len(index)


_FORWARDS: tuple[Any, ...] = (_Product.forward, _Backward.forward)
for _forward in _FORWARDS:  # torch asks for it at each call, and making it is slow
    _forward.__signature__ = inspect.signature(_forward)


class SparseLayer(Convertible, abc.ABC):
    """What `SparseLinear` and `SparseConv2d` share: stored weights and their index, masks, states.

    What is stored is a vector, the parameter ``values``, in the order of the rows; where those stand is in buffers. The
    bias is the ordinary layer's own. A state with another number of stored weights can be loaded. The two layers' own
    docstrings say what the arguments mean.
    """

    rebuilds = True
    index_names: ClassVar[tuple[str, ...]] = ("row_starts", "columns")
    values: nn.Parameter
    bias: nn.Parameter | None
    row_starts: Tensor
    columns: Tensor
    shape: torch.Size

    def __init__(
        self, layer: nn.Module, *, density: float = 0.05, mask: str | Tensor = "magnitude", seed: int = 0,
        rescale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if type(layer) not in self.converts:
            names = " or ".join(f"nn.{kind.__name__}" for kind in self.converts)
            raise Unsupported(f"{type(layer).__name__} is no {names}", f"an {names}")
        own_weights(layer)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if isinstance(mask, Tensor):
            chosen = self._checked(mask, weight.shape).to(weight.device)
        elif mask == "random":
            chosen = random_mask(tuple(weight.shape), density, seed).to(weight.device)
        elif mask == "magnitude":
            chosen = magnitude_mask(weight, density)
        else:
            raise UsageError(f"mask={mask!r}: give 'magnitude', 'random' or booleans in the weight's shape")
        self.shape = weight.shape
        values = weight.detach()[chosen]
        if rescale and bool(values.any()):
            values *= float(weight.detach().double().norm() / values.double().norm())
        self.values = nn.Parameter(values, weight.requires_grad)
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        for name, found in self.index(chosen).items():
            self.register_buffer(name, found)
        self.register_load_state_dict_pre_hook(_make_room)
        self.register_load_state_dict_post_hook(_check_index)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer that stores a part of the weights."""
        return cls(layer, **options)

    def index(self, mask: Tensor) -> dict[str, Tensor]:
        """The buffers for a mask, by name, in the order in which `product` takes them."""
        flat = mask.flatten(1)
        return {"row_starts": starts_of(flat.sum(1)), "columns": flat.nonzero()[:, 1].int()}

    def product(self, x: Tensor, how: How) -> Tensor:
        """The product with the stored weights, in autocast's dtype where that is on."""
        kind, values, bias = x.device.type, self.values, self.bias
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, values, bias = x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)  # type: ignore[assignment]
        if x.dtype != values.dtype:
            raise DataError(f"the input is {x.dtype}, the stored weights are {values.dtype}: convert one of them")
        return product(x, values, bias, how, *(getattr(self, name) for name in self.index_names))

    def places(self) -> Tensor:
        """Where each stored weight stands in the ordinary layer's flattened weight, ascending."""
        return self.mask.flatten().nonzero()[:, 0]

    @property
    def mask(self) -> Tensor:
        """True where a weight is stored, in the ordinary weight's shape; a new tensor."""
        rows = self.row_starts.long().diff()
        start = torch.arange(self.shape[0], device=rows.device).repeat_interleave(rows) * self.shape[1:].numel()
        found = torch.zeros(self.shape, dtype=torch.bool, device=rows.device)
        found.view(-1)[start + self.own_columns()] = True
        return found

    def own_columns(self) -> Tensor:
        """Columns of the stored weights in the ordinary layer's weight ``[O, ...]``, flattened to ``[O, I]``."""
        return self.columns.long()

    @property
    def weight(self) -> Tensor:
        """The ordinary layer's weight, with zeros; a new tensor, through which the stored weights get gradients."""
        empty = self.values.new_zeros(self.shape.numel())
        return empty.index_copy(0, self.places(), self.values).view(self.shape)

    @torch.no_grad()
    def set_mask_(self, mask: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Store other weights from now on, in the middle of training.

        Weights that stay keep their values, gradients and the optimizer's state; new ones begin at 0 in all three. The
        parameter stays the same object, so nothing has to be told to the optimizer; with another number of stored
        weights its size changes. Call it after ``optimizer.step()``, between backward and the next forward pass.

        Args:
            mask: booleans in the shape of the ordinary layer's weight.
            optimizer: the one that trains this layer; None where none has state for it.

        Raises:
            UsageError: for another shape, or an optimizer that does not train this layer.
        """
        mask = self._checked(mask, self.shape).to(self.values.device)
        state: dict[str, Any] = {}
        if optimizer is not None:
            if not any(p is self.values for group in optimizer.param_groups for p in group["params"]):
                raise UsageError(
                    "the optimizer does not hold this layer's values: give the one that trains it, or None"
                )
            state = optimizer.state.get(self.values, {})
        old, new = self.places(), mask.flatten().nonzero()[:, 0]
        at = torch.searchsorted(old, new).clamp_(max=max(0, len(old) - 1))
        stays = old[at] == new if len(old) else torch.zeros_like(new, dtype=torch.bool)

        def carried(t: Tensor) -> Tensor:
            found = t.new_zeros(len(new))
            found[stays] = t[at[stays]]
            return found

        grad = None if self.values.grad is None else carried(self.values.grad)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.values.shape:
                state[key] = carried(value)
        self.values.grad = None
        values = carried(self.values)
        if len(new) != len(old):
            self.values.data = values
        self.values.copy_(values)  # a graph that holds the old ones finds them changed
        self.values.grad = grad
        for name, found in self.index(mask).items():
            setattr(self, name, found)

    @abc.abstractmethod
    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient by every place of the ordinary weight, for an input and the output's gradient."""

    def extra_repr(self) -> str:
        """Shape and number of stored weights."""
        count = self.shape.numel()
        return f"{list(self.shape)}, stored={len(self.values)} of {count}, bias={self.bias is not None}"

    @staticmethod
    def _checked(mask: Tensor, shape: torch.Size) -> Tensor:
        if mask.dtype != torch.bool or mask.shape != shape:
            raise UsageError(
                f"a mask {mask.dtype} {list(mask.shape)} for a weight {list(shape)}: give booleans, one each"
            )
        return mask


@contextlib.contextmanager
def dense_gradients(model: nn.Module) -> Iterator[dict[SparseLayer, Tensor]]:
    """Inside, each backward pass adds up, beside what it does anyway, what RigL needs to let weights grow.

    >>> with dense_gradients(model) as gradients:  # doctest: +SKIP
    ...     loss(model(x), y).backward()
    >>> for layer, gradient in gradients.items():  # doctest: +SKIP
    ...     layer.set_mask_(rigl_mask(layer.weight, layer.mask, gradient, fraction), optimizer)

    Args:
        model: with sparse layers.

    Yields:
        The gradient by every place of each layer's ordinary weight, as one dense product gives it.

    Raises:
        UsageError: where there is no sparse layer.
    """
    found: dict[SparseLayer, Tensor] = {}

    def watch(layer: SparseLayer, args: tuple[Any, ...], output: Tensor) -> None:
        def add(grad: Tensor) -> None:
            given = layer.dense_gradient(args[0].detach(), grad.detach())
            found[layer] = found[layer] + given if layer in found else given

        if output.requires_grad:
            output.register_hook(add)

    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    if not layers:
        raise UsageError(f"{type(model).__name__} has no sparse layer: convert it with weft.convert_ first")
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def starts_of(counts: Tensor) -> Tensor:
    """Where each row of so many stored weights begins, and where the last one ends."""
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _make_room(layer: SparseLayer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before a state is loaded: as many stored weights as it has."""
    for name in ("values", *layer.index_names):
        given, own = state.get(prefix + name), getattr(layer, name)
        if given is not None and given.ndim == 1 and given.shape != own.shape and not name.endswith("starts"):
            if name == "values":
                layer.values.grad = None
                layer.values.data = own.data.new_empty(given.shape)
            else:
                setattr(layer, name, own.new_empty(given.shape))


def _check_index(layer: SparseLayer, keys: object) -> None:
    """After it: an index that a loop may follow."""
    mask_fits = len(layer.values) == len(layer.columns) == int(layer.row_starts[-1]) and int(layer.row_starts[0]) == 0
    if mask_fits and bool((layer.row_starts.diff() >= 0).all()):
        own = layer.own_columns()
        inside = not len(own) or (int(own.min()) >= 0 and int(own.max()) < layer.shape[1:].numel())
        wanted = layer.index(layer.mask) if inside else {}
        if wanted and all(torch.equal(getattr(layer, name), found) for name, found in wanted.items()):
            return
    raise DataError("the loaded state is no sparse layer's: its index and its stored weights do not fit together")
