"""One rule and seed of a comparison: what a step costs, training, and what the rule reaches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft import measure, models
from weft.cards import Card
from weft.diagnosis import concerns
from weft.errors import StageError, Unsupported, WeftError
from weft.measuring import alignment, build, by_module
from weft.method import card
from weft.optimizers import DEFAULTS, UNUSED, settings_of
from weft.optimizers import chosen as choose
from weft.session import Tape
from weft.specs import apply_conversions, read_tape
from weft.training import Epoch, evaluate, fit

if TYPE_CHECKING:
    from weft.data import Dataset

BASELINE = "backprop"
MEASURED = ("step_ratio", "kept_bytes", "peak_bytes")
ALIGNED = 10  # epochs, at most, after which the gradient is held against the exact one
Event = Callable[[dict[str, Any]], None]


def aligned_epochs(epochs: int, most: int = ALIGNED) -> list[int]:
    """The epochs after which alignment is measured: all, or ``most`` of them, evenly spread, first and last too."""
    if epochs <= most:
        return list(range(1, epochs + 1))
    return sorted({round(1 + i * (epochs - 1) / (most - 1)) for i in range(most)})


@dataclasses.dataclass(frozen=True)
class Change:
    """What a run changes beside the rule: a tape, as text, and layers, as `weft.specs.read_conversion` has them."""

    tape: str | None = None
    conversions: tuple[dict[str, Any], ...] = ()

    def label(self, rule: str) -> str:
        """The rule's name, with what else is changed."""
        parts = [one["layer"] + _told(one["options"]) for one in self.conversions]
        return " | ".join([rule, *parts, *([] if self.tape is None else [self.tape])])


def _told(options: dict[str, Any]) -> str:
    return ":" * bool(options) + ",".join(f"{key}={value}" for key, value in options.items())


