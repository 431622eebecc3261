"""Linear layers of which each group of rows has its own: one matrix product for each group.

A group has a tensor of its own for a weight: of one tensor for all of them the gradient is often larger than 32 MB, and
memory of that size is mapped anew for each step, page by page. As operators, torch.compile and torch.export take the
loop over groups of unknown sizes for one step. On CPUs with vectors of 512 bits float32 products are loops of this
library, which take few rows and a weight that is not in the caches at the speed of a large product; elsewhere, and in
other dtypes, each group is a product of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import operations_of, operator, share
from weft.kernels.grouped_reference import grouped_linear_backward_reference, grouped_linear_reference

__all__ = ["grouped_linear"]

WHOLE = torch.int64, torch.int32
FAR = 1 << 23  # bytes of gradients that the caches do not hold until they are read


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


def _native(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> bool:
    """Whether the loops take these: float32, weights with whole rows, the same distance apart."""
    from weft.kernels.cpu.simd import has

    (o, d), stride = weights[0].shape, weights[0].stride()
    alike = all(w.stride() == stride and w.shape == (o, d) for w in weights) and stride[1] == 1 and d * o > 0
    floats = (t is None or t.dtype == torch.float32 for t in (x, bias, scale, *weights))
    shapes = x.ndim == 2 and x.shape[1] == d and sizes.shape == (len(weights),) and sizes.dtype == torch.int64
    shapes = shapes and (rows is None or (rows.ndim == 1 and rows.dtype in WHOLE))
    shapes = shapes and (bias is None or bias.shape == (len(weights), o))
    return alike and shapes and all(floats) and has("avx512f")


def _starts(
    x: Tensor, rows: Tensor | None, sizes: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Where groups begin and end ``[G + 1]``, rows and scale as the loops read them, and how many rows there are."""
    starts = torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    count, found = len(x) if rows is None else len(rows), int(starts[-1])
    if found != count or int(sizes.min()) < 0 or int(sizes.max()) > count:  # a sum of large ones may wrap
        raise UsageError(f"groups of {found} rows together, but {count} rows")
    if scale is not None and scale.shape != (count,):
        raise UsageError(f"scale {tuple(scale.shape)} for {count} rows: give one number for each")
    if rows is not None and count:
        rows = rows.long().contiguous()
        least, most = (int(n) for n in torch.aminmax(rows))
        if least < 0 or most >= len(x):
            raise IndexError(f"rows from {least} to {most} of {len(x)}: give 0 to {len(x) - 1}")
    return starts, rows, None if scale is None else scale.contiguous(), count


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(loop: Any, kind: Any, given: tuple[Any, ...], first: int, last: int, memory: int) -> None:
    loop(kind, first, last, *given, memory)


