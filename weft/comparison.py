"""Rules side by side: the same model, the same batches, one record for each rule and seed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft import data as data_sets
from weft import measure, models
from weft.cards import Card
from weft.errors import StageError, Unsupported, UsageError, WeftError, unknown
from weft.measuring import build, cosine_to_exact
from weft.method import card, methods
from weft.optimizers import build_optimizer, settings_of
from weft.optimizers import chosen as choose
from weft.recipe import Recipe
from weft.runs import write
from weft.training import Epoch, evaluate, fit

if TYPE_CHECKING:
    from weft.data import Dataset

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
BASELINE = "backprop"
MEASURED = ("step_ratio", "kept_bytes", "peak_bytes")
Event = Callable[[dict[str, Any]], None]


def compare(
    model: str = "mlp",
    data: str = "digits",
    rules: str | Sequence[str] | None = None,
    *,
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
        out: a folder for ``compare.json``, written anew, atomically, after every run.
        on_event: called with progress: ``{"event": "run" | "step" | "epoch" | "done", ...}``.

    Returns:
        ``{"runs": [...], "settings": {...}, "environment": {...}}``, plain data. A record's ``status`` is ``ok``,
        ``unsupported`` or ``error``; where a figure is None, ``why`` says the reason.

    Raises:
        UsageError: for names and options that do not exist; DataError, Unsupported: for data that cannot be used.
    """
    if seeds < 1 or threads < 1 or batch_size < 1 or epochs < 1:
        raise UsageError("epochs, batch_size, seeds and threads are at least 1")
    chosen = select(rules)
    if optimizer is not None or lr is not None:
        build_optimizer(optimizer or "adam", [nn.Parameter(torch.zeros(1))], 1e-3 if lr is None else lr)
    loaded = data_sets.load(data, data_dir=data_dir)
    how = {"model": model, "data": data, "epochs": epochs, "batch_size": batch_size, "seed": seed, "seeds": seeds}
    how |= {"at": None if at is None else list(at)}
    how |= {"data_dir": None if data_dir is None else str(data_dir)}
    how |= {"threads": threads, "rules": [c.name for c in chosen]}
    how |= {"optimizer": optimizer, "lr": lr, "same_optimizer": same_optimizer}
    rows = [loaded.y_train, loaded.y_validation, loaded.y_test]
    how["rows"] = dict(zip(("train", "validation", "test"), [0 if r is None else len(r) for r in rows], strict=True))
    document: dict[str, Any] = {"runs": [], "settings": how, "environment": {}}
    if out is not None:
        keep(Path(out), document)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        document["environment"] = measure.environment()
        runner = _Runner(loaded, how, on_event or (lambda event: None))
        for one in chosen:
            for number in range(seed, seed + seeds):
                document["runs"].append(runner.run(one, number))
                if out is not None:
                    keep(Path(out), document)
    finally:
        torch.set_num_threads(before)
    return document


def select(rules: str | Sequence[str] | None) -> list[Card]:
    """The cards of the rules asked for, in that order, each once.

    Raises:
        UsageError: for a name that is no rule.
    """
    every = [c.name for c in methods(contract="rule")]
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


