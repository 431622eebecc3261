"""Train every layer to be active on rows that carry their true label and quiet on rows that carry a wrong one.

    z_0 = N(x with a label code in its first K features),  h_k = f_k(z_{k-1}),  z_k = N(h_k) detached
    N(h) = h / (sqrt(mean h^2) + 1e-8),   goodness g_k = mean h_k^2,   p(positive) = sigmoid((g_k - theta) / T)
    L_k = 1/2 mean_B [softplus(-(g_k^+ - theta) / T) + softplus((g_k^- - theta) / T)],   dL_k / dW_k only
    head: cross-entropy of the last stage's scores of N(h_n) of the same rows under the neutral code

A label's code is ``s`` at its own feature and 0 at the other K - 1; the neutral code is s / K at each. A negative row
carries a wrong label, drawn in proportion to the head's probabilities of the wrong classes ("hard"), anew each step.
The paper's code has the sum of squares less the number of units D at temperature 1: T = 1 / D, softer here. It leaves
the first hidden layer out of the goodness and the head's input; here all layers count, and the head is the model's own.

Paper: "The Forward-Forward Algorithm: Some Preliminary Investigations", Geoffrey Hinton, 2022, arXiv:2212.13345.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.ops.goodness import (
    check_rows,
    goodness,
    hoyer,
    layer_loss,
    normalise,
    observe,
    overlay,
    saturated,
    wrong_labels,
)
from weft.rules.base import IGNORED, Ready, Rule, Scale, check_finite
from weft.rules.batch import labelled
from weft.testing.example import Example, classification
from weft.testing.tools import gradients

CHOICES = {"negatives": ("hard", "uniform"), "predict": ("goodness", "head"), "backward": ("joint", "stage")}


@method(
    "forward-forward",
    contract="rule",
    family="rules",
    papers=[2, 4],
    tags={"additive"},
    defaults={"optimizer": "adam", "lr": 3e-3, "schedule": "cosine"},
)
class ForwardForward(Rule):
    """Forward-Forward, supervised; ``step`` returns the head's cross-entropy, comparable with other rules' loss.

    Args:
        model: any model that can be cut (``at``), from one real-valued input ``[B, ...]`` of at least K features to
            ``[B, K]``. Every stage but the last is a layer, its goodness over all features; the last is the head.
        threshold: theta, the goodness at which a row is as likely positive as negative.
        temperature: T, how much goodness makes a layer sure.
        label_scale: s, the size of a label's code, in units of the standardised input.
        negatives: ``"hard"``: wrong labels by the head's probabilities; ``"uniform"``: all alike.
        predict: ``"goodness"``: a label's score is the total goodness of the row that carries it (K passes);
            ``"head"``: the last stage's scores of the row with the neutral code (one pass).
        backward: ``"joint"``: one backward pass through all stages' losses at the end; ``"stage"``: each stage's as
            soon as it has run, so that no more than one stage's activations are kept.
    """

    stages = "cut"
    shardable = True

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 1.0,
        temperature: float = 0.05,
        label_scale: float = 5.0,
        negatives: str = "hard",
        predict: str = "goodness",
        backward: str = "joint",
        **common: Any,
    ) -> None:
        super().__init__(model, **common)
        for name, given in (("negatives", negatives), ("predict", predict), ("backward", backward)):
            if given not in CHOICES[name]:
                raise UsageError(f"{name}={given!r}; it is {' or '.join(map(repr, CHOICES[name]))}")
        assert self.cut is not None
        self.last = len(self.cut) - 1
        self.classes = self.cut.width(self.last)
        if self.last < 1 or self.classes < 2:
            raise Unsupported("forward-forward needs a hidden stage, a head and two classes", "backprop")
        self.threshold, self.temperature, self.label_scale = threshold, temperature, label_scale
        self.negatives, self.predict, self.backward = negatives, predict, backward

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """A neutral pass without gradients, then one of positive and negative rows, which alone updates statistics."""
        assert self.cut is not None
        x, y = labelled(check_rows(x, y, self.classes, "forward-forward", "mono-forward"), y, self.classes)
        _, neutral, scores = observe(self.cut, self._with(x, None), self.classes)
        neutral = torch.cat([neutral, neutral])  # what the head sees: as many rows as the stages before it
        check_finite([self.criterion(scores, y)])
        known = scores if self.negatives == "hard" else torch.zeros_like(scores)
        wrong = wrong_labels(known, y, self.waits(len(y)).to(x.device))
        left = {id(p): p for p in self.trainable()}
        losses: list[Tensor] = []

        def behind(k: int, h: Tensor) -> Tensor:
            if k < self.last:
                true, false = goodness(h).split(len(y))
                loss = layer_loss(true, false, self.threshold, self.temperature)
            else:
                loss = self.criterion(h[: len(y)], y)
            if self.backward == "stage":
                own = [left.pop(id(p)) for p in self.cut.parameters(k) if id(p) in left]  # type: ignore[union-attr]
                self.descend([loss], own, scale=scale, ready=ready)
                loss = loss.detach()
            losses.append(loss)
            return normalise(h.detach()) if k < self.last - 1 else neutral

        rows = torch.cat([overlay(x, labels, self.classes, self.label_scale) for labels in (y, wrong)])
        self.cut.run(normalise(rows), behind)
        self.cut.require_unshared("forward-forward")
        joint = losses if self.backward == "joint" else []
        self.descend(joint, left.values(), scale=scale, ready=ready)
        return losses[-1]

    def waits(self, rows: int) -> Tensor:
        """This step's exponential draws ``[B, K]``."""
        return self.per_row(lambda n, g: torch.empty(n, self.classes).exponential_(generator=g), rows, "negatives")

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Scores ``[B, K]`` by ``predict``, without side effect and without a graph: none would cross a boundary."""
        assert self.cut is not None
        x = check_rows(x, None, self.classes, "forward-forward", "mono-forward")
        if self.predict == "head":
            return observe(self.cut, self._with(x, None), self.classes)[2]
        labels = torch.arange(self.classes, device=x.device)[:, None].expand(-1, len(x))
        return torch.stack(
            [torch.stack(observe(self.cut, self._with(x, c), self.classes)[0]).sum(0) for c in labels], 1
        )

    def diagnose(self, x: Any, y: Tensor) -> list[str]:
        """Layers whose goodness is beyond the threshold, or short of it, whatever the label."""
        assert self.cut is not None
        x, y = x[y != IGNORED], y[y != IGNORED]
        true, false = (observe(self.cut, self._with(x, c), self.classes)[0] for c in (y, (y + 1) % self.classes))
        return saturated(true, false, self.threshold, self.temperature)

    def _with(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return overlay(x, labels, self.classes, self.label_scale)


def example() -> Example:
    """A small MLP and a batch for it; so soft that negatives of small goodness count."""
    return classification(temperature=1.0)


@claim(
    "gradients are those of each layer's own loss in numpy, to 1e-10 in float64; a label's score is its total goodness",
    row=2,
    mutants={
        "pulled up": ("F.softplus(low)", "F.softplus(-low)", "weft.ops.goodness"),
        "sum of squares": (".square().mean(1)", ".square().sum(1)", "weft.ops.goodness"),
        "length kept": ("normalise(h.detach())", "h.detach()"),
        "uniform negatives": ('self.negatives == "hard"', "False"),
        "head sees the label": ("if k < self.last - 1 else neutral", "if k < self.last else neutral"),
        "one layer's goodness": ("[0]).sum(0) for c in", "[0])[-1] for c in"),
    },
)
def layer_equations(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, of the scores and of all gradients."""
    import numpy as np

    made = classification(seed=seed, dtype=torch.float64, classes=4, batch=24)
    list(made.model.parameters())[-2].data.mul_(20)
    rule = ForwardForward(made.model, threshold=0.2, temperature=0.1, label_scale=3.0, seed=seed)
    scores, waits = rule(made.x).numpy(), rule.waits(24).numpy()
    found = gradients(rule, made.x, made.y)
    params = [p.detach().numpy() for p in made.model.parameters()]
    x, y, n, eye = made.x.numpy(), made.y.numpy(), len(made.y), np.eye(4)

    def run(code: Any) -> list[Any]:
        h, seen = np.concatenate([3 * np.broadcast_to(code, (n, 4)), x[:, 4:]], 1), []
        for w, b in zip(params[0::2], params[1::2], strict=True):
            z = h / (np.sqrt((h * h).mean(1, keepdims=True)) + 1e-8)
            h = np.maximum(0, z @ w.T + b)
            seen.append((z, h, (h * h).mean(1)))
        return seen

    z = run(np.full(4, 0.25))[2][0]
    p = np.exp(z @ params[4].T + params[5])
    e = (p / p.sum(1, keepdims=True) - eye[y]) / n
    wrong = (p * (1 - eye[y]) / waits).argmax(1)
    want = [*map(np.zeros_like, params[:4]), e.T @ z, e.sum(0)]
    for sign, labels in ((1, y), (-1, wrong)):
        for k, (z, h, g) in enumerate(run(eye[labels])[:2]):
            d = h * 2 / h.shape[1] * (-sign / (1 + np.exp(sign * (g - 0.2) / 0.1)) / (0.2 * n))[:, None]
            want[2 * k] += d.T @ z
            want[2 * k + 1] += d.sum(0)
    total = np.stack([sum(g for _, _, g in run(code)[:2]) for code in eye], 1)
    worst = max(abs(g.numpy() - r).max() / (abs(r).max() + 1e-30) for g, r in zip(found, want, strict=True))
    return [Check(abs(scores - total).max() / total.max(), 1e-10, what="scores"), Check(worst, 1e-10, what="gradients")]


