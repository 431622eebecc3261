"""Products with a sparse weight and their gradients, in as many multiplications as there are stored weights.

A sparse matrix ``[O, I]`` is kept by rows: row o has the weights ``values[starts[o] : starts[o + 1]]`` in the columns
``columns[...]`` (CSR). With the transposed index, ``values[order]`` is kept by columns in the same way. A filter
``[O, C, *kernel]`` is a matrix whose column is ``(c * kernel[0] + ky) * kernel[1] + kx``.

These operators have no derivative; `weft.sparsity` builds that upon them. Float32 runs in loops of Weft's own on CPUs,
half types through them; float64, and every dtype on other devices, by gathering and adding in plain torch, some
stored weights at a time.

The way to gather sums in registers and 64 samples at a time is this file's own; that forward, input gradient and stored
weights' gradients are three products over the stored weights is M. Nikdan et al., "SparseProp", ICML 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import operations_of, operator, share
from weft.kernels.sparse_reference import (
    Pair,
    conv2d_geometry,
    patches,
    sparse_conv2d_backward_reference,
    sparse_conv2d_reference,
    sparse_linear_backward_reference,
    sparse_linear_reference,
    taps_of,
)

GROUPS = 8  # parts of a batch whose sums for a weight are added at the end, for one thread as for more
LARGEST_SUMS = 1 << 22  # numbers that all parts' sums have together, or else there are two parts


def _unsigned(index: Tensor) -> Any:
    return index.contiguous().numpy().view("uint32")


def _floats(t: Tensor | None) -> Any:
    return (
        torch.empty(0, dtype=torch.float32).numpy() if t is None else t.detach().float().contiguous().view(-1).numpy()
    )


@functools.lru_cache(maxsize=8)
def _counting(size: int) -> Any:
    """0, 1, 2, ... up to a power of two that is at least ``size`` and 16."""
    return _unsigned(torch.arange(max(16, 1 << max(0, size - 1).bit_length()), dtype=torch.int32))


@functools.lru_cache(maxsize=16)
def _layout(shape: tuple[int, ...], padding: Pair, padded: Pair, out: Pair, stride: Pair) -> tuple[Any, Any]:
    """Shifts of output pixels, and the places of an input's features among the padded images of its channels."""
    inner = torch.arange(shape[0] * padded[0] * padded[1], dtype=torch.int32).view(shape[0], *padded)
    inner = inner[:, padding[0] : padding[0] + shape[1], padding[1] : padding[1] + shape[2]]
    return _unsigned(patches(padded, out, list(stride)).int()), _unsigned(inner.flatten())


def _native(x: Tensor) -> bool:
    return x.dtype != torch.float64


