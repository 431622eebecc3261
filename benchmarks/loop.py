"""``weft.fit`` with ``backprop`` against a loop written by hand: one thread, CPU time, medians of ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft import models
from weft.data import Dataset

ROWS, BATCH = 6400, 64


def run(say: Callable[[str], None], rounds: int = 60) -> list[dict[str, Any]]:
    """An epoch of ``mlp:500x500`` on 28x28 inputs in batches of 64, optimizer included; both the same fused Adam.

    Both train the same network from the same weights, so that where it lies in memory is the same, which alone makes
    epochs differ by several percent; each round has a new one. ``again`` is the loop by hand once more: what identical
    loops differ by.
    """
    data = images(ROWS)
    seconds: dict[str, list[float]] = {"hand": [], "again": [], "fit": []}
    for number in range(-1, rounds):
        net = models.build("mlp:500x500", input_shape=(1, 28, 28), classes=10, seed=number + 1)
        rule, start = weft.create("backprop", net), {k: v.clone() for k, v in net.state_dict().items()}
        for name in random.Random(number).sample(sorted(seconds), len(seconds)):
            net.load_state_dict(start)
            began = time.process_time()
            by_weft(rule, data) if name == "fit" else by_hand(net, data)
            if number >= 0:  # the round before warms up
                seconds[name].append(time.process_time() - began)
    row: dict[str, Any] = {"rows": ROWS, "batch": BATCH, "rounds": rounds}
    for name in ("fit", "again"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["hand"], strict=True)]
        row[f"{name}_ratio"] = statistics.median(ratios)
        row[f"{name}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    row |= {f"{name}_seconds": statistics.median(found) for name, found in seconds.items()}
    say(f"loop: {row}")
    return [row]


def images(rows: int) -> Dataset:
    """Random images and labels, with two rows to validate on, so that evaluation costs nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 28, 28, generator=generator)
    y = torch.randint(0, 10, (rows,), generator=generator)
    return Dataset("random", x, y, x[:2], y[:2], None, None, classes=10, kind="image")


def by_hand(net: nn.Module, data: Dataset) -> None:
    """One epoch as anyone would write it."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    for index in torch.randperm(len(data.y_train)).split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(data.x_train[index]), data.y_train[index])
        loss.backward()
        optimizer.step()


def by_weft(rule: Any, data: Dataset) -> None:
    """One epoch of ``weft.fit`` with the same optimizer."""
    weft.fit(rule, data, epochs=1, batch_size=BATCH, optimizer="adam", lr=1e-3, schedule="constant")
