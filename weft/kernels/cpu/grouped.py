"""Matrix products of groups of few rows on CPUs with vectors of 512 bits: C += A B, six rows by 64 columns at a time.

Such a tile of C stays in registers for the whole depth of the product. 64 columns of B lie side by side in a panel that
stays in the second cache while all rows of A pass it; an element of A is read where it is and spread over a vector, so
that rows can be taken from anywhere, and a transposed A costs nothing. A group's weight is cold: while one panel is
multiplied, the weight's part that the next is made of is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types

from weft.kernels.compiled import kernel
from weft.kernels.cpu.simd import (
    F32,
    FLOATS,
    I32,
    I64,
    LANES,
    asked,
    call,
    fma,
    load,
    mul,
    one_at,
    operation,
    pointer,
    put_one,
    put_word,
    splat,
    spread,
    store,
    total,
    u64,
    word_at,
)

U, f32 = np.uint64, np.float32

ROWS, WIDEST = 6, 64  # of a tile
DEPTH = 1024  # rows of a panel at most: 256 kB
FORWARD, OF_INPUT, OF_WEIGHT = U(0), U(1), U(2)  # y = x W', g W, g' x

FLOAT, WORD, LINE, ONE, FOUR, SIX, SIXTEEN = U(4), U(8), U(64), U(1), U(4), U(6), U(16)

# A tile's table of words: six addresses of A's rows, six of C's, then these.
STEP, PANEL, AHEAD, AHEAD_STEP, ADDED, PAST = (2 * ROWS + i for i in range(6))
TABLE, DUMP, EDGE, START = (U(n) for n in (0, 256, 512, 512 + ROWS * WIDEST * 4))  # of a thread's memory, in bytes
MEMORY = int(START) + DEPTH * WIDEST * 4


def tile(width: int) -> Callable[..., Any]:
    """Six rows of A times a panel of ``width`` vectors, to six rows of C, where it is added if the table says so."""

    def emit(builder: Any, table: Any, depth: Any) -> None:
        def entry(i: int) -> Any:
            return builder.load(pointer(builder, builder.add(table, I64(8 * i)), I64))

        def vector(at: Any, j: int) -> Any:
            return pointer(builder, builder.add(at, I64(64 * j)), FLOATS)

        cells = [(i, j) for i in range(ROWS) for j in range(width)]
        a, c = ([entry(first + i) for i in range(ROWS)] for first in (0, ROWS))
        step, panel, ahead, ahead_step = (entry(i) for i in (STEP, PANEL, AHEAD, AHEAD_STEP))
        added, past = (builder.icmp_unsigned("!=", entry(i), I64(0)) for i in (ADDED, PAST))
        before, begun = builder.block, builder.append_basic_block()
        loop, after, ordinary, streamed, end = (builder.append_basic_block() for _ in range(5))
        builder.cbranch(added, begun, loop)
        builder.position_at_end(begun)
        old = [builder.load(vector(c[i], j), align=4) for i, j in cells]
        builder.branch(loop)

        builder.position_at_end(loop)
        counters = [builder.phi(I64) for _ in range(4)]
        sums = [builder.phi(FLOATS) for _ in cells]
        _, along, at, wanted = counters
        asked(builder, wanted)
        part = [builder.load(vector(at, j), align=64) for j in range(width)]
        new = []
        for i in range(ROWS):
            element = builder.load(pointer(builder, builder.add(a[i], along), F32), align=4)
            factor = spread(builder, element, FLOATS)
            for j, value in enumerate(part):
                new.append(call(builder, "llvm.fma.v16f32", FLOATS, factor, value, sums[i * width + j]))
        steps = I64(1), step, I64(64 * width), ahead_step
        following = [builder.add(one, by) for one, by in zip(counters, steps, strict=True)]
        starts = I64(0), I64(0), panel, ahead
        for phi, first, then in zip(counters, starts, following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(first, begun)
            phi.add_incoming(then, loop)
        for phi, first, then in zip(sums, old, new, strict=True):
            phi.add_incoming(ir.Constant(FLOATS, None), before)
            phi.add_incoming(first, begun)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_unsigned("<", following[0], depth), loop, after)

        builder.position_at_end(after)
        builder.cbranch(past, streamed, ordinary)
        builder.position_at_end(ordinary)
        for value, (i, j) in zip(new, cells, strict=True):
            builder.store(value, vector(c[i], j), align=4)
        builder.branch(end)
        builder.position_at_end(streamed)
        once = builder.module.add_metadata([ir.Constant(I32, 1)])
        for value, (i, j) in zip(new, cells, strict=True):
            builder.store(value, vector(c[i], j), align=64).set_metadata("nontemporal", once)
        builder.branch(end)
        builder.position_at_end(end)

    emit.__name__ = f"tile{width}"
    return operation(types.void, u64, u64)(emit)


tile4, tile2 = tile(4), tile(2)


@operation(types.void, u64, u64, u64, u64)
def turn(builder: Any, at: Any, stride: Any, to: Any, step: Any) -> None:
    """Sixteen floats of sixteen rows, ``stride`` bytes apart, as sixteen columns, ``step`` bytes apart."""
    rows = []
    for i in range(LANES):
        rows.append(builder.load(pointer(builder, builder.add(at, builder.mul(stride, I64(i))), FLOATS), align=4))
    distance = LANES // 2
    while distance:
        for i in range(LANES):
            if not i & distance:
                low = [k + LANES - distance if k & distance else k for k in range(LANES)]
                high = [k + LANES if k & distance else k + distance for k in range(LANES)]
                pair = rows[i], rows[i | distance]
                rows[i], rows[i | distance] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, LANES), mask)) for mask in (low, high)
                )
        distance //= 2
    for i in range(LANES):
        builder.store(rows[i], pointer(builder, builder.add(to, builder.mul(step, I64(i))), FLOATS), align=64)


@numba.njit(error_model="numpy")
def row_of(index: Any, i: Any) -> Any:
    """Which row of x is the i-th."""
    return i if index == U(0) else word_at(index + WORD * i)


@numba.njit(error_model="numpy")
def columns_of(w: Any, stride: Any, rows: Any, depth: Any, to: Any, step: Any) -> None:
    """A panel of a weight's rows: ``to[k, i] = w[i, k]``, zeros from the last row on to the panel's end."""
    whole = depth & ~U(15)
    for i in range(U(0), step // FLOAT, SIXTEEN):
        done = U(0)
        if i + SIXTEEN <= rows:
            done = whole
            for k in range(U(0), whole, SIXTEEN):
                turn(w + stride * i + FLOAT * k, stride, to + FLOAT * i + step * k, step)
        for n in range(i, i + SIXTEEN):
            for k in range(done, depth):
                put_one(to + FLOAT * n + step * k, one_at(w + stride * n + FLOAT * k) if n < rows else f32(0))


@numba.njit(error_model="numpy")
def row_to(x: Any, columns: Any, to: Any, step: Any) -> None:
    """A panel's row: ``columns`` floats and zeros."""
    for i in range(U(0), step // FLOAT, SIXTEEN):
        if i + SIXTEEN <= columns:
            store(to + FLOAT * i, load(x + FLOAT * i))
        else:
            for n in range(i, i + SIXTEEN):
                put_one(to + FLOAT * n, one_at(x + FLOAT * n) if n < columns else f32(0))


@kernel("void(" + ", ".join(["uint64"] * 19) + ")")
def products(
    kind: Any, first: Any, last: Any, starts: Any, index: Any, x: Any, x_row: Any, y: Any, y_row: Any, z: Any,
    z_row: Any, weights: Any, w_row: Any, gradients: Any, d: Any, o: Any, begun: Any, past: Any, memory: Any,
) -> None:  # fmt: skip
    """One of the three products for groups ``first .. last``, none of d and o being 0.

    ``starts`` has the groups' first rows, ``index`` (or 0) which row of x each is; y has the results or their
    gradients ``[N, O]``, z the gradients of the rows ``[N, D]``; ``weights`` and ``gradients`` are addresses of
    addresses. ``*_row`` are bytes from row to row. What is in y counts if ``begun``; ``past``: gradients of weights
    are written past the caches.
    """
    table, panel = memory + TABLE, memory + START
    for g in range(first, last):
        start = word_at(starts + WORD * g)
        count = word_at(starts + WORD * (g + ONE)) - start
        if count == U(0):
            continue
        w, w_next = word_at(weights + WORD * g), word_at(weights + WORD * (g + ONE if g + ONE < last else g))
        a, a_row, step, c, c_row = y + y_row * start, y_row, FLOAT, z + z_row * start, z_row
        rows, columns, depth = count, d, o
        if kind == FORWARD:
            a_row, c, c_row, columns, depth = x_row, a, y_row, o, d
        elif kind == OF_WEIGHT:
            a_row, step, c, c_row, rows, depth = FLOAT, y_row, word_at(gradients + WORD * g), FLOAT * d, o, count
        put_word(table + WORD * U(STEP), step)
        put_word(table + WORD * U(PANEL), panel)
        for from_ in range(U(0), depth, U(DEPTH)):
            size = min(U(DEPTH), depth - from_)
            adding = from_ != U(0) or (kind == FORWARD and begun != U(0))
            for j in range(U(0), columns, U(WIDEST)):
                wide = min(U(WIDEST), columns - j)
                width = U(128) if wide <= U(32) else U(256)  # bytes
                # The first line of the weight that the next panel is made of.
                if j + U(WIDEST) < columns:
                    upcoming = w + (w_row if kind == FORWARD else FLOAT) * (j + U(WIDEST))
                    upcoming += (FLOAT if kind == FORWARD else w_row) * from_
                else:
                    upcoming = w_next
                if kind == FORWARD:
                    columns_of(w + w_row * j + FLOAT * from_, w_row, wide, size, panel, width)
                else:
                    for k in range(U(0), size):
                        at = w + w_row * (from_ + k)
                        if kind == OF_WEIGHT:
                            at = x + x_row * row_of(index, start + from_ + k)
                        row_to(at + FLOAT * j, wide, panel + width * k, width)
                edge = wide != width // FLOAT
                put_word(table + WORD * U(ADDED), U(adding and not edge))
                put_word(table + WORD * U(PAST), U(past != U(0) and not edge and depth == size))
                for r in range(U(0), rows, SIX):
                    for i in range(U(0), SIX):
                        row = min(r + i, rows - ONE)
                        from_row = a + a_row * row
                        if kind == FORWARD:
                            from_row = x + x_row * row_of(index, start + row)
                        put_word(table + WORD * i, from_row + step * from_)
                        to = c + c_row * row + FLOAT * j
                        if edge:
                            to = memory + EDGE + U(4 * WIDEST) * i
                        elif r + i >= rows:
                            to = memory + DUMP
                        put_word(table + WORD * (SIX + i), to)
                    ahead, ahead_step = panel, U(0)
                    if kind == FORWARD and r // SIX < FOUR:
                        ahead, ahead_step = upcoming + r // SIX * LINE * size, LINE
                    elif kind == OF_INPUT and r // SIX < FOUR:
                        ahead, ahead_step = upcoming + r // SIX * LINE, w_row
                    elif kind == OF_WEIGHT:
                        ahead, ahead_step = a + step * from_ + FLOAT * (r + SIXTEEN), step
                    put_word(table + WORD * U(AHEAD), ahead)
                    put_word(table + WORD * U(AHEAD_STEP), ahead_step)
                    if width == U(256):
                        tile4(table, size)
                    else:
                        tile2(table, size)
                    if edge:
                        for i in range(U(0), min(SIX, rows - r)):
                            for n in range(U(0), wide):
                                to = c + c_row * (r + i) + FLOAT * (j + n)
                                value = one_at(memory + EDGE + U(4 * WIDEST) * i + FLOAT * n)
                                put_one(to, value + one_at(to) if adding else value)


@kernel("void(" + ", ".join(["uint64"] * 8) + ")")
def biases(first: Any, last: Any, starts: Any, bias: Any, scale: Any, y: Any, y_row: Any, o: Any) -> None:
    """Each row of y is its group's bias, times the row's scale where ``scale`` is not 0."""
    whole = o & ~U(15)
    for g in range(first, last):
        b = bias + FLOAT * o * g
        for r in range(word_at(starts + WORD * g), word_at(starts + WORD * (g + ONE))):
            s, to = f32(1) if scale == U(0) else one_at(scale + FLOAT * r), y + y_row * r
            for i in range(U(0), whole, SIXTEEN):
                store(to + FLOAT * i, mul(splat(s), load(b + FLOAT * i)))
            for i in range(whole, o):
                put_one(to + FLOAT * i, s * one_at(b + FLOAT * i))


@kernel("void(" + ", ".join(["uint64"] * 10) + ")")
def of_biases(
    first: Any, last: Any, starts: Any, bias: Any, scale: Any, y: Any, y_row: Any, o: Any, of_bias: Any, of_scale: Any
) -> None:
    """Gradients of bias (``[G, O]``, zeros before) and scale from those of y; not where the address is 0."""
    whole = o & ~U(15)
    for g in range(first, last):
        b, into = bias + FLOAT * o * g, of_bias + FLOAT * o * g
        for r in range(word_at(starts + WORD * g), word_at(starts + WORD * (g + ONE))):
            s, at = f32(1) if scale == U(0) else one_at(scale + FLOAT * r), y + y_row * r
            if of_bias != U(0):
                for i in range(U(0), whole, SIXTEEN):
                    store(into + FLOAT * i, fma(splat(s), load(at + FLOAT * i), load(into + FLOAT * i)))
                for i in range(whole, o):
                    put_one(into + FLOAT * i, one_at(into + FLOAT * i) + s * one_at(at + FLOAT * i))
            if of_scale != U(0):
                sums = splat(f32(0))
                for i in range(U(0), whole, SIXTEEN):
                    sums = fma(load(b + FLOAT * i), load(at + FLOAT * i), sums)
                value = total(sums)
                for i in range(whole, o):
                    value += one_at(b + FLOAT * i) * one_at(at + FLOAT * i)
                put_one(of_scale + FLOAT * r, value)
