"""``weft compare`` on MNIST with default options, three seeds: about 15 minutes on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import weft
from weft.comparison import RULES


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each rule: mean and worst test accuracy, CPU seconds an epoch."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            say(f"mnist: {event['rule']}, seed {event['seed']}: {event['record']['accuracy']}")

    document = weft.compare("mlp:500x500", "mnist", RULES, seeds=3, on_event=on_event)
    rows = []
    for name in RULES:
        runs = [run for run in document["runs"] if run["rule"] == name]
        reached = [run["accuracy"] for run in runs]
        rows.append(
            {
                "rule": name,
                "mean": sum(reached) / len(reached),
                "worst": min(reached),
                "validation_mean": sum(run["validation_accuracy"] for run in runs) / len(runs),
                "seconds_per_epoch": sum(run["seconds_per_epoch"] for run in runs) / len(runs),
                "runs": runs,
            }
        )
    return rows
