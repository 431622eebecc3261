"""Keep a few bits of an activation's input: the index of a step of the best piecewise constant derivative.

Forward gives f(x) itself. Backward gives dx = g q(x) in place of g f'(x), where q has k = 2^bits steps,

    q(x) = y_i for s_i < x <= s_{i+1},   (s, y) = argmin int_L^R (f'(x) - q(x))^2 dx,

over the domain [L, R]; the outer steps go on to infinity. The best level on a step is the mean slope,
y_i = (f(s_{i+1}) - f(s_i)) / (s_{i+1} - s_i). With it the integral is int f'^2 dx less the sum over steps of
G(s_i, s_{i+1}), G(a, b) = (f(b) - f(a))^2 / (b - a), so the best borders on a grid t_0 .. t_n have the largest sum,
which dynamic programming finds: sum_k(j) = max_{i < j} sum_{k-1}(i) + G(t_i, t_j).

Where f' itself takes two values (ReLU and its like), one bit is kept and the derivative is exact.

The authors' code has tables for one to four bits on [-100, 100], from gradient steps on the borders that stop in local
minima for two and four bits (GELU: 0.0444 for 0.0406, 0.0041 for 0.0031 on [-10, 10]); here every table is from the
dynamic program, which their paper describes. The outer steps are means over their whole length, so the domain matters.

Paper: "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory Footprint Reduction", Georgii Novikov,
Daniel Bershatsky, Julia Gusak, Alex Shonenkov, Denis Dimitrov, Ivan Oseledets, 2022, arXiv:2202.00441.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError
from weft.kernels.bits import pack_bits
from weft.kernels.step_lookup import bucketize_pack
from weft.measure import kept_bytes
from weft.method import method
from weft.ops.step_derivative import StepActivation, constants
from weft.testing.example import Example

CELLS = 1200  # of the grid over the domain
SIXTH = float(np.float32(1 / 6))  # as torch has it, for float64 too
SMOOTH: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LogSigmoid, nn.Mish, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
STEPS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.Threshold, nn.Hardtanh, nn.ReLU6, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip

Table = tuple[tuple[float, ...], tuple[float, ...]]
_tables: dict[tuple[Any, ...], Table] = {}


def best_steps(function: Callable[[Tensor], Tensor], pieces: int, low: float, high: float) -> Table:
    """Borders and levels of the best piecewise constant derivative on a domain.

    Args:
        function: pointwise, of float64 ``[N]``.
        pieces: k.
        low, high: the domain's ends.

    Returns:
        k - 1 inner borders, on a grid of 1200 cells, and k levels.
    """
    t = np.linspace(low, high, CELLS + 1)
    with torch.no_grad():
        value = function(torch.from_numpy(t)).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = (value - value[:, None]) ** 2 / (t - t[:, None])
    gain[np.tril_indices(CELLS + 1)] = -np.inf
    most, back = gain[0], []
    for _ in range(pieces - 1):
        sums = most[:, None] + gain
        back.append(sums.argmax(0))
        most = sums.max(0)
    ends = [CELLS]
    for earlier in reversed(back):
        ends.append(int(earlier[ends[-1]]))
    cut = [0, *reversed(ends)]
    return tuple(t[cut[1:-1]].tolist()), tuple((np.diff(value[cut]) / np.diff(t[cut])).tolist())


@method("few-bit-activation", contract="layer", family="tape", papers=[144], tags={"same-forward", "lean"})
class FewBitActivation(StepActivation):
    """A pointwise layer of torch that keeps a few bits for each element in place of its input or output.

    Nothing is won where what autograd keeps is kept anyway: ReLU, Sigmoid, Tanh and layers in place keep their output,
    and so does a linear layer after them.

    Args:
        layer: used, not copied.
        bits: 1 to 4 for each element; layers whose derivative has two values keep one and are exact.
        domain: the table is the best one on ``[-domain, domain]``.

    Raises:
        UsageError: for other bits, or a domain that is not positive.
        Unsupported: for other layers.
    """

    converts = (*SMOOTH, *STEPS)

    def __init__(self, layer: nn.Module, *, bits: int = 3, domain: float = 10.0) -> None:
        if type(layer) not in self.converts:
            names = ", ".join(sorted(kind.__name__ for kind in self.converts))
            raise Unsupported(f"{type(layer).__name__} is not a pointwise layer that is known", names)
        if bits not in (1, 2, 3, 4):
            raise UsageError(f"bits={bits!r}; it is 1, 2, 3 or 4")
        if not (0 < domain < math.inf):
            raise UsageError(f"domain={domain!r}; it is a positive number")
        if isinstance(layer, STEPS):
            low = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
            super().__init__(layer, (low, SIXTH if isinstance(layer, nn.Hardsigmoid) else 1.0), 1)
            return
        key = type(layer), layer.extra_repr(), bits, float(domain)
        if key not in _tables:
            _tables[key] = best_steps(lambda x: layer.forward(x.clone()), 2**bits, -domain, domain)
        borders, levels = _tables[key]
        super().__init__(layer, levels, bits)
        self.borders = borders

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> FewBitActivation:
        """The layer with another derivative."""
        return cls(layer, **options)

    def index(self, x: Tensor) -> Tensor:
        """The step of each element, packed; for two values, 1 where the derivative has the second one."""
        if not isinstance(self.layer, STEPS):
            return bucketize_pack(x, constants(self.borders, x.device), self.bits)
        return pack_bits((self.slope(x) != 0).view(torch.uint8), 1)

    def slope(self, x: Tensor) -> Tensor:
        """Not zero on the second step, by torch's own kernels: how they round borders depends on dtype and device."""
        layer, aten, one = self.layer, torch.ops.aten, x.new_ones(()).expand_as(x)
        match layer:
            case nn.LeakyReLU():
                return aten.leaky_relu_backward(one, x, 0.0, False)
            case nn.Hardtanh():  # ReLU6 is one
                return aten.hardtanh_backward(one, x, layer.min_val, layer.max_val)
            case nn.Hardsigmoid():
                return aten.hardsigmoid_backward(one, x)
            case nn.Hardshrink():
                return aten.hardshrink_backward(one, x, layer.lambd)
            case nn.Softshrink():
                return aten.softshrink_backward(one, x, layer.lambd)
        return aten.threshold_backward(one, x, layer.threshold if isinstance(layer, nn.Threshold) else 0)


