"""Train every stage on its own cross-entropy, through a learned projection of its activations onto the classes.

    G_k = h_k M_k^T  [B, K],   L_k = CE(G_k, y),   dL_k / d(W_k, M_k) only;   h_k is detached for stage k + 1

The last stage's scores are its goodness, and what the rule predicts by: the model's own output layer, trained on the
detached activities below it (the paper's nets end with a projection, or sum the goodness of all). Activations are
averaged over all but batch and channels; ``[B, T, D]`` with labels ``[B, T]`` are projected token by token.

Paper: "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors",
James Gong, Bruce Li, Waleed Abdulla, 2025, arXiv:2501.09238.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import StageError, UsageError
from weft.method import method
from weft.rules.base import Ready, Rule, Scale
from weft.testing.example import Example, classification
from weft.testing.tools import gradients


def goodness(h: Tensor, projection: Tensor, *, tokens: bool = False, channels_last: bool = False) -> Tensor:
    """Class scores of a layer's activations.

    Args:
        h: activations ``[B, D]``, ``[B, C, ...]``, or ``[B, ..., D]`` with ``channels_last``.
        projection: ``[K, D]`` (or ``[K, C]``).
        tokens: score each of the T tokens of ``[B, T, D]``: ``[B, T, K]``.
        channels_last: where the channels are; everything between batch and channels is averaged.
    """
    if h.ndim > 2 and not tokens:
        h = h.flatten(1, -2).mean(1) if channels_last else h.flatten(2).mean(2)
    return F.linear(h, projection)


@method(
    "mono-forward",
    contract="rule",
    family="rules",
    papers=[140],
    tags={"additive", "local", "deterministic"},
    defaults={"optimizer": "adam", "lr": 3e-3, "schedule": "cosine"},
)
class MonoForward(Rule):
    """Mono-Forward; the model's own scores are used to predict, the projections only to train.

    Args:
        model: any model that can be cut (``at``).
        backward: ``"joint"``: one backward pass through all stages' losses at the end; ``"stage"``: each stage's as
            soon as it has run, so that no more than one stage's activations are kept.
    """

    stages = "cut"
    shardable = True

    def __init__(self, model: nn.Module, *, backward: str = "joint", **common: Any) -> None:
        super().__init__(model, **common)
        if backward not in ("joint", "stage"):
            raise UsageError(f"backward={backward!r}; it is 'joint' or 'stage'")
        assert self.cut is not None
        self.backward = backward
        last = len(self.cut) - 1
        classes = self.cut.width(last) if last else 0
        like = next(model.parameters())
        self.projections = nn.ParameterList()
        for k in range(last):
            width = self.cut.width(k)
            drawn = torch.rand(classes, width, generator=self.rng("projection", k, fixed=True), dtype=torch.float64)
            self.projections.append(((2 * drawn - 1) / math.sqrt(width)).to(like))

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward pass and a backward pass that stays inside stages; see :meth:`weft.rules.base.Rule.step`."""
        assert self.cut is not None
        trained = self.trainable()
        left = {id(p): p for p in trained} if self.backward == "stage" else {}
        losses: list[Tensor] = []

        def behind(k: int, h: Tensor) -> None:
            assert self.cut is not None
            loss = self.criterion(h if k == len(self.projections) else self._scores(k, h, y), y)
            if self.backward == "stage":
                self.descend([loss], self._own(k, left), scale=scale, ready=ready)
                loss = loss.detach()
            losses.append(loss)

        self.cut.run(x, behind)
        self.cut.require_unshared("mono-forward")
        if self.backward == "joint":
            self.descend(losses, trained, scale=scale, ready=ready)
        else:
            self.descend([], left.values(), scale=scale, ready=ready)
        return losses[-1]

    def _scores(self, k: int, h: Tensor, y: Tensor) -> Tensor:
        assert self.cut is not None
        last = self.cut.channels_last(k)
        projection = self.projections[k]
        if h.shape[-1 if last else 1] != projection.shape[1]:
            raise StageError(
                f"stage {k} gives {tuple(h.shape)}, where {projection.shape[1]} channels were expected in dimension "
                f"{h.ndim - 1 if last else 1}; cut behind a layer whose output has them there (at=[...])"
            )
        return goodness(h, projection, tokens=last and h.shape[:-1] == y.shape and y.ndim > 1, channels_last=last)

    def _own(self, k: int, left: dict[int, nn.Parameter]) -> list[nn.Parameter]:
        """What stage ``k`` trains, taken out of ``left``."""
        assert self.cut is not None
        own = self.cut.parameters(k)
        if any(id(p) not in left for p in own):
            self.cut.require_unshared("mono-forward")
        own += list(self.projections[k : k + 1])
        return [p for p in (left.pop(id(p), None) for p in own) if p is not None]


def example() -> Example:
    """A small MLP and a batch for it."""
    return classification()


