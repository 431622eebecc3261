"""Products with few rows of a weight, on CPUs: the rows of inputs that are not zero, and the rows that are asked for.

What the loops read and write is given as addresses, for a call with arrays costs as much as reading many rows; 0: there
is none. Sums are in float32. Indices are unsigned, or slices: Numba looks at signed ones for negative values, which
keeps loops from vector code. The order of sums depends on the values alone, not on the part of the work that a thread
has.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.core.types.misc import CPointer
from numba.extending import intrinsic

from weft.kernels.compiled import kernel
from weft.kernels.cpu.vectors import as_float, wide

u16, u32, u64, i32, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.float32

CACHED = 1 << 18  # bytes of a weight that are used for all tokens before the next ones are read
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT = (u64(n) for n in range(9))


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, at: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return CPointer(kind)(types.uint64), code

    return pointer


floats, halves = _pointer(types.float32), _pointer(types.uint16)  # to what an address names


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
    "void(uint64, uint64, uint64, uint64, boolean, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64)",
    fastmath={"contract"},
)
def skip_rows(
    x: Any, thresholds: Any, limits: Any, weight: Any, half: Any, bias: Any, out: Any, tokens: Any, inputs: Any,
    width: Any, start: Any, stop: Any, block: Any,
) -> None:  # fmt: skip
    """Columns ``start .. stop`` of ``x @ weight + bias``; ``block`` rows are used for all tokens in turn.

    There are ``limits`` thresholds: 0, 1 or one for each input.
    """
    wide()
    given, into = numba.carray(floats(x), (tokens, inputs)), numba.carray(floats(out), (tokens, width))
    least, added = numba.carray(floats(thresholds), limits), numba.carray(floats(bias), width)
    full, halved = numba.carray(floats(weight), inputs * width), numba.carray(halves(weight), inputs * width)
    index, values = np.empty(inputs, u64), np.empty(inputs, f32)
    for t in range(tokens):
        for n in range(start, stop):
            into[t, n] = added[n] if bias else f32(0)
    for begin in range(u64(0), inputs, block):
        end = min(begin + block, inputs)
        for t in range(tokens):
            count = chosen(given[t], begin, end, least, index, values)
            if half:
                add_half_rows(halved, into[t, start:stop], index, values, count, width, start)
            else:
                add_rows(full, into[t, start:stop], index, values, count, width, start)


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
    "void(uint64, uint64, uint64, uint64, uint64, boolean, uint64, uint64, uint64, uint64, uint64, uint64, uint64,"
    "uint64)",
    fastmath={"contract", "reassoc", "nsz"},
)
def wanted_rows(
    x: Any, gate: Any, thresholds: Any, limits: Any, weight: Any, half: Any, bias: Any, out: Any, tokens: Any,
    outputs: Any, width: Any, start: Any, stop: Any, block: Any,
) -> None:  # fmt: skip
    """Columns ``start .. stop`` of ``gate * (x @ weight.T + bias)`` where the gate reaches its threshold, else 0."""
    wide()
    given, gates = numba.carray(floats(x), (tokens, width)), numba.carray(floats(gate), (tokens, outputs))
    into, least = numba.carray(floats(out), (tokens, outputs)), numba.carray(floats(thresholds), limits)
    full, halved = numba.carray(floats(weight), outputs * width), numba.carray(halves(weight), outputs * width)
    added = numba.carray(floats(bias), outputs)
    index, values, found = np.empty(outputs + FOUR, u64), np.empty(outputs + FOUR, f32), np.empty(4, f32)
    for t in range(tokens):
        for n in range(start, stop):
            into[t, n] = f32(0)
    for begin in range(start, stop, block):
        end = min(begin + block, stop)
        for t in range(tokens):
            count = chosen(gates[t], begin, end, least, index, values)
            if count:
                for k in range(count, count + FOUR):
                    index[k] = index[count - ONE]  # sums of four rows always
            for g in range(u64(0), count, FOUR):
                if half:
                    half_dots(halved, given[t], index, g, found)
                else:
                    dots(full, given[t], index, g, found)
                for k in range(min(FOUR, count - g)):
                    j = index[g + k]
                    into[t, j] = values[g + k] * (found[k] + added[j] if bias else found[k])
