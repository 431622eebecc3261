"""A norm layer's backward pass from its output y = gamma z + beta, with which the layer after it shares what is kept.

Autograd keeps the input; of the output z = (y - beta) / gamma follows, but for features where that would lose digits,
whose z is kept. Source: Y. Yang et al., "Reducing fine-tuning memory overhead by approximate and memory-sharing
backpropagation", 2024, for the norm without an affine part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["SharedNorm", "lossy", "normalised"]

RATIO = 8.0  # of |beta| to |gamma|, above which a feature's z is kept: (y - beta) / gamma loses three bits at most


def normalised(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float | None, centred: bool
) -> tuple[Tensor, Tensor]:
    """Torch's own norm of x, and r ``[rows]`` in float32 (float64 for float64).

    Args:
        x: ``[..., *shape]``.
        shape: normalised together.
        weight, bias: of that shape, or None.
        eps: added to the variance, or to the mean square; None as torch has it.
        centred: LayerNorm, else RMSNorm.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if not centred:
        rows = wide.reshape(-1, math.prod(shape))
        power = torch.linalg.vector_norm(rows, dim=1).square() / rows.shape[1]
        added = torch.finfo(wide.dtype).eps if eps is None else eps
        return F.rms_norm(x, shape, weight, eps), (power + added).rsqrt()
    assert eps is not None  # LayerNorm always has one
    if wide is x:
        y, _, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
    else:  # on CPU the statistics of half types come back rounded to them
        y, scale = F.layer_norm(x, shape, weight, bias, eps), torch.native_layer_norm(wide, shape, None, None, eps)[2]
    return y, scale.reshape(-1)


def lossy(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Indices of the features whose z cannot be had from y = weight z + bias to nearly y's precision; None for none.

    Args:
        weight, bias: of the norm.
        dtype: y's, which may be a half type beside weights in float32.
    """
    small = max(torch.finfo(kind).smallest_normal for kind in (weight.dtype, dtype)) ** 0.5
    found = weight.abs() <= (small if bias is None else bias.abs() / RATIO + small)
    columns = found.reshape(-1).nonzero()[:, 0]
    return columns if len(columns) else None


class SharedNorm(torch.autograd.Function):
    """A norm that keeps its output and r; without a second derivative."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float | None, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """As `normalised`; r is not differentiable."""
        return normalised(x, shape, weight, bias, eps, centred)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, shape, _, centred = inputs
        y, scale = output
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.size, ctx.centred, ctx.dtype = math.prod(shape), centred, x.dtype
        columns = apart = None
        if weight is not None and any(ctx.needs_input_grad[:2]):
            columns = lossy(weight.detach(), None if bias is None else bias.detach(), y.dtype)
            if columns is not None:
                rows = x.detach().reshape(-1, ctx.size)
                picked = rows[:, columns].to(scale.dtype)
                if centred:
                    picked = picked - rows.mean(1, keepdim=True, dtype=scale.dtype)
                apart = (picked * scale[:, None]).to(x.dtype)
        keeps = any(ctx.needs_input_grad[:2])
        ctx.save_for_backward(
            y if keeps else None, scale if ctx.needs_input_grad[0] else None, weight, bias, columns, apart
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        y, scale, weight, bias, columns, apart = ctx.saved_tensors
        found: list[Tensor | None] = [None, None, None]
        if grad is None:
            return (*found, None, None, None)
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        g = grad.reshape(-1, ctx.size).to(wide)
        if ctx.needs_input_grad[2]:
            found[2] = g.sum(0).view(bias.shape).to(bias.dtype)
        if y is not None:
            z = y.reshape(-1, ctx.size).to(wide)
            if weight is not None:
                gamma = weight.reshape(-1).to(wide)
                z = (z if bias is None else z - bias.reshape(-1).to(wide)) / gamma
                if columns is not None:
                    z[:, columns] = apart.to(wide)
                if ctx.needs_input_grad[1]:
                    found[1] = (g * z).sum(0).view(weight.shape).to(weight.dtype)
                g = g * gamma
            if ctx.needs_input_grad[0]:
                dx = torch.addcmul(g, z, (g * z).mean(1, keepdim=True), value=-1)
                if ctx.centred:
                    dx -= g.mean(1, keepdim=True)
                found[0] = dx.mul_(scale[:, None]).view(grad.shape).to(ctx.dtype)
        return (*found, None, None, None)
