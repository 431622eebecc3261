"""One training step of a named model on a named data set, taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft import data as data_sets
from weft import measure, models
from weft.comparison import build
from weft.errors import UsageError, WeftError
from weft.method import card


def measure_step(
    model: str = "mlp",
    data: str = "digits",
    rule: str | None = None,
    *,
    data_dir: str | Path | None = None,
    at: Sequence[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Any]:
    """Time, bytes kept by module, peak bytes and operations of one step, as plain data.

    Args:
        model, data, data_dir, at: as in :func:`weft.compare`.
        rule: a rule's name; plain backpropagation without Weft where None.
        batch_size: rows of the step.
        seed: of weights, batch and rule.
        threads: of torch, while this function runs.

    Returns:
        The fields of :class:`weft.measure.StepReport` with ``settings`` and ``environment``.

    Raises:
        UsageError, DataError, Unsupported: for names that do not exist and combinations that cannot work.
    """
    if batch_size < 1 or threads < 1:
        raise UsageError("batch_size and threads are at least 1")
    found = None if rule is None else card(rule)
    if found is not None and found.contract != "rule":
        raise UsageError(f"{rule!r} is a {found.contract}, not a rule")
    loaded = data_sets.load(data, data_dir=data_dir)
    shape = tuple(loaded.input_shape)
    net = models.build(model, input_shape=shape, classes=loaded.classes, kind=loaded.kind, seed=seed)
    index = next(data_sets.batches(len(loaded.y_train), batch_size, seed=seed, epoch=0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        try:
            built = None if found is None else build(found, net, seed, at)
            report = measure.take_apart(net, loaded.x_train[index], loaded.y_train[index], rule=built)
        except WeftError:
            raise
        except (Exception, SystemExit) as error:
            raise WeftError(f"{model} failed in a step: {type(error).__name__}: {error}") from error
        settings = {"model": model, "data": data, "rule": rule, "batch_size": len(index), "seed": seed}
        settings["threads"] = threads
        return {**report.to_dict(), "settings": settings, "environment": measure.environment()}
    finally:
        torch.set_num_threads(before)
