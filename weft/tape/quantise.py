"""Keep what autograd saves at 1, 2, 4 or 8 bits an element, with a scale and a zero for each group of elements.

A group g of at most 64 consecutive elements has z = min(g) and s = (max(g) - z) / (2^b - 1), both kept in bfloat16; an
element x is kept as the b-bit code q and comes back as x~,

    q = round((x - z) / s),   x~ = z + s q;

or stochastically, as in the paper, q = floor((x - z) / s + u) with u uniform on [0, 1), so that E[x~] = x up to the
rounding of z and s: then the gradient of a weight, linear in what its layer saved, is unbiased for the gradient that
arrives there, at more variance. Other operations are not linear in what they saved: a ReLU loses the gradient of each
output that is rounded to 0. The forward pass is not touched.

To nearest only, two things lower a gradient's error. With 1 or 2 bits the range is cut into 2^b parts that come back as
their centres, s = (max(g) - z) / 2^b, x~ = z + s (q + 1/2). And in a group whose minimum is 0 zeros and nothing else
come back as zeros, since a ReLU's backward pass reads its mask from its output. A tensor with a group whose range is
above 8,192 or not finite stays as it is: half a level of an attention mask (0 beside -1e9, say) is more than the
softmax, which is computed again from it, can bear.

Three kinds of tensors are kept more exactly than that, as their errors would grow from layer to layer. One of two
values, a dropout's mask, is exact in one bit for each element. Queries, keys and values on their way into attention
have 4 bits at least, since fused attention takes the exponential of their products again. Probabilities (of a softmax,
or views [..., T, T] of such maps) have 8, since their sums are taken for 1.

In the authors' code, too, groups run through memory and parameters have 16 bits. There groups have 256 elements of one
sample, rounding is stochastic, a ReLU keeps one exact bit, and each sample in each layer gets bits of its own, on
average as many as were asked for, from its groups' ranges and its layer's gradients; here all tensors have the same.

Paper: "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training", Jianfei Chen, Lianmin
Zheng, Zhewei Yao, Dequan Wang, Ion Stoica, Michael W. Mahoney, Joseph E. Gonzalez, 2021, arXiv:2104.14129.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.kernels.bits import pack_bits, unpack_bits
from weft.kernels.compiled import FLOATS
from weft.kernels.groups import dequantise_groups, quantise_groups
from weft.method import method
from weft.session import Hold, Kept, Reference, Saved, Tape
from weft.testing.example import Example
from weft.testing.savings import savings

WIDEST = 2.0**13  # range of a group: above activations, below the -1e4 of attention masks
# What makes heads [B, H, T, D] of a projection's output.
SPLIT = {f"{name}Backward" for name in ("Unbind", "Transpose", "Permute", "View", "Select", "Split", "SplitWithSizes")}
CENTRED = 2  # bits up to which levels at the centres have the smaller error
ERRORS = {1: 1.5, 2: 0.7, 4: 0.2, 8: 0.02}  # of a gradient, by bits: about twice what small networks showed


@method(
    "quantise",
    contract="tape",
    family="tape",
    papers=[],
    variants={
        "quantise-stochastic": {"options": {"rounding": "stochastic"}, "summary": "Stochastic rounding of groups."}
    },
)
class Quantise(Tape):
    """Group quantisation of what is kept: ``with weft.tape.Quantise(bits=2).on(model): ...``.

    Args:
        bits: 1, 2, 4 or 8 for each element.
        group: elements that share a scale and a zero, a multiple of 8, at most 64; 32 more bits for each.
        rounding: ``"nearest"``, or ``"stochastic"`` for gradients of linear layers that are right in the mean.
        seed: of stochastic rounding.

    Raises:
        UsageError: for other values.
    """

    def __init__(self, *, bits: int = 4, group: int = 64, rounding: str = "nearest", seed: int = 0) -> None:
        if bits not in ERRORS:
            raise UsageError(f"bits={bits!r}; it is one of {', '.join(map(str, ERRORS))}")
        if not (isinstance(group, int) and 8 <= group <= 64 and group % 8 == 0):
            raise UsageError(f"group={group!r}; it is a multiple of 8, at most 64")
        if rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding={rounding!r}; it is 'nearest' or 'stochastic'")
        self.bits, self.group, self.rounding, self.seed = bits, group, rounding, int(seed)
        self.error = ERRORS[bits] * (3 if rounding == "stochastic" else 1)
        self.centred = rounding == "nearest" and bits <= CENTRED
        self._count = 0

    def __str__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits})"

    def enter(self, hold: Hold) -> None:
        self.clock += 1
        self._count = 0

    def takes(self, saved: Saved) -> bool:
        return saved.dtype in FLOATS and super().takes(saved)

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        seed = None
        if self.rounding == "stochastic":
            self._count += 1
            seed = hash((self.seed, self.clock, self._count)) % 2**31
        ends = two_values(tensor) if saved.producer is None and not saved.part else None
        if ends is not None:
            return Kept.of(tensor, pack_bits((tensor == ends[1]).to(torch.uint8), 1), ends)
        bits = max(self.bits, least_bits(saved))
        centred = self.centred and bits <= CENTRED
        codes, scale, zero = quantise_groups(tensor, bits, self.group, seed, centred)
        if not bool((scale <= WIDEST / 2**bits).all()):  # nan where the range is not finite
            return Kept.of(tensor, tensor)
        return Kept.of(tensor, codes, scale, zero, meta=(bits, centred))

    def unpack(self, kept: Kept) -> Tensor:
        if len(kept.tensors) == 1:
            return kept.tensors[0]
        if len(kept.tensors) == 2:
            packed, ends = kept.tensors
            return ends[unpack_bits(packed, 1, kept.shape.numel()).long()].view(kept.shape)
        codes, scale, zero = kept.tensors
        bits, centred = kept.meta
        return dequantise_groups(codes, scale, zero, kept.shape, kept.dtype, bits, self.group, centred)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Of an ordinary tensor; masks take less, heads and probabilities more, see `least_bits`."""
        numel = math.prod(shape)
        return math.ceil(numel * self.bits / 8) + 4 * math.ceil(numel / self.group)


