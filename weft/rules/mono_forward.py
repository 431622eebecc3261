"""Train every stage on its own cross-entropy, through a learned projection of its activations onto the classes.

    G_k = h_k M_k^T  [B, K],   L_k = CE(G_k, y),   dL_k / d(W_k, M_k) only;   h_k is detached for stage k + 1

The last stage's scores are its goodness. Activations ``[B, C, ...]`` are averaged over all but batch and channels;
``[B, T, D]`` with labels ``[B, T]`` are projected token by token.

Paper: "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors",
James Gong, Bruce Li, Waleed Abdulla, 2025, arXiv:2501.09238.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import StageError, UsageError
from weft.method import method
from weft.rules.base import Ready, Rule, Scale
from weft.testing.example import Example, classification


def goodness(h: Tensor, projection: Tensor, *, tokens: bool = False) -> Tensor:
    """Class scores of a layer's activations.

    Args:
        h: activations ``[B, D]``, ``[B, C, ...]``, or ``[B, T, D]`` with ``tokens``.
        projection: ``[K, D]`` (or ``[K, C]``).
        tokens: score each of T tokens: ``[B, T, K]``.
    """
    if h.ndim > 2 and not tokens:
        h = h.flatten(2).mean(2)
    return F.linear(h, projection)


@method(
    "mono-forward",
    contract="rule",
    family="rules",
    papers=[140],
    tags={"local", "deterministic"},
    defaults={"optimizer": "adam", "lr": 1e-3, "schedule": "cosine"},
)
class MonoForward(Rule):
    """Mono-Forward; the model's own scores are used to predict, the projections only to train.

    Args:
        model: any model that can be cut (``at``).
        backward: ``"joint"``: one backward pass through all stages' losses at the end; ``"stage"``: each stage's as
            soon as it has run, so that no more than one stage's activations are kept.
    """

    stages = "cut"

    def __init__(self, model: nn.Module, *, backward: str = "joint", **common: Any) -> None:
        super().__init__(model, **common)
        if backward not in ("joint", "stage"):
            raise UsageError(f"backward={backward!r}; it is 'joint' or 'stage'")
        assert self.cut is not None
        self.backward = backward
        classes = self.cut.width(len(self.cut) - 1)
        like = next(model.parameters())
        self.projections = nn.ParameterList()
        for k in range(len(self.cut) - 1):
            width = self.cut.width(k)
            drawn = torch.rand(classes, width, generator=self.rng("projection", k, fixed=True), dtype=torch.float64)
            self.projections.append(((2 * drawn - 1) / math.sqrt(width)).to(like))

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward pass and a backward pass that stays inside stages; see :meth:`weft.rules.base.Rule.step`."""
        assert self.cut is not None
        left = {id(p): p for p in self.trainable()}
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
            self.descend(losses, self.trainable(), scale=scale, ready=ready)
        else:
            self.descend([], left.values(), scale=scale, ready=ready)
        return losses[-1]

    def _scores(self, k: int, h: Tensor, y: Tensor) -> Tensor:
        tokens = h.ndim == 3 and h.shape[:2] == y.shape
        projection = self.projections[k]
        if h.shape[2 if tokens else 1] != projection.shape[1]:
            raise StageError(
                f"stage {k} gives {tuple(h.shape)}, where {projection.shape[1]} channels were expected; "
                "cut behind a layer whose output has its channels in dimension 1 (at=[...])"
            )
        return goodness(h, projection, tokens=tokens)

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
