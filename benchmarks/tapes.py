"""The character transformer trained under each way to keep less: validation loss, bytes and time, to plain."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft import data, measure, models
from weft.measuring import conversions_of
from weft.specs import apply_conversions, read_tape

SEEDS = tuple(int(seed) for seed in os.environ.get("WEFT_BENCH_SEEDS", "0,1,2").split(","))
BATCH, ROWS = 32, 6400  # 200 steps
WAYS: dict[str, tuple[str | None, str]] = {  # a tape and conversions
    "plain": (None, ""),
    "quantise, 4 bits": ("quantise:bits=4", ""),
    "quantise, 2 bits": ("quantise:bits=2", ""),
    "few-bit activations, 3 bits": (None, "few-bit-activation:bits=3"),
    "approximate activations": (None, "approximate-activation"),
    "VeLoRA, m = 4, down projections": (None, "velora:length=4,where=blocks.*.mlp.2"),
    "VeLoRA, m = 16, down projections": (None, "velora:where=blocks.*.mlp.2"),
    "CompAct, r = n/2": (None, "compact:rank=0.5,where=blocks.*.mlp.*"),
    "CompAct, r = n/4": (None, "compact:rank=0.25,where=blocks.*.mlp.*"),
    "mini-sequence": (None, "mini-sequence:where=blocks.*.mlp"),
    "offload": ("offload", ""),
    "memory-sharing norms": (None, "memory-sharing-norm"),
    "randomised linear, 1/4": (None, "randomised-linear:where=blocks.*.mlp.*"),
}


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Validation loss after 200 steps (three seeds), kept and peak bytes and time of a step, each to plain's."""
    loaded = data.load("tinyshakespeare")
    loaded = dataclasses.replace(loaded, x_train=loaded.x_train[:ROWS], y_train=loaded.y_train[:ROWS])
    index = next(loaded.batches(BATCH, seed=0, epoch=0))
    batch = loaded.x_train[index], loaded.y_train[index]
    base, _ = _step(models.build("char-transformer", **loaded.form, seed=0), None, "")
    rows: list[dict[str, Any]] = []
    for name, (tape, convert) in WAYS.items():
        losses = [_trained(loaded, tape, convert, seed) for seed in SEEDS]
        step = _step(models.build("char-transformer", **loaded.form, seed=0), tape, convert)
        row: dict[str, Any] = {"way": name, "validation_loss": sum(losses) / len(losses), "losses": losses}
        row |= _figures(step, batch)
        plain = rows[0] if rows else row
        row["loss_to_plain"] = row["validation_loss"] / plain["validation_loss"]
        for key in ("kept_bytes", "peak_bytes"):
            row[f"plain_{key}_to_this"] = plain[key] / max(1, row[key])
        row["time"] = measure.step_ratio(step[0], base, rounds=9, inputs=[batch]).ratio
        say(f"tapes: {row}")
        rows.append(row)
    return rows


def _trained(loaded: Any, tape: str | None, convert: str, seed: int) -> float:
    """The validation loss after training."""
    model = models.build("char-transformer", **loaded.form, seed=seed)
    apply_conversions(model, conversions_of(convert))
    rule = weft.create("backprop", model)
    how: dict[str, Any] = {} if tape is None else {"tape": read_tape(tape)}
    weft.fit(rule, loaded, epochs=1, batch_size=BATCH, seed=seed, **how)
    model.eval()
    with torch.no_grad():
        x, y = loaded.x_validation, loaded.y_validation
        parts = [
            F.cross_entropy(model(x[i : i + 128]).flatten(0, 1), y[i : i + 128].flatten(), reduction="sum")
            for i in range(0, len(y), 128)
        ]
    return float(sum(parts)) / y.numel()


Step = tuple[Callable[[Tensor, Tensor], None], nn.Module]


def _step(model: nn.Module, tape: str | None, convert: str) -> Step:
    apply_conversions(model, conversions_of(convert))
    packs = None if tape is None else read_tape(tape)

    def step(x: Tensor, y: Tensor) -> None:
        for p in model.parameters():
            p.grad = None
        with contextlib.nullcontext() if packs is None else packs.on(model):
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()

    step.tape = packs  # type: ignore[attr-defined]
    return step, model


def _figures(step: Step, batch: Sequence[Tensor]) -> dict[str, Any]:
    """Kept and peak bytes; of the peak, the gradients' own are no part."""
    call, model = step
    parameters = [p for p in model.parameters() if p.requires_grad]
    call(*batch)
    return {
        "kept_bytes": measure.kept_bytes(lambda: call(*batch), model).peak_bytes,
        "peak_bytes": measure.peak_bytes(lambda: call(*batch), parameters=parameters, gradients=False)
        + getattr(getattr(call, "tape", None), "outside_bytes", 0),
    }
