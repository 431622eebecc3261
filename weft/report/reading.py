"""What the folders of comparisons and runs hold, checked, in one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open

from weft.errors import RecipeError, UsageError, WeftError
from weft.recipe import Recipe
from weft.runs import CHECKPOINT, RECIPE, RESULT

COMPARISON = "compare.json"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Point(_Read):
    """One epoch of a curve."""

    epoch: int
    loss: FiniteFloat
    validation_accuracy: FiniteFloat | None = None


class Aligned(_Read):
    """The cosine with the exact gradient after one epoch."""

    epoch: int
    whole: FiniteFloat | None
    layers: dict[str, FiniteFloat | None]


class Settings(_Read):
    """What one phase of a run was trained with."""

    rule: str
    optimizer: str | None = None
    lr: FiniteFloat | None = None
    schedule: str | None = None
    clip: FiniteFloat | None = None


class Run(_Read):
    """One rule, or the phases of one recipe, with one seed.

    Attributes:
        status: ``ok``, ``unsupported``, ``error`` or ``unfinished``.
        phases: what each phase was trained with; a run of a comparison has one.
        aligned: None where a folder says nothing of alignment.
        like: runs with the same value differ in their seed alone.
    """

    rule: str
    seed: int
    status: str
    error: str | None = None
    why: dict[str, str] = {}
    accuracy: FiniteFloat | None = None
    validation_accuracy: FiniteFloat | None = None
    curve: list[Point] = []
    step_ratio: FiniteFloat | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    kept_by_module: dict[str, int] = {}
    modules: dict[str, str] = {}
    aligned: list[Aligned] | None = Field(None, alias="alignment")
    phases: list[Settings] = []
    at: list[str] | None = None
    initial_weights: str | None = None
    parameters: int | None = None
    extra_parameters: int | None = None
    passes: dict[str, FiniteFloat] | None = None
    independent_stages: int | None = None
    concerns: list[str] = []
    like: str = ""


class Source(_Read):
    """One folder.

    Attributes:
        kind: ``comparison`` or ``run``.
        settings: a comparison's arguments, or of a recipe those that have the same name.
        planned: runs that were asked for.
    """

    folder: str
    kind: str
    settings: dict[str, Any]
    runs: list[Run]
    environment: dict[str, Any] = {}
    planned: int = 1

    @property
    def subject(self) -> tuple[str, str]:
        """Model and data: figures of different ones are not put side by side."""
        return str(self.settings.get("model")), str(self.settings.get("data"))


def read(folder: Path) -> Source:
    """What a folder holds.

    Raises:
        UsageError: when it does not exist, or holds neither a comparison nor a run.
        WeftError: when a file in it cannot be read or is not what Weft writes.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if (folder / COMPARISON).exists():
        return _comparison(folder)
    if (folder / RECIPE).exists() or (folder / RESULT).exists():
        return _run(folder)
    raise UsageError(
        f"{folder} holds neither {COMPARISON} (of weft compare --out) nor {RECIPE} (of weft fit --out); "
        "name a folder that one of them wrote"
    )


def _comparison(folder: Path) -> Source:
    path = folder / COMPARISON
    document = _plain(path)
    try:
        how, runs = document["settings"], document["runs"]
        given = [
            {"phases": [{"rule": run["rule"], **(run.get("defaults") or {})}], "like": run["rule"], **run}
            for run in runs
        ]
        planned = len(how["rules"]) * int(how["seeds"])
        made = {"folder": str(folder), "kind": "comparison", "settings": how, "planned": planned}
        return Source.model_validate({**made, "runs": given, "environment": document.get("environment") or {}})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _other(path, error, "weft compare") from error


def _run(folder: Path) -> Source:
    try:
        recipe = Recipe.read(folder / RECIPE).model_dump(mode="json") if (folder / RECIPE).exists() else None
    except RecipeError as error:
        raise WeftError(f"{folder} holds a recipe that cannot be read: {error}") from error
    path = folder / RESULT
    result = _plain(path) if path.exists() else None
    try:
        recipe = result["recipe"] if result is not None else recipe
        if recipe is None:
            raise WeftError(f"{folder} has no recipe")
        phases = recipe["rules"]
        if result is not None:
            state: dict[str, Any] = {"status": "ok", **{key: result[key] for key in ("accuracy", "parameters", "why")}}
            curves = [phase["curve"] for phase in result["phases"]]
            trained = [{"rule": phase["rule"], **phase["settings"]} for phase in result["phases"]]
        else:
            state, curves = {"status": "unfinished"}, _so_far(folder / CHECKPOINT)
            state["error"] = f"not finished; weft fit --resume {folder} goes on with it"
            trained = [{key: phase.get(key) for key in Settings.model_fields} for phase in phases]
        curve: list[dict[str, Any]] = []
        for one in curves:
            curve += [{**point, "epoch": len(curve) + i} for i, point in enumerate(one, 1)]
        if curve:
            state["validation_accuracy"] = curve[-1].get("validation_accuracy")
        names = " → ".join(phase["rule"] for phase in phases)
        like = json.dumps({key: value for key, value in recipe.items() if key != "seed"}, sort_keys=True)
        run = {"rule": names, "seed": recipe["seed"], "curve": curve, "phases": trained, "like": like, **state}
        cuts = phases[0].get("options") or {}
        run["at"] = cuts.get("at") if len(phases) == 1 else None
        how = {key: recipe.get(key) for key in ("model", "data", "batch_size", "threads")}
        how["epochs"] = sum(phase["epochs"] for phase in phases)
        made = {"folder": str(folder), "kind": "run", "settings": how, "runs": [run]}
        return Source.model_validate({**made, "environment": {} if result is None else result.get("environment") or {}})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _other(path, error, "weft fit") from error


def _so_far(path: Path) -> list[list[dict[str, Any]]]:
    """The curves of the phases that a checkpoint knows; none where there is no checkpoint or it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            plain = json.loads(file.metadata()["weft"])
        return [*plain["past"], plain["history"]]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return []


def _plain(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeftError(f"cannot read {path}: {error}") from error


def _other(path: Path, error: Exception, command: str) -> WeftError:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    else:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return WeftError(f"{path} is not what this version of {command} writes ({what}); run {command} again")
