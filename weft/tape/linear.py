"""A linear layer that keeps something smaller than its input: what the methods of this kind share.

    y = x W^T + b,   dL/dx = dL/dy W,   dL/db = sum of dL/dy,   dL/dW from what was kept in place of x

Autograd keeps x for dL/dW alone. Outputs and gradients of x and b are therefore those of the ordinary layer, whatever
is kept. Nothing is kept while the weight is frozen or gradients are off. Where x is kept anyway, nothing is saved: a
ReLU and a tanh keep their output, which the next layer reads. Several layers that read one x (query, key and value)
each keep their own, where autograd keeps one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from weft._keeping import plain_math
from weft.convert import Convertible
from weft.errors import DataError, Unsupported

__all__ = ["CompressedLinear", "Gradient"]

Gradient = Callable[..., Tensor]  # (dL/dy [N, O], *kept) -> the gradient of the layer's target


class CompressedLinear(Convertible):
    """Stands in for an ``nn.Linear``, on the same weight and bias; abstract: `keep` says what is kept.

    Second derivatives (``create_graph=True``, and ``torch.func.grad``, which always prepares for them) would need what
    is not kept: backward raises Unsupported, unless the weight is frozen. ``torch.export`` works under
    ``torch.no_grad``, where the layer is the ordinary one.

    Args:
        layer: the ordinary layer.

    Raises:
        Unsupported: for other layers, subclasses and layers with a computed weight among them.
    """

    converts = (nn.Linear,)
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if type(layer) is not nn.Linear or not isinstance(layer.weight, nn.Parameter):
            raise Unsupported(f"{type(layer).__name__} is no nn.Linear with a weight of its own", "an nn.Linear")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer that keeps less, on the same parameters."""
        return cls(layer, **options)

    def extra_repr(self) -> str:
        """The layer's sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def target(self) -> nn.Parameter:
        """The parameter whose gradient is formed from what is kept."""
        return self.weight

    def keep(self, x: Tensor) -> tuple[Gradient, tuple[Tensor, ...]]:
        """What is kept of the input ``[N, D]``, and a function of dL/dy ``[N, O]`` and that for the target's gradient.

        Runs without gradients and autocast, once in each forward pass that needs it. The function may hold constants
        only: a checkpoint's backward pairs the function of the first forward pass with what the second one keeps.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``, as the ordinary layer.

        Raises:
            DataError: for inputs with another number of features.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise DataError(f"inputs of shape {tuple(x.shape)}; expected [..., {self.in_features}]")
        if not (torch.is_grad_enabled() and self.target.requires_grad):
            return F.linear(x, self.weight, self.bias)
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.no_grad(), plain_math(x.device):
            rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
            gradient, kept = self.keep(rows.to(dtype))
        # For a strided input torch takes another product where the weight is frozen, with other bits.
        weight = self.weight if self.weight.requires_grad else self.weight.detach().requires_grad_()
        return _Linear.apply(x, weight, self.bias, self.target, gradient, *kept)


class _Linear(Function):
    """The linear map whose target's gradient is ``gradient(dL/dy, *kept)``; the weight itself gets none."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gradient: Gradient, *kept: Tensor
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, _, ctx.gradient, *kept = inputs
        ctx.by_columns = x.ndim == 2 and x.stride() == (1, len(x))  # autograd then multiplies the other way round
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise Unsupported(
                "a layer that does not keep its input has no second derivative (create_graph=True, torch.func.grad)",
                "the ordinary layer (weft.restore_), or freeze the weight",
            )
        weight, *kept = ctx.saved_tensors
        need, rows = ctx.needs_input_grad, grad.flatten(0, -2) if grad.ndim > 1 else grad[None]
        with plain_math(grad.device):
            by_x = _by_input(rows, weight.to(grad.dtype), ctx.by_columns) if need[0] else None
            by_bias = rows.sum(0) if need[2] else None
            by_target = ctx.gradient(rows, *kept) if need[3] else None
        by_x = by_x if by_x is None else by_x.view(*grad.shape[:-1], by_x.shape[1])
        return by_x, None, by_bias, by_target, *[None] * (1 + len(kept))


def _by_input(rows: Tensor, weight: Tensor, by_columns: bool) -> Tensor:
    """dL/dx ``[N, D]`` by the product that autograd takes, so that its bits are the same."""
    return (weight.mT @ rows.mT).mT if by_columns else rows @ weight
