"""Tensors as few-bit codes with a step and a minimum for each group of elements.

In a group with minimum l and maximum h, ``zero`` is l rounded down and ``scale`` is (h - zero) / (2^bits - 1) rounded
up, both to bfloat16, so that the codes' range holds every element: c = round((x - zero) / scale), x' = zero + scale c.
With ``centred`` the range is cut into 2^bits parts that come back as their centres: scale = (h - zero) / 2^bits,
c = floor((x - zero) / scale), x' = zero + scale (c + 1/2), a smaller step where bits are few.

A group whose minimum is 0 is cut so above 0 and keeps 0 itself apart, so that zeros and nothing else come back as zeros
(a ReLU's output says by them where its gradient passes): scale = h / (2^bits - 1), c = ceil(x / scale),
x' = scale (c - 1/2), or 0. Its ``zero`` is -0. Not so under stochastic rounding, whose levels are the first ones.

Sources: group-wise affine codes with stochastic rounding are those of J. Chen et al., "ActNN: reducing training memory
footprint via 2-bit activation compressed training", ICML 2021; the rounding of step and minimum is this file's own. The
hash has the form and constants of C. Wellons' lowbias32 (2018, public domain).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.bits import (
    check_packed,
    pack_bits_reference,
    packed_bytes,
    unpack_bits_reference,
)
from weft.kernels.compiled import FLOATS, NATIVE, check_tensor, check_whole, operator, share

LARGEST_GROUP = 1024
WORD = 0xFFFFFFFF
SMALLEST, LARGEST = 0x00800000, 0x7E800000  # the bits of 2^-126 and 2^126, between which a float32 has a normal inverse


def quantise_groups(
    x: Tensor, bits: int, group: int = 64, seed: int | None = None, centred: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x as `weft.kernels.bits` packs them, and scale and zero of each group of consecutive elements.

    With G = ceil(N / group) groups there are ``ceil(N * bits / 8) + 4 G`` bytes. Let x' be what `dequantise_groups`
    returns as float32, s a group's scale, top = 2^bits - 1 and e = 2^-24. Then

    - rounding to nearest: ``|x - x'| <= s (1/2 + 4 top e) + e |x'|``;
    - stochastic rounding: ``|x - x'| < s (1 + 4 top e) + e |x'|``, and the mean over seeds is x up to
      ``s (4 top + 1) e + e max|x'|``;
    - ``s <= (1 + 2^-7) (h - l + 2^-7 |l|) / top (1 + 3 e)``, or 2^-126 if that is larger: the step costs as much of the
      group's range as bfloat16 resolves of its minimum; with ``centred`` the same with 2^bits for top. A group of
      equal elements that bfloat16 holds and are not positive beside a zero is exact.

    The first follows from four facts. The difference x - zero, 1 / s and their product are rounded once each, so the
    quotient v is within 3.01 e of itself; v is at most top (1 + 5.01 e), as s is at most 2 e too small after its own
    two roundings and before it is rounded up; no code but top is nearest to what exceeds top so little; and s c has 16
    significant bits and is exact, so that only the sum is rounded in x'. For float64 add e |x|, and for a result in a
    half type half a unit of its last place. Where float32 underflows, all this is up to 2^-126.

    A group that holds an infinite or undefined element, or whose scale would exceed 2^126, comes back as nan.

    Args:
        x: N elements in any shape, float32, float64, float16 or bfloat16; computed with in float32.
        bits: 1 to 8.
        group: elements of a group, a multiple of 8 up to 1024; the last group may have fewer.
        seed: None rounds to nearest; a whole number, stochastically: a code is rounded up with the probability of its
            fraction, by a hash of the seed and the element's index modulo 2^32, the same on every device.
        centred: levels at the centres of 2^bits equal parts; to nearest only.

    Returns:
        The bytes, uint8 ``[ceil(N * bits / 8)]``; scale and zero, bfloat16 ``[G]``.

    Raises:
        UsageError: for another dtype or layout, other bits, group or seed.
    """
    x = check_tensor("x", x, FLOATS)
    _check(bits, group)
    if seed is not None:
        check_whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        if centred:
            raise UsageError("seed and centred: centres are levels for rounding to nearest; leave one of the two out")
    if x.dtype not in NATIVE:
        x = x.float()
    return _quantise(x.reshape(-1).contiguous(), bits, group, seed, centred)