def example() -> Example:
    """A GELU at three bits, and a batch that it bends."""
    x = torch.linspace(-5, 5, 48).reshape(4, 12)
    return Example(nn.GELU(), x, torch.arange(4) % 2, {"bits": 3})


def _slopes(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies gradients with at x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x).sum(), x)[0]


def _points(cells: int, low: float = -10.0, high: float = 10.0) -> Tensor:
    """Midpoints of cells, float64."""
    return low + (torch.arange(cells, dtype=torch.float64) + 0.5) * (high - low) / cells


@claim(
    "b bits an element are kept, three of GELU for b = 3, and the output is bit for bit torch's",
    row=144,
    mutants={
        "a byte for each": ("constants(self.borders, x.device), self.bits)", "constants(self.borders, x.device), 4)"),
        "the input kept": ("save_for_backward(packed)", "save_for_backward(packed, x)", "weft.ops.step_derivative"),
        "another forward": ("y = function(x)", "y = function(x) * (1 + 1e-7)", "weft.ops.step_derivative"),
        "two bits packed": ("view(torch.uint8), 1)", "view(torch.uint8), 2)"),
    },
)
def bits_kept(seed: int) -> list[Check]:
    """Bytes less b N / 8, for GELU and ReLU, and elements of the output that differ, for every layer."""
    generator, differ, checks = torch.Generator().manual_seed(seed), 0, []
    x = (4 * torch.randn(16 + seed % 7, 64, generator=generator)).requires_grad_()
    for kind in FewBitActivation.converts:
        layer = nn.Threshold(0.5, 2.0) if issubclass(kind, nn.Threshold) else kind()
        differ += int((FewBitActivation.from_dense(layer, bits=1)(x) != layer(x)).sum())
    checks.append(Check(differ, 0, "==", "elements that differ"))
    for kind in (nn.GELU, nn.ReLU):
        for bits in (1, 2, 3, 4):
            mine = FewBitActivation.from_dense(kind(), bits=bits)
            wanted = (bits if kind is nn.GELU else 1) * x.numel() / 8
            kept = kept_bytes(functools.partial(mine, x), mine).peak_bytes
            checks.append(Check(kept, wanted, "==", f"bytes, {kind.__name__}, bits={bits}"))
    return checks


@claim(
    "the derivative of 3-bit GELU has a smaller L2 error on [-10, 10] than uniform 8-level grids of inputs or values",
    row=144,
    mutants={
        "uniform borders": (
            "back.append(sums.argmax(0))",
            "back.append(np.arange(CELLS + 1) * (len(back) + 1) // (len(back) + 2))",
        ),
        "levels turned round": ("super().__init__(layer, levels, bits)", "super().__init__(layer, levels[::-1], bits)"),
        "mirrored": ("bucketize_pack(x, constants", "bucketize_pack(-x, constants"),
        "one bit": ("2**bits, -domain", "2, -domain"),
        "gain without the width": ("** 2 / (t - t[:, None])", "** 2"),
    },
)
def below_uniform(seed: int) -> list[Check]:
    """int (q - f')^2 dx, through the layer's backward, against three grids; the inputs move with the seed."""
    x = _points(20_000 + seed % 1000)
    true = 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)

    def error(q: Tensor) -> float:
        return 20 * float((q.double() - true).square().mean())

    def uniform(half: float) -> Tensor:
        """Eight steps of one width on [-half, half], the outer ones longer, each with the best level."""
        index = torch.bucketize(x, torch.linspace(-half, half, 9, dtype=torch.float64)[1:-1])
        return torch.stack([true[index == i].mean() for i in range(8)])[index]

    grid = torch.linspace(float(true.min()), float(true.max()), 8, dtype=torch.float64)
    nearest = grid[(true[:, None] - grid).abs().argmin(1)]
    found = error(_slopes(FewBitActivation.from_dense(nn.GELU(), bits=3), x))
    others = {"inputs": uniform(10), "inputs in [-3, 3]": uniform(3), "values": nearest}
    return [Check(found, error(q), "<", name) for name, q in others.items()]


