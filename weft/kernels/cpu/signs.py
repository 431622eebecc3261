"""Products of signs on CPUs: 64 signs to a word, their differences by exclusive or, counted.

A block is eight rows of weights: for each 64 columns one word of each row side by side, so that a vector holds the
same columns of eight rows and no sum goes across its lanes; then, byte by byte, the columns that fill no word. The last
block has the rows that are left.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types

from weft.kernels.compiled import kernel
from weft.kernels.cpu import simd
from weft.kernels.cpu.simd import I32, I64, LONGS, ir, operation, put_word, word_at, words

u64, f32 = np.uint64, np.float32
ZERO, ONE, TWO, THREE, FOUR, SEVEN, EIGHT, SIXTEEN, WORD = (u64(n) for n in (0, 1, 2, 3, 4, 7, 8, 16, 64))
TILE = u64(4)  # inputs that share what is read of the weights
HALF = u64(32)  # bytes of eight floats
CHUNK = u64(64)  # inputs whose signs stay in the nearest cache
HALVES, halves = ir.VectorType(ir.FloatType(), simd.WORDS), simd.Vector(types.float32, simd.WORDS)


@operation(types.uint64, types.uint64)
def signs_at(builder: Any, at: Any) -> Any:
    """A bit for each of 64 floats from an address on, the first lowest: set where it is at least 0."""
    kind = ir.VectorType(ir.FloatType(), 64)
    value = builder.load(simd.pointer(builder, at, kind), align=4)
    return builder.bitcast(builder.fcmp_ordered(">=", value, ir.Constant(kind, None)), I64)


@operation(types.uint64, types.uint64)
def byte_at(builder: Any, at: Any) -> Any:
    """The byte at an address."""
    return builder.zext(builder.load(simd.pointer(builder, at, ir.IntType(8)), align=1), I64)


@operation(types.void, types.uint64, types.uint64)
def put_byte(builder: Any, at: Any, value: Any) -> Any:
    """The lowest byte of a word to an address."""
    builder.store(builder.trunc(value, ir.IntType(8)), simd.pointer(builder, at, ir.IntType(8)), align=1)


@operation(types.uint64, types.uint64)
def ones(builder: Any, value: Any) -> Any:
    """How many bits are set."""
    return simd.call(builder, "llvm.ctpop.i64", I64, value)


@operation(words)
def none(builder: Any) -> Any:
    """Eight counts of 0."""
    return ir.Constant(LONGS, None)


@operation(words, types.uint64)
def words_at(builder: Any, at: Any) -> Any:
    """Eight words from an address on."""
    return builder.load(simd.pointer(builder, at, LONGS), align=1)


@operation(words, words, types.uint64, types.uint64)
def with_byte(builder: Any, value: Any, at: Any, place: Any) -> Any:
    """The words with eight bytes from an address on, one for each, put in from the bit ``place`` on."""
    kind = ir.VectorType(ir.IntType(8), simd.WORDS)
    found = builder.zext(builder.load(simd.pointer(builder, at, kind), align=1), LONGS)
    return builder.or_(value, builder.shl(found, simd.spread(builder, place, LONGS)))


@operation(words, words, words, types.uint64)
def count(builder: Any, counts: Any, value: Any, other: Any) -> Any:
    """The counts and how many bits of each word differ from ``other``."""
    different = builder.xor(value, simd.spread(builder, other, LONGS))
    return builder.add(counts, simd.call(builder, "llvm.ctpop.v8i64", LONGS, different))


@operation(halves, words, types.uint64)
def dots(builder: Any, counts: Any, columns: Any) -> Any:
    """``columns - 2 counts`` as floats."""
    kind = ir.VectorType(I32, simd.WORDS)
    few = builder.trunc(counts, kind)
    return builder.sitofp(
        builder.sub(simd.spread(builder, builder.trunc(columns, I32), kind), builder.add(few, few)), HALVES
    )


@operation(halves, halves, types.float32)
def times(builder: Any, a: Any, b: Any) -> Any:
    """Eight floats, each times b."""
    return builder.fmul(a, simd.spread(builder, b, HALVES))


@operation(halves, halves, types.uint64)
def times_at(builder: Any, a: Any, at: Any) -> Any:
    """Eight floats, each times its own from an address on."""
    return builder.fmul(a, builder.load(simd.pointer(builder, at, HALVES), align=4))


@operation(halves, halves, types.uint64)
def plus_at(builder: Any, a: Any, at: Any) -> Any:
    """Eight floats, and to each its own from an address on."""
    return builder.fadd(a, builder.load(simd.pointer(builder, at, HALVES), align=4))


@operation(types.void, types.uint64, halves)
def put(builder: Any, at: Any, value: Any) -> Any:
    """Eight floats to an address."""
    builder.store(value, simd.pointer(builder, at, HALVES), align=4)


@operation(words, words, words)
def plus(builder: Any, a: Any, b: Any) -> Any:
    """Sums of words."""
    return builder.add(a, b)


@numba.njit(error_model="numpy")
def last_signs(x: Any, columns: Any) -> Any:
    """The signs of up to 63 floats from the address x on."""
    found = ZERO
    for j in range(columns):
        found |= u64(simd.one_at(x + FOUR * j) >= f32(0)) << j
    return found


@kernel("void(uint64, uint64, uint64, uint64)")
def pack(x: Any, packed: Any, rows: Any, columns: Any) -> None:
    """Blocks of the signs of floats ``[rows, columns]``."""
    full, left = columns // WORD, columns % WORD
    bytes_left = (left + SEVEN) // EIGHT
    for first in range(ZERO, rows, EIGHT):
        height = min(EIGHT, rows - first)
        block = packed + first * (EIGHT * full + bytes_left)
        for i in range(height):
            row = x + (first + i) * columns * FOUR
            for k in range(full):
                put_word(block + EIGHT * (k * height + i), signs_at(row + k * u64(256)))
            word = last_signs(row + full * u64(256), left)
            for k in range(bytes_left):
                put_byte(block + EIGHT * full * height + k * height + i, word >> (EIGHT * k))


@numba.njit(error_model="numpy")
def put_eight(counts: Any, whole: Any, alpha: Any, bias: Any, factor: Any, out: Any) -> None:
    """Eight elements of the output."""
    y = times(times_at(dots(counts, whole), alpha), factor)
    if bias != ZERO:
        y = plus_at(y, bias)
    put(out, y)


@numba.njit(error_model="numpy")
def read(x: Any, bits: Any, factors: Any, rows: Any, columns: Any) -> None:
    """Words of the signs of floats ``[rows, columns]``, the last of a row filled up with zeros, and mean magnitudes.

    Without an address for these, there are none.
    """
    full, left = columns // WORD, columns % WORD
    length = full + u64(left > ZERO)
    for r in range(rows):
        row = x + r * columns * FOUR
        for k in range(full):
            put_word(bits + EIGHT * (r * length + k), signs_at(row + k * u64(256)))
        if left:
            put_word(bits + EIGHT * (r * length + full), last_signs(row + full * u64(256), left))
        if factors != ZERO:
            a, b = simd.splat(f32(0)), simd.splat(f32(0))
            for k in range(columns // u64(32)):
                a = simd.add(a, simd.magnitude(simd.load(row + k * u64(128))))
                b = simd.add(b, simd.magnitude(simd.load(row + k * u64(128) + WORD)))
            total = simd.total(simd.add(a, b))
            for k in range(columns // u64(32) * u64(32), columns):
                total = f32(total + abs(simd.one_at(row + FOUR * k)))
            simd.put_one(factors + FOUR * r, f32(total / f32(max(columns, ONE))))


@numba.njit(error_model="numpy")
def factor_of(factors: Any, row: Any) -> Any:
    """A row's factor, 1 where there are none."""
    return f32(1) if factors == ZERO else simd.one_at(factors + FOUR * row)


