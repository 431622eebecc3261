"""Runs that last: a recipe carried out in a folder, saved atomically, gone on from after a kill at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft import data as data_sets
from weft import measure, models, processes
from weft.boundaries import default_cuts
from weft.curves import Curves
from weft.diagnosis import concerns
from weft.errors import StageError, Unsupported, UsageError
from weft.evaluation import evaluate
from weft.folders import (
    CHECKPOINT,
    PREFIX,
    RECIPE,
    RESULT,
    WEIGHTS,
    begin,
    read_checkpoint,
    sweep,
    write,
    write_checkpoint,
    write_result,
)
from weft.method import card
from weft.processes import Group
from weft.recipe import Recipe
from weft.specs import apply_conversions, read_tape
from weft.training import Epoch, Trainer

__all__ = ["CHECKPOINT", "PREFIX", "RECIPE", "RESULT", "WEIGHTS", "Event", "run", "write"]

Event = Callable[[dict[str, Any]], None]


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    on_event: Event | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Carry out a recipe; with a folder, so that it survives a kill at any moment.

    The folder holds ``recipe.yaml``, ``checkpoint.safetensors`` (weights, optimizer, generators and position, replaced
    in one step) and at the end ``model.safetensors`` and ``result.json``. Going on gives the weights that an
    uninterrupted run gives, bit for bit on the same machine.

    Under torchrun, or inside :func:`weft.processes.joined`, all processes carry it out together, each on its part of
    every batch; the first one alone writes into the folder and tells of progress.

    Args:
        recipe: a recipe, plain data, or the path of a YAML file; None with ``resume``.
        out: a new folder for the run; None keeps nothing.
        resume: the folder of a run to go on with; a finished one returns its result.
        on_event: called with progress: ``{"event": "epoch" | "step" | "saved" | "concern", ...}``;
            ``done`` of ``total`` steps of the phase, ``share`` of the whole run.
        tensorboard: write learning curves into the folder ``tensorboard`` of the run, for TensorBoard to show.

    Returns:
        Plain data: ``phases`` (rule, settings, curve), ``accuracy`` (test, after the last epoch),
        ``validation_accuracy``, ``loss``, ``seconds``, ``parameters``, ``recipe``, ``environment``, ``concerns``
        (:func:`weft.diagnosis.concerns` at the end of each phase that this process carried out); None with ``why``.

    Raises:
        UsageError, RecipeError: for a recipe or folder that makes no sense.
        NonFinite: when training diverges; the last checkpoint stays as it is.
        WeftError: when the folder cannot be written or its checkpoint cannot be read.
    """
    if (recipe is None) == (resume is None) or (out is not None and resume is not None):
        raise UsageError("give a recipe (and out, a new folder), or resume, the folder of a run")
    if resume is not None:
        folder: Path | None = Path(resume)
        chosen = Recipe.read(Path(resume) / RECIPE)
        if (Path(resume) / RESULT).exists():
            return json.loads((Path(resume) / RESULT).read_text(encoding="utf-8"))
    else:
        chosen = _recipe(recipe)
        folder = None if out is None else Path(out)
    if tensorboard and folder is None:
        raise UsageError("TensorBoard's curves need a folder: give out")
    _check_shard(chosen)
    with processes.joined() as group, _as_found(chosen, group):
        state = read_checkpoint(folder) if resume is not None and folder is not None else None
        with group.first_alone():  # it fetches data that are not there yet
            prepared = _Run(chosen, folder, group, on_event or (lambda event: None))
            if folder is not None and not group.rank:
                begin(folder, chosen.text()) if resume is None else sweep(folder)
                if tensorboard:
                    prepared.curves = Curves(folder / "tensorboard")
        try:
            return prepared.carry_out(state)
        finally:
            if prepared.curves is not None:
                prepared.curves.close()


def _check_shard(recipe: Recipe) -> None:
    if not recipe.shard:
        return
    for phase in recipe.rules:
        if not getattr(card(phase.rule).load(), "shardable", False) or phase.options.get("backward") == "stage":
            raise Unsupported(f"{phase.rule} with {phase.options} cannot train a sharded model", "shard: false")
    if processes.count() == 1:
        raise UsageError("shard: true needs several processes; start with torchrun --nproc-per-node N -m weft fit")


def _recipe(given: Any) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return Recipe.read(given) if isinstance(given, str | Path) else Recipe.of(given)


