"""Keep what autograd saves at 1, 2, 4 or 8 bits an element, with a scale and a zero for each group of elements.

A group g of at most 64 consecutive elements has z = min(g) and s = (max(g) - z) / (2^b - 1), both kept in bfloat16; an
element x is kept as the b-bit code q and comes back as x~,

    q = round((x - z) / s),   x~ = z + s q;

or stochastically, as in the paper, q = floor((x - z) / s + u) with u uniform on [0, 1), so that E[x~] = x up to the
rounding of z and s: then a weight's gradient, linear in what its layer saved, is unbiased, at more variance. The
forward pass is not touched. As in the authors' code, groups run through the tensor as it lies in memory and their
parameters have 16 bits.

Two things differ from the paper, to nearest only, both since they lower a gradient's error. With 1 or 2 bits the range
is cut into 2^b parts that come back as their centres, s = (max(g) - z) / 2^b, x~ = z + s (q + 1/2). And in a group
whose minimum is 0 zeros and nothing else come back as zeros, since a ReLU's backward pass reads its mask from its
output.

Paper: "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training", Jianfei Chen, Lianmin
Zheng, Zhewei Yao, Dequan Wang, Ion Stoica, Michael W. Mahoney, Joseph E. Gonzalez, 2021, arXiv:2104.14129.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.kernels.groups import dequantise_groups, quantise_groups
from weft.method import method
from weft.session import Hold, Kept, Saved, Tape
from weft.testing.example import Example
from weft.testing.savings import savings

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

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        seed = None
        if self.rounding == "stochastic":
            self._count += 1
            seed = hash((self.seed, self.clock, self._count)) % 2**31
        return Kept.of(tensor, *quantise_groups(tensor, self.bits, self.group, seed, self.centred))

    def unpack(self, kept: Kept) -> Tensor:
        codes, scale, zero = kept.tensors
        return dequantise_groups(codes, scale, zero, kept.shape, kept.dtype, self.bits, self.group, self.centred)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        numel = math.prod(shape)
        return math.ceil(numel * self.bits / 8) + 4 * math.ceil(numel / self.group)


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
        "a bit less": ("*quantise_groups(tensor, self.bits,", "*quantise_groups(tensor * 0.9, self.bits,"),
        "levels at the ends": (
            "kept.shape, kept.dtype, self.bits, self.group, self.centred",
            "kept.shape, kept.dtype, self.bits, self.group, False",
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
