"""Train every layer as Forward-Forward does, on its own goodness plus that of the other layers as a constant.

    gamma_k = sum of g_t over t != k ("all") or t < k ("before"), detached;   "none": 0, which is plain Forward-Forward
    p_k(positive) = sigmoid((g_k + gamma_k - n_k theta) / T),   n_k: how many layers are in the sum
    L_k = 1/2 mean_B [-log p_k(positive row) - log(1 - p_k(negative row))],   dL_k / dW_k only
    z_0 = N(x with a label code in its first K features),  h_k = f_k(z_{k-1}),  z_k = N(h_k) detached
    N(h) = h / (sqrt(mean h^2) + 1e-8),   goodness g_k = mean h_k^2
    head: cross-entropy of the last stage's scores of N(h_n) of the same rows under the neutral code

Each row's gamma is that row's: one for the positive, one for the negative. A label's score is the total goodness of the
row that carries it, which is what "all" trains. The paper updates layer after layer, gamma computed anew for each; here
all layers take one step from one pass, which is the same to first order in the learning rate. Its theta is one number
and its goodness the sum of squares at temperature 1: with means of squares T = 1 / D, softer here. The label codes, the
wrong labels and the head that draws them are those of forward-forward.

Paper: "Layer Collaboration in the Forward-Forward Algorithm", Guy Lorberbom, Itai Gat, Yossi Adi, Alex Schwing,
Tamir Hazan, 2023, arXiv:2305.12393.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.ops.goodness import check_rows, goodness, layer_loss, normalise, observe, overlay, wrong_labels
from weft.rules.base import Ready, Rule, Scale, check_finite
from weft.rules.batch import labelled
from weft.testing.example import Example, classification
from weft.testing.tools import gradients

CHOICES = {
    "collaborate": ("all", "before", "none"),
    "negatives": ("hard", "uniform"),
    "backward": ("joint", "stage"),
}


def collaborators(layers: Sequence[Tensor], k: int, collaborate: str) -> list[Tensor]:
    """What layer ``k`` takes into account of the ``layers``' goodness, each ``[B]``: constants."""
    others = {"all": [*layers[:k], *layers[k + 1 :]], "before": layers[:k], "none": []}[collaborate]
    return [g.detach() for g in others]


