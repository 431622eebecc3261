"""Keep feature maps as bfloat16 means of blocks and, of what the means leave, 2 bits an element.

For a map x of H x W, B x B blocks, and Up that repeats a block's mean over the block:

    L = bf16(mean of each block),   R = x - Up(L),   m = min(R),   d = (max(R) - m) / (2^b - 1)
    code = floor((R - m) / d + u),  u uniform on [0, 1);   rebuilt  x~ = Up(L) + m + d code,   E[x~] = x

The forward pass is exact, and so is every gradient that does not read x (a convolution's by its input); a convolution's
weight gradient is unbiased. The means carry the low frequencies, which most of a smooth map's gradient depends on. R is
taken from the rounded means, and m (rounded down) and d (rounded up) have 16 bits before codes are made.

As in the authors' code, a map has one m and one d, and blocks are as small as the map where that is smaller; of rows
and columns that fill no block, theirs stretches the blocks, here the last block goes on. ReLU's output is read by ReLU
too, as a mask: there code 0 stands for zero and the others for what is above (theirs keeps a bit for each element as
well). Theirs packs the input of BatchNorm; here normalisation layers keep theirs, as with every tape.

Paper: "DIVISION: Memory Efficient Training via Dual Activation Precision", Guanchu Wang, Zirui Liu, Zhimeng Jiang,
Ninghao Liu, Na Zou, Xia Hu, 2022, arXiv:2208.04187.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.kernels.bits import pack_bits, unpack_bits
from weft.method import method
from weft.session import Hold, Kept, Reference, Saved, Tape
from weft.testing.example import Example

ERRORS = {2: 0.6, 4: 0.1, 8: 0.01}  # of a gradient, by bits; measured on small networks, with a margin of 2


def block_means(x: Tensor, block: int) -> Tensor:
    """bfloat16 means of whole blocks, ``[N, C, H // B, W // B]``, with B no larger than the map."""
    size = [min(block, n) for n in x.shape[2:]]
    return F.avg_pool2d(x, size, size).bfloat16()


def spread(means: Tensor, size: torch.Size, block: int, dtype: torch.dtype) -> Tensor:
    """Block means over their blocks, ``[N, C, H, W]``; the last ones over what is left at the edges."""
    rows, columns = (
        (torch.arange(n, device=means.device) // min(block, n)).clamp_max(count - 1)
        for n, count in zip(size[2:], means.shape[2:], strict=True)
    )
    return means.to(dtype)[:, :, rows[:, None], columns]


def steps(residual: Tensor, counted: Tensor | None, levels: int) -> tuple[Tensor, Tensor]:
    """Each map's lowest residual, at most, and the step that reaches its highest, bfloat16 ``[N, C, 1, 1]``.

    ``counted`` says which elements matter; a map without any has 0 for both.
    """
    low, high = residual, residual
    if counted is not None:
        low = residual.masked_fill(~counted, math.inf)
        high = residual.masked_fill(~counted, -math.inf)
    low, high = low.amin((2, 3), keepdim=True), high.amax((2, 3), keepdim=True)
    low, high = low.masked_fill(low == math.inf, 0), high.masked_fill(high == -math.inf, 0)
    zero = low.bfloat16()
    zero = torch.where(zero.to(low.dtype) > low, torch.nextafter(zero, torch.full_like(zero, -math.inf)), zero)
    exact = (high - zero.to(low.dtype)) / levels
    step = exact.bfloat16()
    step = torch.where(step.to(low.dtype) < exact, torch.nextafter(step, torch.full_like(step, math.inf)), step)
    return zero, step


@method("division", contract="tape", family="tape", papers=[44])
class Division(Tape):
    """Block means and a few bits of the rest: ``with weft.tape.Division().on(model): ...``.

    It takes maps ``[N, C, H, W]`` of at least 2 x 2; what else is saved stays as it is. Smooth maps gain most: of
    white noise the means tell nothing.

    Args:
        bits: 2, 4 or 8 for each element of the residual.
        block: B, the blocks' side.
        rounding: ``"stochastic"``, or ``"nearest"``: half the error in a map, but the same in every batch.
        seed: of stochastic rounding.

    Raises:
        UsageError: for other values.
    """

    def __init__(self, *, bits: int = 2, block: int = 8, rounding: str = "stochastic", seed: int = 0) -> None:
        if bits not in ERRORS:
            raise UsageError(f"bits={bits!r}; it is one of {', '.join(map(str, ERRORS))}")
        if not isinstance(block, int) or block < 1:
            raise UsageError(f"block={block!r}; it is a number of rows and columns, at least 1")
        if rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding={rounding!r}; it is 'nearest' or 'stochastic'")
        self.bits, self.block, self.rounding, self.seed = bits, block, rounding, int(seed)
        self.error = ERRORS[bits]
        self._count = 0

    def __str__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits}, block={self.block})"

    def enter(self, hold: Hold) -> None:
        self.clock += 1
        self._count = 0

    def takes(self, saved: Saved) -> bool:
        shape = saved.shape
        return super().takes(saved) and saved.dtype.is_floating_point and len(shape) == 4 and min(shape[2:]) > 1

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        x = tensor if tensor.dtype == torch.float64 else tensor.float()
        means = block_means(x, self.block)
        residual = x - spread(means, x.shape, self.block, x.dtype)
        masked = saved.producer == "ReluBackward0"
        levels = 2**self.bits - 1 - masked  # code 0 is zero itself
        zero, step = steps(residual, x > 0 if masked else None, levels)
        place = (residual - zero) / torch.where(step > 0, step, 1).to(x.dtype)
        codes = (place + self._offsets(place)).floor().clamp(0, levels)
        codes = torch.where(x > 0, codes + 1, 0) if masked else codes
        packed = pack_bits(codes.to(torch.uint8).flatten(), self.bits)
        return Kept.of(tensor, means, packed, step, zero, meta=masked)

    def _offsets(self, like: Tensor) -> Tensor | float:
        if self.rounding == "nearest":
            return 0.5
        self._count += 1
        generator = torch.Generator(like.device).manual_seed(hash((self.seed, self.clock, self._count)) % 2**31)
        return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def unpack(self, kept: Kept) -> Tensor:
        means, packed, step, zero = kept.tensors
        dtype = torch.float64 if kept.dtype == torch.float64 else torch.float32
        codes = unpack_bits(packed, self.bits, math.prod(kept.shape)).view(kept.shape)
        x = spread(means, kept.shape, self.block, dtype)
        if not kept.meta:
            return (x + zero + step.to(dtype) * codes).to(kept.dtype)
        x = (x + zero + step.to(dtype) * (codes.to(dtype) - 1)).to(kept.dtype)
        return torch.where(codes > 0, x.clamp_min(torch.finfo(kept.dtype).tiny), 0)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        n, c, *size = shape
        cells = math.prod(side // min(self.block, side) for side in size)
        return 2 * n * c * cells + math.ceil(math.prod(shape) * self.bits / 8) + 4 * n * c


def example() -> Example:
    """Two bits and blocks of eight, as the authors have them."""
    return Example(None, None, torch.empty(0), {"bits": 2, "block": 8})


@claim(
    "a convolution on maps of at least 16 x 16 keeps at least 10 times fewer bytes, scales included, and what bytes() "
    "says; its output and the gradient of its input are bit-identical",
    row=44,
    mutants={
        "means in 32 bits": ("F.avg_pool2d(x, size, size).bfloat16()", "F.avg_pool2d(x, size, size)"),
        "four bits": ("bits: int = 2", "bits: int = 4"),
        "blocks of two": ("block: int = 8", "block: int = 2"),
        "another count": ("2 * n * c * cells", "4 * n * c * cells"),
    },
)
def convolution(seed: int) -> list[Check]:
    """For three sizes of map and two strides: the least ratio of bytes, and differences."""
    generator = torch.Generator().manual_seed(seed)
    least, off, mistaken = math.inf, 0, 0
    for size in (16, 17, 16 + seed % 25):
        layer = nn.Conv2d(6, 4, 3, padding=1, stride=1 + size % 2)
        x = torch.randn(5, 6, size, size + 5, generator=generator).requires_grad_()
        tape, results, kept = Division(), list[tuple[Tensor, Tensor]](), list[int]()
        for one in (Reference(), tape):
            with one.on(layer) as session:
                out = layer(x)
                kept.append(session.total_bytes)
                error = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
                results.append((out.detach(), torch.autograd.grad(out, x, error)[0]))
        least = min(least, kept[0] / kept[1])
        off += sum(not torch.equal(a, b) for a, b in zip(*results, strict=True))
        mistaken += kept[0] != 4 * x.numel() or kept[1] != tape.bytes(x.shape, x.dtype)
    return [
        Check(least, 10, ">=", "plain bytes beside kept ones"),
        Check(off, 0, "==", "outputs and input gradients that differ"),
        Check(mistaken, 0, "==", "sizes for which bytes() is wrong"),
    ]


@claim(
    "an element comes back within one step of its map's residual range, to one or the other side so that the mean over "
    "draws is right, and what was zero after ReLU is zero",
    row=44,
    mutants={
        "from means not rounded": (
            "residual = x - spread(means,",
            "residual = x - spread(F.avg_pool2d(x, self.block),",
        ),
        "a range for all maps": ("low.amin((2, 3), keepdim=True)", "low.amin((0, 1, 2, 3), keepdim=True)"),
        "rounded down": ("return torch.rand(like.shape", "return 0 * torch.rand(like.shape"),
        "not at random": ('rounding: str = "stochastic"', 'rounding: str = "nearest"'),
        "residual lost": ("step.to(dtype) * codes)", "step.to(dtype) * 0)"),
        "blocks by columns": ("[:, :, rows[:, None], columns]", "[:, :, rows.flip(0)[:, None], columns]"),
        "zeros not kept": ('saved.producer == "ReluBackward0"', "False"),
        "one draw for all": ("self._count += 1", "self._count = 1"),
    },
)
def residuals(seed: int) -> list[Check]:
    """The largest error in steps, and the mean error over 400 draws in standard errors, both in float64 by loops."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.01, 0.1, 1.0, 10.0]).view(1, 4, 1, 1)
    size = 17 + seed % 6  # not a multiple of the block
    x = torch.randn(3, 4, size, 2 * size, generator=generator) * scale + 100
    x += torch.arange(size).view(-1, 1) * 5 * scale
    cells = range(size // 8), range(2 * size // 8)
    step = torch.zeros(3, 4)
    for n in range(3):
        for c in range(4):
            rest = x[n, c].double().clone()
            for i in cells[0]:
                for j in cells[1]:
                    rows = slice(8 * i, None if i == cells[0][-1] else 8 * i + 8)
                    columns = slice(8 * j, None if j == cells[1][-1] else 8 * j + 8)
                    mean = x[n, c, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].double().mean()
                    rest[rows, columns] -= mean.float().bfloat16().double()
            step[n, c] = (rest.max() - rest.min()) / 3
    tape, total, worst = Division(), torch.zeros_like(x, dtype=torch.float64), 0.0
    saved = Saved("", nn.Conv2d, x.shape, x.dtype, None, x.numel())
    for _ in range(400):
        error = tape.unpack(tape.pack(x, saved)).double() - x
        total += error
        worst = max(worst, float((error.abs() / step[..., None, None]).max()))
    drift = total / 400 / (step[..., None, None] / 2 / 400**0.5)  # a step of two outcomes deviates by half at most
    y = torch.randn(4, 8, 16, 16, generator=generator).relu()
    back = tape.unpack(tape.pack(y, Saved("", nn.Conv2d, y.shape, y.dtype, "ReluBackward0", y.numel())))
    return [
        Check(worst, 1.05, what="largest error in steps"),
        Check(float(drift.abs().max()), 8, what="largest mean error in standard errors"),
        Check(int(((back > 0) != (y > 0)).sum()), 0, "==", "elements on the wrong side of zero"),
    ]


@claim(
    "of smooth maps it keeps more than 2 bits an element of the map itself do: its error is at most 0.7 of theirs, "
    "and a convolution's weight gradient by less than from the means alone",
    row=44,
    mutants={
        "no means": ("F.avg_pool2d(x, size, size).bfloat16()", "0 * F.avg_pool2d(x, size, size).bfloat16()"),
        "no residual": ("step.to(dtype) * codes)", "step.to(dtype) * 1.5)"),
        "one bit": ("levels = 2**self.bits - 1 - masked", "levels = 1"),
    },
)
def smooth_maps(seed: int) -> list[Check]:
    """Relative errors in norm, noise on every sixteenth pixel interpolated; 32 maps of 64 x 64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 8, 4, 5, 5, generator=generator)
    x, error = (F.interpolate(c, (64, 64), mode="bicubic", align_corners=True) for c in coarse)
    tape = Division(seed=seed)
    back = tape.unpack(tape.pack(x, Saved("", nn.Conv2d, x.shape, x.dtype, None, x.numel())))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    places = (x - low) / (high - low) * 3
    plain = (places + torch.rand(x.shape, generator=generator)).floor() / 3 * (high - low) + low
    means = F.interpolate(F.avg_pool2d(x, 8), (64, 64))

    def slope(maps: Tensor) -> Tensor:
        weight = torch.zeros(4, 4, 3, 3, requires_grad=True)
        return torch.autograd.grad(F.conv2d(maps, weight, padding=1), weight, error)[0]

    def off(maps: Tensor) -> tuple[float, float]:
        wanted = slope(x)
        return float((maps - x).norm() / x.norm()), float((slope(maps) - wanted).norm() / wanted.norm())

    return [
        Check(off(back)[0], 0.7 * off(plain)[0], what="error of the maps"),
        Check(off(back)[1], off(means)[1], what="error of the weight gradient"),
    ]