class _Runner:
    """Runs one rule at a time; what is measured of a step is measured once for each rule."""

    def __init__(self, data: Dataset, how: dict[str, Any], on_event: Event) -> None:
        self.data, self.how, self.on_event = data, how, on_event
        self.measured: dict[str, dict[str, Any]] = {}

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """The first batch of a run: what a step and its alignment are measured on."""
        index = next(data_sets.batches(len(self.data.y_train), self.how["batch_size"], seed=seed, epoch=0))
        return self.data.x_train[index], self.data.y_train[index]

    def model(self, seed: int) -> nn.Module:
        """The model with its initial weights, the same for every rule."""
        d = self.data
        shape = tuple(d.input_shape)
        return models.build(self.how["model"], input_shape=shape, classes=d.classes, kind=d.kind, seed=seed)

    def run(self, one: Card, seed: int) -> dict[str, Any]:
        """The record of one rule and seed; a rule that fails leaves its error in it."""
        record: dict[str, Any] = {"rule": one.name, "seed": seed, "status": "error", "error": None, "why": {}}
        figures = ("accuracy", "validation_accuracy", "loss", "seconds_per_epoch", *MEASURED, "cosine_to_exact")
        record |= dict.fromkeys((*figures, "parameters", "extra_parameters"))
        record |= {
            "at": None,
            "defaults": {},
            "initial_weights": "own" if "own-model" in one.tags else "shared",
            "curve": [],
        }
        self.on_event({"event": "run", "rule": one.name, "seed": seed})
        model = self.model(seed)
        try:
            record["parameters"] = sum(p.numel() for p in model.parameters())
            self._train(one, seed, model, record)
            record["status"] = "ok"
        except (Unsupported, StageError) as error:
            record |= {"status": "unsupported", "error": str(error)}
        except (Exception, SystemExit) as error:  # a user's model may end in any way
            text = str(error) if isinstance(error, WeftError) else f"{type(error).__name__}: {error}"
            record["error"] = text or type(error).__name__
        for name in (*figures, "parameters", "extra_parameters"):
            value = record[name]
            if isinstance(value, float) and not math.isfinite(value):
                record[name], record["why"][name] = None, f"it is {value}"
            elif value is None and record["status"] != "ok":
                record["why"][name] = record["error"]
        self.on_event({"event": "done", "rule": one.name, "seed": seed, "record": record})
        return record

    def _train(self, one: Card, seed: int, model: nn.Module, record: dict[str, Any]) -> None:
        how = self.how
        source = card(BASELINE) if how["same_optimizer"] else one
        rule = build(one, model, seed, how["at"])
        record["at"] = None if rule.cut is None else list(rule.cut.at)
        record["defaults"] = self._settings(rule, source)
        if one.name not in self.measured:
            self.measured[one.name] = self._measure(one, rule)
        record |= {key: self.measured[one.name][key] for key in MEASURED}
        record["why"] |= self.measured[one.name]["why"]
        cosines: dict[str, float | None] = {}
        batch = self.batch(seed)

        def after(epoch: Epoch) -> None:
            record["curve"].append(
                {"epoch": epoch.epoch, "loss": epoch.loss, "validation_accuracy": epoch.validation_accuracy}
            )
            if epoch.epoch in (1, how["epochs"]):
                value, why = cosine_to_exact(one, rule, *batch)
                if epoch.epoch == 1:
                    cosines["first"] = value
                if epoch.epoch == how["epochs"]:
                    cosines["last"] = value
                if why:
                    record["why"]["cosine_to_exact"] = why
            self.on_event({"event": "epoch", "rule": one.name, "seed": seed, **record["curve"][-1]})

        def step(done: int, total: int) -> None:
            self.on_event({"event": "step", "rule": one.name, "seed": seed, "done": done, "total": total})

        options = (
            {key: record["defaults"][key] for key in ("optimizer", "lr", "schedule")} if rule.updates == "grad" else {}
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # what dropout in the user's model draws from
            history = fit(
                rule,
                self.data,
                epochs=how["epochs"],
                batch_size=how["batch_size"],
                seed=seed,
                on_epoch=after,
                on_step=step,
                **options,
            )
        record["loss"] = history[-1].loss
        record["validation_accuracy"] = history[-1].validation_accuracy
        record["seconds_per_epoch"] = sum(epoch.seconds for epoch in history) / len(history)
        record["cosine_to_exact"] = None if None in cosines.values() else cosines
        record["extra_parameters"] = rule.extra_parameters()
        if self.data.x_test is None or self.data.y_test is None:
            record["why"]["accuracy"] = "the data has no test part (x_test, y_test)"
        else:
            record["accuracy"] = evaluate(rule, self.data.x_test, self.data.y_test)

    def _settings(self, rule: Any, source: Card) -> dict[str, Any]:
        """What the rule is trained with."""
        if rule.updates == "self":
            return {"optimizer": None, "lr": None, "schedule": None}
        return choose(settings_of(rule, **source.defaults), optimizer=self.how["optimizer"], lr=self.how["lr"])

    def _measure(self, one: Card, rule: Any) -> dict[str, Any]:
        """Step time against backprop's, bytes kept and peak bytes, of copies."""
        found: dict[str, Any] = {"why": {}}
        x, y = self.batch(self.how["seed"])

        def stepper(made: Any) -> Callable[[], Any]:
            def step() -> None:
                made.zero_grad(set_to_none=True)
                made.step(x, y)

            return step

        plain = card(BASELINE).build(copy.deepcopy(self.model(self.how["seed"])))
        mine = copy.deepcopy(rule)
        measures: dict[str, Callable[[], Any]] = {
            "step_ratio": lambda: measure.step_ratio(stepper(mine), stepper(plain)).ratio,
            "kept_bytes": lambda: measure.kept_bytes(stepper(mine), mine).peak_bytes,
            "peak_bytes": lambda: measure.peak_bytes(stepper(mine), parameters=mine.trainable()),
        }
        for name, call in measures.items():
            try:
                found[name] = call()
            except WeftError as error:
                found[name], found["why"][name] = None, str(error)
        return found


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
    for run in [r for r in document["runs"][-1:] if r["status"] != "unsupported"]:
        write(folder / f"{run['rule']}-seed{run['seed']}.yaml", recipe_of(run, document["settings"]).text().encode())


def recipe_of(run: dict[str, Any], how: dict[str, Any]) -> Recipe:
    """The recipe that repeats one run of a comparison."""
    given = {key: how[key] for key in ("model", "data", "data_dir", "batch_size", "threads", "epochs")}
    given |= {key: run["defaults"][key] for key in ("optimizer", "lr", "schedule") if run["defaults"].get(key)}
    given |= {} if run["at"] is None else {"options": {"at": run["at"]}}
    return Recipe.of({**given, "rule": run["rule"], "seed": run["seed"]})
