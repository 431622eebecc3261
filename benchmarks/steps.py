"""A step of each rule against plain PyTorch: one thread, CPU time, interleaved, medians, inputs rotated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft import measure, models

Say = Callable[[str], None]


def run(say: Say) -> list[dict[str, Any]]:
    """The joint step, optimizer excluded, on ``mlp:500x500`` for 28x28 inputs, at several batch sizes."""
    rows = []
    for batch in (64, 128, 512):
        batches = [(torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,))) for _ in range(8)]
        for card in weft.methods(contract="rule"):
            row = {"rule": card.name, "batch": batch, **compared(card, batches)}
            say(f"steps: {row}")
            rows.append(row)
    return rows


def net() -> nn.Module:
    """The model, with the same weights each time."""
    return models.build("mlp:500x500", input_shape=(1, 28, 28), classes=10)


def compared(card: Any, batches: list[tuple[Tensor, Tensor]], rounds: int = 60) -> dict[str, Any]:
    """Medians of a rule's step against ``loss.backward()`` without Weft, and against the rule ``backprop``."""
    rule, baseline, plain = card.build(net()), weft.create("backprop", net()), net()

    def plain_step(x: Tensor, y: Tensor) -> None:
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()

    def step_of(made: Any) -> Callable[[Tensor, Tensor], None]:
        def step(x: Tensor, y: Tensor) -> None:
            made.zero_grad()
            made.step(x, y)

        return step

    against_plain = measure.step_ratio(step_of(rule), plain_step, rounds=rounds, inputs=rotated(batches))
    against_rule = measure.step_ratio(step_of(rule), step_of(baseline), rounds=rounds, inputs=rotated(batches))
    return {
        "ratio_to_plain": against_plain.ratio,
        "ratio_to_backprop": against_rule.ratio,
        "milliseconds": 1000 * against_plain.seconds,
        "plain_milliseconds": 1000 * against_plain.baseline_seconds,
    }


def rotated(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, over and over."""
    return itertools.cycle(batches)
