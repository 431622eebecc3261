"""Keep two bits of an activation's input: backward through three ReLUs that are fitted to the function.

For h = GELU or SiLU the stand-in h~ is a sum of three ReLUs that meets h at both ends of the line,

    h~(x) = sum_i a_i max(x - c_i, 0),   sum_i a_i = 1,   sum_i a_i c_i = 0,   (a, c) = argmin int (h - h~)^2 dx.

Forward gives h itself. Backward gives dx = g h~'(x), the slope h~'(x) = sum of a_i over c_i < x, one of four values: an
index of two bits is all that is kept. It is h that is fitted, not h'; `few-bit-activation` fits h'.

Where h(x) - x / 2 is even, as here, the fit is in closed form but for one root: c = (-t, 0, t), a = (-e, 1 + 2e, -e),
h~ - h is u(|x|) - e max(t - |x|, 0) with u(x) = -h(-x), and both derivatives of the integral vanish at

    t int_0^t u = 3 int_0^t x u,   e = 6 int_0^t x u / t^3.

The authors' constants come from simulated annealing and lie within 0.03% of this minimum of the integral; they fit GELU
in its erf form alone.

Paper: "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation", Yuchen Yang, Yingdong
Shi, Cheems Wang, Xiantong Zhen, Yuxuan Shi, Jun Xu, 2024, arXiv:2406.16282.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported
from weft.kernels.step_lookup import bucketize_pack
from weft.measure import kept_bytes
from weft.method import method
from weft.ops.step_derivative import StepActivation, constants
from weft.testing.example import Example

FUNCTIONS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu-tanh": lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@functools.cache
def combined_relus(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Kinks c and slopes h~' between them, of the best three ReLUs for a function.

    Args:
        name: one of ``FUNCTIONS``; the function less x / 2 is even.

    Returns:
        Three kinks and four slopes.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def moments(t: float) -> tuple[float, float]:
        x = t * (nodes + 1) / 2
        u = np.array([-FUNCTIONS[name](-v) for v in x]) * weights * t / 2
        return float(u.sum()), float(u @ x)

    low, high = 1.0, 20.0  # t int u - 3 int x u is negative near 0 and positive far out
    for _ in range(60):
        t = (low + high) / 2
        total, first = moments(t)
        low, high = (t, high) if t * total < 3 * first else (low, t)
    e = 6 * moments(t)[1] / t**3
    return (-t, 0.0, t), (0.0, -e, 1 + e, 1.0)


@method("approximate-activation", contract="layer", family="tape", papers=[49], tags={"same-forward", "lean"})
class ApproximateActivation(StepActivation):
    """An ``nn.GELU`` (either form) or ``nn.SiLU`` that keeps two bits for each element: ReGELU2 and ReSiLU2.

    Args:
        layer: used, not copied.

    Raises:
        Unsupported: for other layers.
    """

    converts = (nn.GELU, nn.SiLU)

    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.GELU | nn.SiLU):
            raise Unsupported(f"{type(layer).__name__} is neither nn.GELU nor nn.SiLU", "few-bit-activation")
        tanh = isinstance(layer, nn.GELU) and layer.approximate == "tanh"
        kinks, slopes = combined_relus("gelu-tanh" if tanh else "gelu" if isinstance(layer, nn.GELU) else "silu")
        super().__init__(layer, slopes, 2)
        self.kinks = kinks

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> ApproximateActivation:
        """The layer with another derivative."""
        return cls(layer, **options)

    def index(self, x: Tensor) -> Tensor:
        """How many kinks lie below each element, two bits each."""
        return bucketize_pack(x, constants(self.kinks, x.device), 2)


def example() -> Example:
    """A GELU and a batch that it bends."""
    x = torch.linspace(-5, 5, 48).reshape(4, 12)
    return Example(nn.GELU(), x, torch.arange(4) % 2)


@claim(
    "the output is GELU's or SiLU's own to 1e-7 and two bits an element are kept, a sixteenth of float32",
    row=49,
    mutants={
        "three bits": ("constants(self.kinks, x.device), 2)", "constants(self.kinks, x.device), 3)"),
        "the input kept": (
            "ctx.save_for_backward(packed)",
            "ctx.save_for_backward(packed, x)",
            "weft.ops.step_derivative",
        ),
        "another forward": ("y = function(x)", "y = function(x).relu()", "weft.ops.step_derivative"),
    },
)
def two_bits(seed: int) -> list[Check]:
    """Bytes that a layer keeps, alone, for a number of elements that four divides."""
    generator, worst, ratios = torch.Generator().manual_seed(seed), 0.0, []
    x = (3 * torch.randn(8 + seed % 5, 52, generator=generator)).requires_grad_()
    for layer in (nn.GELU(), nn.GELU("tanh"), nn.SiLU()):
        mine = ApproximateActivation.from_dense(layer)
        worst = max(worst, float((mine(x) - layer(x)).detach().abs().max()))
        kept, plain = (kept_bytes(functools.partial(m, x), m).peak_bytes for m in (mine, layer))
        ratios.append(kept / plain)
    return [Check(worst, 1e-7, what="output"), Check(max(abs(16 * r - 1) for r in ratios), 0.0, what="16 x bytes - 1")]


@claim(
    "the three ReLUs meet the constraints, and others that meet them have a larger int (h - h~)^2, the authors' too",
    row=49,
    mutants={
        "no root": ("t * total < 3 * first", "t * total < 2 * first"),
        "height": ("e = 6 * moments(t)[1]", "e = 5 * moments(t)[1]"),
        "kink off the middle": ("return (-t, 0.0, t)", "return (-t, 0.05, t)"),
        "slopes upside down": ("(0.0, -e, 1 + e, 1.0)", "(0.0, e, 1 - e, 1.0)"),
        "other kinks": ("self.kinks = kinks", "self.kinks = (-1.0, 0.0, 1.0)"),
        "erf for tanh": ('"gelu-tanh" if tanh', '"gelu" if tanh'),
        "GELU for SiLU": ('else "silu")', 'else "gelu")'),
    },
)
def best_relus(seed: int) -> list[Check]:
    """Smallest relative rise of the integral over steps in twenty directions, each both ways."""
    random, checks = np.random.default_rng(seed), []
    nodes, weights = np.polynomial.legendre.leggauss(120)
    published = {  # a_1 and a_2, and c; a_3 is what is missing to 1
        "GELU": (-0.0492226114562, 1.0979632065417, -3.1858810036855, -0.0011788212812, 3.1908326134149),
        "SiLU": (-0.0406035719053, 1.0809254285297, -6.3050461001646, -0.0008684942046, 6.3258152420897),
    }
    for layer in (nn.GELU(), nn.GELU("tanh"), nn.SiLU()):

        def error(a: Iterable[float], c: Iterable[float], h: nn.Module = layer) -> float:
            """The integral over [-30, 30], where both have met their ends, by quadrature between kinks."""
            total, ends, kinks = 0.0, [-30.0, *c, 30.0], list(zip(a, c, strict=True))
            for low, high in itertools.pairwise(ends):
                x = (high - low) / 2 * nodes + (high + low) / 2
                stand_in = sum(size * np.maximum(x - kink, 0) for size, kink in kinks)
                total += float((h(torch.from_numpy(x)).numpy() - stand_in) ** 2 @ weights) * (high - low) / 2
            return total

        mine = ApproximateActivation.from_dense(layer)
        a, c = np.diff(mine.levels), np.array(mine.kinks)
        rises, least = [], error(a, c)
        for step in random.normal(size=(20, 4)) * [1e-4, 1e-4, 5e-3, 5e-3]:
            for sign in (-1, 1):
                a1, a3, c1, c3 = np.array([a[0], a[2], c[0], c[2]]) + sign * step
                a2 = 1 - a1 - a3
                rises.append(error((a1, a2, a3), (c1, -(a1 * c1 + a3 * c3) / a2, c3)) / least - 1)
        off = max(abs(a.sum() - 1), abs(a @ c), abs(mine.levels[0]))
        checks += [Check(off, 1e-12, what="constraints"), Check(min(rises), 0.0, ">", f"rise for {layer}")]
        if str(layer) != "GELU(approximate='tanh')":
            a1, a2, *kinks = published[type(layer).__name__]
            checks.append(Check(least, error((a1, a2, 1 - a1 - a2), kinks), "<", f"the authors' {layer}"))
    return checks


@claim(
    "the gradient is g times the slope of the three ReLUs at the input, in every dtype, in place too",
    row=49,
    mutants={
        "mirrored": ("bucketize_pack(x, constants", "bucketize_pack(-x, constants"),
        "slopes turned round": ("super().__init__(layer, slopes, 2)", "super().__init__(layer, slopes[::-1], 2)"),
        "index of the output": ("= index(x)", "= index(function(x.clone()))", "weft.ops.step_derivative"),
        "gradient lost": (
            "dx = gather_unpack(packed, constants(ctx.levels, grad.device), grad,",
            "dx = gather_unpack(packed, constants(ctx.levels, grad.device), torch.ones_like(grad),",
            "weft.ops.step_derivative",
        ),
    },
)
def slopes_of_relus(seed: int) -> Check:
    """Largest error against autograd through the three ReLUs themselves, of the largest gradient."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for layer in (nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True)):
        mine = ApproximateActivation.from_dense(layer)
        a = torch.tensor(mine.levels, dtype=torch.float64).diff()
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)):
            x, g = (torch.randn(400, generator=generator).to(dtype) for _ in range(2))
            x = (4 * x).index_fill(0, torch.tensor([0]), 0.0).requires_grad_()
            (found,) = torch.autograd.grad(mine(1 * x), x, g)
            relus = (a * (x.double()[:, None] - torch.tensor(mine.kinks)).relu()).sum(1)
            (wanted,) = torch.autograd.grad(relus, x, g.double())
            worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()) / tolerance)
    return Check(worst, 1.0, what="in units of each dtype's tolerance")