def two_values(x: Tensor) -> Tensor | None:
    """The smaller and the larger value ``[2]`` of a tensor that has no others, or None."""
    low, high = torch.aminmax(x)
    return torch.stack([low, high]) if bool(((x == low) | (x == high)).all()) else None


def least_bits(saved: Saved) -> int:
    """Bits below which an error grows from layer to layer: of probabilities, and of what goes into fused attention."""
    producer = (saved.producer or "").rstrip("0123456789")
    square = len(saved.shape) > 2 and saved.shape[-1] == saved.shape[-2]
    if producer in ("SoftmaxBackward", "SafeSoftmaxBackward") or (square and producer in SPLIT):
        return 8
    return 4 if len(saved.shape) == 4 and producer in SPLIT else 1


def example() -> Example:
    """Two bits, the coarsest that trains networks."""
    return Example(None, None, torch.empty(0), {"bits": 2})


def _kept_as(tape: Tape, x: Tensor) -> tuple[Tensor, int]:
    """What comes back of x, and the bytes that were kept."""
    model = torch.nn.Identity()
    with tape.on(model) as session:
        leaf = x.clone().requires_grad_()
        loss = (leaf * 1).square().sum() / 2  # whose gradient is what was kept
        held = session.total_bytes
        (back,) = torch.autograd.grad(loss, leaf)
    return back, held


@claim(
    "what comes back is off by half a level at most, in b bits an element and 32 for each group",
    mutants={
        "larger groups": ("= bits, group, rounding, int(seed)", "= bits, 2 * group, rounding, int(seed)"),
        "a bit less": ("quantise_groups(tensor, bits,", "quantise_groups(tensor * 0.9, bits,"),
        "levels at the ends": (
            "kept.shape, kept.dtype, bits, self.group, centred",
            "kept.shape, kept.dtype, bits, self.group, False",
        ),
        "codes on ends": ('rounding == "nearest" and bits <= CENTRED', "False"),
    },
)
def half_a_level(seed: int) -> list[Check]:
    """Against levels of a float64 grid over each group of 48 of a normal sample with an offset, for 1, 2, 4 and 8 bits.

    The bfloat16 of z and s moves levels by up to 2^-8 of |z| and of the range, which the bound has in it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(200, 48, generator=generator, dtype=torch.float64) + 0.5).float()
    low, high = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
    checks = []
    for bits in (1, 2, 4, 8):
        back, held = _kept_as(Quantise(bits=bits, group=48), x)
        parts = 2**bits if bits <= 2 else 2**bits - 1
        most = (high - low) * (0.5 / parts + 2.0**-7) + low.abs() * 2.0**-7
        checks.append(Check(float(((back.double() - x.double()).abs() / most).max()), 1.0, what=f"error, {bits} bits"))
        checks.append(Check(held, x.numel() * bits / 8 + 200 * 4, "==", what=f"bytes, {bits} bits"))
    return checks


@claim(
    "stochastic rounding is unbiased: in the mean over draws x comes back, and a linear layer's gradient is exact",
    mutants={
        "to nearest": ('        if self.rounding == "stochastic":', '        if self.rounding == "none":'),
        "one draw for all": ("hash((self.seed, self.clock, self._count))", "hash(self.seed)"),
        "the same draw each session": ("self.clock += 1", "self.clock = 0"),
    },
)
def unbiased(seed: int) -> list[Check]:
    """Standard errors of the mean of 400 draws of 2 bits from x, in the largest of all elements, and of a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (torch.randn(*s, generator=generator) for s in ((128, 64), (32, 64), (128, 32)))
    tape, draws, total = Quantise(bits=2, rounding="stochastic", seed=seed), 400, torch.zeros(128, 64).double()
    sums = torch.zeros(2, 32, 64, dtype=torch.float64)
    for _ in range(draws):
        layer = torch.nn.Linear(64, 32, bias=False)
        layer.weight = torch.nn.Parameter(weight)
        with tape.on(layer):
            layer(x * 1).backward(grad)
        found = layer.weight.grad
        assert found is not None
        sums += torch.stack([found.double(), found.double() ** 2])
        total += _kept_as(tape, x)[0].double()
    exact = grad.double().t() @ x.double()
    spread = ((sums[1] / draws - (sums[0] / draws) ** 2) / draws).sqrt()
    off = float(((sums[0] / draws - exact) / spread).abs().max())
    range_ = x.double().amax(1, keepdim=True) - x.double().amin(1, keepdim=True)
    bias = ((total / draws - x.double()).abs() / (range_ / 3 / 2 / draws**0.5)).max()
    return [
        Check(off, 6.5, what="standard errors of the gradient's mean"),
        Check(float(bias), 6.5 + 0.5, what="standard errors of the mean of what comes back, at most"),
    ]