@claim(
    "with negatives that do not depend on the head, a layer's gradient is bit-identical when later layers are changed",
    row=2,
    mutants={
        "negatives by the head": ('self.negatives == "hard"', 'self.negatives == "uniform"'),
        "one loss": ("self.descend(joint,", "self.descend([sum(losses) ** 2],"),
    },
)
def later_layers(seed: int) -> list[Check]:
    """How many numbers of the gradients change in the layers that are changed, and in the two before them."""
    made = classification(seed=seed, hidden=(12, 11, 10), classes=4, batch=64)
    rule = ForwardForward(made.model, negatives="uniform", temperature=1.0, seed=seed)
    before = gradients(rule, made.x, made.y)
    for p in rule.trainable()[4:]:
        p.data.mul_(-20.0).add_(0.1)
    changed = [int((a != b).sum()) for a, b in zip(before, gradients(rule, made.x, made.y), strict=True)]
    return [Check(sum(changed[4:]), 1, ">=", "later layers"), Check(sum(changed[:4]), 0, "==", "earlier layers")]


@claim(
    "a 2x500 network reaches at least 90 % test accuracy on 8x8 digits, predicting by goodness",
    row=2,
    mutants={
        "hidden layers untrained": ("self.descend(joint,", "self.descend(joint[-1:],"),
        "pulled up": ("F.softplus(low)", "F.softplus(-low)", "weft.ops.goodness"),
        "no label": ("labels[:, None], scale)", "labels[:, None], 0.0)", "weft.ops.goodness"),
    },
)
def digits_accuracy_by_goodness(seed: int) -> Check:
    """Accuracy of one network after 10 epochs in batches of 32; of 30 seeds: mean 0.967, deviation 0.0055."""
    from weft.testing.train import digits_accuracy, digits_mlp, train

    rule = ForwardForward(digits_mlp((500, 500), seed), seed=seed)
    train(rule, epochs=10, batch_size=32, seed=seed)
    return Check(digits_accuracy(rule), 0.90, ">=")


