"""``weft compare`` with each rule's own options: an MLP on MNIST with three seeds, a convnet on CIFAR-10 with one.

Each takes the better part of an hour on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import weft

RULES = (
    "backprop",
    "feedback-alignment",
    "direct-feedback-alignment",
    "ternary-direct-feedback-alignment",
    "product-feedback-alignment",
    "orthogonal-product-feedback-alignment",
    "counter-current",
    "target-projection",
    "direct-random-target-projection",
    "mono-forward",
    "scalable-forward-forward",
    "collaborative-forward-forward",
    "forward-forward",
    "physical-forward-forward",
    "pepita",
    "noprop",
    "inference-learning",
    "guided-forward-gradient",
    "forward-gradient",
    "zeroth-order",
)
CONVOLUTIONAL = (
    "backprop",
    "mono-forward",
    "scalable-forward-forward",
    "feedback-alignment",
    "direct-feedback-alignment",
    "ternary-direct-feedback-alignment",
    "orthogonal-product-feedback-alignment",
    "counter-current",
    "target-projection",
    "forward-forward",
    "collaborative-forward-forward",
    "pepita",
)
MEANS = ("accuracy", "validation_accuracy", "seconds_per_epoch")


def mnist(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """``mlp:500x500``, 10 epochs, batch 128."""
    return rows("mlp:500x500", "mnist", RULES, 3, say)


def cifar(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """``convnet`` on 8,334 images, 10 epochs, batch 128."""
    return rows("convnet", "cifar10-small", CONVOLUTIONAL, 1, say)


def rows(model: str, data: str, rules: Sequence[str], seeds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each rule that applies: mean and worst test accuracy, what a step costs, and the runs."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            record = event["record"]
            say(f"{data}: {event['rule']}, seed {event['seed']}: {record['error'] or record['accuracy']}")

    runs = weft.compare(model, data, rules, seeds=seeds, on_event=on_event)["runs"]
    found = []
    for name in rules:
        own = [run for run in runs if run["rule"] == name and run["status"] == "ok"]
        if own:
            row: dict[str, Any] = {"rule": name, "worst": min(run["accuracy"] for run in own)}
            row |= {key: sum(run[key] for run in own) / len(own) for key in MEANS}
            row |= {key: own[0][key] for key in ("step_ratio", "kept_bytes", "peak_bytes")}
            found.append(row | {"seeds": len(own), "runs": own})
    return sorted(found, key=lambda row: -row["accuracy"])
