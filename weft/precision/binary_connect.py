"""Multiply by weights of -1 and 1 alone in both passes; the gradient goes to real weights, which are kept in [-1, 1].

    W_b = sign(W), with sign(0) = 1,  or  W_b = 1 with probability clip((W + 1) / 2, 0, 1), else -1
    y = H x W_b^T + b,   dL/dx = H dL/dy W_b,   dL/dW := dL/dW_b = H dL/dy^T x,   W <- clip(W, -1, 1) after each step

Drawn, W_b has the mean W, and each pass forward draws anew. What is multiplied with the inputs is W_b; H, one number,
comes after. In eval mode the weights are W_b where they are signs, and W itself where they are drawn in training: of
the paper's three ways the one that it tries. H is 1 in the paper, and the authors' code takes H = sqrt(1.5 / (D + O))
with W in [-H, H], so that a layer's output has the size that Glorot's initialisation gives it: the same but for step
sizes. Here H is theirs unless given, and W has the paper's range. BatchNorm after each layer makes it matter little.

Weights are clipped at the next pass forward in training, and before a state is taken; until then what a step has added
to them stands in the parameter. A step leaves no trace in what other layers do, as a hook on the optimizer would.
Weights as an ordinary layer starts with are near 0, and change their signs easily; Adam's steps are to be compared with
1, as the authors note in dividing them by H.

Paper: "BinaryConnect: Training Deep Neural Networks with binary weights during propagations", Matthieu Courbariaux,
Yoshua Bengio, Jean-Pierre David, 2015, arXiv:1511.00363.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError
from weft.kernels.signs import signs
from weft.method import method
from weft.ops.packed_signs import SignLayer, SignLinear
from weft.ops.straight_through import straight_through
from weft.precision import binary_linear
from weft.testing.example import Example
from weft.testing.linear import linear_of


def drawn_signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """1 with probability ``(w + 1) / 2``, cut off at 0 and 1, else -1: for each of the weights, in their dtype."""
    u = torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)
    return torch.where(u < (weight.float() + 1) / 2, 1.0, -1.0).to(weight.dtype)


class ConnectedSigns(SignLayer):
    """What multiplies by -1 and 1 alone, beside the base of a kind of layer; options as for `BinaryConnect`."""

    draws: Tensor

    def __init__(self, layer: nn.Module, *, stochastic: bool, scale: float | None, seed: int) -> None:
        super().__init__(layer)
        self.factor = math.sqrt(1.5 / max(1, self.fans())) if scale is None else float(scale)
        if not self.factor > 0 or math.isinf(self.factor):
            raise UsageError(f"scale={scale!r}: give a number above 0, or None")
        self.stochastic, self.seed = bool(stochastic), int(seed)
        if stochastic:
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_state_dict_pre_hook(_clip_before)

    def fans(self) -> int:
        """D + O: of convolutions with all taps, as the authors' code has it."""
        outputs, inputs, *taps = cast(Tensor, self.weight).shape
        return (inputs + outputs) * math.prod(taps)

    def extra_repr(self) -> str:
        """Sizes, H and how signs are found."""
        return f"{super().extra_repr()}, stochastic={self.stochastic}, scale={self.factor:.4g}"

    def as_bits(self) -> bool:
        """Unless they are drawn in training."""
        return not self.stochastic

    def scales(self, weight: Tensor) -> Tensor:
        """H, for each output."""
        return torch.full((weight.shape[0],), self.factor, device=weight.device)

    @torch.no_grad()
    def clip_(self) -> None:
        """Bring the weights back into [-1, 1]; weights that are there are not touched: a graph may have saved them."""
        weight = self.weight
        if weight is None or weight.numel() == 0:
            return
        if not torch.compiler.is_compiling():
            low, high = torch.aminmax(weight)
            try:
                if low >= -1 and high <= 1:
                    return
            except RuntimeError:  # of weights inside of torch.func.vmap there is not one answer, nor a rule for clamp_
                weight.copy_(weight.clamp(-1, 1))
                return
        weight.clamp_(-1, 1)

    def multiplied(self, drawn: Tensor | None) -> Tensor:
        """W_b, given what `draw` gives, or in eval mode W where signs are drawn in training; with W's gradient."""
        assert self.weight is not None
        if self.training:
            self.clip_()
        weight: Tensor = self.weight
        if not self.stochastic:
            return straight_through(signs(weight.detach()), weight)
        return weight.clamp(-1, 1) if drawn is None else straight_through(drawn, weight)

    def draw(self) -> Tensor | None:
        """Signs for one pass in training, where they are drawn: by themselves, as no compiler takes their generator."""
        if not (self.stochastic and self.training):
            return None
        assert self.weight is not None
        if torch.compiler.is_exporting():
            raise Unsupported("signs are drawn anew in each pass of training", "eval() before torch.export")
        key = (self.seed * 0x9E3779B97F4A7C15 + int(self.draws)) & (1 << 63) - 1
        self.draws += 1
        return drawn_signs(self.weight.detach(), torch.Generator().manual_seed(key))