@claim(
    "hard negatives are wrong labels in proportion to the head's probabilities, never the true one",
    row=2,
    mutants={
        "uniform": ("y[:, None], -math.inf)", "y[:, None], -math.inf).clamp(max=-9.0)", "weft.ops.goodness"),
        "true label too": ("y[:, None], -math.inf)", "y[:, None], 0.0)", "weft.ops.goodness"),
    },
)
def hard_negatives(seed: int) -> list[Check]:
    """How often the true label is drawn in 40000 draws, and how far a frequency is off, in standard errors."""
    scores, true, n = torch.tensor([0.3, -0.9, 1.2, 0.0, 0.8, -0.4], dtype=torch.float64), seed % 6, 40000
    p = {c: math.exp(s) for c, s in enumerate(scores.tolist()) if c != true}
    waits = torch.empty(n, 6).exponential_(generator=torch.Generator().manual_seed(seed))
    drawn = wrong_labels(scores.expand(n, 6), torch.tensor(true).expand(n), waits).tolist()
    shares = [(drawn.count(c), n * p[c] / sum(p.values())) for c in p]
    worst = max(abs(count - mean) / math.sqrt(mean * (1 - mean / n)) for count, mean in shares)
    return [Check(drawn.count(true), 0, "==", "true label"), Check(worst, 6.5, what="standard errors")]


@claim(
    "on 10,000 MNIST digits, at 85 % or more right, the first hidden layer is sparser than backprop's by 0.1 (Hoyer)",
    row=4,
    tier="slow",
    budget=120.0,
    mutants={
        "hidden layers untrained": ("self.descend(joint,", "self.descend(joint[-1:],"),
        "no label": ("labels[:, None], scale)", "labels[:, None], 0.0)", "weft.ops.goodness"),
        "no sum of sizes": ("h.norm(1, dim=1)", "h.norm(2, dim=1)", "weft.ops.goodness"),
    },
)
def first_layer_sparsity(seed: int) -> list[Check]:
    """Means over test rows that are right; backprop at the authors' rate, 1e-4 (at 3e-3 it is the sparser of both)."""
    from weft import data, models
    from weft.rules.backprop import Backprop

    images: Any = data.load("mnist")
    x, y, sparsity = images.x_test[:2000], images.y_test[:2000], list[float]()
    for kind, rate in ((Backprop, 1e-4), (ForwardForward, 3e-3)):
        rule = kind(models.build("mlp:500x500", input_shape=(1, 28, 28), classes=10, seed=seed), seed=seed)
        optimizer = torch.optim.Adam(rule.trainable(), lr=rate, fused=True)
        for index in (i for epoch in range(10) for i in data.batches(10_000, 128, seed=seed, epoch=epoch)):
            optimizer.zero_grad()
            rule.step(images.x_train[index], images.y_train[index])
            optimizer.step()
        right = rule(x).argmax(1) == y
        rows = normalise(overlay(x, y, 10, rule.label_scale)) if isinstance(rule, ForwardForward) else x
        sparsity.append(float(hoyer(rule.model[:3](rows[right]).detach()).nanmean()))  # type: ignore[index]
    return [
        Check(float(right.double().mean()), 0.85, ">=", "accuracy"),
        Check(sparsity[1] - sparsity[0], 0.1, ">=", "sparsity"),
    ]
