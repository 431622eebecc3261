"""Rules side by side: the same model, the same batches, one record for each rule and seed."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft import data as data_sets
from weft import measure
from weft._runner import BASELINE, Change, Event, Runner
from weft.cards import Card
from weft.errors import UsageError, WeftError, unknown
from weft.measuring import conversions_of
from weft.method import card, methods
from weft.optimizers import DEFAULTS, build_optimizer
from weft.recipe import Recipe
from weft.report import PAGE, write_report
from weft.runs import write
from weft.specs import read_tape

RULES = (
    "backprop",
    "feedback-alignment",
    "direct-feedback-alignment",
    "mono-forward",
    "forward-forward",
    "pepita",
    "forward-gradient",
    "noprop",
)


def compare(
    model: str = "mlp",
    data: str = "digits",
    rules: str | Sequence[str] | None = None,
    *,
    tape: str | Sequence[str] = (),
    convert: str | Sequence[str] = (),
    data_dir: str | Path | None = None,
    at: Sequence[str] | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    seeds: int = 1,
    threads: int = 1,
    optimizer: str | None = None,
    lr: float | None = None,
    same_optimizer: bool = False,
    out: str | Path | None = None,
    on_event: Event | None = None,
) -> dict[str, Any]:
    """Train the same model under several rules and measure what each costs and reaches.

    Args:
        model: ``mlp``, ``mlp:500x500``, ``convnet``, ``resnet``, ``char-transformer`` or ``path/to/file.py:function``.
        data: a data set's name, or ``path.npz`` with ``x_train, y_train`` and perhaps ``x_test, y_test``.
        rules: names of rules, as a list or comma-separated; ``"all"`` for every rule; by default backprop and the
            rules that the command's documentation lists.
        tape: a tape, or several, as in :func:`weft.measure_step`: every rule runs plainly and under each of them.
        convert: layers to swap, as there, or several such texts: every rule runs with each of them too.
        data_dir: where data sets are, by default ``WEFT_DATA`` or the user's cache.
        at: modules to cut behind, for the rules that need stages; see :func:`weft.stages.cut`.
        epochs: passes over the training part (the first five sixths of the training set; the rest validates).
        batch_size: rows a step.
        seed: the first seed; of weights, batches and whatever the rule draws.
        seeds: how many seeds, counted up from ``seed``.
        threads: of torch, while this function runs.
        optimizer: in place of each rule's own.
        lr: in place of each rule's own.
        same_optimizer: every rule gets backprop's optimizer, learning rate and schedule (or those given).
        out: a folder for ``compare.json``, written anew, atomically, after every run, with the recipe of each run;
            at the end, and when it is interrupted with some runs done, ``report.html`` too.
        on_event: called with progress: ``{"event": "run" | "step" | "epoch" | "done" | "report", ...}``. The last has
            ``path``, or None and ``error``: a page that cannot be written costs no figure.

    Returns:
        ``{"runs": [...], "settings": {...}, "environment": {...}}``, plain data for JSON. ``settings`` are the
        arguments with ``rows`` of each part of the data, ``environment`` is that of :func:`weft.measure.environment`.
        A record of ``runs`` has

        - ``rule``, ``seed``, ``status`` (``ok``, ``unsupported`` or ``error``), ``error``; ``why``: for each figure
          that is None, the reason; ``rule`` names the tape or the layers too (``"backprop | quantise:bits=2"``), and
          ``method``, ``tape`` and ``conversions`` have them apart;
        - ``accuracy`` (test), ``validation_accuracy``, ``loss``, all after the last epoch; ``curve``: loss and
          validation accuracy for each epoch; ``seconds_per_epoch`` (CPU time);
        - ``step_ratio`` (a step's time to backprop's), ``kept_bytes`` (for the way back, at most), ``kept_by_module``
          (how they divide; at most 30 modules, the others summed), ``peak_bytes`` (of a step, gradients included),
          each measured once for each rule; names of modules are those inside the rule, ``model.`` for the model's;
        - ``modules``: the class of each module that ``kept_by_module`` and ``alignment`` name;
        - ``alignment``: ``{"epoch", "whole", "layers": {module: cosine}}``, the cosine of the rule's gradient with the
          exact one, on the run's first batch, over all parameters and by the module that owns them, after each
          epoch (beyond 10 epochs: after 10 of them, evenly spread); ``cosine_to_exact``: first and last ``whole``;
        - ``passes``: as in :func:`weft.measure.passes`; ``independent_stages``: how many parts of the model are trained
          without waiting for each other; ``concerns``: reasons to doubt that the rule learns, see
          :func:`weft.diagnosis.concerns`;
        - ``defaults`` (optimizer, lr, schedule, clip), ``at`` (cuts), ``initial_weights`` (``shared`` by all rules, or
          the rule's ``own``), ``parameters``, ``extra_parameters`` (numbers that the rule holds beside the model).

    Raises:
        UsageError: for names and options that do not exist; DataError, Unsupported: for data that cannot be used.
    """
    if seeds < 1 or threads < 1 or batch_size < 1 or epochs < 1:
        raise UsageError("epochs, batch_size, seeds and threads are at least 1")
    chosen, changes = select(rules), _changes(tape, convert)
    if optimizer is not None or lr is not None:
        build_optimizer(optimizer or "adam", [nn.Parameter(torch.zeros(1))], 1e-3 if lr is None else lr)
    loaded = data_sets.load(data, data_dir=data_dir)
    how = {"model": model, "data": data, "epochs": epochs, "batch_size": batch_size, "seed": seed, "seeds": seeds}
    how |= {"at": None if at is None else list(at)}
    how |= {"data_dir": None if data_dir is None else str(data_dir)}
    how |= {"threads": threads, "rules": [change.label(c.name) for c in chosen for change in changes]}
    how |= {"optimizer": optimizer, "lr": lr, "same_optimizer": same_optimizer}
    how["rows"] = loaded.rows
    if loaded.kind == "graph":
        how["batch_size"] = len(loaded.y_train)  # all nodes, whatever was asked for
    document: dict[str, Any] = {"runs": [], "settings": how, "environment": {}}
    tell = on_event or (lambda event: None)
    if out is not None:
        keep(Path(out), document)
        (Path(out) / PAGE).unlink(missing_ok=True)  # of an earlier comparison
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        document["environment"] = measure.environment()
        runner = Runner(loaded, how, tell)
        for one, change, number in itertools.product(chosen, changes, range(seed, seed + seeds)):
            document["runs"].append(runner.run(one, number, change))
            if out is not None:
                keep(Path(out), document)
    finally:
        torch.set_num_threads(before)
        if out is not None and document["runs"]:
            found = _page(Path(out))
            tell({"event": "report", **found})
            if found["error"] and on_event is None:
                warnings.warn(f"no page was written: {found['error']}", stacklevel=2)
    return document


def _changes(tape: str | Sequence[str], convert: str | Sequence[str]) -> list[Change]:
    """Plain, then each tape, then each set of layers to swap.

    Raises:
        UsageError: for tapes, layers and options that do not exist.
    """
    changes = [Change()]
    for text in [tape] if isinstance(tape, str) else tape:
        read_tape(text)
        changes.append(Change(tape=text))
    for text in [convert] if isinstance(convert, str) else convert:
        changes.append(Change(conversions=tuple(conversions_of(text))))
    return changes


def select(rules: str | Sequence[str] | None) -> list[Card]:
    """The cards of the rules asked for, in that order, each once.

    Raises:
        UsageError: for a name that is no rule.
    """
    every = [c.name for c in methods() if c.contract in ("rule", "solver")]
    if rules is None:
        names: Iterable[str] = [name for name in RULES if name in every]
    elif rules == "all" or list(rules) == ["all"]:
        names = [BASELINE, *(name for name in every if name != BASELINE)]
    else:
        names = [n.strip() for n in rules.split(",") if n.strip()] if isinstance(rules, str) else rules
    chosen = []
    for name in dict.fromkeys(names):
        if name not in every:
            raise UsageError(unknown("rule", name, every, "(weft methods --family rules lists all)"))
        chosen.append(card(name))
    if not chosen:
        raise UsageError("no rule was named; give names, or 'all'")
    return chosen


def _page(folder: Path) -> dict[str, str | None]:
    """Write the page of a comparison; the figures are safe already, so that no error may take their place."""
    try:
        return {"path": str(write_report(folder)), "error": None}
    except Exception as error:
        text = str(error) if isinstance(error, WeftError) else f"{type(error).__name__}: {error}"
        return {"path": None, "error": text}


def keep(folder: Path, document: dict[str, Any]) -> None:
    """``compare.json`` in the folder, and the recipe of the last run, each replaced in one step.

    Raises:
        WeftError: when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeftError(f"cannot make the folder {folder}: {error.strerror}; choose another with --out") from error
    write(folder / "compare.json", json.dumps(document, indent=1, allow_nan=False).encode())
    for run in [r for r in document["runs"][-1:] if r["status"] != "unsupported" and r["defaults"]]:
        name = re.sub(r"[^\w.=,:-]+", "-", run["rule"]).replace(":", "-")
        write(folder / f"{name}-seed{run['seed']}.yaml", recipe_of(run, document["settings"]).text().encode())


def recipe_of(run: dict[str, Any], how: dict[str, Any]) -> Recipe:
    """The recipe that repeats one run of a comparison."""
    given = {key: how[key] for key in ("model", "data", "data_dir", "batch_size", "threads", "epochs")}
    given |= {key: run["defaults"][key] for key in DEFAULTS if run["defaults"].get(key)}
    given |= {} if run["at"] is None else {"options": {"at": run["at"]}}
    given |= {key: run[key] for key in ("tape", "conversions") if run.get(key)}
    return Recipe.of({**given, "rule": run["method"], "seed": run["seed"]})
