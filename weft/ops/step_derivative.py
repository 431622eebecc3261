"""Pointwise layers with an exact forward pass whose derivative is a step function, kept as a packed index.

With q the step function that stands for f', the backward pass gives g q(x); of x it needs the index of the step alone,
one to four bits an element, and x itself is not kept. The levels are constants and belong to no call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.convert import Convertible
from weft.kernels.bits import unpack_bits
from weft.kernels.step_lookup import gather_unpack

__all__ = ["StepActivation", "StepDerivative", "constants"]


@functools.lru_cache(maxsize=256)
def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table of numbers, made once for each device and dtype."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


class StepDerivative(torch.autograd.Function):
    """``function(x)`` with the backward pass g x levels[index(x)]; without a second derivative."""

    @staticmethod
    def forward(
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        index: Callable[[Tensor], Tensor],
        levels: tuple[float, ...],
        bits: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The function's values, and the packed indices, which are not differentiable.

        Args:
            x: any shape.
            function: pointwise; runs without gradients.
            index: of each element's step, packed to ``bits`` each.
            levels: by index.
            bits: 1 to 4.
            inplace: whether the function changes x and returns it.
        """
        packed = index(x)  # first: a function in place overwrites x
        y = function(x)
        return y, packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, _, ctx.levels, ctx.bits, inplace = inputs
        packed = output[1]
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed)
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = None
        if grad is not None and grad.dtype == torch.float64:  # the kernel's levels are float32
            levels = constants(ctx.levels, grad.device, grad.dtype)
            dx = grad * levels[unpack_bits(packed, ctx.bits, grad.numel()).long()].view(grad.shape)
        elif grad is not None:
            dx = gather_unpack(packed, constants(ctx.levels, grad.device), grad, ctx.bits)
        return dx, None, None, None, None, None


class StepActivation(Convertible):
    """A pointwise layer of torch, run as it is, with a step function for its derivative.

    A layer that works in place goes on doing so.

    Attributes:
        layer: the ordinary layer.
        levels: the derivative's values, by index.
        bits: kept for each element.
    """

    def __init__(self, layer: nn.Module, levels: Sequence[float], bits: int) -> None:
        super().__init__()
        self.layer, self.levels, self.bits = layer, tuple(map(float, levels)), bits

    def index(self, x: Tensor) -> Tensor:
        """Index of the step that each element is on, packed."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output, any shape."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.layer(x)
        inplace = bool(getattr(self.layer, "inplace", False))
        return StepDerivative.apply(x, self.layer.forward, self.index, self.levels, self.bits, inplace)[0]