@contextlib.contextmanager
def _as_found(recipe: Recipe, group: Group) -> Iterator[None]:
    """Inside, the recipe's threads and seed, of each process its own; afterwards the caller's threads and generator."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(recipe.seed, group.rank))
        torch.set_num_threads(recipe.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Run:
    """A recipe with its data and model."""

    def __init__(self, recipe: Recipe, folder: Path | None, group: Group, on_event: Event) -> None:
        self.recipe, self.folder, self.group = recipe, folder, group
        self.on_event = on_event if not group.rank else lambda event: None
        self.data = data_sets.load(recipe.data, data_dir=recipe.data_dir)
        self.model = models.build(recipe.model, **self.data.form, seed=recipe.seed)
        apply_conversions(self.model, recipe.conversions)
        self.past: list[list[dict[str, Any]]] = []
        self.structures: list[dict[str, Any]] = []
        self.curves: Curves | None = None
        self.concerns: list[str] = []
        if recipe.shard:
            self._shard()

    def _shard(self) -> None:
        """Spread the model over the processes, before any rule is built from it."""
        try:
            names = default_cuts(self.model)
        except StageError:
            names = []
        processes.shard(self.model, names)

    def carry_out(self, state: tuple[dict[str, Tensor], dict[str, Any]] | None) -> dict[str, Any]:
        """Every phase, from the saved one on."""
        first = 0
        if state is not None:
            first, self.past = state[1]["phase"], state[1]["past"]
            self._earlier(*state)
        trainer: Trainer | None = None
        for number in range(first, len(self.recipe.rules)):
            trainer = self._trainer(number, trainer)
            if state is not None and number == first:
                trainer.load(*state)
            self._train(number, trainer)
        assert trainer is not None
        rule = trainer.rule
        result = self._result(rule)
        if self.folder is not None:
            own = "own-model" in card(rule.method_name).tags
            weights = {key: processes.whole(value) for key, value in (rule if own else self.model).state_dict().items()}
            if not self.group.rank:
                write_result(self.folder, weights, result)
        return result

    def _earlier(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """The user's model as it is in a checkpoint, grown as earlier phases left it, for rules built from it."""
        for number, structure in enumerate(plain["structures"]):
            self.structures.append(structure)
            if structure:
                self._rule(number).rebuild(structure)
        prefix, now = "rule.model.", self.model.state_dict()
        found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if set(found) == set(now) and all(found[key].shape == now[key].shape for key in now):
            self.model.load_state_dict({key: processes.like(value, now[key]) for key, value in found.items()})

    def _rule(self, number: int) -> Any:
        phase = self.recipe.rules[number]
        rule = card(phase.rule).build(self.model, seed=self.recipe.seed, **phase.options)
        rule.sharded = self.recipe.shard
        return rule

    def _trainer(self, number: int, before: Trainer | None) -> Trainer:
        recipe, phase = self.recipe, self.recipe.rules[number]
        rule = self._rule(number)
        return Trainer(
            rule,
            self.data,
            epochs=phase.epochs,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            weight_decay=phase.weight_decay,
            accumulate=recipe.accumulate,
            autocast=recipe.autocast,
            tape=None if recipe.tape is None else read_tape(recipe.tape),
            group=self.group,
            before=before,
            **({"clip": phase.clip} if rule.updates == "self" else recipe.settings(phase)),
        )

    def _train(self, number: int, trainer: Trainer) -> None:
        name, epochs = self.recipe.rules[number].rule, [phase.epochs for phase in self.recipe.rules]
        before, whole = sum(epochs[:number]), sum(epochs)

        def share() -> dict[str, Any]:
            of_all = (before + trainer.done / trainer.per_epoch) / whole
            return {"done": trainer.done, "total": trainer.total, "share": of_all}

        def on_epoch(epoch: Epoch) -> None:
            figures = {"epoch": epoch.epoch, "loss": epoch.loss, "validation_accuracy": epoch.validation_accuracy}
            if self.curves is not None:
                self.curves.add(before + epoch.epoch, name, figures, trainer.rate())
            self.on_event({"event": "epoch", "phase": number, "rule": name, **figures, **share()})

        def on_step(done: int, total: int) -> None:
            self.on_event({"event": "step", "phase": number, "rule": name, **share()})

        def save() -> None:
            assert self.folder is not None
            tensors, plain = trainer.state()
            plain |= {"phase": number, "past": self.past, "structures": self.structures}
            if not self.group.rank:
                write_checkpoint(self.folder, tensors, plain)
            self.on_event({"event": "saved", "phase": number, "done": trainer.done, "total": trainer.total})

        trainer.run(
            on_epoch=on_epoch,
            on_step=on_step,
            save=None if self.folder is None else save,
            save_every=self.recipe.checkpoint_seconds,
        )
        self.past.append([{**vars(epoch)} for epoch in trainer.history])
        if self.group.size == 1:
            index = next(self.data.batches(self.recipe.batch_size, seed=self.recipe.seed, epoch=0))
            batch = self.data.x_train[index], self.data.y_train[index]
            for text in concerns(
                card(name),
                trainer.rule,
                *batch,
                accuracy=trainer.history[-1].validation_accuracy,
                classes=self.data.classes,
            ):
                self.concerns.append(text)
                self.on_event({"event": "concern", "phase": number, "rule": name, "text": text})
        self.structures.append(trainer.rule.structure())

    def _result(self, rule: Any) -> dict[str, Any]:
        data, last = self.data, self.past[-1][-1]
        why = {}
        accuracy = None
        if data.x_test is None or data.y_test is None:
            why["accuracy"] = "the data has no test part (x_test, y_test)"
        else:
            accuracy = evaluate(rule, data.x_test, data.y_test, batch_size=data.scored_at_once, group=self.group)
        phases = [
            {"rule": phase.rule, "settings": self.recipe.settings(phase), "curve": curve}
            for phase, curve in zip(self.recipe.rules, self.past, strict=True)
        ]
        return {
            "accuracy": accuracy,
            "validation_accuracy": last["validation_accuracy"],
            "loss": last["loss"],
            "seconds": sum(epoch["seconds"] for curve in self.past for epoch in curve),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "phases": phases,
            "concerns": self.concerns,
            "why": why,
            "recipe": self.recipe.model_dump(mode="json"),
            "environment": measure.environment(),
        }


def _seed(seed: int, rank: int) -> int:
    """Of torch's generator in one process: what dropout draws is to differ between processes."""
    if rank == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(repr((seed, rank)).encode(), digest_size=7).digest(), "little")