def dequantise_groups(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    group: int = 64,
    centred: bool = False,
) -> Tensor:
    """``zero + scale * code`` (or the centres) in ``shape``, computed in float32 and rounded to ``dtype``.

    Args:
        codes: the bytes of N elements, uint8.
        scale: bfloat16 ``[G]``.
        zero: bfloat16 ``[G]``.
        shape: with N elements.
        dtype: float32, float64, float16 or bfloat16.
        bits: as given to `quantise_groups`.
        group, centred: as given to `quantise_groups`.

    Raises:
        UsageError: where these do not fit together.
    """
    _check(bits, group)
    if dtype not in FLOATS:
        raise UsageError(f"dtype={dtype}: give one of {', '.join(map(str, FLOATS))}")
    n = math.prod(shape)
    codes = check_packed(codes, n, bits)
    scale, zero = (check_tensor(name, t, (torch.bfloat16,), 1) for name, t in (("scale", scale), ("zero", zero)))
    count = -(-n // group)
    if scale.shape[0] != count or zero.shape[0] != count:
        raise UsageError(f"{len(scale)} scales, {len(zero)} zeros: {n} elements in groups of {group} have {count} each")
    kept = dtype if dtype in NATIVE else torch.float32
    out = _dequantise(codes, scale.contiguous(), zero.contiguous(), n, kept, bits, group, centred)
    return out.to(dtype).view(tuple(shape))


def _check(bits: int, group: int) -> None:
    check_whole("bits", bits, 1, 8)
    check_whole("group", group, 8, LARGEST_GROUP)
    if group % 8:
        raise UsageError(f"group={group}: give a multiple of 8 up to {LARGEST_GROUP}")


def keys(seed: int) -> tuple[int, int]:
    """Two 32-bit words from a seed of 64 bits."""
    low, high = seed & WORD, seed >> 32 & WORD
    key = _mix(low ^ _mix(high ^ 0x9E3779B9))
    return key, _mix(key ^ 0x85EBCA6B ^ high)


def _mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x7FEB352D & WORD
    h = (h ^ h >> 15) * 0x846CA68B & WORD
    return h ^ h >> 16


def uniform_reference(count: int, seed: int, device: torch.device | None = None) -> Tensor:
    """What stochastic rounding compares the fractions of elements ``0 .. count`` with: in [0, 1), ``[count]``."""
    key, salt = keys(seed)
    h = (torch.arange(count, device=device) & WORD) ^ key
    h = (h ^ h >> 16) * 0x7FEB352D & WORD
    h = ((h ^ h >> 15) + salt & WORD) * 0x846CA68B & WORD
    return ((h ^ h >> 16) >> 8).float() * 2.0**-24


def quantise_groups_reference(
    x: Tensor, bits: int, group: int, seed: int | None, centred: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantise_groups` in plain torch, for x ``[N]``."""
    n, top = len(x), (1 << bits) - 1
    if n == 0:
        none = x.new_empty(0, dtype=torch.bfloat16)
        return x.new_empty(0, dtype=torch.uint8), none, none.clone()
    x = x.float()
    rows = torch.cat([x, x[-1:].expand(-n % group)]).view(-1, group)
    good = rows.isfinite().all(1, keepdim=True)
    rows = torch.where(good, rows, 0.0)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    bottom = low.view(torch.int32)
    zero = (bottom + (bottom >> 31 & 0xFFFF) & -0x10000).view(torch.float32)
    zero = torch.where(zero == 0, 0.0, zero)
    from_zero = (low == 0) & (seed is None)
    step = ((high - zero) / torch.where(from_zero, top, top + centred)).view(torch.int32) + 0xFFFF & -0x10000
    step = torch.where(step > 0, step.clamp_min(SMALLEST), step)
    good &= step <= LARGEST
    rows, zero = torch.where(good, rows, 0.0), torch.where(good, zero, 0.0)
    scale = torch.where(good, step.view(torch.float32), torch.nan)
    v = (rows - zero) * torch.where(good & (step > 0), 1 / scale, 0.0)
    if seed is None:
        codes = torch.where(from_zero, v.ceil(), v.floor() if centred else v.round()).clamp_max(top)
        zero = torch.where(from_zero & good, -0.0, zero)
    else:
        draws = uniform_reference(rows.numel(), seed, x.device).view_as(v)
        codes = (v.floor() + (draws < v - v.floor())).clamp_max(top)
    packed = pack_bits_reference(codes.to(torch.uint8).flatten()[:n], bits)
    return packed, scale.flatten().bfloat16(), zero.flatten().bfloat16()


def dequantise_groups_reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    n: int,
    dtype: torch.dtype,
    bits: int,
    group: int,
    centred: bool = False,
) -> Tensor:
    """`dequantise_groups` in plain torch, ``[n]``."""
    c = unpack_bits_reference(codes, bits, n).float()
    c = torch.cat([c, c.new_zeros(-n % group)]).view(-1, group)
    scale, zero = scale.float()[:, None], zero.float()[:, None]
    from_zero = (zero == 0) & zero.signbit()
    values = torch.where(from_zero, (c - 0.5).clamp_min(0) * scale, (c + 0.5 * centred) * scale + zero)
    return values.to(dtype).flatten()[:n].clone()


def _empty_codes(x: Tensor, bits: int, group: int, seed: int | None, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    packed = x.new_empty(packed_bytes(x.shape[0], bits), dtype=torch.uint8)
    count = (x.shape[0] + group - 1) // group
    return packed, x.new_empty(count, dtype=torch.bfloat16), x.new_empty(count, dtype=torch.bfloat16)


def _empty_values(
    codes: Tensor, scale: Tensor, zero: Tensor, n: int, dtype: torch.dtype, bits: int, group: int, centred: bool
) -> Tensor:
    return codes.new_empty(n, dtype=dtype)


def _quantise_cpu(x: Tensor, bits: int, group: int, seed: int | None, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    from weft.kernels.cpu import packing as loops

    packed, scale, zero = _empty_codes(x, bits, group, seed, centred)
    arrays = (*loops.bits_of(x), packed.numpy(), loops.bits_of(scale)[1], loops.bits_of(zero)[1])
    rest = bits, group, seed is not None, *map(loops.u32, keys(seed or 0)), centred
    unit = loops.BLOCK // group * group
    share(lambda start, stop: loops.quantise(*arrays, *loops.group_scratch(), start, stop, *rest), len(x), unit)
    return packed, scale, zero


def _dequantise_cpu(
    codes: Tensor, scale: Tensor, zero: Tensor, n: int, dtype: torch.dtype, bits: int, group: int, centred: bool
) -> Tensor:
    from weft.kernels.cpu import packing as loops

    out = codes.new_empty(n, dtype=dtype)
    arrays = (codes.numpy(), loops.bits_of(scale)[1], loops.bits_of(zero)[1], *loops.bits_of(out))
    unit = loops.BLOCK // group * group
    share(lambda start, stop: loops.dequantise(*arrays, *loops.scratch(), start, stop, bits, group, centred), n, unit)
    return out


def _quantise_cuda(x: Tensor, bits: int, group: int, seed: int | None, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    from weft.kernels.cuda import packing as loops

    made = _empty_codes(x, bits, group, seed, centred)
    args = x, made[0], loops.unsigned(made[1]), loops.unsigned(made[2]), *keys(seed or 0)
    loops.launch_groups(loops.quantise, len(x), group, *args, bits=bits, noisy=seed is not None, centred=centred)
    return made


def _dequantise_cuda(
    codes: Tensor, scale: Tensor, zero: Tensor, n: int, dtype: torch.dtype, bits: int, group: int, centred: bool
) -> Tensor:
    from weft.kernels.cuda import packing as loops

    out = codes.new_empty(n, dtype=dtype)
    loops.launch_groups(loops.dequantise, n, group, codes, scale, loops.unsigned(zero), out, bits=bits, centred=centred)
    return out


_quantise = operator(
    "quantise_groups(Tensor x, int bits, int group, int? seed, bool centred) -> (Tensor, Tensor, Tensor)",
    quantise_groups_reference,
    fake=_empty_codes,
    cpu=_quantise_cpu,
    cuda=_quantise_cuda,
)
_dequantise = operator(
    "dequantise_groups(Tensor codes, Tensor scale, Tensor zero, SymInt n, ScalarType dtype, int bits, int group,"
    " bool centred) -> Tensor",
    dequantise_groups_reference,
    fake=_empty_values,
    cpu=_dequantise_cpu,
    cuda=_dequantise_cuda,
)
