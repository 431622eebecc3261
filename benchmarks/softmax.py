"""`weft.ops.softmax` against `torch.softmax`, each called as a user calls it: both allocate what they return."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ratios import ratio
from weft import ops
from weft.kernels import pages

ROUNDS = int(os.environ.get("WEFT_BENCH_ROUNDS", "15"))
SHAPES = {  # at least, aim; several inputs, so that none stays in the caches
    (1, 1 << 20): (1.25, 1.6),
    (1, 1 << 22): (1.25, 1.6),
    (1, 1 << 24): (None, None),
    (512, 50_257): (1.0, 1.3),
    (4096, 1024): (None, None),
    (64, 128): (None, None),
    (1, 1000): (None, None),
}


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Both methods and what the default takes, forward; the default with its way back; and without huge pages."""
    rows = []
    for shape, wanted in SHAPES.items():
        size = shape[0] * shape[1]
        x = [3 * torch.randn(shape) for _ in range(4 if size <= 1 << 22 else 2)]
        g = torch.randn(shape)
        with torch.no_grad():
            for method in ("two-pass", "online", "fastest"):
                rows.append(_row(shape, method, _forward(x, method), wanted))
                say(f"softmax: {rows[-1]}")
                if 4 * size >= pages.LEAST and method != "fastest":
                    kept, pages.LEAST = pages.LEAST, sys.maxsize
                    try:
                        rows.append(_row(shape, f"{method}, small pages", _forward(x, method), (None, None)))
                    finally:
                        pages.LEAST = kept
                    say(f"softmax: {rows[-1]}")
        if size <= 1 << 22:
            rows.append(_row(shape, "fastest, and back", _both(x, g), (None, None)))
            say(f"softmax: {rows[-1]}")
    return rows


def _forward(x: list[Tensor], method: str) -> dict[str, float]:
    return ratio(
        lambda i: torch.softmax(x[i % len(x)], -1), lambda i: ops.softmax(x[i % len(x)], -1, method), rounds=ROUNDS,
        shortest=0.01,
    )  # fmt: skip


def _both(x: list[Tensor], g: Tensor) -> dict[str, float]:
    x = [t.clone().requires_grad_() for t in x]

    def step(function: Callable[[Tensor], Tensor], i: int) -> None:
        torch.autograd.grad(function(x[i % len(x)]), x[i % len(x)], g)

    return ratio(lambda i: step(lambda t: torch.softmax(t, -1), i), lambda i: step(ops.softmax, i), rounds=ROUNDS)


def _row(
    shape: tuple[int, int], way: str, found: dict[str, float], wanted: tuple[float | None, float | None]
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{shape[0]} x {shape[1]}", "way": way, "ratio": found["ratio"], "low": found["low"]}
    row |= {"high": found["high"], "at_least": wanted[0], "aim": wanted[1]}
    return row | {"milliseconds": found["seconds"] * 1e3, "torch_milliseconds": found["plain_seconds"] * 1e3}