def _clip_before(layer: ConnectedSigns, prefix: str, keep: bool) -> None:
    layer.clip_()


@method("binary-connect", contract="layer", family="precision", papers=[100])
class BinaryConnect(ConnectedSigns, SignLinear):
    """An ``nn.Linear`` that multiplies by -1 and 1 alone, on the same parameters.

    Where signs are drawn, ``torch.compile`` leaves the draw to plain torch, and refuses it under ``fullgraph=True``.
    Transformations of `torch.func` refuse it in training, and clipping of weights that they are not given: `clip_` them
    before.

    Args:
        layer: the ordinary layer.
        stochastic: draw the signs in training.
        scale: H; None for ``sqrt(1.5 / (D + O))``.
        seed: of the draws; how many there were is kept in a buffer.

    Raises:
        Unsupported: for other layers.
        UsageError: for a scale that is not above 0.
    """

    def __init__(
        self, layer: nn.Module, *, stochastic: bool = False, scale: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(layer, stochastic=stochastic, scale=scale, seed=seed)

    def differentiable(self, x: Tensor) -> Tensor:
        """By the real weights."""
        y = F.linear(x, self.multiplied(self.draw())) * self.factor
        return y if self.bias is None else y + self.bias.to(y.dtype)


def example() -> Example:
    """Weights on both sides of 0, an input with two leading dimensions."""
    return binary_linear.example()


@claim(
    "Both matmuls see only -1 and 1, the same in both passes; the gradient of the stored weights is that of the binary "
    "ones; and through steps of any size stored weights stay in [-1, 1].",
    row=100,
    budget=2.0,
    mutants={
        "real weights": ("straight_through(signs(weight.detach()), weight)", "weight * 1"),
        "drawn halves": ("straight_through(drawn, weight)", "straight_through(drawn * 0.5, weight)"),
        "sign of 0 is 0": ("signs(weight.detach())", "weight.detach().sign()"),
        "not clipped": ("weight.clamp_(-1, 1)", "weight.clamp_(-2, 2)"),
        "clipped too far": ("weight.clamp_(-1, 1)", "weight.clamp_(-0.9, 0.9)"),
        "clipped above alone": ("if low >= -1 and high <= 1:", "if high <= 1:"),
        "clipped never": ("if low >= -1 and high <= 1:", "if True:"),
        "no clipping before a state": ("    layer.clip_()", "    layer.clip_"),
        "gradient cut where signs are sure": (
            "straight_through(signs(weight.detach()), weight)",
            "straight_through(signs(weight.detach()), weight.clamp(-0.5, 0.5))",
        ),
        "gradient of something else": ("values.detach() + (z", "values.detach() + 2 * (z", "weft.ops.straight_through"),
    },
)
def only_signs(seed: int) -> list[Check]:
    """Values that the products see, by unit vectors; differences from plain projected descent, written out."""
    generator, wrong, off, most = torch.Generator().manual_seed(seed), 0, 0.0, 0.0
    for stochastic in (False, True):
        start = 0.5 * torch.randn(9, 12, generator=generator, dtype=torch.float64)
        start[torch.rand(9, 12, generator=generator) < 0.1] = 0
        layer = BinaryConnect.from_dense(linear_of(start), stochastic=stochastic, scale=1.0, seed=seed)
        assert isinstance(layer.weight, nn.Parameter)
        mine = start.clamp(-1, 1)
        for _ in range(5):
            x = torch.eye(12, dtype=torch.float64, requires_grad=True)
            g = torch.randn(12, 9, generator=generator, dtype=torch.float64)
            y = layer(x)
            (by_x,) = torch.autograd.grad(y, [x], torch.eye(12, 9, dtype=torch.float64), retain_graph=True)
            (by_w,) = torch.autograd.grad(y, [layer.weight], g)
            forth, back = y.detach().T, by_x[:9]
            wrong += int((forth.abs() != 1).sum()) + int((back != forth).sum())
            if not stochastic:
                wrong += int((forth != 1 - 2.0 * (mine < 0)).sum())
            with torch.no_grad():
                layer.weight.sub_(by_w)
            mine = (mine - g.T).clamp(-1, 1)
            most = max(most, float(layer.state_dict()["weight"].abs().max()))
            off = max(off, float((by_w - g.T).abs().max()), float((layer.weight.detach() - mine).abs().max()))
        with torch.no_grad():
            layer.weight.sub_(9)  # below -1 alone
        most = max(most, float(layer.state_dict()["weight"].abs().max()))
    return [Check(wrong, 0, "==", "elements"), Check(off, 1e-12, what="descent"), Check(most, 1.0, what="weights")]


@claim(
    "Drawn signs average to every stored weight within 0.02 over 100,000 draws, and in eval mode the weights are the "
    "stored ones; signs that are not drawn stay the same.",
    row=100,
    budget=3.0,
    mutants={
        "twice as sure": ("(weight.float() + 1) / 2", "(2 * weight.float() + 1) / 2"),
        "shifted": ("(weight.float() + 1) / 2", "(weight.float() + 1.06) / 2"),
        "the same draw each time": ("self.draws += 1", "self.draws += 0"),
        "half of them drawn": (
            "if not (self.stochastic and self.training):",
            "if not (self.stochastic and self.training and int(self.draws) < 5):",
        ),
        "signs in eval mode": ("return weight.clamp(-1, 1) if", "return signs(weight) if"),
    },
)
def right_on_average(seed: int) -> list[Check]:
    """20 weights of which every output has the same, so that 10 passes of 10,000 outputs are 100,000 draws of each.

    By Hoeffding's bound one of them is off by 0.02 with a chance of 20 * 2 exp(-20), below 1e-7.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.cat([1.8 * torch.rand(17, generator=generator) - 0.9, torch.tensor([-1.0, 0.0, 1.0])])
    layer = BinaryConnect.from_dense(linear_of(w.expand(10_000, 20)), stochastic=True, scale=1.0, seed=seed)
    with torch.no_grad():
        passes = [layer(torch.eye(20)) for _ in range(10)]
        far = float((torch.stack(passes).mean((0, 2)) - w).abs().max())
        alike = max(float((a * b)[:17].mean(1).abs().max()) for a, b in itertools.pairwise(passes))
        there = float((layer.eval()(torch.eye(20)) - w[:, None]).abs().max())
    return [
        Check(far, 0.02, what="mean"),
        Check(sum(int((y.abs() != 1).sum()) for y in passes), 0, "==", "other values than signs"),
        Check(alike, 0.999, "<", "two passes"),
        Check(there, 1e-6, what="eval mode"),
    ]
