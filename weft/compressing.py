"""A finished run made smaller or faster: `load_run` gives its trained model, `compress_run` compresses it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from weft import data as data_sets
from weft import measure, models
from weft.cards import Card
from weft.data import Dataset
from weft.errors import Unsupported, UsageError, WeftError, unknown
from weft.evaluation import evaluate
from weft.folders import RECIPE, RESULT, WEIGHTS
from weft.measuring import compare_inference
from weft.method import card, methods
from weft.recipe import Recipe
from weft.specs import apply_conversions, parse

CALIBRATION = 1024  # training rows by default
BATCHES = (1, 64)  # rows whose inference is timed


def load_run(folder: str | Path, *, data_dir: str | Path | None = None) -> nn.Module:
    """The trained model of a finished run of ``weft fit``, in evaluation mode.

    Args:
        folder: as ``weft.run(..., out=folder)`` or ``weft fit --out`` left it.
        data_dir: where the data set is, whose form the model is built for; by default the recipe's.

    Raises:
        UsageError: for a folder without a run.
        WeftError: for a run that is not finished, or weights that do not fit.
        Unsupported: for a rule that predicts by a network of its own.
    """
    return _loaded(Path(folder), data_dir)[0]


def _loaded(folder: Path, data_dir: str | Path | None) -> tuple[nn.Module, Dataset, Recipe]:
    if not (folder / RECIPE).is_file():
        raise UsageError(f"{folder} holds no run (no {RECIPE}): give a folder that weft fit --out has made")
    recipe = Recipe.read(folder / RECIPE)
    if not (folder / RESULT).is_file() or not (folder / WEIGHTS).is_file():
        raise WeftError(f"the run in {folder} is not finished: weft fit --resume {folder} goes on with it")
    rule = recipe.rules[-1].rule
    if "own-model" in card(rule).tags:
        raise Unsupported(f"{rule} predicts by a network of its own, which only the rule can build", "another rule")
    data = data_sets.load(recipe.data, data_dir=recipe.data_dir if data_dir is None else data_dir)
    model = models.build(recipe.model, **data.form, seed=recipe.seed)
    apply_conversions(model, recipe.conversions)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise WeftError(f"{folder / WEIGHTS} cannot be read ({error}); train the run again") from error
    except RuntimeError as error:
        raise WeftError(
            f"the weights in {folder} do not fit {recipe.model} on {recipe.data}: the model's code or the data have "
            f"changed since, or the rule {rule} has changed the model's structure. {error}"
        ) from error
    return model.eval(), data, recipe


def read_compressor(text: str) -> tuple[Card, dict[str, Any]]:
    """A method of the contract ``compress`` and its options from ``chess:sparsity=0.5``.

    Raises:
        UsageError: for a name that is no such method, and options that it does not have.
    """
    name, options = parse(text)
    valid = [found.name for found in methods() if found.contract == "compress"]
    if name not in valid:
        raise UsageError(unknown("method", name, valid, "that compresses (weft methods lists all)"))
    found = card(name)
    known = [option.name for option in found.options]
    for given in options:
        if given not in known:
            raise UsageError(unknown("option", given, known, f"of {name!r}"))
    return found, options


def compress_run(
    folder: str | Path,
    method: str = "chess",
    *,
    calibration: int = CALIBRATION,
    rounds: int = 15,
    data_dir: str | Path | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Compress the model of a finished run, calibrated on its training data, and measure it before and after.

    The folder stays as it is.

    Args:
        folder: of the run.
        method: a method of the contract ``compress`` with its options: ``"chess:sparsity=0.5"``.
        calibration: rows of the training data, at most; a graph is taken whole.
        rounds: pairs of interleaved timings for each batch.
        data_dir: where the data set is; by default the recipe's.
        threads: of torch, while this function runs.

    Returns:
        Plain data, with ``before`` and ``after`` in each: ``accuracy`` (test; None without a test part), ``operations``
        (matrix products of the whole model for one row), ``bytes`` (all weights, and those that are not skipped by a
        token that comes alone), ``time`` (CPU seconds of inference on ``"1"`` and ``"64"`` rows, with ``ratio``, above
        1 where it is faster); ``report`` (the method's), ``settings``, ``recipe``, ``environment``.

    Raises:
        UsageError, WeftError, Unsupported: as `load_run` and `read_compressor`, and as the method does.
    """
    if calibration < 1 or rounds < 1 or threads < 1:
        raise UsageError("calibration, rounds and threads are at least 1")
    found, options = read_compressor(method)
    made = found.build(**options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, data, recipe = _loaded(Path(folder), data_dir)
        model = copy.deepcopy(plain)
        whole = data.kind == "graph"
        rows = data.x_train if whole else data.x_train[next(data.batches(calibration, seed=recipe.seed, epoch=0))]
        report = made.compress_(model, [rows] if whole else list(rows.split(128)))
        timed = {} if whole else _timed(plain, model, data, rounds)
        accuracy = {"before": _accuracy(plain, data), "after": _accuracy(model, data)}
        return {
            "accuracy": accuracy,
            "report": report.to_dict(),
            **_costs(plain, report, data),
            "time": timed,
            "settings": {"folder": str(folder), "method": method, "calibration": len(rows), "threads": threads},
            "recipe": recipe.model_dump(mode="json"),
            "environment": measure.environment(),
        }
    finally:
        torch.set_num_threads(before)


def _accuracy(model: nn.Module, data: Dataset) -> float | None:
    if data.x_test is None or data.y_test is None:
        return None
    return evaluate(model, data.x_test, data.y_test, batch_size=data.scored_at_once)


def _costs(plain: nn.Module, report: Any, data: Dataset) -> dict[str, dict[str, float]]:
    """Operations of the whole model for one row, and bytes for one token: the plain model's, less what is saved."""
    row = data.x_train if data.kind == "graph" else data.x_train[:1]
    with torch.no_grad():
        operations = measure.operations(lambda: plain(row))["total"]
    weights = sum(p.numel() * p.element_size() for p in plain.parameters())
    plain_data, tokens = report.to_dict()["total"], _tokens(plain, report, row)
    saved = tokens * (plain_data["operations_before"] - plain_data["operations_after"])
    unread = plain_data["bytes_before"] - plain_data["bytes_after"]
    return {
        "operations": {"before": float(operations), "after": operations - saved},
        "bytes": {"before": float(weights), "after": weights - unread},
    }


def _tokens(plain: nn.Module, report: Any, row: torch.Tensor) -> int:
    """How many tokens one row brings to the first layer that was compressed."""
    seen: list[int] = []
    layer = plain.get_submodule(report.names[0])
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // args[0].shape[-1]))
    try:
        with torch.no_grad():
            plain(row)
    finally:
        handle.remove()
    return sum(seen)


def _timed(plain: nn.Module, model: nn.Module, data: Dataset, rounds: int) -> dict[str, Any]:
    """The ``time`` of `compress_run`."""
    found = {size: row["time"] for size, row in compare_inference(plain, model, data.x_train, BATCHES, rounds).items()}
    return {
        size: {
            "before": time["baseline_seconds"],
            "after": time["seconds"],
            "ratio": 1 / time["ratio"] if time["ratio"] else None,
        }
        for size, time in found.items()
    }
