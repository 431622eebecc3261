"""Few-bit codes on CPUs: packing, quantising by groups, looking up steps; all in blocks of elements that stay in cache.

Eight codes are the bytes of a 64-bit word; three shifts and masks move their low bits together, or apart, for every
width alike, and a word is stored at its first byte, to be overwritten by the next from the first byte that it has
too many. Indices are unsigned: Numba looks at signed ones for negative values, which keeps loops from vector code.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from weft.kernels.compiled import kernel
from weft.kernels.cpu.vectors import as_float, as_int, wide

u8, u16, u32, u64, i32, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32

BLOCK = 1024  # elements, the most that a call's scratch arrays hold
ONE, TWO, FOUR, SEVEN, EIGHT = u64(1), u64(2), u64(4), u64(7), u64(8)
SPREAD = u64(0x0001000100010001), u64(0x0000000100000001)  # a bit in every second byte, in every fourth
SIGN, LOW, HIGH = i32(31), i32(0xFFFF), i32(-0x10000)  # a float32's sign bit, and its parts outside and in bfloat16
INFINITE, SMALLEST, LARGEST = i32(0x7F800000), i32(0x00800000), i32(0x7E800000)  # bits of inf, 2^-126, 2^126
MAGNITUDE = i32(0x7FFFFFFF)
NAN = u16(0x7FC0)
ROUNDER = f32(8388608.0)  # 2^23: a sum with it has no fraction, rounded half to even


def _word(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), context.get_value_type(types.uint64).as_pointer())


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """The eight bytes from ``array[at]`` on, the first lowest; they must be there."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_word(context, builder, signature, args), align=1)

    return types.uint64(array, types.uint64), code


