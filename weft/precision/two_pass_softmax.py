"""Find a softmax without its row's maximum: each exponential is a mantissa and an exponent, which cannot overflow.

    e^x = p 2^n,   n = round(x log2 e),   p = e^(x - n ln 2) in [0.7, 1.5]
    first pass:   (m, E) <- (m 2^(E - E') + sum p 2^(n - E'), E'),   E' = max(E, n)
    second pass:  y = p 2^(n - E) / m

The usual three passes read the row for its maximum, for the sum and for the outputs. Here n stays a float, and ln 2 is
taken off in parts, so that x - n ln 2 is right at the far ends: in two parts with fused products, as the loops for CPUs
do it, or in three of few bits. In the loops E is raised only when an exponent is 24 above it, and p is a polynomial of
degree 5 as in the paper, fitted anew. Long rows are shared by threads. With ``method="online"`` the first pass stores
p 2^(n - E) block by block, and the second scales it: half of the arithmetic for one write and one read more.

On one thread a row of a million floats takes some 0.7 of torch's time, 0.6 with "online", which is the faster one
wherever it was measured. What is small loses by the call. Most of the time of results above 32 MiB goes into fresh
pages of memory: the system is asked for huge ones. Compiled code, float64, autocast and CUDA are torch's.

Paper: "The Two-Pass Softmax Algorithm", Marat Dukhan, Artsiom Ablavatski, 2020, arXiv:2001.04438.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft import ops
from weft.claim import Check, claim
from weft.method import method
from weft.testing.example import Example

LN2 = 355 / 512, -217 * 2.0**-20, math.log(2) - 355 / 512 + 217 * 2.0**-20  # n times either of two is exact to 2^14
TAYLOR = [1 / math.factorial(k) for k in range(8)]


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """p and n of each exponential, float32."""
    n = (x * (1 / math.log(2))).round()
    t = x - n * LN2[0] - n * LN2[1] - n * LN2[2]
    p = torch.zeros_like(t)
    for coefficient in reversed(TAYLOR):
        p = p * t + coefficient
    return p, n


def two_passes(blocks: Sequence[Tensor]) -> list[Tensor]:
    """The softmax of all blocks together, float32 and finite, each read twice: the method in plain torch."""
    m, e = torch.zeros(()), torch.tensor(-1e6)
    for k in range(len(blocks)):
        p, n = pair(blocks[k])
        top = torch.maximum(e, n.amax())
        m = torch.ldexp(m, e - top) + torch.ldexp(p, n - top).sum()
        e = top
    outputs = []
    for k in range(len(blocks)):
        p, n = pair(blocks[k])
        outputs.append(torch.ldexp(p, n - e) / m)
    return outputs


@method(
    "two-pass-softmax",
    contract="function",
    family="precision",
    papers=[99],
    tags={"exact"},
    variants={
        "online-softmax": {
            "options": {"method": "online"},
            "summary": "Find a softmax without its row's maximum, with one exponential an element, stored and scaled.",
        }
    },
)
def softmax(x: Tensor, dim: int = -1, *, method: str = "two-pass") -> Tensor:
    """`weft.ops.softmax`: `torch.softmax` to 1e-6, by two passes over each row.

    Args:
        x: float32, or any dtype that `torch.softmax` takes, at torch's speed.
        dim: a row is what lies along it.
        method: ``"two-pass"`` or ``"online"``.

    Raises:
        UsageError: for a dimension that x does not have, a dtype without fractions or an unknown method.
    """
    return ops.softmax(x, dim, method)


def example() -> Example:
    """Rows that fill vectors and rows that do not, of numbers whose exponentials overflow."""
    x = 60 * torch.randn(6, 83, generator=torch.Generator().manual_seed(0))

    def plain(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    return Example(plain, (x,), torch.arange(6) % 2, {"dim": -1})


class _Counting(Sequence[Tensor]):
    """Blocks that count how often each is read."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.blocks, self.read = blocks, [0] * len(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, k: Any) -> Any:
        self.read[k] += 1
        return self.blocks[k]


