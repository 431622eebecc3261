"""What `weft.kernels.grouped` runs on CPUs: its loops where they can, and plain torch.

All that the loops take for granted of what they read by address is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import share
from weft.kernels.grouped_reference import grouped_linear_backward_reference, grouped_linear_reference

WHOLE = torch.int64, torch.int32
FAR = 1 << 23  # bytes of gradients that the caches do not hold until they are read


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
def product_cpu(
    x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None, weights: list[Tensor]
) -> Tensor:
    """`grouped_linear_reference`."""
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
def gradients_cpu(
    grad: Tensor, x: Tensor, rows: Tensor | None, sizes: Tensor, bias: Tensor | None, scale: Tensor | None,
    weights: list[Tensor], by_x: bool, by_bias: bool, by_scale: bool, by_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """`grouped_linear_backward_reference`."""
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