class Runner:
    """Runs one rule at a time; what is measured of a step is measured once for each rule."""

    def __init__(self, data: Dataset, how: dict[str, Any], on_event: Event) -> None:
        self.data, self.how, self.on_event = data, how, on_event
        self.measured: dict[str, dict[str, Any]] = {}

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """The first batch of a run: what a step and its alignment are measured on."""
        index = next(self.data.batches(self.how["batch_size"], seed=seed, epoch=0))
        return self.data.x_train[index], self.data.y_train[index]

    def model(self, seed: int) -> nn.Module:
        """The model with its initial weights, the same for every rule."""
        return models.build(self.how["model"], **self.data.form, seed=seed)

    def _accuracy(self, rule: Any, part: str) -> float:
        """Of the part ``validation`` or ``test``."""
        x, y = getattr(self.data, f"x_{part}"), getattr(self.data, f"y_{part}")
        return evaluate(rule, x, y, batch_size=self.data.scored_at_once)

    def run(self, one: Card, seed: int, change: Change | None = None) -> dict[str, Any]:
        """The record of one rule and seed, perhaps changed; a rule that fails leaves its error in it."""
        change = change or Change()
        label = change.label(one.name)
        record: dict[str, Any] = {"rule": label, "seed": seed, "status": "error", "error": None, "why": {}}
        record |= {"method": one.name, "tape": change.tape, "conversions": list(change.conversions)}
        figures = ("accuracy", "validation_accuracy", "loss", "seconds_per_epoch", *MEASURED, "cosine_to_exact")
        record |= dict.fromkeys((*figures, "parameters", "extra_parameters"))
        record |= {"at": None, "defaults": {}, "curve": [], "alignment": [], "kept_by_module": {}, "modules": {}}
        record |= {"passes": None, "independent_stages": None, "concerns": []}
        record["initial_weights"] = "own" if "own-model" in one.tags else "shared"
        self.on_event({"event": "run", "rule": label, "seed": seed})
        model = self.model(seed)
        try:
            apply_conversions(model, change.conversions)
            record["parameters"] = sum(p.numel() for p in model.parameters())
            if one.contract == "solver" and change.tape is not None:
                raise Unsupported("a solver takes no steps, so that there is nothing for a tape to pack")
            (self._solve if one.contract == "solver" else self._train)(one, seed, model, record)
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
        self.on_event({"event": "done", "rule": label, "seed": seed, "record": record})
        return record

    def _train(self, one: Card, seed: int, model: nn.Module, record: dict[str, Any]) -> None:
        how = self.how
        source = card(BASELINE) if how["same_optimizer"] else one
        rule = build(one, model, seed, how["at"])
        record["at"] = None if rule.cut is None else list(rule.cut.at)
        record["defaults"] = self._settings(rule, source)
        label, tape = record["rule"], None if record["tape"] is None else read_tape(record["tape"])
        if label not in self.measured:
            self.measured[label] = self._measure(one, rule, tape)
        record |= {key: self.measured[label][key] for key in (*MEASURED, "kept_by_module", "passes")}
        record["why"] |= self.measured[label]["why"]
        batch, aligned = self.batch(seed), aligned_epochs(how["epochs"])

        def after(epoch: Epoch) -> None:
            record["curve"].append(
                {"epoch": epoch.epoch, "loss": epoch.loss, "validation_accuracy": epoch.validation_accuracy}
            )
            if epoch.epoch in aligned:
                found, why = alignment(one, rule, *batch, tape=tape)
                if found is not None:
                    record["alignment"].append({"epoch": epoch.epoch, **found})
                if why:
                    record["why"]["alignment"] = why
                    if epoch.epoch in (1, how["epochs"]):
                        record["why"]["cosine_to_exact"] = why
            self.on_event({"event": "epoch", "rule": label, "seed": seed, **record["curve"][-1]})

        def step(done: int, total: int) -> None:
            self.on_event({"event": "step", "rule": label, "seed": seed, "done": done, "total": total})

        options = {key: record["defaults"][key] for key in DEFAULTS} if rule.updates == "grad" else {}
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
                tape=tape,
                **options,
            )
        record["loss"] = history[-1].loss
        record["validation_accuracy"] = history[-1].validation_accuracy
        record["seconds_per_epoch"] = sum(epoch.seconds for epoch in history) / len(history)
        record["cosine_to_exact"] = _first_and_last(record["alignment"], how["epochs"])
        record["modules"] = _classes(rule, record)
        record["extra_parameters"] = rule.extra_parameters()
        record["independent_stages"] = len(rule.groups()) if "local" in one.tags else 1
        aligned_last = record["alignment"][-1] if record["alignment"] else None
        record["concerns"] = concerns(
            one,
            rule,
            *batch,
            found=aligned_last,
            accuracy=record["validation_accuracy"],
            classes=self.data.classes,
        )
        self._score(rule, record)

    def _solve(self, one: Card, seed: int, model: nn.Module, record: dict[str, Any]) -> None:
        """All weights from the whole training part at once."""
        solver = one.build(model, seed=seed)
        start = time.process_time()
        report = solver.fit(self.data.x_train, self.data.y_train)
        record["seconds_per_epoch"] = time.process_time() - start
        record["loss"] = report.loss
        if self.data.y_validation is not None:
            record["validation_accuracy"] = self._accuracy(solver, "validation")
        record["curve"] = [{"epoch": 1, "loss": report.loss, "validation_accuracy": record["validation_accuracy"]}]
        record["why"] |= dict.fromkeys((*MEASURED, "cosine_to_exact", "alignment", "passes"), "a solver takes no steps")
        record["extra_parameters"] = sum(p.numel() for p in solver.parameters()) - record["parameters"]
        self._score(solver, record)

    def _score(self, rule: Any, record: dict[str, Any]) -> None:
        """The test accuracy of what was trained."""
        if self.data.x_test is None or self.data.y_test is None:
            record["why"]["accuracy"] = "the data has no test part (x_test, y_test)"
        else:
            record["accuracy"] = self._accuracy(rule, "test")

    def _settings(self, rule: Any, source: Card) -> dict[str, Any]:
        """What the rule is trained with."""
        if rule.updates == "self":
            return dict(UNUSED)
        return choose(settings_of(rule, **source.defaults), optimizer=self.how["optimizer"], lr=self.how["lr"])

    def _measure(self, one: Card, rule: Any, tape: Tape | None) -> dict[str, Any]:
        """Step time against backprop's, bytes kept and peak bytes, of copies."""
        found: dict[str, Any] = {"why": {}, "kept_by_module": {}}
        x, y = self.batch(self.how["seed"])

        def stepper(made: Any, tape: Tape | None = None) -> Callable[[], Any]:
            def step() -> None:
                made.zero_grad(set_to_none=True)
                with contextlib.nullcontext() if tape is None else tape.on(made):
                    made.step(x, y)

            return step

        plain = card(BASELINE).build(copy.deepcopy(self.model(self.how["seed"])))
        mine = copy.deepcopy(rule)

        def kept() -> int:
            report = measure.kept_bytes(stepper(mine, tape), mine)
            found["kept_by_module"] = by_module(report.by_module)
            return report.peak_bytes

        measures: dict[str, Callable[[], Any]] = {
            "step_ratio": lambda: measure.step_ratio(stepper(mine, tape), stepper(plain)).ratio,
            "kept_bytes": kept,
            "peak_bytes": lambda: (
                measure.peak_bytes(stepper(mine, tape), parameters=mine.trainable())
                + (0 if tape is None else tape.outside_bytes)
            ),
            "passes": lambda: _passes(one, mine, stepper(mine, tape), x, len(y)),
        }
        for name, call in measures.items():
            try:
                found[name] = call()
            except WeftError as error:
                found[name], found["why"][name] = None, str(error)
        return found


def _passes(one: Card, rule: Any, step: Callable[[], Any], x: Any, rows: int) -> dict[str, float]:
    """Passes through the model, or through the rule's own network."""
    net = rule if "own-model" in one.tags else rule.model
    return measure.passes(step, lambda: net(*x) if isinstance(x, tuple) else net(x), net, rows)


def _first_and_last(aligned: list[dict[str, Any]], epochs: int) -> dict[str, float] | None:
    """The cosine of the whole gradient after the first and the last epoch, where there are both."""
    whole = {entry["epoch"]: entry["whole"] for entry in aligned}
    first, last = whole.get(1), whole.get(epochs)
    return None if first is None or last is None else {"first": first, "last": last}


def _classes(rule: nn.Module, record: dict[str, Any]) -> dict[str, str]:
    """The class of each module that a record names, by its name inside the rule."""
    named = set(record["kept_by_module"])
    named |= {f"model.{layer}".rstrip(".") for entry in record["alignment"] for layer in entry["layers"]}
    return {name: type(module).__name__ for name, module in rule.named_modules() if name in named}
