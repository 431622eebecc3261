"""Carry the error back through a fixed random matrix times a learned one, which aligns with the transposed weights.

    z = h W^T + b:    dh = (dz B) R,   dW = dz^T h,   dR = (dz B)^T h = B^T dW          B [n, r n], R [r n, m], W [n, m]

B never changes: its entries are normal with variance 1 / (r n), so that B B^T is the identity in the mean, or its rows
are orthonormal. R begins uniform as in Glorot's initialisation, unrelated to W. Nothing of W is in what R learns by;
yet with one optimizer (SGD) for both, and the same weight decay c_t,

    R_t - B^T W_t = prod_s (1 - lr c_s) (R_0 - B^T W_0)   (without momentum), so that B R tends to B B^T W

The decay is part of the rule, and strong in the first steps, as in the authors' settings (there of the first epoch);
an optimizer's ``weight_decay`` adds to it. Adam breaks the equation. The layer that reads the input needs no R.
Convolutions: R has r n output channels in W's groups, B mixes the channels of each place, group by group. In the
authors' code (jil095/product_feedback_alignment) B is uniform, and decay is on the first layer and biases too.

Paper: "Deep Learning without Weight Symmetry", Li Ji-An, Marcus K. Benna, 2024, arXiv:2405.20594.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.calls import Calls
from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.ops.feedback import ProductFeedbackFunction, fixed_matrix, handlers, learned_matrix
from weft.rules.base import Ready, Rule, Scale, inputs
from weft.testing.example import Example, classification


@method(
    "product-feedback-alignment",
    contract="rule",
    family="rules",
    papers=[121],
    tags={"additive", "deterministic"},
    defaults={"optimizer": "sgd", "lr": 0.05, "schedule": "cosine"},
    variants={
        "orthogonal-product-feedback-alignment": {
            "options": {"expansion": 1, "orthogonal": True},
            "summary": "Carry the error back through a fixed orthogonal matrix times a learned one, of W's size.",
        }
    },
)
class ProductFeedbackAlignment(Rule):
    """Product feedback alignment; :meth:`trainable` has the learned matrices too, but not those of frozen weights.

    Args:
        model: any model of linear and convolution layers; one whose weight is the first parameter reads the input.
        expansion: r, of the space between B and R; memory and time grow with it.
        orthogonal: B with orthonormal rows.
        decay: c, of every R and its W: ``step`` adds c R and c W to their gradients.
        early_decay, early_steps: c in that many first steps, in place of ``decay``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        expansion: int = 10,
        orthogonal: bool = False,
        decay: float = 1e-4,
        early_decay: float = 0.03,
        early_steps: int = 50,
        **common: Any,
    ) -> None:
        super().__init__(model, **common)
        if expansion < 1 or early_steps < 0 or not (0 <= decay < math.inf and 0 <= early_decay < math.inf):
            raise UsageError(f"{expansion=}, {decay=}, {early_decay=}, {early_steps=}; expansion is at least 1")
        self.expansion, self.orthogonal, first = expansion, orthogonal, id(next(model.parameters(), None))
        self.decay, self.early_decay, self.early_steps = decay, early_decay, early_steps
        layers: dict[int, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(
                module.weight, nn.Parameter
            ):
                layers.setdefault(id(module.weight), name)
        self.names = [name for key, name in layers.items() if key != first]
        self.learned = nn.ParameterList()
        for name in self.names:
            weight, generator = model.get_parameter(f"{name}.weight"), self.rng("learned", name, fixed=True)
            shape = (expansion * weight.shape[0], *weight.shape[1:])
            self.learned.append(learned_matrix(shape, generator).to(weight))

    def layers(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, W and R of each layer that has a learned matrix."""
        return [(n, self.model.get_parameter(f"{n}.weight"), r) for n, r in zip(self.names, self.learned, strict=True)]

    def trainable(self) -> list[nn.Parameter]:
        """The model's parameters and the learned matrices, without those of frozen weights."""
        frozen = {id(r) for _, w, r in self.layers() if not w.requires_grad}
        return [p for p in super().trainable() if id(p) not in frozen]

    def fixed(self, name: str, weight: Tensor, groups: int = 1) -> Tensor:
        """B of the layer ``name``, drawn when first asked for; it follows from the seed alone."""
        key = (self.clock[0], name, weight.dtype, weight.device)
        if key not in self._fixed:
            r, generator = self.expansion, self.rng("fixed", name, fixed=True)
            self._fixed[key] = fixed_matrix(weight.shape[0], r, groups, self.orthogonal, generator).to(weight)
        return self._fixed[key]

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward and one backward pass; see :meth:`weft.rules.base.Rule.step`."""
        found = {id(w): (name, r) for name, w, r in self.layers()}

        def replaced(x: Tensor, weight: Tensor, bias: Tensor | None = None, conv: Any = None) -> Tensor:
            name, learned = found.get(id(weight), ("", None))
            if learned is not None:
                fixed = self.fixed(name, weight, 1 if conv is None else conv[-1])
                return ProductFeedbackFunction.apply(x, weight, bias, fixed, learned, conv)
            if x.grad_fn is not None:
                what = "behind other layers, by a weight that is the model's first or not an nn.Linear's or nn.Conv's"
                raise Unsupported(f"a linear map or convolution {what}", "feedback-alignment")
            return F.linear(x, weight, bias) if conv is None else torch.ops.aten.convolution(x, weight, bias, *conv)

        with Calls(handlers(replaced), strict=True):
            scores = self.model(*inputs(x))
        loss, rate = self.criterion(scores, y), self.early_decay if self.clock[1] < self.early_steps else self.decay
        decayed = [p for _, w, r in self.layers() if w.requires_grad and rate for p in (w, r)]
        arriving = [None, *(rate * p.detach() for p in decayed)]
        self.descend([loss, *decayed], self.trainable(), gradients=arriving, scale=scale, ready=ready)
        return loss


def example() -> Example:
    """A small MLP and a batch for it."""
    return classification()


@claim(
    "every gradient, of weights, biases and learned matrices, is that of the equations written in numpy, to 1e-10",
    row=121,
    mutants={
        "sign": ("dx = middle @ learned if", "dx = -middle @ learned if", "weft.ops.feedback"),
        "own error": ("dr = middle.flatten(0, -2)", "dr = middle.flatten(0, -2).sign()", "weft.ops.feedback"),
        "no decay": ("arriving = [None, *(rate", "arriving = [None, *(0"),
        "weights not decayed": ("for p in (w, r)]", "for p in (r,)]"),
        "early decay for ever": ("if self.clock[1] < self.early_steps", "if self.clock[1] >= 0"),
    },
)
def equations(seed: int) -> Check:
    """Largest error relative to the largest entry, in an early and in a later step of a 4-layer MLP, in float64."""
    import numpy as np

    made = classification(seed=seed, hidden=(12, 11, 10), dtype=torch.float64, batch=9)
    rule = ProductFeedbackAlignment(made.model, expansion=3, decay=0.01, early_decay=0.2, early_steps=1, seed=seed)
    params, learned = ([p.detach().numpy() for p in ps] for ps in (made.model.parameters(), rule.learned))
    w, b, h, worst = params[0::2], params[1::2], [made.x.numpy()], 0.0
    for k in range(4):
        z = h[-1] @ w[k].T + b[k]
        h.append(np.maximum(0, z) if k < 3 else np.exp(z - z.max(1, keepdims=True)))
    for c in (0.2, 0.01):
        rule.zero_grad()
        rule.step(made.x, made.y)
        d, want = (h[4] / h[4].sum(1, keepdims=True) - np.eye(3)[made.y.numpy()]) / 9, []
        for k in (3, 2, 1, 0):
            layer, kept = made.model[2 * k], c if k else 0.0
            want += [(layer.weight.grad, d.T @ h[k] + kept * w[k]), (layer.bias.grad, d.sum(0))]
            if k:
                middle = d @ rule.fixed(str(2 * k), layer.weight).numpy()
                want.append((rule.learned[k - 1].grad, middle.T @ h[k] + c * learned[k - 1]))
                d = (h[k] > 0) * (middle @ learned[k - 1])
        worst = max(worst, *(float(abs(g.numpy() - r).max() / abs(r).max()) for g, r in want))
    return Check(worst, 1e-10)


@claim(
    "B B^T is the identity in the mean; R begins with variance 2 / (fan_in + fan_out); layers differ",
    row=121,
    mutants={
        "variance": ("flatten(0, 1) / math.sqrt(shape[2])", "flatten(0, 1) / shape[1] ** 0.5", "weft.ops.feedback"),
        "one matrix for all layers": ('self.rng("fixed", name, fixed', 'self.rng("fixed", fixed'),
        "fan_in alone": ("(shape[0] + shape[1]) *", "(shape[1] + shape[1]) *", "weft.ops.feedback"),
    },
)
def matrices(seed: int) -> Check:
    """Of layers with 150 units and expansion 4: standard errors of mean squares and of a correlation."""
    made = classification(seed=seed, hidden=(150, 150, 150), dtype=torch.float64)
    rule = ProductFeedbackAlignment(made.model, expansion=4, seed=seed)
    a, b = (600**0.5 * rule.fixed(name, made.model[int(name)].weight).flatten() for name in ("2", "4"))
    r = rule.learned[0].detach() * (750 / 2) ** 0.5
    off = [(a.square().mean() - 1) / 2**0.5, (a * b).mean(), (r.square().mean() - 1) / 0.8**0.5]
    return Check(max(abs(float(v)) for v in off) * 90_000**0.5, 6.5)


@claim(
    "the learned matrix's gradient is B^T times the weight's, and with R = B^T W and an orthogonal B the rule is "
    "backpropagation, in a network with strided and grouped convolutions",
    row=121,
    mutants={
        "B transposed": ("(fixed.t() if back else fixed)", "(fixed if back else fixed.t())", "weft.ops.feedback"),
        "in convolutions": ('else "bgn...,gnm->bgm..."', 'else "bgm...,gnm->bgn..."', "weft.ops.feedback"),
        "B not orthogonal": (".qr(drawn.mT).Q.mT * math.sqrt(shape[2])", ".qr(drawn.mT).Q.mT", "weft.ops.feedback"),
        "other inputs": ("backward(middle, x, learned", "backward(middle, x.abs(), learned", "weft.ops.feedback"),
    },
)
def symmetric_product(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, against autograd and B^T dW, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Tanh()]
        model = nn.Sequential(*conv, nn.Flatten(), nn.Linear(54, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.arange(4) % 3
    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    rule = ProductFeedbackAlignment(model, expansion=1, orthogonal=True, decay=0, early_decay=0, seed=seed)

    def through(name: str, weight: Tensor, value: Any) -> Tensor:
        groups = 2 if weight.ndim == 4 else 1
        rows = zip(rule.fixed(name, weight, groups).chunk(groups), value.flatten(1).chunk(groups), strict=True)
        return torch.cat([b.T @ part for b, part in rows]).view_as(weight).detach()

    for name, w, r in rule.layers():
        r.data = through(name, w, w)
    rule.step(x, y)
    pairs: list[Any] = [(p.grad, g) for p, g in zip(model.parameters(), want, strict=True)]
    learned: list[Any] = [(r.grad, through(name, w, w.grad)) for name, w, r in rule.layers()]
    return [Check(max(float((a - b).abs().max() / b.abs().max()) for a, b in p), 1e-10) for p in (pairs, learned)]


@claim(
    "under SGD, R - B^T W shrinks by the decay alone, whatever the data, and no weight is kept for the way back",
    row=121,
    mutants={
        "weights": ("for_backward(x, fixed, learned)", "for_backward(x, fixed, inputs[1])", "weft.ops.feedback"),
        "no decay of weights": ("for p in (w, r)]", "for p in (r,)]"),
        "another rate": ("dr = middle.flatten(0, -2)", "dr = 2 * middle.flatten(0, -2)", "weft.ops.feedback"),
    },
)
def only_decay(seed: int) -> list[Check]:
    """Largest error of R - B^T W after 20 steps at rate 0.3 and decay 0.1, by its largest entry; weights kept."""
    made = classification(seed=seed, hidden=(12, 12, 12), dtype=torch.float64, batch=9)
    rule = ProductFeedbackAlignment(made.model, expansion=1, early_decay=0.1, seed=seed)
    weights, kept = {w.untyped_storage().data_ptr() for _, w, _ in rule.layers()}, list[int]()

    def parts() -> list[Tensor]:
        return [(r - rule.fixed(name, w).T @ w).detach() for name, w, r in rule.layers()]

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    before, optimizer = parts(), torch.optim.SGD(rule.trainable(), lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rule.step(made.x, made.y)
        optimizer.step()
    worst = max(float((a - 0.97**20 * b).abs().max() / b.abs().max()) for a, b in zip(parts(), before, strict=True))
    return [Check(worst, 1e-10), Check(len(weights.intersection(kept)), 0, "==", "weights kept")]


@claim(
    "on a 4-layer digits MLP the cosine with the exact gradient is higher than feedback alignment's in every hidden "
    "layer, by 0.1 or more, and 5 seeds' mean test accuracy is at most 1 point behind backprop's",
    row=121,
    tier="slow",
    budget=120.0,
    mutants={
        "untrained": ("dr = middle.flatten(0, -2)", "dr = 0 * middle.flatten(0, -2)", "weft.ops.feedback"),
        "other way": ("dr = middle.flatten(0, -2)", "dr = -middle.flatten(0, -2)", "weft.ops.feedback"),
    },
)
def digits_like_backprop(seed: int) -> list[Check]:
    """Least lead of the mean cosine, and points behind; 3 layers of 64 units, 40 epochs of SGD."""
    runs = [[_trained(n, kind) for kind in ("product", "fixed", "exact")] for n in range(5 * seed, 5 * seed + 5)]
    lead = [sum(own[1][k] - fa[1][k] for own, fa, _ in runs) / 5 for k in range(3)]
    points = sum(100 * (exact[0] - own[0]) for own, _, exact in runs) / 5
    return [Check(min(lead), 0.1, ">=", "lead"), Check(points, 1.0, "<=", "points behind")]


def _trained(number: int, kind: str) -> tuple[float, list[float]]:
    """Test accuracy, and each hidden layer's cosine with the exact gradient; "fixed": feedback alignment, R frozen."""
    from weft import data
    from weft.rules.backprop import Backprop
    from weft.testing.train import digits_accuracy, digits_mlp

    model, digits, found = digits_mlp((64, 64, 64), number), data.load("digits"), list[list[Tensor]]()
    how: dict[str, Any] = {"expansion": 1, "orthogonal": True, "early_decay": 0.0} if kind == "fixed" else {}
    own, exact = ProductFeedbackAlignment(model, seed=number, **how), Backprop(model)
    own.learned.requires_grad_(kind == "product")
    rule: Rule = exact if kind == "exact" else own
    optimizer = torch.optim.SGD(rule.trainable(), lr=0.1, momentum=0.9)
    for epoch in range(40):
        for index in data.batches(len(digits.y_train), 64, seed=number, epoch=epoch):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / 40)
            optimizer.zero_grad()
            rule.step(digits.x_train[index], digits.y_train[index])
            optimizer.step()
    own.decay = own.early_decay = 0.0
    for one in (own, exact):
        one.zero_grad()
        one.step(digits.x_train, digits.y_train)
        found.append([p.grad.flatten().clone() for p in model.parameters() if p.ndim > 1 and p.grad is not None][:3])
    return digits_accuracy(rule), [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(*found, strict=True)]
