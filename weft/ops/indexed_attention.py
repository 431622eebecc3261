"""Softmax attention over given keys for each query, of which the weights of these keys alone are kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IndexedAttention"]

BLOCK = 256  # queries at a time


class IndexedAttention(torch.autograd.Function):
    """``(q [B, H, T, d], k [B, H, S, d], v [B, H, S, e], index [B, H, T, l], causal, ignore [B, S] or None)``.

    Gives the output ``[B, H, T, e]`` and the weights ``[B, H, T, l]``, which have no derivative. A query's indices are
    distinct; those after its own place where causal, and those that are ignored, get no weight. Products are computed
    for a block of queries and all keys.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, causal: bool, ignore: Any) -> tuple[Tensor, Tensor]:
        outs, weights, scale = [], [], q.shape[-1] ** -0.5
        for start in range(0, q.shape[-2], BLOCK):
            part, at = q[..., start : start + BLOCK, :], index[..., start : start + BLOCK, :].long()
            logits = (scale * part @ k.mT).gather(-1, at)
            if causal:
                row = torch.arange(start, start + part.shape[-2], device=q.device)[:, None]
                logits = logits.masked_fill(at > row, -math.inf)
            if ignore is not None:
                logits = logits.masked_fill(ignore[:, None, None].expand(*at.shape[:-1], -1).gather(-1, at), -math.inf)
            weights.append(logits.softmax(-1).to(q.dtype))
            outs.append(_spread(weights[-1], at, k.shape[-2]) @ v)
        if not outs:
            return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(index.shape)
        return torch.cat(outs, -2), torch.cat(weights, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, index, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, index, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, index, p = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        dq, dk, dv, scale = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), q.shape[-1] ** -0.5
        for start in range(0, q.shape[-2], BLOCK):
            rows = (..., slice(start, start + BLOCK), slice(None))
            at, weights, g = index[rows].long(), p[rows], grad[rows]
            dp = (g @ v.mT).gather(-1, at)
            da = scale * weights * (dp - (weights * dp).sum(-1, keepdim=True))
            da = _spread(da, at, k.shape[-2])
            dq[rows] = da @ k
            dk += da.mT @ q[rows]
            dv += _spread(weights, at, k.shape[-2]).mT @ g
        return dq, dk, dv, None, None, None


def _spread(values: Tensor, at: Tensor, size: int) -> Tensor:
    return values.new_zeros(*values.shape[:-1], size).scatter_(-1, at, values)