def _work(samples: int, per_sample: int) -> int:
    """Elements whose reading costs about as much, for `share`."""
    return max(1, samples * per_sample // 8)


def _check(values: Tensor, starts: Tensor, columns: Tensor) -> None:
    """Loops do not look where they read."""
    count = int(starts[-1]) if starts.numel() else -1
    if not values.shape == columns.shape == (count,):
        raise UsageError(f"{values.numel()} values, {columns.numel()} columns: the rows end at {count}; give as many")


def _check_gradient(grad: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(grad.shape) != shape:
        raise UsageError(f"a gradient {list(grad.shape)} of an output {list(shape)}: give one of that shape")


def _linear_cpu(x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor) -> Tensor:
    if not _native(x):
        return sparse_linear_reference(x, values, bias, starts, columns)
    from weft.kernels.cpu import sparse as loops

    _check(values, starts, columns)
    batch, features = x.shape
    y = x.new_empty(batch, len(starts) - 1, dtype=torch.float32)
    arrays = _floats(values), _floats(bias), _unsigned(starts), _unsigned(columns), _counting(max(features, batch))
    source, out = _floats(x), y.view(-1).numpy()
    unit = _work(loops.WIDEST, len(values) + features + y.shape[1])

    def run(start: int, stop: int) -> None:
        tile, block = _scratch(loops.WIDEST * features), _scratch(loops.WIDEST * loops.LANES)
        part = start // unit * loops.WIDEST, min(batch, stop // unit * loops.WIDEST)
        loops.linear(source, features, *arrays, tile, block, out, *part)

    if y.numel():
        share(run, -(-batch // loops.WIDEST) * unit, unit)
    return y.to(x.dtype)


def _linear_backward_cpu(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, other_starts: Tensor, other_rows: Tensor,
    order: Tensor, of_x: bool, of_values: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    index = starts, columns, other_starts, other_rows, order
    if not _native(x):
        return sparse_linear_backward_reference(grad, x, values, *index, of_x, of_values, of_bias)
    from weft.kernels.cpu import sparse as loops

    _check(values, starts, columns)
    _check(values, other_starts, other_rows)
    if other_starts.shape[0] != x.shape[1] + 1 or order.shape != values.shape:
        raise UsageError(
            f"{other_starts.shape[0]} starts of {x.shape[1]} columns, {order.numel()} places: give D + 1, K"
        )
    _check_gradient(grad, (x.shape[0], starts.shape[0] - 1))
    (batch, features), rows = x.shape, grad.shape[1]
    arrays = _floats(grad), _floats(x), _floats(values), *map(_unsigned, index), _counting(max(rows, features, batch))

    def loop(part: Any, start: int, stop: int) -> None:
        tile = _scratch(loops.WIDEST * (features if of_values else 0))
        above, block = _scratch(loops.WIDEST * rows), _scratch(loops.WIDEST * loops.LANES)
        loops.linear_backward(*arrays, tile, above, block, *part, start, stop)

    sizes = len(values) * of_values, rows * of_bias
    made = _in_groups(loop, x, of_x, sizes, loops.WIDEST, 2 * len(values) + features + rows)
    return made[0], made[1].to(values.dtype), made[2].to(values.dtype)


def _conv2d_cpu(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    if not _native(x):
        return sparse_conv2d_reference(x, values, bias, starts, columns, kernel, stride, padding, dilation)
    from weft.kernels.cpu import sparse as loops

    _check(values, starts, columns)
    taps, shifts, places, image, out = _images(x, columns, kernel, stride, padding, dilation)
    y = x.new_empty(len(x), len(starts) - 1, *out, dtype=torch.float32)
    counting = _counting(max(len(x), loops.LANES))
    arrays = _floats(x), _floats(values), _floats(bias), _unsigned(starts), taps, shifts, places, counting
    target, unit = y.view(-1).numpy(), _work(loops.LANES, len(values) * len(shifts) + len(places))

    def run(start: int, stop: int) -> None:
        tile, block = _scratch(loops.LANES * image, zero=True), _scratch(loops.LANES**2)
        part = start // unit * loops.LANES, min(len(x), stop // unit * loops.LANES)
        loops.conv(*arrays, tile, block, target, *part)

    if y.numel():
        share(run, -(-len(x) // loops.LANES) * unit, unit)
    return y.to(x.dtype)


def _conv2d_backward_cpu(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], of_x: bool, of_values: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    how = kernel, stride, padding, dilation
    if not _native(x):
        return sparse_conv2d_backward_reference(grad, x, values, starts, columns, *how, of_x, of_values, of_bias)
    from weft.kernels.cpu import sparse as loops

    _check(values, starts, columns)
    taps, shifts, places, image, out = _images(x, columns, *how)
    _check_gradient(grad, (x.shape[0], starts.shape[0] - 1, *out))
    counting = _counting(max(len(x), loops.LANES))
    arrays = _floats(grad), _floats(x), _floats(values), _unsigned(starts), taps, shifts, places, counting

    def loop(part: Any, start: int, stop: int) -> None:
        tile = _scratch(loops.LANES * (image if of_values else 0), zero=True)
        below, block = _scratch(loops.LANES * (image if of_x else 0)), _scratch(loops.LANES**2)
        loops.conv_backward(*arrays, tile, below, block, *part, start, stop)

    sizes = len(values) * of_values, grad.shape[1] * of_bias
    made = _in_groups(loop, x, of_x, sizes, loops.LANES, 2 * len(values) * len(shifts) + len(places))
    return made[0], made[1].to(values.dtype), made[2].to(values.dtype)


def _images(
    x: Tensor, columns: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Any, Any, Any, int, Pair]:
    """Taps, shifts and places as the loops take them, the features of a sample with its padding, the output's size."""
    padded, out = conv2d_geometry(tuple(x.shape), kernel, stride, padding, dilation)
    shape, at, step = tuple(map(int, x.shape[1:])), (padding[0], padding[1]), (stride[0], stride[1])
    shifts, places = _layout(shape, at, padded, out, step)
    return _unsigned(taps_of(columns, padded, kernel, dilation)), shifts, places, shape[0] * padded[0] * padded[1], out


def _scratch(size: int, zero: bool = False) -> Any:
    return (torch.zeros if zero else torch.empty)(size, dtype=torch.float32).numpy()


def _in_groups(
    loop: Callable[[Any, int, int], None], x: Tensor, of_x: bool, sizes: Pair, width: int, per_sample: int
) -> list[Tensor]:
    """The input's gradient, and sums over the batch of the given sizes: from a few parts, added in their order.

    The parts are the same for any number of threads, and so is what they add up to.
    """
    batch = len(x)
    tiles = -(-batch // width)
    most = max(2, min(GROUPS, LARGEST_SUMS // max(1, sum(sizes))))
    groups = max(1, min(most, tiles))
    each = -(-tiles // groups) * width
    first = torch.empty(x.shape if of_x and x.numel() else 0, dtype=torch.float32)
    sums = [torch.zeros(groups, size, dtype=torch.float32) for size in sizes]
    unit = _work(each, per_sample)

    def run(start: int, stop: int) -> None:
        for group in range(start // unit, stop // unit):
            part = first.view(-1).numpy(), *(s[group].numpy() for s in sums)
            loop(part, min(batch, group * each), min(batch, group * each + each))

    if batch:
        share(run, groups * unit, unit)
    return [(first.view_as(x) if of_x else first).to(x.dtype), *(s[0] if groups == 1 else s.sum(0) for s in sums)]


# operators


def _linear_fake(x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], starts.shape[0] - 1)


def _conv2d_fake(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    _, out = conv2d_geometry(tuple(x.shape), kernel, stride, padding, dilation)
    return x.new_empty(x.shape[0], starts.shape[0] - 1, *out)


def _backward_fake(grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_x, of_values, of_bias = rest[-3:]
    return (
        x.new_empty(x.shape if of_x else 0),
        values.new_empty(values.shape if of_values else 0),
        values.new_empty(starts.shape[0] - 1 if of_bias else 0),
    )


sparse_linear = operator(
    "sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor starts, Tensor columns) -> Tensor",
    sparse_linear_reference,
    fake=_linear_fake,
    cpu=_linear_cpu,
    cuda=sparse_linear_reference,
)
sparse_linear_backward = operator(
    "sparse_linear_backward(Tensor grad, Tensor x, Tensor values, Tensor starts, Tensor columns, Tensor other_starts,"
    " Tensor other_rows, Tensor order, bool of_x, bool of_values, bool of_bias) -> (Tensor, Tensor, Tensor)",
    sparse_linear_backward_reference,
    fake=_backward_fake,
    cpu=_linear_backward_cpu,
    cuda=sparse_linear_backward_reference,
)
sparse_conv2d = operator(
    "sparse_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor starts, Tensor columns, int[] kernel, int[] stride,"
    " int[] padding, int[] dilation) -> Tensor",
    sparse_conv2d_reference,
    fake=_conv2d_fake,
    cpu=_conv2d_cpu,
    cuda=sparse_conv2d_reference,
)
sparse_conv2d_backward = operator(
    "sparse_conv2d_backward(Tensor grad, Tensor x, Tensor values, Tensor starts, Tensor columns, int[] kernel,"
    " int[] stride, int[] padding, int[] dilation, bool of_x, bool of_values, bool of_bias)"
    " -> (Tensor, Tensor, Tensor)",
    sparse_conv2d_backward_reference,
    fake=_backward_fake,
    cpu=_conv2d_backward_cpu,
    cuda=sparse_conv2d_backward_reference,
)


@operations_of("sparse_linear", "sparse_conv2d")
def _product_flops(x: Any, values: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """A product and a sum for each stored weight, sample and pixel, those on padding included."""
    return int(2 * values[0] * out_shape[0] * math.prod(out_shape[2:]))


@operations_of("sparse_linear_backward", "sparse_conv2d_backward")
def _backward_flops(grad: Any, x: Any, values: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """The same for the input's gradient and for the weights', where they are asked for."""
    asked = int(rest[-3]) + int(rest[-2])
    return int(2 * asked * values[0] * grad[0] * math.prod(grad[2:]))
