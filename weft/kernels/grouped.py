"""Linear layers of which each group of rows has its own: one matrix product for each group.

A group has a tensor of its own for a weight: of one tensor for all of them the gradient is often larger than 32 MB, and
memory of that size is mapped anew for each step, page by page. As operators, torch.compile and torch.export take the
loop over groups of unknown sizes for one step. On CPUs with vectors of 512 bits float32 products are loops of this
library, which take few rows and a weight that is not in the caches at the speed of a large product; elsewhere, and in
other dtypes, each group is a product of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import operations_of, operator
from weft.kernels.grouped_loops import WHOLE, gradients_cpu, product_cpu
from weft.kernels.grouped_reference import grouped_linear_backward_reference, grouped_linear_reference

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor, weights: Sequence[Tensor], sizes: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``[N, O]``: rows of x, sorted by group, times each group's weight, plus its bias.

    Rows are gathered anew in the backward pass, so that x alone is kept. Compiled code has no forward mode, and refuses
    `torch.func.grad`.

    Args:
        x: ``[T, D]``.
        weights: G tensors ``[O, D]`` of x's dtype, of any strides.
        sizes: ``[G]`` int64, rows of each group.
        bias: ``[G, O]``.
        rows: ``[N]`` int64 or int32, which rows of x; None for all of them as they are.
        scale: ``[N]``, multiplies the bias alone.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
        IndexError: for rows that x does not have.
    """
    first = weights[0] if weights else x
    fits = x.ndim == 2 and sizes.shape == (len(weights),) and bool(weights) and sizes.dtype == torch.int64
    fits = fits and all(w.ndim == 2 and w.shape == first.shape and w.dtype == x.dtype for w in weights)
    if not fits or first.shape[1] != x.shape[1] or (bias is not None and bias.shape != (len(weights), first.shape[0])):
        found = f"x {tuple(x.shape)} {x.dtype}, {len(weights)} weights like {tuple(first.shape)} {first.dtype}"
        raise UsageError(f"{found}, sizes {tuple(sizes.shape)}: give [T, D], [O, D] for each group, and int64 [G]")
    count = (x if rows is None else rows).shape[0]
    if rows is not None and (rows.ndim != 1 or rows.dtype not in WHOLE):
        raise UsageError(f"rows {tuple(rows.shape)} {rows.dtype}: give int64 [N]")
    if scale is not None and scale.shape != (count,):
        raise UsageError(f"scale {tuple(scale.shape)}: give one number for each of {count} rows")
    if any(t is not None and t.dtype != x.dtype for t in (bias, scale)):
        raise UsageError(f"bias and scale: give them as {x.dtype}, which x has")
    if len({t.device for t in (x, sizes, rows, bias, scale, *weights) if t is not None}) > 1:
        raise UsageError(f"x is on {x.device}: give all tensors there")
    if torch.compiler.is_compiling():  # which takes no function of many tensors without a gradient, nor one with a jvp
        plain: Tensor = _product(x, rows, sizes, bias, scale, list(weights))
        return plain
    out: Tensor = _GroupedLinear.apply(x, rows, sizes, bias, scale, *weights)
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, *weights: Tensor
    ) -> Tensor:
        return _product(x, rows, sizes, bias, scale, list(weights))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        found = _found(ctx, grad, (needs[0], needs[3], needs[4], any(needs[5:])))
        none: list[Tensor | None] = [None] * len(needs[5:])
        return found[0], None, None, found[1], found[2], *(found[3] or none)

    @staticmethod
    def jvp(ctx: Any, by_x: Tensor | None, *moved: Tensor | None) -> Tensor:
        x, rows, sizes, bias, scale, *weights = ctx.saved_tensors
        (_, _, by_bias, by_scale), by_weights = moved[:4], moved[4:]
        parts = list[Tensor]() if by_x is None else [grouped_linear(by_x, weights, sizes, rows=rows)]
        if any(w is not None for w in by_weights):
            pairs = zip(by_weights, weights, strict=True)
            changed = [torch.zeros_like(w) if by is None else by for by, w in pairs]
            parts.append(grouped_linear(x, changed, sizes, rows=rows))
        if by_bias is not None:
            each = by_bias.repeat_interleave(sizes, 0)
            parts.append(each if scale is None else scale[:, None] * each)
        if by_scale is not None and bias is not None:
            parts.append(by_scale[:, None] * bias.repeat_interleave(sizes, 0))
        return torch.stack(parts).sum(0) if parts else x.new_zeros(len(x if rows is None else rows), len(weights[0]))


def _found(
    ctx: Any, grad: Tensor, asked: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | None]:
    """Gradients of x, bias, scale and weights, as far as they are asked for."""
    x, rows, sizes, bias, scale, *weights = ctx.saved_tensors
    made = _again if torch.is_grad_enabled() else _gradients  # or nothing differentiates them again
    of_x, of_bias, of_scale, of_weights = made(grad, x, rows, sizes, bias, scale, weights, *asked)
    by_x, by_bias, by_scale, by_weights = asked
    return (
        of_x if by_x else None, of_bias if by_bias else None, of_scale if by_scale else None,
        of_weights if by_weights else None,
    )  # fmt: skip


def _again(
    grad: Tensor, x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None,
    weights: list[Tensor], *_: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:  # fmt: skip
    """`_gradients` by what can be differentiated again."""
    taken, counts = x if rows is None else x.index_select(0, rows), sizes.tolist()
    group = torch.arange(len(weights), device=x.device).repeat_interleave(sizes)
    of_x = grouped_linear(grad, [w.t() for w in weights], sizes)
    if rows is not None:
        of_x = x.new_zeros(x.shape).index_add(0, rows, of_x)
    each = grad if scale is None else scale[:, None] * grad
    of_bias = None if bias is None else bias.new_zeros(bias.shape).index_add(0, group, each)
    of_scale = grad.new_zeros(len(grad)) if bias is None else (grad * bias[group]).sum(1)
    pairs = zip(grad.split(counts), taken.split(counts), strict=True)
    return of_x, of_bias, of_scale, [g.t() @ t for g, t in pairs]


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *given, weights = inputs
    ctx.save_for_backward(*given, *weights)


def _registered(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    of_x, of_bias, of_scale, of_weights = _found(ctx, grad, (needs[0], needs[3], needs[4], any(needs[5])))
    return of_x, None, None, of_bias, of_scale, of_weights or [None] * len(needs[5])


_product = operator(
    "grouped_linear(Tensor x, Tensor? rows, Tensor sizes, Tensor? bias, Tensor? scale, Tensor[] weights) -> Tensor",
    grouped_linear_reference,
    fake=_product_fake,
    cpu=product_cpu,
    cuda=grouped_linear_reference,
    derivative=(_keep, _registered),
)
_gradients = operator(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor? rows, Tensor sizes, Tensor? bias, Tensor? scale, "
    "Tensor[] weights, bool by_x, bool by_bias, bool by_scale, bool by_weights) -> (Tensor, Tensor, Tensor, Tensor[])",
    grouped_linear_backward_reference,
    fake=_gradients_fake,
    cpu=gradients_cpu,
    cuda=grouped_linear_backward_reference,
)


@operations_of("grouped_linear")
def _product_operations(x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, **given: Any) -> int:
    return 2 * (x if rows is None else rows)[0] * weights[0][0] * weights[0][1]


@operations_of("grouped_linear_backward")
def _gradients_operations(grad: Any, x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, by_x: bool,
    by_bias: bool, by_scale: bool, by_weights: bool, **given: Any) -> int:  # fmt: skip
    return 2 * grad[0] * weights[0][0] * weights[0][1] * (by_x + by_weights)