@claim(
    "no piecewise constant derivative with as many pieces has a smaller L2 error: for 1 and 2 bits all on a coarse "
    "grid, for 3 and 4 bits 2000 changes of the found one",
    row=144,
    mutants={
        "one step before": ("most = sums.max(0)", "most = gain[0]"),
        "borders aside": ("tuple(t[cut[1:-1]].tolist())", "tuple((t[cut[1:-1]] + 0.2).tolist())"),
        "half the levels": ("/ np.diff(t[cut])", "/ np.diff(t[cut]) / 2"),
        "another domain": ("-domain, domain)", "-3 * domain, 3 * domain)"),
    },
)
def optimal(seed: int) -> list[Check]:
    """Smallest error of the others, each with its best levels, over the found one's; from sums over midpoints."""
    random, checks, cells = np.random.default_rng(seed), [], 24_000
    x = _points(cells)
    for layer in (nn.GELU(), nn.Softplus(), nn.Tanh()):
        true = _slopes(layer, x).numpy()
        first, second = (np.concatenate([[0.0], np.cumsum(true**power)]) for power in (1, 2))

        def error(cuts: np.ndarray, first: np.ndarray = first, second: np.ndarray = second) -> np.ndarray:
            """Of borders ``[N, k - 1]``, in midpoints."""
            ends = np.pad(np.sort(cuts, 1), ((0, 0), (1, 1)), constant_values=((0, 0), (0, cells)))
            counts = np.maximum(np.diff(ends), 1)
            return (second[-1] - (np.diff(first[ends]) ** 2 / counts).sum(1)) * 20 / cells

        for bits in (1, 2, 3, 4):
            mine = FewBitActivation.from_dense(layer, bits=bits)
            found = 20 * float(np.square(_slopes(mine, x).numpy() - true).mean())
            if bits < 3:
                others = np.array(list(itertools.combinations(range(400, cells, 400), 2**bits - 1)))
            else:
                size = 2000, 2**bits - 1  # in cells of the method's grid; about half the borders stay
                moves = random.integers(-4, 5, size) * random.integers(0, 2, size)
                others = np.rint((np.array(mine.borders) + 10) * 60).astype(int) * 20 + moves * 20
            checks.append(Check(float(error(others).min()) / found, 1 - 1e-4, ">=", f"{layer}, {bits} bits"))
    return checks


@claim(
    "at one bit the gradient of ReLU, and of every layer whose derivative has two values, is autograd's exactly",
    row=144,
    mutants={
        "zero counted as positive": ("(self.slope(x) != 0)", "((self.slope(x) != 0) | (x == 0))"),
        "turned round": ("self.slope(x) != 0", "self.slope(x) == 0"),
        "slope of LeakyReLU": ("layer.negative_slope if", "0.0 if"),
        "one side of a band": ("layer.min_val, layer", "-math.inf, layer"),
        "borders in float32": ("hardtanh_backward(one, x", "hardtanh_backward(one.float(), x.float()"),
        "shrinking for another width": ("softshrink_backward(one, x, layer.lambd", "softshrink_backward(one, x, 0.5"),
        "threshold at zero": ("layer.threshold if isinstance(layer, nn.Threshold)", "0 if layer"),
        "sixth": ("SIXTH if", "1 / 6 if"),
        "levels in float32": ("grad.dtype == torch.float64", "False", "weft.ops.step_derivative"),
    },
)
def exact_at_one_bit(seed: int) -> Check:
    """Elements whose gradients differ in four dtypes, at drawn inputs, at borders (some no dtype has) and beside."""
    generator, differ = torch.Generator().manual_seed(seed), 0
    edges = torch.tensor([-3.0, -0.5, -0.3, -0.1, -0.0, 0.0, 0.1, 0.3, 0.5, 0.7, 3.0, 6.0], dtype=torch.float64)
    layers = [nn.ReLU(), nn.LeakyReLU(0.3), nn.Threshold(0.1, 2.0), nn.Hardtanh(-0.3, 0.7), nn.ReLU6()]
    layers += [nn.Hardsigmoid(), *(kind(width) for kind in (nn.Hardshrink, nn.Softshrink) for width in (0.3, 0.5))]
    for layer in layers:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            at = edges.to(dtype)
            beside = [torch.nextafter(at, torch.full_like(at, end)) for end in (-9.0, 9.0)]
            x = torch.cat([at, *beside, (4 * torch.randn(300, generator=generator)).to(dtype)]).requires_grad_()
            g = torch.randn(x.shape, generator=generator).to(dtype)
            found, wanted = (torch.autograd.grad(m(x), x, g)[0] for m in (FewBitActivation.from_dense(layer), layer))
            differ += int((found != wanted).sum())
    return Check(differ, 0, "==", "elements that differ")
