"""The nuclear norm of a matrix of which a few entries are trained and the others are zero, as a penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["NuclearNorm"]


class NuclearNorm(torch.autograd.Function):
    """lambda ||P||_*; its value is not computed, its gradient only on the way back."""

    @staticmethod
    def forward(compact: Tensor, index: Tensor, shape: torch.Size, weight: float) -> Tensor:
        return compact.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.shape, ctx.weight = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compact, index = ctx.saved_tensors
        return grad * ctx.weight * nuclear_gradient(compact, index, ctx.shape), None, None, None


def nuclear_gradient(compact: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """U V^T at ``index``, for the matrix ``[shape[0], -1]`` that holds ``compact`` there and zeros elsewhere."""
    kind = torch.promote_types(compact.dtype, torch.float32)
    matrix = torch.zeros(shape, dtype=kind, device=compact.device).put_(index, compact.to(kind)).flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = s > s[:1] * torch.finfo(kind).eps * max(matrix.shape)  # beyond it, vectors are arbitrary
    return ((u * rank) @ v).take(index).to(compact.dtype)
