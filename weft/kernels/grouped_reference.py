"""What `weft.kernels.grouped` computes, in plain torch: one matrix product for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import UsageError


@torch.no_grad()
def grouped_linear_reference(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """The operator: one matrix product for each group, into its part of the result."""
    if any(w.shape != weights[0].shape for w in weights):
        raise UsageError(f"weights {[tuple(w.shape) for w in weights]}: give one shape for all groups")
    x, counts = x if rows is None else x.index_select(0, rows), sizes.tolist()
    if sum(counts) != len(x) or min(counts) < 0:
        raise UsageError(f"groups of {sum(counts)} rows together, but {len(x)} rows")
    out = x.new_empty(len(x), weights[0].shape[0])
    scales = x.new_ones(len(x)) if scale is None else scale
    parts = zip(x.split(counts), out.split(counts), scales.split(counts), weights, strict=True)
    for g, (part, into, factor, weight) in enumerate(parts):
        if not len(part):
            continue
        if bias is None or scale is not None:
            torch.mm(part, weight.t(), out=into)
            if bias is not None:
                into.addcmul_(factor[:, None], bias[g])
        else:
            torch.addmm(bias[g], part, weight.t(), out=into)
    return out


@torch.no_grad()
def grouped_linear_backward_reference(
    grad: Tensor, x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None,
    weights: list[Tensor], by_x: bool, by_bias: bool, by_scale: bool, by_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of x, bias, scale and weights; empty where they are not asked for."""
    taken, counts = x if rows is None else x.index_select(0, rows), sizes.tolist()
    of_x = torch.empty_like(taken, memory_format=torch.contiguous_format) if by_x else taken.new_empty(len(taken), 0)
    of_bias = grad.new_zeros(len(weights), grad.shape[1]) if by_bias else grad.new_empty(0)
    of_scale = grad.new_zeros(len(grad) if by_scale else 0)
    of_weights: list[Tensor] = []
    parts = zip(taken.split(counts), of_x.split(counts), grad.split(counts), weights, strict=True)
    start = 0
    for g, (part, of_part, of_out, weight) in enumerate(parts):
        rest = slice(start, start := start + len(part))
        if by_weights:
            of_weights.append(of_out.t() @ part if len(part) else weight.new_zeros(weight.shape))
        if not len(part):
            continue
        if by_x:
            torch.mm(of_out, weight, out=of_part)
        if by_bias and scale is None:
            torch.sum(of_out, 0, out=of_bias[g])
        elif by_bias and scale is not None:
            torch.mm(scale[None, rest], of_out, out=of_bias[g, None])
        if by_scale and bias is not None:
            torch.mv(of_out, bias[g], out=of_scale[rest])
    if by_x and rows is not None:
        of_x = x.new_zeros(x.shape).index_add_(0, rows, of_x)
    return of_x if by_x else x.new_empty(0), of_bias, of_scale, of_weights
