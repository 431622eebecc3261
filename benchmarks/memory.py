"""Peak bytes of a step against depth: 4 to 32 stages of width 512, batch 128."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import weft
from weft import measure
from weft.errors import UsageError


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every rule that takes ``backward``, in both modes, with and without ``ready``; backprop beside them."""
    rows = []
    for card in weft.methods(contract="rule"):
        modes = ("joint", "stage") if any(o.name == "backward" for o in card.options) else ("",)
        for mode in modes:
            for ready in (False, True):
                row: dict[str, Any] = {"rule": card.name, "backward": mode, "ready": ready}
                try:
                    row |= {f"stages_{n}": peak(card, n, {"backward": mode} if mode else {}, ready) for n in (4, 8, 32)}
                except UsageError:
                    continue
                say(f"memory: {row}")
                rows.append(row)
    return rows


def peak(card: Any, stages: int, options: dict[str, Any], ready: bool) -> int:
    """Peak bytes of one step, gradients included; with ``ready`` each parameter is updated and its gradient dropped."""
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(stages)]
    rule = card.build(nn.Sequential(*blocks, nn.Linear(512, 10)), **options)
    x, y = torch.randn(128, 512), torch.randint(0, 10, (128,))

    def update(p: nn.Parameter) -> None:
        with torch.no_grad():
            p.add_(p.grad, alpha=-1e-4)  # type: ignore[arg-type]
        p.grad = None

    return measure.peak_bytes(lambda: rule.step(x, y, ready=update if ready else None), parameters=rule.trainable())
