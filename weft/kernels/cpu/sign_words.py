"""Convolutions of signs on CPUs: words of 64 channels for each pixel, made in one pass, and products with windows.

The loops call those of ``signs.py``: after a change there, remove the caches beside the loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types

from weft.kernels.compiled import kernel
from weft.kernels.cpu import simd
from weft.kernels.cpu.signs import CHUNK, EIGHT, FOUR, ONE, SIXTEEN, WORD, ZERO, eight, few, none, put_word
from weft.kernels.cpu.simd import FLOATS, I32, I64, LONGS, ir, operation, words

u64, f32 = np.uint64, np.float32


def _with_signs(first: int) -> Any:
    @operation(words, words, simd.floats, types.uint64)
    def with_signs(builder: Any, bits: Any, x: Any, place: Any) -> Any:
        """Eight words with the bit ``place`` set where eight of sixteen floats are at least 0."""
        lanes = ir.Constant(ir.VectorType(I32, simd.WORDS), [*range(first, first + simd.WORDS)])
        flags = builder.fcmp_ordered(">=", x, ir.Constant(FLOATS, None))
        bit = simd.spread(builder, builder.shl(ir.Constant(I64, 1), place), LONGS)
        return builder.select(builder.shuffle_vector(flags, flags, lanes), builder.or_(bits, bit), bits)

    return with_signs


low_signs, high_signs = _with_signs(0), _with_signs(simd.WORDS)


@operation(types.void, types.uint64, types.uint64, words)
def put_words(builder: Any, at: Any, step: Any, value: Any) -> Any:
    """Eight words to addresses that are ``step`` apart."""
    for k in range(simd.WORDS):
        there = builder.add(at, builder.mul(step, ir.Constant(I64, k)))
        builder.store(builder.extract_element(value, ir.Constant(I32, k)), simd.pointer(builder, there, I64), align=1)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64)")
def image_words(x: Any, bits: Any, means: Any, channels: Any, pixels: Any, start: Any, stop: Any) -> None:
    """Words ``[B, pixels, ceil(C / 64)]`` and means of |x| ``[B, pixels]`` of images ``[B, C, pixels]``, start .. stop.

    A word has 64 channels, the first lowest; beyond the last one 0.
    """
    groups, line, whole = (channels + WORD - ONE) // WORD, pixels * FOUR, pixels // SIXTEEN * SIXTEEN
    part = f32(f32(1) / f32(max(channels, ONE)))
    for n in range(start, stop):
        image, place = x + n * channels * line, n * pixels
        for p in range(ZERO, whole, SIXTEEN):
            total = simd.splat(f32(0))
            for g in range(groups):
                a, b, first = none(), none(), image + g * WORD * line + p * FOUR
                for c in range(min(WORD, channels - g * WORD)):
                    value = simd.load(first + c * line)
                    a, b = low_signs(a, value, c), high_signs(b, value, c)
                    total = simd.add(total, simd.magnitude(value))
                at = bits + ((place + p) * groups + g) * EIGHT
                put_words(at, groups * EIGHT, a)
                put_words(at + groups * WORD, groups * EIGHT, b)
            simd.store(means + (place + p) * FOUR, simd.mul(total, simd.splat(part)))
        for p in range(whole, pixels):
            one = f32(0)
            for g in range(groups):
                word, first = ZERO, image + g * WORD * line + p * FOUR
                for c in range(min(WORD, channels - g * WORD)):
                    number = simd.one_at(first + c * line)
                    word |= u64(number >= f32(0)) << c
                    one = f32(one + abs(number))
                put_word(bits + ((place + p) * groups + g) * EIGHT, word)
            simd.put_one(means + (place + p) * FOUR, f32(one * part))


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64)")
def window_product(
    weights: Any, blocks: Any, scale: Any, factors: Any, out: Any, outputs: Any, windows: Any, length: Any,
    columns: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Parts ``start .. stop`` of ``[B, O, windows]``: of an image 64 outputs each, then of the next one.

    Weights are ``length`` words for each output. Blocks hold eight windows side by side, the last one the last eight of
    an image, some of them again; of fewer than eight there is one smaller block.
    """
    parts, step, size = (outputs + CHUNK - ONE) // CHUNK, windows * FOUR, length * EIGHT
    many = (windows + EIGHT - ONE) // EIGHT
    for k in range(start, stop):
        n, first = k // parts, k % parts * CHUNK
        rows, own = min(CHUNK, outputs - first), weights + first * size
        here, alpha, means = out + (n * outputs + first) * step, scale + first * FOUR, factors + n * step
        if windows < EIGHT:
            few(own, alpha, blocks + n * windows * size, means, ZERO, here, rows, length * WORD, step, windows, columns)
        else:
            for b in range(many):
                block, w = blocks + (n * many + b) * EIGHT * size, min(b * EIGHT, windows - EIGHT) * FOUR
                eight(own, alpha, block, means + w, ZERO, here + w, rows, length * WORD, step, columns)
