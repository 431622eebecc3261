"""The loops of `weft.kernels.cpu.packing` in Triton, to the same bits: a row of a tile is the eight codes of a word."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 256  # words of a program


def launch(loop: Any, n: int, *args: Any, **constants: Any) -> None:
    """Runs a loop over ``n`` elements on the device of the first tensor."""
    if n:
        with torch.cuda.device_of(args[0]):
            loop[(triton.cdiv(n, 8 * TILE),)](*args, n, **constants, tile=TILE)


def launch_groups(loop: Any, n: int, group: int, *args: Any, **constants: Any) -> None:
    """The same over groups, each a row of words: a power of two of them, as Triton's tiles are, of which some idle."""
    if n:
        words = triton.next_power_of_2(group // 8)
        rows = max(1, TILE // words)
        grid = (triton.cdiv(triton.cdiv(n, group), rows),)
        with torch.cuda.device_of(args[0]):
            loop[grid](*args, n, group, **constants, rows=rows, words=words)


def unsigned(tensor: Tensor) -> Tensor:
    """A bfloat16 tensor's bits."""
    return tensor.view(torch.int16)


@triton.jit
def _write(packed: Any, codes: Any, word: Any, used: Any, n: Any, bits: tl.constexpr) -> None:
    """Packs codes ``[..., 8]`` of the words ``word`` ``[...]`` where ``used``."""
    places = tl.arange(0, 8).to(tl.int64) * bits
    value = tl.sum(codes.to(tl.int64) << places, axis=len(codes.shape) - 1)
    for k in tl.static_range(bits):
        at = word * bits + k
        tl.store(packed + at, ((value >> (8 * k)) & 255).to(tl.uint8), mask=used & (at < (n * bits + 7) // 8))


@triton.jit
def _read(packed: Any, word: Any, used: Any, n: Any, bits: tl.constexpr) -> Any:
    """The codes ``[..., 8]`` of the words ``word`` ``[...]``, int32."""
    value = word * 0
    for k in tl.static_range(bits):
        at = word * bits + k
        byte = tl.load(packed + at, mask=used & (at < (n * bits + 7) // 8), other=0)
        value |= byte.to(tl.int64) << (8 * k)
    places = tl.arange(0, 8).to(tl.int64) * bits
    return ((tl.expand_dims(value, len(value.shape)) >> places) & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def pack(codes: Any, packed: Any, n: Any, bits: tl.constexpr, tile: tl.constexpr) -> None:
    word = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = tl.load(codes + at, mask=at < n, other=0) & ((1 << bits) - 1)
    _write(packed, code, word, word * 8 < n, n, bits)


@triton.jit
def unpack(packed: Any, codes: Any, n: Any, bits: tl.constexpr, tile: tl.constexpr) -> None:
    word = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes + at, _read(packed, word, word * 8 < n, n, bits).to(tl.uint8), mask=at < n)


@triton.jit(do_not_specialize=["key", "salt"])
def quantise(
    x: Any, packed: Any, scales: Any, zeros: Any, key: Any, salt: Any, n: Any, group: Any,
    bits: tl.constexpr, noisy: tl.constexpr, centred: tl.constexpr, rows: tl.constexpr, words: tl.constexpr,
) -> None:  # fmt: skip
    """``scales`` and ``zeros`` are bits of bfloat16; ``key`` and ``salt`` are int64, of which the low half counts."""
    g = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    j = tl.arange(0, words)[:, None] * 8 + tl.arange(0, 8)[None, :]
    at = g[:, None, None] * group + j[None, :, :]
    used = (j < group)[None, :, :] & (at < n)
    value = tl.load(x + at, mask=used, other=0.0).to(tl.float32)
    v = value.to(tl.int32, bitcast=True)
    order = v ^ ((v >> 31) & 0x7FFFFFFF)
    low = tl.min(tl.min(tl.where(used, order, 0x7FFFFFFF), axis=2), axis=1)
    high = tl.max(tl.max(tl.where(used, order, -0x80000000), axis=2), axis=1)
    bottom = low ^ ((low >> 31) & 0x7FFFFFFF)
    peak = high ^ ((high >> 31) & 0x7FFFFFFF)
    below = (bottom + ((bottom >> 31) & 0xFFFF)) & -0x10000
    zero = below.to(tl.float32, bitcast=True)
    top: tl.constexpr = (1 << bits) - 1
    from_zero = (low == 0) | (low == -1)
    if noisy:
        from_zero = low != low
    parts = tl.where(from_zero, zero * 0 + top, zero * 0 + (top + 1 if centred else top))
    quotient = tl.div_rn(peak.to(tl.float32, bitcast=True) - zero, parts)
    step = (quotient.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    step = tl.where(step > 0, tl.maximum(step, 0x00800000), step)
    bad = (high >= 0x7F800000) | (low < -0x7F800000) | (step > 0x7E800000)
    none = bad | (step == 0)
    inverse = tl.div_rn(tl.full([rows], 1.0, tl.float32), tl.where(none, 0x3F800000, step).to(tl.float32, bitcast=True))
    count = (n + group - 1) // group
    start = tl.where(bad | (zero == 0), 0, below >> 16)
    tl.store(zeros + g, tl.where(from_zero & (bad == 0), -0x8000, start).to(tl.int16), mask=g < count)
    tl.store(scales + g, tl.where(bad, 0x7FC0, step >> 16).to(tl.int16), mask=g < count)
    t = (value - zero[:, None, None]) * inverse[:, None, None]
    if noisy:
        h = at.to(tl.uint32) ^ tl.cast(key, tl.uint32)
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = ((h ^ (h >> 15)) + tl.cast(salt, tl.uint32)) * 0x846CA68B
        draw = ((h ^ (h >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08
        code = t.to(tl.int32)
        code = tl.minimum(code + (draw < t - code.to(tl.float32)).to(tl.int32), top)
    else:
        down = t.to(tl.int32)
        near = tl.minimum(down, top) if centred else (t + 8388608.0).to(tl.int32, bitcast=True) & 255
        up = tl.minimum(down + (down.to(tl.float32) < t).to(tl.int32), top)
        code = tl.where(from_zero[:, None, None], up, near)
    code = tl.where(used & (none == 0)[:, None, None], code, 0)
    word = g[:, None] * (group // 8) + tl.arange(0, words)[None, :]
    _write(packed, code, word, (tl.arange(0, words) * 8 < group)[None, :] & (word * 8 < n), n, bits)


@triton.jit
def dequantise(
    packed: Any, scales: Any, zeros: Any, out: Any, n: Any, group: Any,
    bits: tl.constexpr, centred: tl.constexpr, rows: tl.constexpr, words: tl.constexpr,
) -> None:  # fmt: skip
    """``zeros`` are bits of bfloat16."""
    g = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    word = g[:, None] * (group // 8) + tl.arange(0, words)[None, :]
    used = (tl.arange(0, words) * 8 < group)[None, :] & (word * 8 < n)
    code = _read(packed, word, used, n, bits)
    count = (n + group - 1) // group
    scale = tl.load(scales + g, mask=g < count, other=0.0).to(tl.float32)[:, None, None]
    zero = tl.load(zeros + g, mask=g < count, other=0).to(tl.int32)[:, None, None]
    from_zero = (zero & 0xFFFF) == 0x8000
    zero = (zero << 16).to(tl.float32, bitcast=True)
    at = word[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    steps = code.to(tl.float32)
    above = tl.maximum(steps - 0.5, 0.0) * scale
    value = tl.where(from_zero, above, (steps + (0.5 if centred else 0.0)) * scale + zero)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=used[:, :, None] & (at < n))


@triton.jit
def bucketize(
    x: Any, boundaries: Any, packed: Any, n: Any, count: tl.constexpr, bits: tl.constexpr, tile: tl.constexpr
) -> None:
    word = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    code = tl.zeros([tile, 8], tl.int32)
    for k in tl.static_range(count):
        code += tl.where(value <= tl.load(boundaries + k), 0, 1)
    _write(packed, tl.where(at < n, code, 0), word, word * 8 < n, n, bits)


@triton.jit
def gather(packed: Any, levels: Any, grad: Any, out: Any, n: Any, bits: tl.constexpr, tile: tl.constexpr) -> None:
    word = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    level = tl.load(levels + _read(packed, word, word * 8 < n, n, bits))
    value = tl.load(grad + at, mask=at < n, other=0.0)
    tl.store(out + at, (value * level).to(out.dtype.element_ty), mask=at < n)
