"""How well a model's scores tell the classes of a data set, over all processes of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.processes import Group
from weft.rules.batch import IGNORED


def evaluate(rule: Any, x: Tensor, y: Tensor, *, batch_size: int = 1000, group: Group | None = None) -> float:
    """The share of labels (of those that are not -100) that have the highest score, in evaluation mode.

    Args:
        rule: a rule, or any module that gives scores.
        x: inputs ``[N, ...]``.
        y: labels ``[N]`` or ``[N, T]``.
        batch_size: rows scored at a time; of a graph all, :attr:`weft.data.Dataset.scored_at_once`.
        group: the processes that share the work; what is sharded is scored by each.
    """
    group = Group() if group is None or getattr(rule, "sharded", False) else group
    x, y = x.tensor_split(group.size)[group.rank], y.tensor_split(group.size)[group.rank]
    training = rule.training
    rule.eval()
    right = counted = 0
    try:
        with torch.no_grad():
            for start in range(0, len(y), batch_size):
                labels = y[start : start + batch_size]
                best = rule(x[start : start + batch_size]).argmax(-1)
                right += int(((best == labels) & (labels != IGNORED)).sum())
                counted += int((labels != IGNORED).sum())
    finally:
        rule.train(training)
    right, counted = (int(n) for n in group.total([right, counted]))
    return right / counted if counted else 0.0
