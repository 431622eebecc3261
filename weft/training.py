"""An ordinary training loop around ``rule.step``: batches, optimizer, schedule, evaluation."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft import processes
from weft.errors import UsageError, WeftError, unknown
from weft.evaluation import evaluate
from weft.optimizers import SCHEDULES, build_optimizer, settings_of
from weft.processes import Group
from weft.stepping import Stepper

if TYPE_CHECKING:
    from weft.data import Dataset
    from weft.session import Tape

CHECKED = 50  # steps between two looks at the gradients' norm


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch of training gave.

    Attributes:
        epoch: its number, from 1.
        loss: the mean of what the rule's steps returned, over samples.
        validation_accuracy: after the epoch, between 0 and 1; None without validation data.
        seconds: CPU seconds of training, evaluation excluded.
    """

    epoch: int
    loss: float
    validation_accuracy: float | None
    seconds: float


class Trainer:
    """Training as a state that can be saved between any two steps and gone on from, bit for bit.

    Args:
        rule: any rule; its optimizer is built from ``rule.trainable()``.
        data: a :class:`weft.data.Dataset`.
        epochs, batch_size, optimizer, lr, schedule, seed: as in :func:`fit`.
        weight_decay: of the optimizer; None leaves the optimizer's own default.
        clip: the largest norm of all gradients together; larger ones are scaled down to it. None: the card's, which
            for most rules is none; ``math.inf``: no limit.
        accumulate: the micro-batches that a batch is cut into, to step with less memory.
        autocast: ``"bfloat16"`` or ``"float16"`` to run the rule's steps under ``torch.autocast``.
        tape: what packs the tensors kept between the passes of each step; None for plain PyTorch.
        group: the processes that share the run (:func:`weft.processes.joined`), each with the same arguments; every
            batch is cut into as many parts, and the gradients are added up by the numbers of their labels.
        before: a trainer whose optimizer's state is taken over for the parameters that both train.

    Attributes:
        history: an :class:`Epoch` for each epoch done.
        done, total: steps done and steps in all.
    """

    def __init__(
        self,
        rule: Any,
        data: Dataset,
        *,
        epochs: int = 10,
        batch_size: int = 128,
        optimizer: str | None = None,
        lr: float | None = None,
        schedule: str | None = None,
        seed: int = 0,
        weight_decay: float | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        autocast: str | None = None,
        tape: Tape | None = None,
        group: Group | None = None,
        before: Trainer | None = None,
    ) -> None:
        self.settings = settings_of(rule, optimizer=optimizer, lr=lr, schedule=schedule, clip=clip)
        if self.settings["schedule"] not in SCHEDULES:
            raise UsageError(unknown("schedule", self.settings["schedule"], list(SCHEDULES)))
        if epochs < 1 or accumulate < 1:
            raise UsageError(f"epochs={epochs}, accumulate={accumulate}; both are at least 1")
        if rule.updates == "self" and (clip is not None or accumulate > 1 or weight_decay is not None):
            raise UsageError(f"{rule.method_name} changes the weights itself; leave clip, accumulate, weight_decay out")
        self.rule, self.data, self.epochs, self.batch_size, self.seed = rule, data, epochs, batch_size, seed
        self.weight_decay = weight_decay
        self.per_epoch = data.batch_count(batch_size)
        self.done, self.total = 0, epochs * self.per_epoch
        self.history: list[Epoch] = []
        self.optimizer: torch.optim.Optimizer | None = self._optimizer(None if before is None else before.optimizer)
        self._summed, self._seconds = 0.0, 0.0
        self.group = Group() if group is None else group
        limit = None if rule.updates == "self" else self.settings["clip"]
        self.stepper = Stepper(rule, data, self.group, clip=limit, accumulate=accumulate, autocast=autocast, tape=tape)
        smallest = len(data.y_train) - batch_size * (self.per_epoch - 1)
        self.stepper.join(min(smallest, batch_size))

    def _optimizer(self, before: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer | None:
        """A new optimizer; what an earlier one of its kind knows of a parameter is kept."""
        if self.rule.updates == "self":
            return None
        how = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        groups = [{"params": kind} for kind in processes.kinds(self.rule.trainable())]
        made = build_optimizer(self.settings["optimizer"], groups, self.settings["lr"], **how)
        if type(before) is type(made):
            made.state.update({p: before.state[p] for p in self.rule.trainable() if p in before.state})
        return made

    def run(
        self,
        *,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        save: Callable[[], None] | None = None,
        save_every: float = math.inf,
    ) -> list[Epoch]:
        """Train from where it stands to the end.

        Args:
            on_epoch: called after each epoch.
            on_step: called with (steps done, steps in all) after each step.
            save: called between two steps, after every epoch and whenever ``save_every`` seconds have passed.
            save_every: seconds.

        Raises:
            NonFinite: when a loss or a gradient is not finite; nothing is saved after that.
        """
        saved = time.monotonic()
        wanted = False
        while self.done < self.total:
            epoch = self.done // self.per_epoch
            self.rule.train()
            order = self.data.batches(self.batch_size, seed=self.seed, epoch=epoch)
            for index in itertools.islice(order, self.done % self.per_epoch, None):
                start = time.process_time()
                if save and not self.group.rank:
                    wanted = time.monotonic() - saved > save_every
                loss, wanted = self._step(index, wanted)
                self._summed += len(index) * loss
                self.done += 1
                self._seconds += time.process_time() - start
                if on_step:
                    on_step(self.done, self.total)
                if self.done % self.per_epoch and save and wanted:
                    self.check_gradients()
                    save()
                    saved = time.monotonic()
            self._end_epoch(epoch)
            if on_epoch:
                on_epoch(self.history[-1])
            if save:
                self.check_gradients()
                save()
                saved = time.monotonic()
        return self.history

    def rate(self) -> float:
        """The learning rate of the next step; 0 for a rule that changes the weights itself."""
        if self.optimizer is None:
            return 0.0
        return self.settings["lr"] * SCHEDULES[self.settings["schedule"]](self.done / self.total)

    def _step(self, index: Tensor, wanted: bool) -> tuple[float, bool]:
        """One update; the loss of the whole batch, and whether the first process wanted a checkpoint after it."""
        if self.optimizer is not None:
            rate = self.rate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
        loss, wanted = self.stepper.step(index, wanted)
        if self.optimizer is not None:
            self.stepper.limit()
            if self.done % CHECKED == 0:
                self.check_gradients()
            self.optimizer.step()
        return loss, wanted

    def _end_epoch(self, epoch: int) -> None:
        if self.rule.grow(epoch):
            self.optimizer = self._optimizer(self.optimizer)
        require_match(self.rule, self.optimizer)
        accuracy = None
        if self.data.y_validation is not None:
            x, y, most = self.data.x_validation, self.data.y_validation, self.data.scored_at_once
            accuracy = evaluate(self.rule, x, y, batch_size=most, group=self.group)
        self.history.append(Epoch(epoch + 1, self._summed / len(self.data.y_train), accuracy, self._seconds))
        self._summed, self._seconds = 0.0, 0.0

    def check_gradients(self) -> None:
        """Raise NonFinite, naming parameters, when the last step's gradients or the weights are not finite."""
        self.stepper.check_finite(f"step {self.done} of {self.total}")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`load` needs: tensors by name, and plain data; asked of all processes at the same step."""
        tensors = {f"rule.{key}": processes.whole(value) for key, value in self.rule.state_dict().items()}
        generators = self.group.gather(torch.get_rng_state())
        tensors |= {_generator(rank): state for rank, state in enumerate(generators)}
        if self.optimizer is not None:
            for i, slots in self.optimizer.state_dict()["state"].items():
                found = {key: processes.whole(torch.as_tensor(value)) for key, value in slots.items()}
                tensors |= {f"optimizer.{i}.{key}": value for key, value in found.items()}
        plain = {
            "done": self.done,
            "summed": self._summed,
            "seconds": self._seconds,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "structure": self.rule.structure(),
        }
        return tensors, plain

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Stand where :meth:`state` was taken; the global generator of torch too, which dropout draws from."""
        if plain["structure"]:
            self.rule.rebuild(plain["structure"])
        now = self.rule.state_dict()
        own = {key.removeprefix("rule."): value for key, value in tensors.items() if key.startswith("rule.")}
        self.rule.load_state_dict({k: processes.like(v, now[k]) if k in now else v for k, v in own.items()})
        if (state := tensors.get(_generator(self.group.rank))) is not None:
            torch.set_rng_state(state)
        self.optimizer = self._optimizer()
        if self.optimizer is not None:
            slots: dict[int, dict[str, Tensor]] = {}
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, i, name = key.split(".", 2)
                    slots.setdefault(int(i), {})[name] = processes.like(value, held[int(i)])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.done, self._summed, self._seconds = plain["done"], plain["summed"], plain["seconds"]
        self.history = [Epoch(**epoch) for epoch in plain["history"]]


def fit(
    rule: Any,
    data: Dataset,
    *,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Epoch]:
    """Train a rule's model on the training part of a data set.

    Args:
        rule: any rule.
        data: a :class:`weft.data.Dataset`.
        on_epoch: called after each epoch.
        on_step: called with (steps done, steps in all) after each step.
        options: of :class:`Trainer`: ``epochs=10``, ``batch_size=128``, ``optimizer`` (``adam``, ``adamw``, ``sgd`` or
            ``rmsprop``), ``lr``, ``schedule`` (``constant``, ``cosine`` or ``linear``, to zero over all steps),
            ``clip`` (these four by default the card's), ``seed`` of the order of batches, ``weight_decay``,
            ``accumulate``, ``autocast``, ``tape``, ``group`` (of processes).

    Raises:
        UsageError: for options that do not exist or make no sense.
        NonFinite: when a loss or a gradient is not finite; the weights are those of the step before.
    """
    known = list(inspect.signature(Trainer).parameters)[2:]
    for name in options:
        if name not in known:
            raise UsageError(unknown("option", name, known, "of weft.fit"))
    return Trainer(rule, data, **options).run(on_epoch=on_epoch, on_step=on_step)


def require_match(rule: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise WeftError when an optimizer does not hold exactly ``rule.trainable()``."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in rule.trainable()}:
        raise WeftError("the optimizer does not hold exactly rule.trainable(); build it anew from rule.trainable()")


def _generator(rank: int) -> str:
    """The name of a process's generator in a checkpoint."""
    return f"generator.{rank}" if rank else "generator"
