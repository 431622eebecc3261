"""Linear layers of which each group of rows has its own: one matrix product for each group.

A group has a tensor of its own for a weight: of one tensor for all of them the gradient is often larger than 32 MB, and
memory of that size is mapped anew for each step, page by page. As operators, torch.compile and torch.export take the
loop over groups of unknown sizes for one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.errors import UsageError
from weft.kernels.compiled import operations_of, operator

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor, weights: Sequence[Tensor], sizes: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``[N, O]``: rows of x, sorted by group, times each group's weight, plus its bias.

    Rows are gathered anew in the backward pass, so that x alone is kept. Differentiable once.

    Args:
        x: ``[T, D]``.
        weights: G tensors ``[O, D]`` of x's dtype, of any strides.
        sizes: ``[G]`` int64, rows of each group.
        bias: ``[G, O]``.
        rows: ``[N]``, which rows of x; None for all of them as they are.
        scale: ``[N]``, multiplies the bias alone.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
    """
    first = weights[0] if weights else x
    fits = x.ndim == 2 and sizes.shape == (len(weights),) and bool(weights)
    fits = fits and all(w.ndim == 2 and w.shape == first.shape and w.dtype == x.dtype for w in weights)
    if not fits or first.shape[1] != x.shape[1] or (bias is not None and bias.shape != (len(weights), first.shape[0])):
        found = f"x {tuple(x.shape)} {x.dtype}, {len(weights)} weights like {tuple(first.shape)} {first.dtype}"
        raise UsageError(f"{found}, sizes {tuple(sizes.shape)}: give [T, D], [O, D] for each group, and [G]")
    given = x, rows, sizes, bias, scale
    if torch.compiler.is_compiling() and not _needs_gradient(x, bias, scale, *weights):
        plain: Tensor = _product(*given, list(weights))  # the compiler takes no function of many weights without one
        return plain
    out: Tensor = _GroupedLinear.apply(*given, *weights)
    return out


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, *weights: Tensor
    ) -> Tensor:
        return _product(x, rows, sizes, bias, scale, list(weights))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, rows, sizes, bias, scale, *weights = inputs
        ctx.save_for_backward(x, rows, sizes, bias, scale, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, sizes, bias, scale, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        asked = needs[0], needs[3], needs[4], any(needs[5:])
        found = _gradients(grad, x, rows, sizes, bias, scale, weights, *asked)
        of_x, of_bias, of_scale = (given if by else None for given, by in zip(found[:3], asked[:3], strict=True))
        return of_x, None, None, of_bias, of_scale, *(found[3] or [None] * len(weights))


@torch.no_grad()
def grouped_linear_reference(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """The operator: one matrix product for each group, into its part of the result."""
    x, counts = x if rows is None else x.index_select(0, rows), sizes.tolist()
    if sum(counts) != len(x):
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
    of_scale = grad.new_empty(len(grad) if by_scale else 0)
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
        of_x = torch.zeros_like(x).index_add_(0, rows, of_x)
    return of_x if by_x else x.new_empty(0), of_bias, of_scale, of_weights


def _product_fake(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], weights[0].shape[0])


def _gradients_fake(
    grad: Tensor, x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None,
    weights: list[Tensor], by_x: bool, by_bias: bool, by_scale: bool, by_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return (
        x.new_empty(x.shape) if by_x else x.new_empty(0),
        grad.new_empty(len(weights), grad.shape[1]) if by_bias else grad.new_empty(0),
        grad.new_empty(grad.shape[0] if by_scale else 0),
        [w.new_empty(w.shape) for w in weights] if by_weights else [],
    )


_product = operator(
    "grouped_linear(Tensor x, Tensor? rows, Tensor sizes, Tensor? bias, Tensor? scale, Tensor[] weights) -> Tensor",
    grouped_linear_reference,
    fake=_product_fake,
    cpu=grouped_linear_reference,
    cuda=grouped_linear_reference,
)
_gradients = operator(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor? rows, Tensor sizes, Tensor? bias, Tensor? scale, "
    "Tensor[] weights, bool by_x, bool by_bias, bool by_scale, bool by_weights) -> (Tensor, Tensor, Tensor, Tensor[])",
    grouped_linear_backward_reference,
    fake=_gradients_fake,
    cpu=grouped_linear_backward_reference,
    cuda=grouped_linear_backward_reference,
)


@operations_of("grouped_linear")
def _product_operations(x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, **given: Any) -> int:
    return 2 * (x if rows is None else rows)[0] * weights[0][0] * weights[0][1]


@operations_of("grouped_linear_backward")
def _gradients_operations(grad: Any, x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, by_x: bool,
    by_bias: bool, by_scale: bool, by_weights: bool, **given: Any) -> int:  # fmt: skip
    return 2 * grad[0] * weights[0][0] * weights[0][1] * (by_x + by_weights)