def _in_parts(run: Any, groups: int, work: int) -> None:
    """Calls ``run(first, last)`` on parts of the groups, which take ``work`` products of vectors together."""
    unit = max(1, work // groups)
    share(lambda start, stop: run(start // unit, stop // unit), groups * unit, unit)


def _in_memory(run: Any, groups: int, work: int) -> None:
    """The same with an address of memory for the loop."""
    from weft.kernels.cpu import grouped as loops

    def held(first: int, last: int) -> None:
        memory = torch.empty(loops.MEMORY + 64, dtype=torch.uint8, device="cpu")
        run(first, last, memory.data_ptr() + -memory.data_ptr() % 64)

    _in_parts(held, groups, work)


@torch.no_grad()
def _product_cpu(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    if not _native(x, rows, sizes, bias, scale, weights):
        return grouped_linear_reference(x, rows, sizes, bias, scale, weights)
    from weft.kernels.cpu import grouped as loops

    x = x if x.stride(1) == 1 else x.contiguous()
    starts, rows, scale, count = _starts(x, rows, sizes, scale)
    (o, d), groups = weights[0].shape, len(weights)
    out, addresses = x.new_empty(count, o), _addresses(weights)
    if bias is not None:
        bias = bias.contiguous()
        begin = starts.data_ptr(), bias.data_ptr(), _address(scale), out.data_ptr(), 4 * o, o
        _in_parts(lambda first, last: loops.biases(first, last, *begin), groups, count * o // 16)
    left = starts.data_ptr(), _address(rows), x.data_ptr(), 4 * x.stride(0), out.data_ptr(), 4 * o, 0, 0
    right = addresses.data_ptr(), 4 * weights[0].stride(0), 0, d, o, bias is not None, False
    work = count * d * o // 16
    _in_memory(partial(_run, loops.products, loops.FORWARD, (*left, *right)), groups, work)
    return out


@torch.no_grad()
def _gradients_cpu(
    grad: Tensor, x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None,
    weights: list[Tensor], by_x: bool, by_bias: bool, by_scale: bool, by_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    if not _native(x, rows, sizes, bias, scale, weights) or grad.dtype != x.dtype or grad.ndim != 2:
        asked = by_x, by_bias, by_scale, by_weights
        return grouped_linear_backward_reference(grad, x, rows, sizes, bias, scale, weights, *asked)
    from weft.kernels.cpu import grouped as loops

    shape, source = x.shape, x
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x, grad))
    starts, rows, scale, count = _starts(x, rows, sizes, scale)
    (o, d), groups, held = weights[0].shape, len(weights), _addresses(weights)
    if grad.shape != (count, o):
        raise UsageError(f"a gradient {tuple(grad.shape)}: give ({count}, {o})")
    z, of_weights = x.new_empty(count, d) if by_x else x.new_empty(0), list[Tensor]()
    if by_weights:
        made_for = zip(weights, sizes.tolist(), strict=True)
        of_weights = [w.new_empty(w.shape) if n else w.new_zeros(w.shape) for w, n in made_for]
    made = _addresses(of_weights) if by_weights else held
    past = groups * o * d * 4 >= FAR and d % 16 == 0 and not int((made % 64).any())
    left = starts.data_ptr(), _address(rows), x.data_ptr(), 4 * x.stride(0), grad.data_ptr(), 4 * grad.stride(0)
    right = z.data_ptr(), 4 * d, held.data_ptr(), 4 * weights[0].stride(0), made.data_ptr(), d, o, False, past
    for kind in (*[loops.OF_INPUT] * by_x, *[loops.OF_WEIGHT] * by_weights):
        _in_memory(partial(_run, loops.products, kind, (*left, *right)), groups, count * d * o // 16)
    of_bias = grad.new_zeros(groups, o) if by_bias else grad.new_empty(0)
    of_scale = grad.new_zeros(count) if by_scale else grad.new_empty(0)
    if by_bias or (by_scale and bias is not None):
        bias = None if bias is None else bias.contiguous()
        given = starts.data_ptr(), _address(bias), _address(scale), grad.data_ptr(), 4 * grad.stride(0), o
        into = of_bias.data_ptr() if by_bias else 0, of_scale.data_ptr() if by_scale and bias is not None else 0
        _in_parts(lambda first, last: loops.of_biases(first, last, *given, *into), groups, count * o // 16)
    if by_x and rows is not None:
        z = source.new_zeros(shape).index_add_(0, rows, z)
    return z if by_x else x.new_empty(0), of_bias, of_scale, of_weights


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
    cpu=_product_cpu,
    cuda=grouped_linear_reference,
    derivative=(_keep, _registered),
)
_gradients = operator(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor? rows, Tensor sizes, Tensor? bias, Tensor? scale, "
    "Tensor[] weights, bool by_x, bool by_bias, bool by_scale, bool by_weights) -> (Tensor, Tensor, Tensor, Tensor[])",
    grouped_linear_backward_reference,
    fake=_gradients_fake,
    cpu=_gradients_cpu,
    cuda=grouped_linear_backward_reference,
)


@operations_of("grouped_linear")
def _product_operations(x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, **given: Any) -> int:
    return 2 * (x if rows is None else rows)[0] * weights[0][0] * weights[0][1]


@operations_of("grouped_linear_backward")
def _gradients_operations(grad: Any, x: Any, rows: Any, sizes: Any, bias: Any, scale: Any, weights: Any, by_x: bool,
    by_bias: bool, by_scale: bool, by_weights: bool, **given: Any) -> int:  # fmt: skip
    return 2 * grad[0] * weights[0][0] * weights[0][1] * (by_x + by_weights)