@method(
    "collaborative-forward-forward",
    contract="rule",
    family="rules",
    papers=[6],
    tags={"additive"},
    defaults={"optimizer": "adam", "lr": 5e-3, "schedule": "cosine"},
)
class CollaborativeForwardForward(Rule):
    """Layer collaboration in Forward-Forward; ``step`` returns the head's cross-entropy.

    Args:
        model: any model that can be cut (``at``) into two hidden stages or more and a head, from one real-valued input
            ``[B, ...]`` of at least K features to ``[B, K]``.
        collaborate: whose goodness a layer adds to its own: that of ``"all"`` others, of those ``"before"`` it, or
            ``"none"``.
        threshold: theta, the goodness, for each layer in the sum, at which a row is as likely positive as negative.
        temperature: T, how much goodness makes a layer sure.
        label_scale: s, the size of a label's code, in units of the standardised input.
        negatives: ``"hard"``: wrong labels by the head's probabilities; ``"uniform"``: all alike.
        backward: ``"joint"``: one backward pass through all stages' losses at the end; ``"stage"``: each stage's as
            soon as it has run, so that no more than one stage's activations are kept; with ``collaborate="all"`` that
            takes one more pass, without gradients, for the goodness of the later layers.
    """

    stages = "cut"
    shardable = True

    def __init__(
        self,
        model: nn.Module,
        *,
        collaborate: str = "all",
        threshold: float = 1.0,
        temperature: float = 0.05,
        label_scale: float = 5.0,
        negatives: str = "hard",
        backward: str = "joint",
        **common: Any,
    ) -> None:
        super().__init__(model, **common)
        for name, given in (("collaborate", collaborate), ("negatives", negatives), ("backward", backward)):
            if given not in CHOICES[name]:
                raise UsageError(f"{name}={given!r}; it is one of {', '.join(map(repr, CHOICES[name]))}")
        assert self.cut is not None
        self.last = len(self.cut) - 1
        self.classes = self.cut.width(self.last)
        if self.last < 2 or self.classes < 2:
            raise Unsupported("collaboration needs two hidden stages, a head and two classes", "forward-forward")
        self.collaborate, self.threshold, self.temperature = collaborate, threshold, temperature
        self.label_scale, self.negatives, self.backward = label_scale, negatives, backward

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """A neutral pass without gradients, then one of positive and negative rows, which alone updates statistics."""
        assert self.cut is not None
        x, y = labelled(
            check_rows(x, y, self.classes, "collaborative-forward-forward", "mono-forward"), y, self.classes
        )
        _, neutral, scores = observe(self.cut, self._with(x, None), self.classes)
        neutral = torch.cat([neutral, neutral])  # what the head sees: as many rows as the stages before it
        check_finite([self.criterion(scores, y)])
        known = scores if self.negatives == "hard" else torch.zeros_like(scores)
        rows = torch.cat([self._with(x, labels) for labels in (y, wrong_labels(known, y, self.waits(y)))])
        left = {id(p): p for p in self.trainable()}
        by_stage = self.backward == "stage"
        ahead = observe(self.cut, rows, self.classes)[0] if by_stage and self.collaborate == "all" else []
        layers: list[Tensor] = []
        losses: list[Tensor] = []

        def layer(k: int) -> Tensor:
            others = collaborators(ahead or layers, k, self.collaborate)
            true, false = sum(others, layers[k]).split(len(y))
            return layer_loss(true, false, self.threshold * (1 + len(others)), self.temperature)

        def behind(k: int, h: Tensor) -> Tensor:
            if k < self.last:
                layers.append(goodness(h))
            if by_stage:
                loss = layer(k) if k < self.last else self.criterion(h[: len(y)], y)
                own = [left.pop(id(p)) for p in self.cut.parameters(k) if id(p) in left]  # type: ignore[union-attr]
                self.descend([loss], own, scale=scale, ready=ready)
                losses.append(loss.detach())
            return normalise(h.detach()) if k < self.last - 1 else neutral

        out = self.cut.run(normalise(rows), behind)
        self.cut.require_unshared("collaborative-forward-forward")
        if not by_stage:
            losses = [*map(layer, range(self.last)), self.criterion(out[: len(y)], y)]
        self.descend([] if by_stage else losses, left.values(), scale=scale, ready=ready)
        return losses[-1]

    def waits(self, y: Tensor) -> Tensor:
        """This step's exponential draws ``[B, K]``, by which wrong labels are chosen."""
        drawn = self.per_row(lambda n, g: torch.empty(n, self.classes).exponential_(generator=g), len(y), "negatives")
        return drawn.to(y.device)

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Each label's score ``[B, K]``, the total goodness of the rows with its code, in K passes without a graph."""
        assert self.cut is not None
        x = check_rows(x, None, self.classes, "collaborative-forward-forward", "mono-forward")
        labels = torch.arange(self.classes, device=x.device)[:, None].expand(-1, len(x))
        layers = [observe(self.cut, self._with(x, label), self.classes)[0] for label in labels]
        return torch.stack([torch.stack(found).sum(0) for found in layers], 1)

    def _with(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return overlay(x, labels, self.classes, self.label_scale)


def example() -> Example:
    """A small MLP and a batch for it; so soft that negatives of small goodness count."""
    return classification(temperature=1.0)


def _runs(params: Sequence[Any], x: Any, label: Any, scale: float) -> list[Any]:
    """For each layer of a ReLU network in numpy: input ``[B, D]``, output and goodness, on rows with a label's code."""
    import numpy as np

    h, seen = np.concatenate([scale * np.broadcast_to(label, (len(x), 4)), x[:, 4:]], 1), []
    for w, b in zip(params[0::2], params[1::2], strict=True):
        z = h / (np.sqrt((h * h).mean(1, keepdims=True)) + 1e-8)
        h = np.maximum(0, z @ w.T + b)
        seen.append((z, h, (h * h).mean(1)))
    return seen


@claim(
    "gradients are those of the global goodness, the other layers held constant, in numpy to 1e-10; scores its total",
    row=6,
    mutants={
        "later layers left out": ("[*layers[:k], *layers[k + 1 :]]", "layers[:k]"),
        "own goodness twice": ("[*layers[:k], *layers[k + 1 :]]", "layers"),
        "not detached": ("[g.detach() for g in others]", "list(others)"),
        "of other rows": ("[g.detach() for g in others]", "[g.detach().flip(0) for g in others]"),
        "one layer's threshold": ("self.threshold * (1 + len(others))", "self.threshold"),
        "mean of goodness": ("torch.stack(found).sum(0)", "found[-1]"),
    },
)
def global_goodness(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, of the scores and of all gradients, for "all" and "before"."""
    import numpy as np

    made = classification(seed=seed, hidden=(12, 11, 10), dtype=torch.float64, classes=4, batch=24)
    list(made.model.parameters())[-2].data.mul_(20)
    params = [p.detach().numpy() for p in made.model.parameters()]
    x, y, n, eye = made.x.numpy(), made.y.numpy(), len(made.y), np.eye(4)
    checks = []
    for collaborate in ("all", "before"):
        rule = CollaborativeForwardForward(
            made.model, collaborate=collaborate, threshold=0.2, temperature=0.1, label_scale=3.0, seed=seed
        )
        scores, waits = rule(made.x).numpy(), rule.waits(made.y).numpy()
        found = gradients(rule, made.x, made.y)
        z = _runs(params, x, np.full(4, 0.25), 3.0)[3][0]
        p = np.exp(z @ params[6].T + params[7])
        e = (p / p.sum(1, keepdims=True) - eye[y]) / n
        wrong = (p * (1 - eye[y]) / waits).argmax(1)
        want = [*map(np.zeros_like, params[:6]), e.T @ z, e.sum(0)]
        for sign, labels in ((1, y), (-1, wrong)):
            layers = _runs(params, x, eye[labels], 3.0)[:3]
            for k, (z, h, _) in enumerate(layers):
                counted = layers if collaborate == "all" else layers[: k + 1]
                over = sum(g for _, _, g in counted) - 0.2 * len(counted)
                d = h * 2 / h.shape[1] * (-sign / (1 + np.exp(sign * over / 0.1)) / (0.2 * n))[:, None]
                want[2 * k] += d.T @ z
                want[2 * k + 1] += d.sum(0)
        total = np.stack([sum(g for _, _, g in _runs(params, x, code, 3.0)[:3]) for code in eye], 1)
        worst = max(abs(g.numpy() - r).max() / (abs(r).max() + 1e-30) for g, r in zip(found, want, strict=True))
        checks += [Check(abs(scores - total).max() / total.max(), 1e-10, what=f"{collaborate}: scores")]
        checks += [Check(worst, 1e-10, what=f"{collaborate}: gradients")]
    return checks


@claim(
    "without the collaboration term, gradients are those of plain Forward-Forward, bit for bit",
    row=6,
    mutants={
        "term kept": ('"none": []', '"none": layers[:k]'),
        "threshold kept": ("(1 + len(others))", "len(layers)"),
        "softer": ("(1 + len(others)), self.temperature)", "(1 + len(others)), 2 * self.temperature)"),
        "length kept": ("normalise(h.detach())", "h.detach()"),
    },
)
def plain_forward_forward(seed: int) -> Check:
    """How many numbers of all gradients differ from autograd of plain Forward-Forward, written out in float32."""
    made = classification(seed=seed, hidden=(12, 11, 10), classes=4, batch=24)
    rule = CollaborativeForwardForward(
        made.model, collaborate="none", threshold=0.2, temperature=0.1, label_scale=3.0, seed=seed
    )
    layers = [m for m in made.model if isinstance(m, nn.Linear)]
    y, n = made.y, len(made.y)

    def length_one(h: Tensor) -> Tensor:
        return h / ((h * h).mean(1).sqrt() + 1e-8)[:, None]

    def with_code(code: Tensor) -> Tensor:
        return torch.cat([code.expand(n, 4), made.x[:, 4:]], 1)

    z = length_one(with_code(torch.full((4,), 0.75)))
    for layer in layers[:3]:
        z = length_one(layer(z).relu()).detach()
    allowed = layers[3](z).exp() * (torch.arange(4) != y[:, None])
    wrong = (allowed / rule.waits(y)).argmax(1)
    head = layers[3](torch.cat([z, z]))[:n]
    want = list(torch.autograd.grad(nn.functional.cross_entropy(head, y), list(layers[3].parameters())))
    rows = torch.cat([with_code(3.0 * torch.eye(4)[labels]) for labels in (y, wrong)])
    for layer in reversed(layers[:3]):
        z = length_one(rows)
        for before in layers[: layers.index(layer)]:
            z = length_one(before(z).relu()).detach()
        over = ((layer(z).relu() ** 2).mean(1) - 0.2) / 0.1
        loss = 0.5 * (nn.functional.softplus(-over[:n]) + nn.functional.softplus(over[n:])).mean()
        want = [*torch.autograd.grad(loss, list(layer.parameters())), *want]
    found = gradients(rule, made.x, made.y)
    return Check(sum(int((a != b).sum()) for a, b in zip(found, want, strict=True)), 0, "==")


@claim(
    "stages trained in turn get the gradients of stages trained together, whichever layers collaborate",
    row=6,
    mutants={
        "later layers unknown": ('self.collaborate == "all" else []', 'self.collaborate == "none" else []'),
        "clean rows ahead": ("observe(self.cut, rows, self.classes)[0] if", "observe(self.cut, rows.flip(0), 4)[0] if"),
    },
)
def in_turn(seed: int) -> Check:
    """Largest difference relative to the largest entry, over both kinds of collaboration, in float64."""
    made = classification(seed=seed, hidden=(12, 11, 10), dtype=torch.float64, classes=4, batch=24)
    worst = 0.0
    for collaborate in ("all", "before"):
        found = [
            gradients(
                CollaborativeForwardForward(
                    made.model, collaborate=collaborate, backward=backward, temperature=1.0, seed=seed
                ),
                made.x,
                made.y,
            )
            for backward in ("joint", "stage")
        ]
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)))
    return Check(worst, 1e-10)
