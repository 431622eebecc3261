"""Measured figures, from the files that ``make bench`` writes; where a file is not there, nothing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generators import speed
from generators.text import code, escape, table

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
Row = dict[str, Any]


def read(name: str) -> dict[str, Any] | None:
    """One file of results, None where it does not exist."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def section(name: str) -> str:
    """The figures of one benchmark as Markdown, with where they were measured; empty where there are none."""
    document = read(name)
    if document is None:
        return ""
    return SHOWN[name](document["rows"]) + "\n" + measured_on(document.get("environment", {}))


def claims() -> dict[tuple[str, str], Row]:
    """Records of claims by (method, function), where there is a file of them."""
    document = read("claims")
    if document is None:
        return {}
    records = document if isinstance(document, list) else document.get("claims", document.get("rows", []))
    return {(record["method"], record["function"]): record for record in records}


def measured_on(environment: Row) -> str:
    """One line: machine, versions, commit."""
    facts = [
        environment.get("cpu"),
        *(f"{key} {environment[key]}" for key in ("torch", "python") if key in environment),
    ]
    commit = environment.get("commit")
    facts += [f"commit {commit[:10]}"] if commit else []
    return f"Measured on {escape(', '.join(str(fact) for fact in facts if fact))}.\n"


def _memory(rows: list[Row]) -> str:
    sizes = [key for key in rows[0] if key.startswith("stages_")]
    header = ["rule", "backward", "ready", *(key.replace("stages_", "") + " stages" for key in sizes)]
    made = [
        [_page(row["rule"]), code(row["backward"]), "yes" if row["ready"] else ""]
        + [f"{row[key] / 1e6:.1f} MB" for key in sizes]
        for row in rows
    ]
    return (
        "Peak bytes of one step, gradients included, optimizer state not: stages of width 512 (`nn.Linear` and ReLU), "
        "batch 128. With `ready` each parameter is updated and its gradient dropped as soon as it is final.\n\n"
        + table(header, made, header[3:])
    )


def _steps(rows: list[Row]) -> str:
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    ratios = {(row["rule"], row["batch"]): row["ratio_to_plain"] for row in rows}
    header = ["rule", *(f"batch {batch}" for batch in batches)]
    made = [
        [_page(name), *(f"{ratios[name, batch]:.2f}" for batch in batches)]
        for name in dict.fromkeys(row["rule"] for row in rows)
    ]
    return (
        "CPU time of a step, optimizer excluded, as a ratio to plain PyTorch's forward and `loss.backward()`: "
        "`mlp:500x500` on 28x28 inputs, one thread, medians of interleaved runs.\n\n" + table(header, made, header[1:])
    )


def _accuracy(what: str) -> Callable[[list[Row]], str]:
    def shown(rows: list[Row]) -> str:
        seeds = rows[0]["seeds"]
        reached = {"accuracy": "test accuracy, mean", "worst": "worst"} if seeds > 1 else {"accuracy": "test accuracy"}
        header = ["rule", *reached.values(), "step x", "kept", "peak"]
        made = []
        for row in rows:
            sizes = (f"{row[key] / 1e6:.2f} MB" for key in ("kept_bytes", "peak_bytes"))
            made.append([_page(row["rule"]), *(f"{100 * row[key]:.2f} %" for key in reached)])
            made[-1] += [f"{row['step_ratio']:.2f}", *sizes]
        return (
            f"{what}, after the last of 10 epochs at batch 128, each rule with options and optimizer of its card, "
            f"{'one seed' if seeds == 1 else f'{seeds} seeds'}. Step x: a step's time to plain backprop's, "
            "without the optimizer; kept: bytes kept for the way back, at most; peak: bytes allocated in a step, "
            "gradients included, at most.\n\n" + table(header, made, header[1:])
        )

    return shown


def _page(name: str) -> str:
    return f"[{name}](methods/{name}.md)"


def _tapes(rows: list[Row]) -> str:
    header = ["way", "validation loss", "to plain", "kept", "peak", "step x"]
    made = [
        [
            escape(row["way"]),
            *(f"{row[key]:.3f}" for key in ("validation_loss", "loss_to_plain")),
            *(f"{row[key] / 1e6:.1f} MB" for key in ("kept_bytes", "peak_bytes")),
            f"{row['time']:.2f}",
        ]
        for row in rows
    ]
    return (
        "`char-transformer` on tiny Shakespeare: validation loss after 200 steps of 32 rows (Adam 0.001, cosine), mean "
        f"of {len(rows[0]['losses'])} seeds; kept and peak bytes of a step, gradients allocated before it; time to the "
        "plain step's.\n\n" + table(header, made, header[1:])
    )


def _keeping(rows: list[Row]) -> str:
    header = ["way", "kept", "peak", "step x", "gradient error"]

    def mega(value: float | None) -> str:
        return "–" if value is None else f"{value / 1e6:.1f} MB"

    made = [
        [
            escape(row["way"]),
            *(mega(row[key]) for key in ("kept_bytes", "peak_bytes")),
            f"{row['time']:.2f}",
            "–" if row["error"] is None else "exact" if row["error"] < 1e-6 else f"{100 * row['error']:.2g} %",
        ]
        for row in rows
    ]
    return (
        "One step of a 6-layer transformer (width 256, length 256, batch 8, 65 tokens), one thread: bytes kept between "
        "the passes, peak with gradients allocated before, time to the plain step's, and the mean of the layers' "
        "relative gradient errors. PEFT's two train rank-8 adapters of the down projections and nothing else.\n\n"
        + table(header, made, header[1:])
    )


SHOWN: dict[str, Callable[[list[Row]], str]] = {
    "memory": _memory,
    "steps": _steps,
    "mnist": _accuracy("`mlp:500x500` on MNIST, 50,000 images"),
    "cifar": _accuracy("`convnet` on `cifar10-small`, 8,334 images"),
    "tapes": _tapes,
    "keeping": _keeping,
    "sparse": speed.sparse,
    "sparse_mnist": speed.sparse_mnist,
    "fast_feed_forward": speed.fast_feed_forward,
    "fast_feed_forward_mnist": speed.fast_feed_forward_mnist,
    "binary": speed.binary,
    "row_skipping": speed.row_skipping,
    "experts": speed.experts,
    "softmax": speed.softmax,
}