@numba.njit(error_model="numpy")
def eight(
    bits: Any, factors: Any, block: Any, alpha: Any, bias: Any, out: Any, rows: Any, columns: Any, step: Any,
    whole: Any,
) -> None:  # fmt: skip
    """Eight outputs of each row; rows of the output are ``step`` bytes apart.

    ``whole`` of the ``columns`` count; the bits of the others are the same in rows and weights.
    """
    full, left = columns // WORD, columns % WORD
    line = EIGHT * (full + u64(left > ZERO))
    last = none()
    for k in range((left + SEVEN) // EIGHT):
        last = with_byte(last, block + WORD * full + EIGHT * k, EIGHT * k)
    many = rows // TILE * TILE
    for r in range(ZERO, many, TILE):
        here = bits + r * line
        a, b, c, d = none(), none(), none(), none()
        for k in range(full):
            w, x = words_at(block + WORD * k), here + EIGHT * k
            a, b = count(a, w, word_at(x)), count(b, w, word_at(x + line))
            c, d = count(c, w, word_at(x + TWO * line)), count(d, w, word_at(x + THREE * line))
        if left:
            x = here + EIGHT * full
            a, b = count(a, last, word_at(x)), count(b, last, word_at(x + line))
            c, d = count(c, last, word_at(x + TWO * line)), count(d, last, word_at(x + THREE * line))
        at = out + r * step
        put_eight(a, whole, alpha, bias, factor_of(factors, r), at)
        put_eight(b, whole, alpha, bias, factor_of(factors, r + ONE), at + step)
        put_eight(c, whole, alpha, bias, factor_of(factors, r + TWO), at + TWO * step)
        put_eight(d, whole, alpha, bias, factor_of(factors, r + THREE), at + THREE * step)
    for r in range(many, rows):
        here = bits + r * line
        a, b = none(), none()
        for k in range(full // TWO):
            w, x = block + TWO * WORD * k, here + SIXTEEN * k
            a, b = count(a, words_at(w), word_at(x)), count(b, words_at(w + WORD), word_at(x + EIGHT))
        if full % TWO:
            a = count(a, words_at(block + WORD * (full - ONE)), word_at(here + EIGHT * (full - ONE)))
        if left:
            b = count(b, last, word_at(here + EIGHT * full))
        put_eight(plus(a, b), whole, alpha, bias, factor_of(factors, r), out + r * step)


@numba.njit(error_model="numpy")
def sixteen(bits: Any, factor: Any, block: Any, other: Any, alpha: Any, bias: Any, out: Any, columns: Any) -> None:
    """Two blocks of outputs of one row whose columns fill words: what is read of it serves both."""
    a, b = none(), none()
    for k in range(columns // WORD):
        x = word_at(bits + EIGHT * k)
        a, b = count(a, words_at(block + WORD * k), x), count(b, words_at(other + WORD * k), x)
    put_eight(a, columns, alpha, bias, factor, out)
    put_eight(b, columns, alpha + HALF, bias + HALF if bias != ZERO else ZERO, factor, out + HALF)


@numba.njit(error_model="numpy")
def few(
    bits: Any, factors: Any, block: Any, alpha: Any, bias: Any, out: Any, rows: Any, columns: Any, step: Any,
    height: Any, whole: Any,
) -> None:  # fmt: skip
    """The ``height`` outputs of the last block, as by `eight`."""
    full, left = columns // WORD, columns % WORD
    line = EIGHT * (full + u64(left > ZERO))
    for i in range(height):
        last = ZERO
        for k in range((left + SEVEN) // EIGHT):
            last |= byte_at(block + (EIGHT * full + k) * height + i) << (EIGHT * k)
        for r in range(rows):
            here, n = bits + r * line, ZERO
            for k in range(full):
                n += ones(word_at(block + EIGHT * (k * height + i)) ^ word_at(here + EIGHT * k))
            if left:
                n += ones(last ^ word_at(here + EIGHT * full))
            y = f32(f32(np.int64(whole) - np.int64(TWO * n)) * simd.one_at(alpha + FOUR * i))
            y = f32(y * factor_of(factors, r))
            if bias != ZERO:
                y = f32(y + simd.one_at(bias + FOUR * i))
            simd.put_one(out + r * step + FOUR * i, y)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, boolean)")
def product(
    x: Any, packed: Any, alpha: Any, bias: Any, out: Any, rows: Any, columns: Any, outputs: Any, start: Any, stop: Any,
    factored: Any,
) -> None:  # fmt: skip
    """Outputs ``start .. stop`` of every row; ``start`` is a multiple of 8. Each thread reads the signs for itself."""
    length = (columns + WORD - ONE) // WORD
    chunk, step = min(CHUNK, rows), outputs * FOUR
    bits, factors = np.empty(chunk * length + ONE, u64), np.empty(chunk + ONE, f32)
    signs, means = u64(bits.ctypes.data), u64(factors.ctypes.data) if factored else ZERO
    for r in range(ZERO, rows, CHUNK):
        size = min(CHUNK, rows - r)
        read(x + r * columns * FOUR, signs, means, size, columns)
        first, size_of_block = start, (columns + SEVEN) // EIGHT * EIGHT
        if size == ONE and columns % WORD == ZERO:
            while first + SIXTEEN <= stop:
                own, block = first * FOUR, packed + first // EIGHT * size_of_block
                shift, place = bias + own if bias != ZERO else ZERO, out + r * step + own
                sixteen(signs, factor_of(means, ZERO), block, block + size_of_block, alpha + own, shift, place, columns)
                first += SIXTEEN
        while first < stop:
            own, block = first * FOUR, packed + first // EIGHT * size_of_block
            shift, place = bias + own if bias != ZERO else ZERO, out + r * step + own
            if outputs - first >= EIGHT:
                eight(signs, means, block, alpha + own, shift, place, size, columns, step, columns)
            else:
                few(signs, means, block, alpha + own, shift, place, size, columns, step, outputs - first, columns)
            first += EIGHT
    bits[0], factors[0] = ZERO, f32(0)  # Numba frees an array after the last line that names it


@operation(simd.floats, simd.floats, types.uint64, types.uint64)
def add_where(builder: Any, total: Any, x: Any, bits: Any) -> Any:
    """Sixteen sums and the 64 floats from the address x on, where the word at the address ``bits`` has its bits set."""
    flags = ir.VectorType(ir.IntType(1), simd.LANES)
    for k in range(4):
        mask = simd.pointer(builder, builder.add(bits, ir.Constant(I64, 2 * k)), ir.IntType(16))
        chosen = builder.bitcast(builder.load(mask, align=1), flags)
        part = simd.pointer(builder, builder.add(x, ir.Constant(I64, 64 * k)), simd.FLOATS)
        total = builder.select(chosen, builder.fadd(total, builder.load(part, align=4)), total)
    return total


@numba.njit(error_model="numpy")
def put_sum(total: Any, whole: Any, alpha: Any, bias: Any, out: Any) -> None:
    """One output: what has a positive sign counts twice, less all."""
    y = f32(f32(f32(2) * simd.total(total) - whole) * simd.one_at(alpha))
    simd.put_one(out, f32(y + simd.one_at(bias)) if bias != ZERO else y)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64)")
def sums(
    x: Any, packed: Any, alpha: Any, bias: Any, out: Any, rows: Any, columns: Any, outputs: Any, start: Any, stop: Any
) -> None:
    """Outputs ``start .. stop`` of every row, whose floats are taken as they are; ``start`` is a multiple of 8."""
    full, left = columns // WORD, columns % WORD
    bytes_left = (left + SEVEN) // EIGHT
    rest, last, zero = simd.room(), simd.room(), simd.splat(f32(0))
    for k in range(FOUR):
        simd.store(rest + WORD * k, zero)
    for r in range(rows):
        row, whole = x + r * columns * FOUR, zero
        for k in range(left):
            simd.put_one(rest + FOUR * k, simd.one_at(row + (WORD * full + k) * FOUR))
        for k in range(FOUR * full):
            whole = simd.add(whole, simd.load(row + WORD * k))
        for k in range(FOUR):
            whole = simd.add(whole, simd.load(rest + WORD * k))
        all_of_it = simd.total(whole)
        for first in range(start, stop, EIGHT):
            own, height = first * FOUR, min(EIGHT, outputs - first)
            block, place = packed + first * (EIGHT * full + bytes_left), out + (r * outputs + first) * FOUR
            if height == EIGHT and not left:
                a, b, c, d, e, f, g, h = zero, zero, zero, zero, zero, zero, zero, zero
                for k in range(full):
                    at, w = row + k * u64(256), block + WORD * k
                    a, b = add_where(a, at, w), add_where(b, at, w + EIGHT)
                    c, d = add_where(c, at, w + SIXTEEN), add_where(d, at, w + u64(24))
                    e, f = add_where(e, at, w + u64(32)), add_where(f, at, w + u64(40))
                    g, h = add_where(g, at, w + u64(48)), add_where(h, at, w + u64(56))
                for i, total in enumerate((a, b, c, d, e, f, g, h)):
                    there = FOUR * u64(i)
                    shift = bias + own + there if bias != ZERO else ZERO
                    put_sum(total, all_of_it, alpha + own + there, shift, place + there)
            else:
                for i in range(height):
                    total, word = zero, ZERO
                    for k in range(full):
                        total = add_where(total, row + k * u64(256), block + EIGHT * (k * height + i))
                    for k in range(bytes_left):
                        word |= byte_at(block + (EIGHT * full + k) * height + i) << (EIGHT * k)
                    put_word(last, word)
                    total = add_where(total, rest, last)
                    shift = bias + own + FOUR * i if bias != ZERO else ZERO
                    put_sum(total, all_of_it, alpha + own + FOUR * i, shift, place + FOUR * i)