@intrinsic
def store(typing: Any, array: Any, at: Any, word: Any) -> Any:
    """Writes eight bytes from ``array[at]`` on; there must be room."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _word(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), code


@numba.njit(error_model="numpy")
def pack_block(codes: Any, size: Any, packed: Any, at: Any, end: Any, bits: Any) -> None:
    """``size`` codes, which are lost, into ``packed[at:end]``."""
    wide()
    first, second, third = EIGHT - bits, TWO * (EIGHT - bits), FOUR * (EIGHT - bits)
    one, two = SPREAD[0] * ((ONE << bits) - ONE), SPREAD[1] * ((ONE << TWO * bits) - ONE)
    four = (ONE << FOUR * bits) - ONE
    words = (size + SEVEN) // EIGHT
    for j in range(size, words * EIGHT):
        codes[j] = u8(0)
    for j in range(words):
        word = load(codes, EIGHT * j)
        word = (word & one) | ((word >> first) & (one << bits))
        word = (word & two) | ((word >> second) & (two << TWO * bits))
        store(codes, EIGHT * j, (word & four) | ((word >> third) & (four << FOUR * bits)))
    for j in range(words):
        word, here = load(codes, EIGHT * j), at + bits * j
        if here + EIGHT <= end:
            store(packed, here, word)
        else:
            for k in range(min(bits, end - here)):
                packed[here + k] = u8(word >> (EIGHT * k))


@numba.njit(error_model="numpy")
def unpack_block(packed: Any, at: Any, codes: Any, size: Any, bits: Any) -> None:
    """``size`` codes, and up to seven more to fill a word, from ``packed[at:]``."""
    wide()
    first, second, third = EIGHT - bits, TWO * (EIGHT - bits), FOUR * (EIGHT - bits)
    one, two = SPREAD[0] * ((ONE << bits) - ONE), SPREAD[1] * ((ONE << TWO * bits) - ONE)
    four = (ONE << FOUR * bits) - ONE
    words, end = (size + SEVEN) // EIGHT, u64(packed.size)
    for j in range(words):
        here = at + bits * j
        if here + EIGHT <= end:
            word = load(packed, here)
        else:
            word = u64(0)
            for k in range(min(bits, end - here)):
                word |= u64(packed[here + k]) << (EIGHT * k)
        store(codes, EIGHT * j, word)
    for j in range(words):
        word = load(codes, EIGHT * j)
        word = (word & four) | ((word & (four << FOUR * bits)) << third)
        word = (word & two) | ((word & (two << TWO * bits)) << second)
        store(codes, EIGHT * j, (word & one) | ((word & (one << bits)) << first))


@kernel("void(uint8[::1], uint8[::1], uint8[::1], uint64, uint64, uint64)")
def pack(codes: Any, packed: Any, scratch: Any, start: Any, stop: Any, bits: Any) -> None:
    """Elements ``start .. stop``; ``start`` is a multiple of 8."""
    wide()
    end = (stop * bits + SEVEN) // EIGHT
    for begin in range(start, stop, BLOCK):
        size = min(u64(BLOCK), stop - begin)
        for j in range(size):
            scratch[j] = codes[begin + j]
        pack_block(scratch, size, packed, begin // EIGHT * bits, end, bits)


@kernel("void(uint8[::1], uint8[::1], uint8[::1], uint64, uint64, uint64)")
def unpack(packed: Any, codes: Any, scratch: Any, start: Any, stop: Any, bits: Any) -> None:
    """Elements ``start .. stop``; ``start`` is a multiple of 8."""
    wide()
    for begin in range(start, stop, BLOCK):
        size = min(u64(BLOCK), stop - begin)
        unpack_block(packed, begin // EIGHT * bits, scratch, size, bits)
        for j in range(size):
            codes[begin + j] = scratch[j]


@numba.njit(error_model="numpy")
def read_block(full: Any, half: Any, begin: Any, size: Any, values: Any) -> None:
    """Bits of float32 from an array of them, or from one of bfloat16 where the first is empty."""
    wide()
    if full.size:
        for j in range(size):
            values[j] = full[begin + j]
    else:
        for j in range(size):
            values[j] = i32(u32(half[begin + j]) << u32(16))


@numba.njit(error_model="numpy")
def write_block(values: Any, full: Any, half: Any, begin: Any, size: Any) -> None:
    """The inverse of `read_block`: to bfloat16 by rounding half to even."""
    wide()
    if full.size:
        for j in range(size):
            full[begin + j] = values[j]
    else:
        for j in range(size):
            v = values[j]
            rounded = u32(u32(v) + u32(0x7FFF) + (u32(u32(v) >> u32(16)) & u32(1)))
            half[begin + j] = NAN if i32(v & MAGNITUDE) > INFINITE else u16(u32(rounded) >> u32(16))


@kernel(
    "void(int32[::1], uint16[::1], uint8[::1], uint16[::1], uint16[::1], uint8[::1], int32[::1], int32[::1],"
    "float32[::1], uint64, uint64, uint64, uint64, boolean, uint32, uint32, boolean)"
)
def quantise(
    full: Any, half: Any, packed: Any, scales: Any, zeros: Any, codes: Any, values: Any, ends: Any, inverses: Any,
    start: Any, stop: Any, bits: Any, group: Any, noisy: Any, key: Any, salt: Any, centred: Any,
) -> None:  # fmt: skip
    """Elements ``start .. stop``; ``start`` is a multiple of the block."""
    wide()
    top = i32((ONE << bits) - ONE)
    parts = i32(top + i32(1)) if centred else top
    last = (stop * bits + SEVEN) // EIGHT
    block = u64(BLOCK) // group * group
    for begin in range(start, stop, block):
        size = min(block, stop - begin)
        groups, before = (size + group - ONE) // group, begin // group
        read_block(full, half, begin, size, values)
        for g in range(groups):
            low, high = MAGNITUDE, i32(-0x80000000)
            for j in range(g * group, min(g * group + group, size)):
                v = values[j]
                order = i32(v ^ ((v >> SIGN) & MAGNITUDE))  # the order of floats, of integers
                low, high = min(low, order), max(high, order)
            ends[TWO * g], ends[TWO * g + ONE] = low, high
        for g in range(groups):
            low, high = ends[TWO * g], ends[TWO * g + ONE]
            bottom, peak = i32(low ^ ((low >> SIGN) & MAGNITUDE)), i32(high ^ ((high >> SIGN) & MAGNITUDE))
            below = i32(i32(bottom + i32((bottom >> SIGN) & LOW)) & HIGH)
            zero = as_float(below)
            from_zero = not noisy and (low == i32(0) or low == i32(-1))
            many = top if from_zero else parts
            step = i32(i32(as_int(f32(f32(as_float(peak) - zero) / f32(many))) + LOW) & HIGH)
            if step > i32(0):
                step = max(step, SMALLEST)
            bad = high >= INFINITE or low < i32(-INFINITE) or step > LARGEST
            inverses[g] = f32(0) if bad or step == i32(0) else f32(f32(1) / as_float(step))
            ends[g] = below
            zeros[before + g] = u16(0) if bad or zero == f32(0) else u16(u32(below) >> u32(16))
            if from_zero and not bad:
                zeros[before + g] = u16(0x8000)
            scales[before + g] = NAN if bad else u16(u32(step) >> u32(16))
        for g in range(groups):
            zero, inverse, end = as_float(ends[g]), inverses[g], min(g * group + group, size)
            if inverse == f32(0):
                for j in range(g * group, end):
                    codes[j] = u8(0)
            elif zeros[before + g] == u16(0x8000):
                for j in range(g * group, end):
                    v = f32(as_float(values[j]) - zero) * inverse
                    code = i32(v)
                    codes[j] = u8(min(i32(code + i32(f32(code) < v)), top))
            elif noisy:
                for j in range(g * group, end):
                    h = u32(u32(begin + j) ^ key)
                    h = u32(u32(h ^ (h >> u32(16))) * u32(0x7FEB352D))
                    h = u32(u32(h ^ (h >> u32(15))) + salt)
                    h = u32(h * u32(0x846CA68B))
                    h = u32(h ^ (h >> u32(16)))
                    v = f32(as_float(values[j]) - zero) * inverse
                    code = i32(v)
                    more = f32(i32(h >> u32(8))) * f32(2.0**-24) < f32(v - f32(code))
                    codes[j] = u8(min(i32(code + i32(more)), top))
            elif centred:
                for j in range(g * group, end):
                    codes[j] = u8(min(i32(f32(as_float(values[j]) - zero) * inverse), top))
            else:
                for j in range(g * group, end):
                    v = f32(as_float(values[j]) - zero) * inverse
                    codes[j] = u8(as_int(f32(v + ROUNDER)))
        pack_block(codes, size, packed, begin // EIGHT * bits, last, bits)


@kernel(
    "void(uint8[::1], uint16[::1], uint16[::1], int32[::1], uint16[::1], uint8[::1], int32[::1],"
    "uint64, uint64, uint64, uint64, boolean)"
)
def dequantise(
    packed: Any, scales: Any, zeros: Any, full: Any, half: Any, codes: Any, values: Any,
    start: Any, stop: Any, bits: Any, group: Any, centred: Any,
) -> None:  # fmt: skip
    """Elements ``start .. stop``; ``start`` is a multiple of the block."""
    wide()
    block = u64(BLOCK) // group * group
    half_step = f32(0.5) if centred else f32(0)
    for begin in range(start, stop, block):
        size = min(block, stop - begin)
        unpack_block(packed, begin // EIGHT * bits, codes, size, bits)
        for g in range((size + group - ONE) // group):
            scale = as_float(i32(u32(scales[begin // group + g]) << u32(16)))
            zero = as_float(i32(u32(zeros[begin // group + g]) << u32(16)))
            end = min(g * group + group, size)
            if zeros[begin // group + g] == u16(0x8000):
                for j in range(g * group, end):
                    values[j] = as_int(f32(max(f32(0), f32(f32(codes[j]) - f32(0.5))) * scale))
            else:
                for j in range(g * group, end):
                    values[j] = as_int(f32(f32(f32(f32(codes[j]) + half_step) * scale) + zero))
        write_block(values, full, half, begin, size)


@kernel(
    "void(int32[::1], uint16[::1], float32[::1], uint64, uint8[::1], uint8[::1], int32[::1], uint64, uint64, uint64)"
)
def bucketize(
    full: Any, half: Any, boundaries: Any, count: Any, packed: Any, codes: Any, values: Any,
    start: Any, stop: Any, bits: Any,
) -> None:  # fmt: skip
    """Elements ``start .. stop``; of 16 boundaries those after the first ``count`` are infinite."""
    wide()
    end = (stop * bits + SEVEN) // EIGHT
    for begin in range(start, stop, BLOCK):
        size = min(u64(BLOCK), stop - begin)
        read_block(full, half, begin, size, values)
        for j in range(size):
            codes[j] = u8(0)
        for k in range(u64(0), count, FOUR):
            a, b, c, d = boundaries[k], boundaries[k + ONE], boundaries[k + TWO], boundaries[k + u64(3)]
            for j in range(size):
                v = as_float(values[j])
                above = i32(i32(not v <= a) + i32(not v <= b)) + i32(i32(not v <= c) + i32(not v <= d))
                codes[j] = u8(min(i32(i32(codes[j]) + i32(above)), i32(count)))
        pack_block(codes, size, packed, begin // EIGHT * bits, end, bits)


@kernel(
    "void(uint8[::1], float32[::1], int32[::1], uint16[::1], int32[::1], uint16[::1], uint8[::1], int32[::1],"
    "float32[::1], uint64, uint64, uint64)"
)
def gather(
    packed: Any, levels: Any, full: Any, half: Any, full_out: Any, half_out: Any, codes: Any, values: Any, chosen: Any,
    start: Any, stop: Any, bits: Any,
) -> None:  # fmt: skip
    """Elements ``start .. stop``; there are 16 levels."""
    wide()
    for begin in range(start, stop, BLOCK):
        size = min(u64(BLOCK), stop - begin)
        unpack_block(packed, begin // EIGHT * bits, codes, size, bits)
        read_block(full, half, begin, size, values)
        for k in range(u64(0), ONE << bits, FOUR):
            a, b, c, d = levels[k], levels[k + ONE], levels[k + TWO], levels[k + u64(3)]
            for j in range(size):
                code = u64(codes[j])
                even, odd = code & ONE == u64(0), code & TWO == u64(0)
                level = (a if even else b) if odd else (c if even else d)
                chosen[j] = level if code >= k else chosen[j]
        for j in range(size):
            values[j] = as_int(f32(as_float(values[j]) * chosen[j]))
        write_block(values, full_out, half_out, begin, size)


def bits_of(tensor: Tensor) -> tuple[Any, Any]:
    """Its memory as int32 and as uint16, of which one is empty: of float32, or of bfloat16."""
    if tensor.dtype == torch.float32:
        return tensor.view(torch.int32).numpy(), np.empty(0, u16)
    return np.empty(0, i32), tensor.view(torch.uint16).numpy()


def scratch() -> tuple[Any, Any]:
    """Room for codes and values of a block; each thread needs its own."""
    return np.empty(BLOCK, u8), np.empty(BLOCK, i32)


def group_scratch() -> tuple[Any, ...]:
    """And for the ends and inverse steps of its groups."""
    return *scratch(), np.empty(BLOCK // 4, i32), np.empty(BLOCK // 8, f32)


def lookup_scratch() -> tuple[Any, ...]:
    """And for its levels."""
    return *scratch(), np.empty(BLOCK, f32)