def _rows(seed: int) -> list[Tensor]:
    """Rows of several lengths within -1e4 and 1e4: wide, narrow at both ends, rising, falling."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for length in (1, 17, 64, 1000, 5000):
        for scale, shift in ((1.0, 0.0), (30.0, 0.0), (2000.0, 0.0), (3.0, 9980.0), (3.0, -9980.0)):
            row = (scale * torch.randn(length, generator=generator) + shift).clamp(-1e4, 1e4)
            rows += [row, row.sort().values, row.sort(descending=True).values]
    return rows


@claim(
    "Each block of the input is read twice, no more, and outputs are those of softmax in float64 to 1e-6, without "
    "overflow, for inputs up to 1e4 and -1e4.",
    row=99,
    budget=3.0,
    mutants={
        "a pass for the maximum": (
            "m, e = torch.zeros(()), torch.tensor(-1e6)",
            "m, e = torch.zeros(()), max(pair(b)[1].amax() for b in (blocks[k] for k in range(len(blocks))))",
        ),
        "ln 2 in one part": ("t = x - n * LN2[0] - n * LN2[1] - n * LN2[2]", "t = x - n * sum(LN2)"),
        "ln 2 in two parts": ("- n * LN2[1] - n * LN2[2]", "- n * LN2[1]"),
        "no exponent": ("top = torch.maximum(e, n.amax())", "top = torch.zeros(())"),
        "the last exponent, not the highest": ("top = torch.maximum(e, n.amax())", "top = n.amax()"),
        "the sum is not scaled": ("torch.ldexp(m, e - top)", "m"),
        "few terms": ("range(8)", "range(5)"),
    },
)
def read_twice(seed: int) -> list[Check]:
    """Largest and smallest number of reads; largest error of any output; outputs that are not finite."""
    reads, worst, wild = [], 0.0, 0
    for row in _rows(seed):
        blocks = _Counting(row.split(256))
        y = torch.cat(two_passes(blocks))
        reads += blocks.read
        wild += int((~torch.isfinite(y)).sum())
        worst = max(worst, float((y.nan_to_num(9.0) - row.double().softmax(0)).abs().max()))
    return [
        Check(max(reads), 2, "==", "reads"),
        Check(min(reads), 2, "==", "reads"),
        Check(wild, 0, "==", "not finite"),
        Check(worst, 1e-6, what="error"),
    ]


@claim(
    "Either way gives torch's outputs to 1e-6 for inputs up to 1e4 and -1e4 along any dimension, 0 for -inf, nan where "
    "torch gives nan, and first and second derivatives and products with tangents to 1e-5.",
    row=99,
    budget=4.0,
    mutants={
        "turned round": ("y.movedim(-1, dim)", "y.flip(-1).movedim(-1, dim)", "weft.ops.exponentials"),
        "half precision": ("last = x.float()", "last = x.bfloat16().float()", "weft.ops.exponentials"),
        "gradient of the exponential": (
            "return softmax_rows_backward(y, grad), None",
            "return y * grad, None",
            "weft.ops.exponentials",
        ),
        "tangent of the exponential": (
            "        return _along(y, tangent)",
            "        return y * tangent",
            "weft.ops.exponentials",
        ),
        "second derivatives cut": (
            "return _along(y, grad), None",
            "return _along(y.detach(), grad) + 0 * y, None",
            "weft.ops.exponentials",
        ),
    },
)
def as_torch(seed: int) -> list[Check]:
    """Largest errors against float64; places where one is nan and the other is not."""
    generator, worst, odd, slope = torch.Generator().manual_seed(seed), 0.0, 0, 0.0
    torch.manual_seed(seed)
    for way in ("two-pass", "online"):
        for row in _rows(seed):
            worst = max(worst, float((softmax(row, method=way) - row.double().softmax(0)).abs().max()))
        for value in (-math.inf, math.inf, math.nan, 1e30, -1e30):
            x = torch.randn(4, 5, 90, generator=generator)
            x[torch.rand(4, 5, 90, generator=generator) < 0.2] = value
            x[1, 2] = value
            for dim in range(-3, 3):
                mine, wanted = softmax(x, dim, method=way), x.double().softmax(dim)
                odd += int((mine.isnan() != wanted.isnan()).sum())
                worst = max(worst, float((mine - wanted).nan_to_num(0.0).abs().max()))
        x, g, h = (3 * torch.randn(7, 50, generator=generator) for _ in range(3))

        def derivatives(function: Any, *given: Tensor) -> list[Tensor]:
            x, g, h = given
            x = x.clone().requires_grad_()
            (plain,) = torch.autograd.grad(function(x), x, g)
            (first,) = torch.autograd.grad(function(x), x, g, create_graph=True)
            (second,) = torch.autograd.grad(first, x, h)
            return [plain, first.detach(), second, torch.func.jvp(function, (x.detach(),), (h,))[1]]

        found = derivatives(lambda x, way=way: softmax(x, method=way), x, g, h)
        exact = derivatives(lambda x: torch.softmax(x, -1), x.double(), g.double(), h.double())
        for a, b in zip(found, exact, strict=True):
            slope = max(slope, float((a - b).abs().max() / max(1.0, float(b.abs().max()))))
    return [Check(worst, 1e-6), Check(odd, 0, "==", "nan"), Check(slope, 1e-5, what="derivatives")]


@claim(
    "In each call the loop of the way that was asked for runs, once, and what it writes is what comes out: the softmax "
    "in float64 to 1e-6, on short rows and by parts on long ones; so does the loop of the way back, to 1e-5.",
    row=99,
    budget=2.0,
    mutants={
        "torch's own": ("or x.ndim == 0 or", "or x.ndim >= 0 or", "weft.ops.exponentials"),
        "two-pass for either": (
            'stored, along_last = method != "two-pass",',
            "stored, along_last = False,",
            "weft.ops.exponentials",
        ),
        "online for either": (
            'stored, along_last = method != "two-pass",',
            "stored, along_last = True,",
            "weft.ops.exponentials",
        ),
        "the reference": ("cpu=_softmax_cpu", "cpu=softmax_rows_reference", "weft.kernels.exponentials"),
        "rows left to torch": ("odd = np.zeros(rows", "odd = np.ones(rows", "weft.kernels.exponentials"),
        "long rows as short ones": ("if columns >= 2 * int(loops.PART)", "if not columns", "weft.kernels.exponentials"),
        "the way back by operations": (
            "cpu=_back_cpu",
            "cpu=softmax_rows_backward_reference",
            "weft.kernels.exponentials",
        ),
    },
)
def by_the_loops(seed: int) -> list[Check]:
    """Runs too many or too few, and largest errors; each loop's output is doubled after it, and so is what is right."""
    from weft.kernels.cpu import exponentials as loops

    generator, ran = torch.Generator().manual_seed(seed), collections.Counter[str]()

    def double(name: str, *given: int) -> None:
        ran[name] += 1
        at, columns, start, stop = given[1:5] if "row" in name else given[2:]
        if name.startswith("long"):
            start, stop = 0, 1
        part = (ctypes.c_float * (columns * (stop - start))).from_address(at + 4 * start * columns)
        torch.frombuffer(part, dtype=torch.float32).mul_(2)

    off = slope = 0.0
    rows = (2000 * torch.randn(7, 300, generator=generator)).clamp(-1e4, 1e4)
    row, g = 3 * torch.randn(2 * int(loops.PART) + 5, generator=generator), torch.randn(7, 300, generator=generator)
    names = {"two-pass": ("rows", "long_row"), "online": ("rows_stored", "long_row_stored")}
    with contextlib.ExitStack() as stack:
        for name in ("back", *names["two-pass"], *names["online"]):
            stack.enter_context(getattr(loops, name).followed(functools.partial(double, name)))
        for way in names:
            for x in (rows, row):
                off = max(off, float((softmax(x, method=way) / 2 - x.double().softmax(-1)).abs().max()))
            x = rows.clone().requires_grad_()
            y = softmax(x / 2000, method=way)
            (found,) = torch.autograd.grad(y, x, g)
            right = 2 * (rows.double() / 2000).softmax(-1)
            right = 2 * right * (g - (g * right).sum(-1, keepdim=True))
            slope = max(slope, float((2000 * found - right).abs().max() / right.abs().max()))
    wanted = collections.Counter({"back": 2, **{short: 2 for short, _ in names.values()}})
    wanted.update(long for _, long in names.values())
    wrong = sum(abs(ran[name] - wanted[name]) for name in {*ran, *wanted})
    return [Check(wrong, 0, "==", "runs"), Check(off, 1e-6, what="outputs"), Check(slope, 1e-5, what="way back")]
