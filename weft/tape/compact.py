"""Keep a linear layer's input times a random matrix; the optimizer, too, works on the gradient in that smaller form.

    z = x P,   P in R^{n x r} with entries N(0, 1/r),   G = dL/dy^T z,   W <- W + scale * C P^T

z [N, r] is kept in place of x [N, n]. G [O, r], the gradient of W times P, is the gradient of a parameter C that starts
at zero: any optimizer steps on C, with moments of C's size, and the step is then folded into W and C set to zero. P is
drawn from a seed whenever it is needed, and another one after every `gap` steps. For a step that is linear in the
gradient, W changes along dL/dW P P^T, which is dL/dW in the mean; one draw is off by sqrt((n + 1) / r) of its length.

Paper: "CompAct: Compressed Activations for Memory-Efficient LLM Training", Yara Shamshoum, Nitzan Hodos, Yuval
Sieradzki, Assaf Schuster, 2024, arXiv:2410.15352. As in the authors' code, moments are left as they are when P is
redrawn. The paper has r = n/2, n/4 and n/8, a scale of 0.25 with Adam, gaps of 50 (60 to 350 million parameters) and
200, and leaves attention's output projection, embeddings and the head as they are. q, k and v each keep a z of their
own where autograd keeps one x for the three: below r = n/3 that is still less. The scale is 1 here: for a small
network on the digits, r = n/4 and Adam at rates from 0.001 to 0.01, it trains as well as 0.25 or better.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from weft._keeping import plain_math
from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.session import kept
from weft.tape.linear import CompressedLinear, Gradient
from weft.testing.example import Example


def gaussian_projection(features: int, rank: int, seed: int, draw: int, device: torch.device | str = "cpu") -> Tensor:
    """P ``[features, rank]`` in float32, entries N(0, 1 / rank): E[P P^T] = I. Devices draw different numbers."""
    generator = torch.Generator(device).manual_seed(hash((seed, draw)) % 2**63)
    return torch.randn(features, rank, generator=generator, device=device) / math.sqrt(rank)


@method("compact", contract="layer", family="tape", papers=[352], tags={"same-forward", "lean"})
class CompAct(CompressedLinear):
    """An ``nn.Linear`` that keeps ``rank / in_features`` of its input and trains through the parameter ``compact``.

    ``weight`` is frozen for as long as the layer stands in, and ``compact`` [out, rank] trains in its place: build the
    optimizer after the layer is swapped. The next forward pass, a copy, ``state_dict`` and ``restore_`` fold a step
    into the weight; to read the weight in between, call `fold`. Since ``compact`` is zero before each step, weight
    decay has no effect, nor has what else an optimizer reads of a parameter's values (trust ratios); an optimizer that
    runs the model within a step (LBFGS) does not work. A weight that is shared with another layer is frozen there too.

    Args:
        layer: the ordinary layer; its weight and bias are used, not copied.
        rank: r, or r / n where it is below 1.
        gap: steps until P is drawn anew.
        scale: a factor on every step of the weight.
        seed: of P. Layers of the same width and seed share it; give each its own by ``{nn.Linear: function}``.

    Raises:
        Unsupported: for other layers.
        UsageError: for a rank or a gap that does not fit.
    """

    def __init__(
        self, layer: nn.Module, *, rank: float = 0.25, gap: int = 50, scale: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(layer)
        features = self.in_features
        if not (0 < rank < 1 or rank in range(1, features + 1)) or gap < 1:
            raise UsageError(
                f"rank={rank}, gap={gap}; the rank is a fraction or a whole number up to the {features} features of "
                "this layer, the gap at least 1"
            )
        self.rank = int(rank) if rank >= 1 else max(1, round(rank * features))
        self.gap, self.scale, self.seed = int(gap), float(scale), int(seed)
        self._trained, self.folds = self.weight.requires_grad, 0
        self.compact = nn.Parameter(self.weight.new_zeros(self.out_features, self.rank), self._trained)
        self.weight.requires_grad_(False)
        self._version, self._used = self.compact._version, False
        self.register_state_dict_pre_hook(_fold)
        self.register_load_state_dict_pre_hook(_fold)
        self.register_load_state_dict_post_hook(_look_again)

    def extra_repr(self) -> str:
        """Sizes and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    @property
    def target(self) -> nn.Parameter:
        """The parameter that holds the compressed gradient."""
        return self.compact

    @property
    def projection(self) -> Tensor:
        """P ``[D, r]`` of the current step."""
        draw = self.folds // self.gap
        return gaussian_projection(self.in_features, self.rank, self.seed, draw, self.weight.device)

    def keep(self, x: Tensor) -> tuple[Gradient, tuple[Tensor, ...]]:
        """z ``[N, r]``."""
        self._used = True
        return _compressed_gradient, (x @ self.projection.to(x.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``, as the ordinary layer after the optimizer's last step."""
        # Most optimizers change the version; a fused one and one that writes to p.data do not.
        if self.compact._version != self._version or (self._used and bool(self.compact.any())):
            self.fold()
        return super().forward(x)

    def fold(self) -> None:
        """Adds what an optimizer has done since the last time to the weight, and counts it as one step."""
        if self.compact._version == self._version and not bool(self.compact.any()):
            return
        with torch.no_grad(), plain_math(self.weight.device):
            self.weight.addmm_(self.compact, self.projection.to(self.weight.dtype).mT, alpha=self.scale)
            self.compact.zero_()
        self.folds += 1
        self._version, self._used = self.compact._version, False

    def to_dense(self) -> None:
        """Folds and unfreezes the weight, which the ordinary layer has too."""
        self.fold()
        self.weight.requires_grad_(self._trained)

    def get_extra_state(self) -> Tensor:
        """How many steps were folded."""
        return torch.tensor(self.folds)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up the count of a saved state."""
        self.folds = int(state)

    def __getstate__(self) -> dict[str, Any]:
        self.fold()
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._version = self.compact._version


def _compressed_gradient(grad: Tensor, z: Tensor) -> Tensor:
    """G ``[O, r]`` from dL/dy ``[N, O]`` and z ``[N, r]``."""
    return grad.mT @ z


def _fold(layer: CompAct, *given: object) -> None:
    layer.fold()


def _look_again(layer: CompAct, keys: object) -> None:
    """What was loaded is no step of an optimizer, unless it holds one."""
    layer._version, layer._used = layer.compact._version, True


def example() -> Example:
    """Rank 4 of 16 features, on an input with two leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 5)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return Example(layer, torch.randn(6, 4, 16, generator=generator), torch.arange(6) % 5, {"rank": 4})


def _case(seed: int, rows: int, features: int, out: int) -> tuple[nn.Linear, Tensor, Tensor, torch.Generator]:
    """A layer, an input and a gradient of its output, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(features, out, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    x, g = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for d in (features, out))
    return layer, x, g, generator


@claim(
    "CompAct keeps r/n of the input, input gradients are exact, and the mean over 5,000 draws of the decompressed "
    "weight gradient is within 5% of autograd's for n = 64, r = 16 (theory: sqrt((n + 1) / (5,000 r)) = 2.9%).",
    row=352,
    budget=5.0,
    mutants={
        "variance 1/n": ("/ math.sqrt(rank)", "/ math.sqrt(features)"),
        "orthonormal P": (
            "return torch.randn(features, rank, generator=generator, device=device) / math.sqrt(rank)",
            "return torch.linalg.qr(torch.randn(features, rank, generator=generator, device=device))[0]",
        ),
        "one P for all steps": ("draw = self.folds // self.gap", "draw = 0"),
        "another P in the step": ("self.projection.to(self.weight.dtype).mT", "self.projection.flip(1).double().mT"),
        "x is kept beside z": (
            "(x @ self.projection.to(x.dtype),)",
            "(torch.cat([x @ self.projection.to(x.dtype), x], 1)[:, : self.rank],)",
        ),
        "another rounding of the input's gradient": (
            "else rows @ weight",
            "else (rows.half() @ weight.half()).to(rows.dtype)",
            "weft.tape.linear",
        ),
    },
)
def mean_of_draws(seed: int) -> list[Check]:
    """The weight after 5,000 steps of SGD on one input and output gradient: the sum of all decompressed gradients."""
    dense, x, g, _ = _case(seed, 32, 64, 24)
    x.requires_grad_()
    start, draws = dense.weight.detach().clone(), 5000
    found = []
    with kept(dense) as count:
        plain_out = dense(x)
        plain = torch.autograd.grad(plain_out, [dense.weight, x], g)
    found.append(count.peak_bytes)
    layer = CompAct.from_dense(dense, rank=16, gap=1, scale=2.0, seed=seed)
    with kept(layer) as count:
        out = layer(x)
        mine = torch.autograd.grad(out, x, g)[0]
    found.append(count.peak_bytes)
    optimizer = torch.optim.SGD([layer.compact], lr=1 / (2.0 * draws))
    for _ in range(draws):
        optimizer.zero_grad()
        layer(x.detach()).backward(g)
        optimizer.step()
    layer.to_dense()
    mean = start - dense.weight.detach()
    return [
        Check(found[1] / found[0], 16 / 64, "==", "bytes kept, of autograd's"),
        Check(int((mine != plain[1]).sum() + (out != plain_out).sum()), 0, "==", "input's gradient and output"),
        Check(float((mean - plain[0]).norm() / plain[0].norm()), 0.05, what="mean of 5,000 weight gradients"),
    ]


@claim(
    "Steps are those of Adam on the compressed gradient, projected back, with moments of r/n of the weight's size; "
    "accumulated passes share P, and a copy or a saved state between a step and the next pass goes on alike.",
    row=352,
    budget=2.0,
    mutants={
        "P is redrawn by each pass": ("        self._used = True", "        self.folds += 1"),
        "a gap that is not heeded": ("draw = self.folds // self.gap", "draw = self.folds"),
        "C is not set back": ("self.compact.zero_()", "self.compact.mul_(0.5)"),
        "no scale": ("alpha=self.scale)", "alpha=1.0)"),
        "a loaded state counts as a step": ("layer._version, layer._used = layer.compact._version, True", "return"),
        "the count is not restored": ("self.folds = int(state)", "self.folds = 0"),
        "a copy counts as a step": ("        self._version = self.compact._version\n\n\ndef", "        pass\n\n\ndef"),
        "fused steps are not noticed": ("(self._used and bool(self.compact.any()))", "False"),
    },
)
def adam_on_the_compressed(seed: int) -> list[Check]:
    """Largest error of weight and bias after 8 steps; P is read off a layer whose input and gradient are identities."""
    errors, eye = [], torch.eye(12, dtype=torch.float64)
    for fused in (False, True):
        dense, x, _, generator = _case(seed, 20, 12, 7)
        goal = torch.randn(20, 7, generator=generator, dtype=torch.float64)
        w, b = dense.weight.detach().clone(), dense.bias.detach().clone()
        layer = CompAct.from_dense(dense, rank=0.25, gap=3, scale=0.7, seed=seed)
        probe = CompAct.from_dense(_case(seed, 1, 12, 12)[0], rank=3, gap=1, seed=seed)
        adam = torch.optim.Adam([layer.compact, layer.get_parameter("bias")], lr=0.05, fused=fused)
        m, v = ([torch.zeros(1, dtype=torch.float64)] * 2 for _ in range(2))
        for t in range(1, 9):
            p = torch.autograd.grad(probe(eye), probe.compact, eye)[0]
            if t % 3 == 0:
                with torch.no_grad():
                    probe.compact.zero_()  # to the layer, a step
            error = 2 * (x @ w.T + b - goal) / 140
            adam.zero_grad()
            for rows in (slice(0, 8), slice(8, 20)):
                ((layer(x[rows]) - goal[rows]).square().sum() / 140).backward()
            adam.step()
            steps = []
            for k, grad in enumerate((error.T @ x @ p, error.sum(0))):
                m[k], v[k] = 0.9 * m[k] + 0.1 * grad, 0.999 * v[k] + 0.001 * grad**2
                steps.append(0.05 * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-8))
            w, b = w - 0.7 * steps[0] @ p.T, b - steps[1]
            if t in (2, 5):  # a copy goes on in the layer's place, or another layer with its state
                other = copy.deepcopy(layer)
                if t == 5:
                    other = CompAct.from_dense(_case(1, 1, 12, 7)[0], rank=3, gap=3, scale=0.7, seed=seed)
                    other.load_state_dict(layer.state_dict())
                state, layer = adam.state_dict(), other
                adam = torch.optim.Adam([layer.compact, layer.get_parameter("bias")], lr=0.05, fused=fused)
                adam.load_state_dict(state)
        moments = adam.state[layer.compact]["exp_avg"].numel()
        layer.to_dense()
        for p, wanted in zip((layer.weight, layer.get_parameter("bias")), (w, b), strict=True):
            errors.append(float((p.detach() - wanted).abs().max()))
    return [Check(max(errors), 1e-6, what="weight and bias"), Check(moments * 4, w.numel(), "==", "moments")]