@claim(
    "a dropout's mask is exact in one bit an element, and gradients of attention stay near at 2 bits",
    mutants={
        "masks as all else": ("ends = two_values(tensor)", "ends = None and two_values(tensor)"),
        "the smaller value twice": ("torch.stack([low, high])", "torch.stack([low, low])"),
        "probabilities as all else": ("        return 8\n", "        return 1\n"),
    },
)
def masks_and_probabilities(seed: int) -> list[Check]:
    """Bytes and values of a mask; the larger error of the gradients of logits and values, attention being narrow."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(96, 64, generator=generator) < 0.9).float() / 0.9
    with Quantise(bits=2).on(torch.nn.Identity()) as session:
        leaf = torch.randn(96, 64, generator=generator).requires_grad_()
        loss = (leaf * mask).sum()
        held = session.total_bytes
        (back,) = torch.autograd.grad(loss, leaf)
    logits, value = (torch.randn(4, 128, n, generator=generator) for n in (128, 64))
    into = torch.randn(4, 128, 64, generator=generator)
    logits, value = (logits * 4).requires_grad_(), value.requires_grad_()

    def gradients(tape: Tape) -> tuple[Tensor, ...]:
        with tape.on(torch.nn.Identity()):
            chances = logits.softmax(-1).view(4, 128, 128)
            return torch.autograd.grad(chances @ value, [logits, value], into)

    pairs = zip(gradients(Quantise(bits=2)), gradients(Reference()), strict=True)
    off = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    return [
        Check(held, 96 * 64 / 8 + 8, "==", what="bytes of the mask"),
        Check(float((back - mask).abs().max()), 0.0, "==", what="error of the mask"),
        Check(off, 0.7, what="gradient error of attention"),
    ]


@claim(
    "2 bits keep 10 times fewer bytes of a 6-layer transformer at a gradient error of 0.2 and 3 times less peak, 4 "
    "bits 6 times fewer at 0.05; a step takes 1.2 of plain at most",
    tier="slow",
    budget=120.0,
    mutants={
        "statistics too": (
            "    def pack(self",
            "    def takes(self, saved: Saved) -> bool:\n        return saved.numel > 1\n\n    def pack(self",
        ),
        "smaller groups": ("= bits, group, rounding, int(seed)", "= bits, group // 4, rounding, int(seed)"),
    },
)
def transformer_step(seed: int) -> list[Check]:
    """Width 256, length 256, batch 8, 65 tokens, one thread; the error is the mean of the layers' relative errors."""
    two, four = savings(Quantise(bits=2), seed, rounds=5), savings(Quantise(bits=4), seed)
    return [
        Check(two["kept"], 10.0, ">=", what="kept bytes of plain to 2 bits"),
        Check(two["error"], 0.2, what="gradient error, 2 bits"),
        Check(two["peak"], 3.0, ">=", what="peak of plain to 2 bits, gradients allocated before"),
        Check(two["time"], 1.2, what="step, 2 bits to plain"),
        Check(four["kept"], 6.0, ">=", what="kept bytes of plain to 4 bits"),
        Check(four["error"], 0.05, what="gradient error, 4 bits"),
    ]
