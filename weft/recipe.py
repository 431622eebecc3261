"""A training run as plain data: model, data, rules in phases, optimizer, seed; read from YAML and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from weft.cards import Card
from weft.errors import RecipeError, UsageError, unknown
from weft.method import card
from weft.optimizers import DEFAULTS, OPTIMIZERS, SCHEDULES, UNUSED
from weft.optimizers import chosen as choose
from weft.specs import read_conversion, read_tape

SINGLE = ("rule", "epochs", "options", "optimizer", "lr", "schedule", "weight_decay", "clip")


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Phase(_Plain):
    """Some epochs under one rule.

    Attributes:
        rule: a rule's name.
        epochs: passes over the training part.
        options: keyword arguments of the rule.
        optimizer, lr, schedule: by default those of the rule's card.
        weight_decay: of the optimizer; null leaves its own default.
        clip: the largest norm of all gradients together; by default the card's, .inf for no limit.
    """

    rule: str
    epochs: int = Field(10, ge=1)
    options: dict[str, Any] = {}
    optimizer: str | None = None
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    schedule: str | None = None
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    clip: float | None = Field(None, gt=0)

    @field_validator("rule")
    @classmethod
    def _rule(cls, name: str) -> str:
        found = _card(name)
        if found.contract != "rule":
            raise ValueError(f"{name!r} is a {found.contract}, not a rule")
        return name

    @field_validator("optimizer")
    @classmethod
    def _optimizer(cls, name: str | None) -> str | None:
        return _one_of("optimizer", name, OPTIMIZERS)

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, name: str | None) -> str | None:
        return _one_of("schedule", name, SCHEDULES)


class Recipe(_Plain):
    """A whole run. In YAML a single phase may be written without ``rules``, its keys beside the others.

    Attributes:
        model: as in :func:`weft.compare`.
        data: as in :func:`weft.compare`.
        data_dir: where data sets are; by default ``WEFT_DATA`` or the user's cache.
        rules: the phases, one after another; parameters that survive from one to the next keep their values.
        tape: what packs the tensors kept between the passes, ``"quantise:bits=4 | offload"``; null for plain PyTorch.
        conversions: layers to swap before training, one after another: ``compact:rank=0.25,where=blocks.*`` or a
            mapping with ``layer``, ``options`` and ``where``; see :func:`weft.convert_`.
        batch_size: rows a step.
        accumulate: micro-batches that a batch is cut into.
        autocast: ``bfloat16`` or ``float16``, or null.
        seed: of weights, batches and whatever is drawn.
        threads: of torch, in each process.
        shard: whether processes share out the model's parameters too, gradients and optimizer state with them (torch's
            ``fully_shard``); for the rules that say ``shardable``.
        checkpoint_seconds: how often the state is saved within an epoch; it is saved after every epoch too.
    """

    model: str = "mlp"
    data: str = "digits"
    data_dir: str | None = None
    rules: list[Phase] = Field(min_length=1)
    tape: str | None = None
    conversions: list[dict[str, Any]] = []
    batch_size: int = Field(128, ge=1)
    accumulate: int = Field(1, ge=1)
    autocast: Literal["bfloat16", "float16"] | None = None
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)
    shard: bool = False
    checkpoint_seconds: float = Field(60.0, ge=0)

    @field_validator("tape")
    @classmethod
    def _tape(cls, text: str | None) -> str | None:
        try:
            if text is not None:
                read_tape(text)
            return text
        except UsageError as error:
            raise ValueError(str(error)) from None

    @field_validator("conversions", mode="before")
    @classmethod
    def _conversions(cls, given: Any) -> Any:
        if not isinstance(given, list) or not all(isinstance(one, str | Mapping) for one in given):
            raise ValueError(
                "a list of layers, each as text (compact:rank=0.25) or as a mapping with layer, options, where"
            )
        try:
            return [read_conversion(one) for one in given]
        except UsageError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Recipe:
        """A checked recipe from plain data.

        Raises:
            RecipeError: for unknown keys and bad values, each with its path and the nearest valid key.
        """
        if not isinstance(given, Mapping):
            raise RecipeError(f"a recipe is a mapping of keys to values, not {type(given).__name__}")
        data = dict(given)
        single = {key: data.pop(key) for key in SINGLE if key in data}
        if single and "rules" in data:
            raise RecipeError(f"{', '.join(single)}: these belong into an entry of rules, or leave rules out")
        if "rules" not in data:
            data["rules"] = [{"rule": "backprop", **single}]
        if isinstance(data["rules"], list):
            data["rules"] = _phases(data["rules"])
        try:
            return cls.model_validate(_integers_as_floats(data))
        except ValidationError as error:
            raise RecipeError("\n".join(_said(e, bool(single)) for e in error.errors())) from None

    @classmethod
    def read(cls, path: str | Path, changes: Iterable[str] = ()) -> Recipe:
        """A recipe from a YAML file, with changes as ``key=value`` (``rules.0.lr=0.1``), values in YAML.

        Raises:
            RecipeError: when the file cannot be read or is not a recipe.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        data = {} if data is None else data
        if isinstance(data, dict) and isinstance(data.get("rules"), list):
            data["rules"] = _phases(data["rules"])
        for change in changes:
            _set(data, change)
        return cls.of(data)

    def text(self) -> str:
        """The recipe as YAML, every value written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def settings(self, phase: Phase) -> dict[str, Any]:
        """Optimizer, learning rate, schedule and clip of a phase: its own, else its card's, else Weft's.

        None of each for a rule that changes the weights itself.
        """
        if getattr(card(phase.rule).load(), "updates", "grad") == "self":
            return dict(UNUSED)
        own = {key: getattr(phase, key) for key in DEFAULTS}
        return choose({**DEFAULTS, **card(phase.rule).defaults}, **own)


def _phases(entries: list[Any]) -> list[Any]:
    """A rule's name alone is a phase with defaults."""
    return [{"rule": entry} if isinstance(entry, str) else entry for entry in entries]


