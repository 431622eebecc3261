"""Layers that see only the signs of their weights, and in eval mode keep them as bits."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.optim.optimizer import register_optimizer_step_post_hook

from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.kernels.sign_matrix import SignMatrix, frozen_product
from weft.kernels.signs import pack_signs, sign_product, sign_sums

__all__ = ["SignLayer", "SignLinear"]


_steps = 0  # of all optimizers, since bits were packed for the first time


@functools.cache
def _count_steps() -> None:
    """From now on: optimizers with ``fused=True`` do not count the changes that they make to a weight."""

    def count(*_: object) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


@dataclasses.dataclass
class _Bits:
    """The bits of a layer's weights, and what they were made from."""

    matrix: Any
    state: tuple[Any, ...]
    made_from: list[Tensor]  # held, so that no other weights come to lie at their address


class SignLayer(Convertible, abc.ABC):
    """Stands in for an ordinary layer, on the same parameters; abstract: subclasses say what they compute.

    In eval mode, where no gradient is asked for, the layer computes with packed bits. They are no part of its state,
    and made anew when the weights have changed (at each call, for weights that were made under inference_mode, which do
    not count their changes), or any optimizer has made a step. Changes in place that torch does not count (through
    ``weight.data`` or NumPy) are seen after the next call of ``train`` or ``eval``, or pass with gradients. Code
    made by ``torch.compile`` or ``torch.export``, and transformations of `torch.func`, have the float weights in them,
    after `pack_` the bits.

    Args:
        layer: the ordinary layer.

    Raises:
        Unsupported: for other layers, subclasses and layers with a computed weight among them.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    packed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        (kind,), given = self.converts, cast(Any, layer)
        if type(layer) is not kind or not isinstance(given.weight, nn.Parameter):
            name = f"an nn.{kind.__name__}"
            raise Unsupported(f"{type(layer).__name__} is not {name} with a weight of its own", name)
        self.weight = given.weight
        self.register_parameter("bias", given.bias)
        self._bits: _Bits | None = None

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer with binary weights, on the same parameters."""
        return cls(layer, **options)

    @abc.abstractmethod
    def check(self, x: Tensor) -> None:
        """Raises UsageError for an input of another shape."""

    @abc.abstractmethod
    def differentiable(self, x: Tensor) -> Tensor:
        """The output by torch's own operations on the float weights."""

    @abc.abstractmethod
    def scales(self, weight: Tensor) -> Tensor:
        """The factor of each output, ``[O]``."""

    @abc.abstractmethod
    def matrix(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What computes outputs from these, float32, and an input of any dtype but float64."""

    @abc.abstractmethod
    def from_packed(self, x: Tensor) -> Tensor:
        """The same by operations that compilers can follow, in any dtype: from what `pack_` has left."""

    def rows(self, weight: Tensor) -> Tensor:
        """The weights of each output, ``[O, D]``, in the order in which they are packed."""
        return weight

    def as_bits(self) -> bool:
        """Whether in eval mode the weights are their signs."""
        return True

    def by_bits(self) -> bool:
        """Whether bits are what eval mode computes with."""
        return self.as_bits()

    def train(self, mode: bool = True) -> Self:
        """As every module's; bits are made anew after it."""
        self._bits = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """The output, in the dtype that the ordinary layer has.

        Raises:
            UsageError: for an input of another shape.
            Unsupported: where a gradient is asked for after `pack_`.
        """
        self.check(x)
        differentiated = self.training or self._differentiated(x)
        if differentiated:
            self._bits = None  # the step that follows may be one that torch does not count
        by_floats = torch.compiler.is_compiling() or x.dtype == torch.float64 or not self.by_bits()
        if differentiated or by_floats or _stands_in(x):
            return self._by_operations(x, differentiated)
        bits = self._bits
        if bits is None or bits.state != self._state():
            bits = self._bits = self._packed()
        return bits.matrix(x).to(_wanted(x))

    def pack_(self) -> Self:
        """Keep the bits and the scales alone, as buffers: for use, not for training; put into eval mode.

        A thirty-second of the bytes, where 8 divides the weights of an output. The state is that of a packed layer from
        then on: whoever loads it into another packs that one first. `restore_` leaves the layer as it is.

        Raises:
            Unsupported: where the weights are not their signs in eval mode.
        """
        if self.weight is None:
            return self.eval()
        if not self.as_bits():
            raise Unsupported(f"{self} takes the float weights in eval mode", "stochastic=False")
        weight = self.weight.detach()
        with torch.inference_mode(False):  # what is made under inference_mode does not count its changes
            self.register_buffer("packed", pack_signs(self.rows(weight)))
            self.register_buffer("scale", self.scales(weight).float())
        self.weight = self._bits = None
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        vars(self).pop("_weft_original", None)  # the ordinary layer that `convert_` holds would keep the float weights
        return self.eval()

    def _differentiated(self, x: Tensor) -> bool:
        """Whether a derivative is asked for, or, while there are float weights, a transformation of `torch.func`."""
        given = [t for t in (x, self.weight, self.bias) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            return True
        if torch.compiler.is_compiling() or _stands_in(x):
            return False
        if self.weight is not None:
            try:
                for t in given:
                    t.data_ptr()
            except RuntimeError:  # inside of a transformation
                return True
        return any(unpack_dual(t).tangent is not None for t in given)

    def _by_operations(self, x: Tensor, differentiated: bool) -> Tensor:
        if self.weight is not None:
            return self.differentiable(x)
        if differentiated:
            raise Unsupported(
                "pack_() has dropped the float weights, and bits have no gradient", "eval() and no_grad()"
            )
        return self.from_packed(x).to(_wanted(x))

    def _state(self) -> tuple[Any, ...]:
        """What is another whenever the weight, or what `pack_` has left, or the bias are."""
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # computed anew in each pass, by torch.nn.utils.parametrize, say
            return (object(),)
        try:
            found = self._left() if weight is None else (weight._version, weight.data_ptr(), weight.stride(), _steps)
            return found if bias is None else (*found, bias._version, bias.data_ptr())
        except RuntimeError:  # tensors made under inference_mode do not count their changes
            return (object(),)

    def _left(self) -> tuple[Any, ...]:
        return tuple([n for t in self._buffers.values() if t is not None for n in (t._version, t.data_ptr())])

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """Eval mode as a function of a copy of the bits, the scales and the bias, whose outputs are float32.

        It costs less than a module's call, is fastest under `torch.inference_mode`, and has no derivative.

        Raises:
            Unsupported: where bits are not what eval mode computes with.
        """
        if not self.by_bits():
            raise Unsupported(f"{self} does not compute with bits in eval mode", "the layer as it is")
        return self.matrix(*(None if t is None else t.clone() for t in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The bits, the scales and the bias."""
        bias = None if self.bias is None else self.bias.detach().float()
        if self.weight is None:
            return self.packed, self.scale.float(), bias
        weight = self.weight.detach()
        return pack_signs(self.rows(weight)), self.scales(weight).float(), bias

    def _packed(self) -> _Bits:
        _count_steps()
        state = self._state()  # before what may change while bits are made
        made_from = (self.packed, self.scale, self.bias) if self.weight is None else (self.weight, self.bias)
        return _Bits(self.matrix(*self._parts()), state, [p.detach() for p in made_from if p is not None])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bits": None}


class SignLinear(SignLayer):
    """A `SignLayer` for ``nn.Linear``, fastest under `torch.inference_mode`; abstract still.

    There a call goes past torch's dispatcher: dispatch modes, but those of Weft's own counting, do not see it.

    Attributes:
        inputs: what the bits are multiplied with, as `weft.kernels.sign_matrix.SignMatrix` takes it.

    Args:
        layer: the ordinary layer.

    Raises:
        Unsupported: for other layers, subclasses and layers with a computed weight among them.
    """

    converts = (nn.Linear,)
    inputs = "floats"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        given: Any = layer
        self.in_features, self.out_features = given.in_features, given.out_features

    def extra_repr(self) -> str:
        """Sizes, and whether the float weights are gone."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + (", packed" if self.weight is None else "")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``.

        Raises:
            UsageError: for another number of features.
            Unsupported: where a gradient is asked for after `pack_`.
        """
        bits = self._bits
        if (  # what costs least, where bits are ready and nothing else is asked for
            bits is not None
            and not self.training
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and bits.state == self._state()
            and (y := bits.matrix.at_once(x)) is not None
        ):
            return y
        return super().forward(x)

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """As `SignLayer.frozen`."""
        return frozen_product(cast(SignMatrix, super().frozen()))

    def check(self, x: Tensor) -> None:
        """Raises UsageError for another number of features."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise UsageError(f"x has the shape {tuple(x.shape)}: give [..., {self.in_features}]")

    def matrix(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> SignMatrix:
        """The product of bits."""
        return SignMatrix(packed, scale, bias, self.in_features, self.inputs)

    def from_packed(self, x: Tensor) -> Tensor:
        """By the operators for bits."""
        given = x, self.packed, self.scale.float(), None if self.bias is None else self.bias.float()
        return sign_sums(*given) if self.inputs == "floats" else sign_product(*given, factored=self.inputs != "signs")


def _stands_in(x: Tensor) -> bool:
    """Whether x has a shape and no numbers: on the meta device, or of a mode's own kind of tensor."""
    return x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _wanted(x: Tensor) -> torch.dtype:
    """The dtype of the output that an ordinary layer has."""
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
