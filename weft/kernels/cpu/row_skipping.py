"""Products with few rows of a weight, on CPUs: the rows of inputs that are not zero, and the rows that are asked for.

A weight of float32 or of bfloat16 is given as two arrays, of which one is empty; sums are in float32. Indices are
unsigned, or slices: Numba looks at signed ones for negative values, which keeps loops from vector code. The order of
sums depends on the values alone, not on the part of the work that a thread has.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from weft.kernels.compiled import kernel
from weft.kernels.cpu.vectors import as_float, wide

u16, u32, u64, i32, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.float32

CACHED = 1 << 18  # bytes of a weight that are used for all tokens before the next ones are read
NONE, HALF = np.empty(0, f32), np.empty(0, u16)
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT = (u64(n) for n in range(9))


@numba.njit(error_model="numpy")
def chosen(x: Any, begin: Any, end: Any, thresholds: Any, index: Any, values: Any) -> Any:
    """How many of ``x[begin:end]`` are neither zero nor below their thresholds; which, and what they are."""
    count = u64(0)
    if thresholds.size == x.size:
        for j in range(begin, end):
            v = x[j]
            index[count], values[count] = j, v
            count += u64(not np.abs(v) < thresholds[j] and v != f32(0))
    else:
        least = thresholds[0] if thresholds.size else f32(0)
        for j in range(begin, end):
            v = x[j]
            index[count], values[count] = j, v
            count += u64(not np.abs(v) < least and v != f32(0))
    return count


@numba.njit(error_model="numpy")
def row(weight: Any, index: Any, width: Any, start: Any, size: Any) -> Any:
    """``size`` columns of a row of a weight that has ``width`` of them, from ``start`` on."""
    k = index * width + start
    return weight[k : k + size]


@numba.njit(error_model="numpy", fastmath={"contract"})
def add_rows(weight: Any, out: Any, index: Any, values: Any, count: Any, width: Any, start: Any) -> None:
    """``out += sum_k values[k] * weight[index[k]]``, of columns from ``start`` on; eight rows at a time."""
    wide()
    size, whole = u64(out.size), count // EIGHT * EIGHT
    for g in range(u64(0), whole, EIGHT):
        a, b, c, d = values[g], values[g + ONE], values[g + TWO], values[g + THREE]
        e, f, h, i = values[g + FOUR], values[g + FIVE], values[g + SIX], values[g + SEVEN]
        row_a = row(weight, index[g], width, start, size)
        row_b = row(weight, index[g + ONE], width, start, size)
        row_c = row(weight, index[g + TWO], width, start, size)
        row_d = row(weight, index[g + THREE], width, start, size)
        row_e = row(weight, index[g + FOUR], width, start, size)
        row_f = row(weight, index[g + FIVE], width, start, size)
        row_h = row(weight, index[g + SIX], width, start, size)
        row_i = row(weight, index[g + SEVEN], width, start, size)
        for n in range(size):
            low = (a * row_a[n] + b * row_b[n]) + (c * row_c[n] + d * row_d[n])
            out[n] += low + ((e * row_e[n] + f * row_f[n]) + (h * row_h[n] + i * row_i[n]))
    for g in range(whole, count):
        a, row_a = values[g], row(weight, index[g], width, start, size)
        for n in range(size):
            out[n] += a * row_a[n]


@numba.njit(error_model="numpy")
def widened(bits: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return as_float(i32(u32(bits) << u32(16)))


@numba.njit(error_model="numpy", fastmath={"contract"})
def add_half_rows(weight: Any, out: Any, index: Any, values: Any, count: Any, width: Any, start: Any) -> None:
    """`add_rows` of a weight in bfloat16, four rows at a time."""
    wide()
    size, whole = u64(out.size), count // FOUR * FOUR
    for g in range(u64(0), whole, FOUR):
        a, b, c, d = values[g], values[g + ONE], values[g + TWO], values[g + THREE]
        row_a = row(weight, index[g], width, start, size)
        row_b = row(weight, index[g + ONE], width, start, size)
        row_c = row(weight, index[g + TWO], width, start, size)
        row_d = row(weight, index[g + THREE], width, start, size)
        for n in range(size):
            low = a * widened(row_a[n]) + b * widened(row_b[n])
            out[n] += low + (c * widened(row_c[n]) + d * widened(row_d[n]))
    for g in range(whole, count):
        a, row_a = values[g], row(weight, index[g], width, start, size)
        for n in range(size):
            out[n] += a * widened(row_a[n])


@kernel(
    "void(float32[:, ::1], float32[::1], float32[::1], uint16[::1], float32[:, ::1], uint64[::1], float32[::1],"
    "uint64, uint64, uint64)",
    fastmath={"contract"},
)
def skip_rows(
    x: Any, thresholds: Any, full: Any, half: Any, out: Any, index: Any, values: Any, start: Any, stop: Any, block: Any
) -> None:
    """Adds ``x @ weight`` to columns ``start .. stop`` of ``out``; ``block`` rows are used for all tokens in turn."""
    wide()
    tokens, inputs, width = u64(x.shape[0]), u64(x.shape[1]), u64(out.shape[1])
    for begin in range(u64(0), inputs, block):
        end = min(begin + block, inputs)
        for t in range(tokens):
            count = chosen(x[t], begin, end, thresholds, index, values)
            if full.size:
                add_rows(full, out[t, start:stop], index, values, count, width, start)
            else:
                add_half_rows(half, out[t, start:stop], index, values, count, width, start)


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def dots(weight: Any, x: Any, index: Any, at: Any, found: Any) -> None:
    """``found[:4] = weight[index[at : at + 4]] @ x``; each sum is taken in the same order, whichever its place."""
    wide()
    size = u64(x.size)
    a, b, c, d = f32(0), f32(0), f32(0), f32(0)
    row_a = row(weight, index[at], size, ZERO, size)
    row_b = row(weight, index[at + ONE], size, ZERO, size)
    row_c = row(weight, index[at + TWO], size, ZERO, size)
    row_d = row(weight, index[at + THREE], size, ZERO, size)
    for n in range(size):
        v = x[n]
        a += v * row_a[n]
        b += v * row_b[n]
        c += v * row_c[n]
        d += v * row_d[n]
    found[0], found[1], found[2], found[3] = a, b, c, d


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def half_dots(weight: Any, x: Any, index: Any, at: Any, found: Any) -> None:
    """`dots` of a weight in bfloat16."""
    wide()
    size = u64(x.size)
    a, b, c, d = f32(0), f32(0), f32(0), f32(0)
    row_a = row(weight, index[at], size, ZERO, size)
    row_b = row(weight, index[at + ONE], size, ZERO, size)
    row_c = row(weight, index[at + TWO], size, ZERO, size)
    row_d = row(weight, index[at + THREE], size, ZERO, size)
    for n in range(size):
        v = x[n]
        a += v * widened(row_a[n])
        b += v * widened(row_b[n])
        c += v * widened(row_c[n])
        d += v * widened(row_d[n])
    found[0], found[1], found[2], found[3] = a, b, c, d


@kernel(
    "void(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1], uint16[::1], float32[::1], float32[:, ::1],"
    "uint64[::1], float32[::1], uint64, uint64, uint64)",
    fastmath={"contract", "reassoc", "nsz"},
)
def wanted_rows(
    x: Any, gate: Any, thresholds: Any, full: Any, half: Any, bias: Any, out: Any, index: Any, values: Any,
    start: Any, stop: Any, block: Any,
) -> None:  # fmt: skip
    """Columns ``start .. stop`` of ``gate * (x @ weight.T + bias)`` where the gate reaches its threshold, of zeros."""
    wide()
    found = np.empty(4, f32)
    for begin in range(start, stop, block):
        end = min(begin + block, stop)
        for t in range(u64(x.shape[0])):
            count = chosen(gate[t], begin, end, thresholds, index, values)
            if count:
                for k in range(count, count + FOUR):
                    index[k] = index[count - ONE]  # sums of four rows always
            for g in range(u64(0), count, FOUR):
                if full.size:
                    dots(full, x[t], index, g, found)
                else:
                    half_dots(half, x[t], index, g, found)
                for k in range(min(FOUR, count - g)):
                    j = index[g + k]
                    out[t, j] = values[g + k] * (found[k] + bias[j] if bias.size else found[k])


def weight_of(tensor: Tensor) -> tuple[Any, Any]:
    """A weight's memory as float32 and as uint16, of which one is empty."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.float32:
        return flat.numpy(), HALF
    return NONE, flat.view(torch.uint16).numpy()


def floats(tensor: Tensor | None) -> Any:
    """A tensor as an array of float32; without one, an empty array."""
    return NONE if tensor is None else tensor.detach().float().contiguous().numpy()


def scratch(size: int) -> tuple[Any, Any]:
    """Room for the indices and values of a token; each thread needs its own."""
    return np.empty(size + 4, u64), np.empty(size + 4, f32)