@claim(
    "every gradient, the projections' too, equals that of the layer's own cross-entropy written in numpy, to 1e-10",
    row=140,
    mutants={
        "global loss alone": ("self.descend(losses, trained", "self.descend(losses[-1:], trained"),
        "layers untrained": ("F.linear(h, projection)", "F.linear(h.detach(), projection)"),
    },
)
def local_equations(seed: int) -> Check:
    """Largest error relative to the largest entry, over all gradients of a 3-layer MLP, in float64."""
    import numpy as np

    made = classification(seed=seed, dtype=torch.float64, batch=9)
    rule = MonoForward(made.model, seed=seed)
    rule.step(made.x, made.y)
    weights = [p.detach().numpy() for p in made.model.parameters()]
    projections = [p.detach().numpy() for p in rule.projections]
    h, onehot, want = made.x.numpy(), np.eye(3)[made.y.numpy()], []
    for k in range(3):
        z = h @ weights[2 * k].T + weights[2 * k + 1]
        out = z if k == 2 else np.maximum(0, z)
        scores = out if k == 2 else out @ projections[k].T
        e = np.exp(scores - scores.max(1, keepdims=True))
        e = (e / e.sum(1, keepdims=True) - onehot) / len(onehot)
        d = e if k == 2 else (z > 0) * (e @ projections[k])
        want += [(made.model[2 * k].weight.grad, d.T @ h), (made.model[2 * k].bias.grad, d.sum(0))]
        if k < 2:
            want.append((rule.projections[k].grad, e.T @ out))
        h = out
    return Check(max(float(abs(g.numpy() - r).max() / abs(r).max()) for g, r in want), 1e-10)


@claim(
    "on images and sequences the gradients are those of cross-entropies of averaged, or each token's, activations",
    row=140,
    mutants={
        "summed over space": ("h.flatten(2).mean(2)", "h.flatten(2).sum(2)"),
        "summed over time": ("h.flatten(1, -2).mean(1)", "h.flatten(1, -2).sum(1)"),
    },
)
def images_and_sequences(seed: int) -> Check:
    """Largest error relative to the largest entry, over all gradients of three models, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    conv = [nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)]
    cases: list[Any] = [
        (conv, normal(6, 2, 7, 7), torch.arange(6) % 3, "bchw,kc->bk", 1 / 25, 1 / 9),
        (
            [nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)],
            normal(2, 5, 4),
            torch.arange(10).view(2, 5) % 3,
            "btd,kd->btk",
            1,
        ),
        (
            [nn.Linear(4, 7), nn.Tanh(), Mean(), nn.Linear(7, 3)],
            normal(6, 5, 4),
            torch.arange(6) % 3,
            "btd,kd->bk",
            1 / 5,
        ),
    ]
    worst = 0.0
    for layers, x, y, product, *factors in cases:
        model = nn.Sequential(*layers).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.5 * normal(*p.shape))
        rule = MonoForward(
            model, at=[str(i) for i, layer in enumerate(layers) if isinstance(layer, nn.Tanh)], seed=seed
        )
        found = [g.clone() for g in gradients(rule, x, y)]
        h, losses = x, list[Tensor]()
        for layer in layers:
            h = layer(h)
            if isinstance(layer, nn.Tanh):
                k = len(losses)
                losses.append(torch.einsum(product, h, rule.projections[k]) * factors[k])
                h = h.detach()
        picked = [s.log_softmax(-1).gather(-1, y[..., None]).mean() for s in [*losses, h]]
        want = torch.autograd.grad(-torch.stack(picked).sum(), rule.trainable())
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, want, strict=True)))
    return Check(worst, 1e-10)


@claim(
    "a layer's gradient is bit-identical when later layers are changed",
    row=140,
    mutants={
        "scaled by the last loss": (
            "losses, trained, scale=scale",
            "losses, trained, scale=scale * losses[-1].detach()",
        ),
    },
)
def later_layers(seed: int) -> Check:
    """How many numbers of the first two layers' gradients change when the third and fourth layer change."""
    made = classification(seed=seed, hidden=(12, 11, 10), batch=16)
    rule = MonoForward(made.model, seed=seed)
    found = []
    for _ in range(2):
        rule.zero_grad()
        rule.step(made.x, made.y)
        own = [*made.model[:4].parameters(), *list(rule.projections)[:2]]
        found.append(torch.cat([p.grad.flatten() for p in own if p.grad is not None]))
        with torch.no_grad():
            for p in made.model[4:].parameters():
                p.mul_(-2.0).add_(0.1)
    assert float(found[0].abs().sum()) > 0
    return Check(int((found[0] != found[1]).sum()), 0, "==")


@claim(
    "mean digits accuracy over 5 seeds of a 3-layer MLP is within 2 points of backprop's after 15 epochs",
    row=140,
    mutants={
        "hidden layers untrained": ("self.descend(losses, trained", "self.descend(losses[-1:], trained"),
    },
)
def digits_accuracy_after_15_epochs(seed: int) -> Check:
    """Points that backprop is ahead of (128, 128); both by Adam, 5e-3 with a cosine to zero, batch 64."""
    return Check(_points_behind(seed, (128, 128), epochs=15, lr=5e-3), 2.0)


@claim(
    "mean digits accuracy over 5 seeds of a 3-layer MLP is within 1 point of backprop's after 60 epochs",
    row=140,
    tier="slow",
    budget=120.0,
    mutants={
        "hidden layers untrained": ("self.descend(losses, trained", "self.descend(losses[-1:], trained"),
    },
)
def digits_accuracy_after_60_epochs(seed: int) -> Check:
    """Points that backprop is ahead of (256, 256); both by Adam, 3e-3 with a cosine to zero, batch 64."""
    return Check(_points_behind(seed, (256, 256), epochs=60, lr=3e-3), 1.0)


def _points_behind(seed: int, hidden: tuple[int, ...], *, epochs: int, lr: float) -> float:
    from weft.rules.backprop import Backprop
    from weft.testing.train import points_behind

    return points_behind(MonoForward, Backprop, seed, hidden, seeds=5, epochs=epochs, lr=lr)