def _card(name: str) -> Card:
    try:
        return card(name)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _one_of(kind: str, name: str | None, valid: Iterable[str]) -> str | None:
    if name is not None and name not in valid:
        raise ValueError(unknown(kind, name, list(valid)))
    return name


def _integers_as_floats(data: dict[str, Any]) -> dict[str, Any]:
    """YAML reads ``lr: 1`` as an integer and ``lr: 1e-3`` as text; both are numbers to a person."""

    def number(value: Any) -> Any:
        if isinstance(value, str):
            try:
                found = float(value)
            except ValueError:
                return value
            return found if math.isfinite(found) else value
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    floats = ("lr", "weight_decay", "clip")
    if isinstance(data.get("rules"), list):
        data["rules"] = [
            {k: number(v) if k in floats else v for k, v in entry.items()} if isinstance(entry, dict) else entry
            for entry in data["rules"]
        ]
    if "checkpoint_seconds" in data:
        data["checkpoint_seconds"] = number(data["checkpoint_seconds"])
    return data


def _said(error: Any, single: bool) -> str:
    """One problem: its path, what is wrong, the nearest valid key."""
    parts = [part for part in error["loc"] if part not in ("rules", 0) or not single]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    if error["type"] == "extra_forbidden":
        inside = len(error["loc"]) > 1
        valid = list(Phase.model_fields) if inside else [*Recipe.model_fields, *SINGLE]
        return f"{path}: {unknown('key', str(error['loc'][-1]), valid)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path or 'rules'}: {message} (given: {error['input']!r})"


def _set(data: Any, change: str) -> None:
    """Apply ``rules.0.lr=0.1`` to plain data."""
    key, sign, value = change.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {change!r}: give key=value, e.g. lr=0.1 or rules.0.epochs=3")
    *path, last = key.strip().split(".")
    here = data
    for part in path:
        here = _inside(here, part, change)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change!r}: {value!r} is not YAML: {error}") from error
    if isinstance(here, list):
        _inside(here, last, change)
        here[int(last)] = parsed
    elif isinstance(here, dict):
        here[last] = parsed
    else:
        raise RecipeError(f"--set {change!r}: there is nothing at {'.'.join(path)} to set {last} of")


def _inside(here: Any, part: str, change: str) -> Any:
    if isinstance(here, list) and part.isdigit() and int(part) < len(here):
        return here[int(part)]
    if isinstance(here, dict):
        return here.setdefault(part, {})
    raise RecipeError(f"--set {change!r}: there is no {part!r}")
