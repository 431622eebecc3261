"""An ordinary training loop around ``rule.step``: batches, optimizer, schedule, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.data import batch_count, batches
from weft.errors import NonFinite, UsageError, WeftError, unknown
from weft.optimizers import SCHEDULES, build_optimizer, settings_of

if TYPE_CHECKING:
    from weft.data import Dataset

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
        clip: the largest norm of all gradients together; larger ones are scaled down to it. None: no limit.
        accumulate: the micro-batches that a batch is cut into, to step with less memory.
        autocast: ``"bfloat16"`` or ``"float16"`` to run the rule's steps under ``torch.autocast``.

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
    ) -> None:
        self.settings = settings_of(rule, optimizer=optimizer, lr=lr, schedule=schedule)
        if self.settings["schedule"] not in SCHEDULES:
            raise UsageError(unknown("schedule", self.settings["schedule"], list(SCHEDULES)))
        if epochs < 1 or accumulate < 1:
            raise UsageError(f"epochs={epochs}, accumulate={accumulate}; both are at least 1")
        if autocast not in (None, "bfloat16", "float16"):
            raise UsageError(unknown("autocast", str(autocast), ["bfloat16", "float16"]))
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise UsageError(f"clip={clip}; it is a positive number")
        if rule.updates == "self" and (clip is not None or accumulate > 1 or weight_decay is not None):
            raise UsageError(f"{rule.method_name} changes the weights itself; leave clip, accumulate, weight_decay out")
        self.rule, self.data, self.epochs, self.batch_size, self.seed = rule, data, epochs, batch_size, seed
        self.weight_decay, self.clip, self.accumulate, self.autocast = weight_decay, clip, accumulate, autocast
        self.per_epoch = batch_count(len(data.y_train), batch_size)
        self.done, self.total = 0, epochs * self.per_epoch
        self.history: list[Epoch] = []
        self.optimizer = self._optimizer()
        self._summed, self._seconds = 0.0, 0.0

    def _optimizer(self) -> torch.optim.Optimizer | None:
        if self.rule.updates == "self":
            return None
        how = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return build_optimizer(self.settings["optimizer"], self.rule.trainable(), self.settings["lr"], **how)

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
        while self.done < self.total:
            epoch = self.done // self.per_epoch
            self.rule.train()
            order = batches(len(self.data.y_train), self.batch_size, seed=self.seed, epoch=epoch)
            for index in itertools.islice(order, self.done % self.per_epoch, None):
                start = time.process_time()
                self._summed += len(index) * self._step(index)
                self.done += 1
                self._seconds += time.process_time() - start
                if on_step:
                    on_step(self.done, self.total)
                if self.done % self.per_epoch and save and time.monotonic() - saved > save_every:
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

    def _step(self, index: Tensor) -> float:
        if self.optimizer is not None:
            rate = self.settings["lr"] * SCHEDULES[self.settings["schedule"]](self.done / self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
        loss = 0.0
        for part in index.tensor_split(min(self.accumulate, len(index))):
            share = len(part) / len(index)
            how = {} if share == 1.0 else {"scale": share}
            with self._autocast():
                loss += share * float(self.rule.step(self.data.x_train[part], self.data.y_train[part], **how))
        if self.optimizer is not None:
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.rule.trainable(), self.clip)
            if self.done % CHECKED == 0:
                self.check_gradients()
            self.optimizer.step()
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.data.x_train.device.type, getattr(torch, self.autocast))

    def _end_epoch(self, epoch: int) -> None:
        if self.rule.grow(epoch):
            self.optimizer = self._optimizer()
        require_match(self.rule, self.optimizer)
        accuracy = None
        if self.data.y_validation is not None:
            accuracy = evaluate(self.rule, self.data.x_validation, self.data.y_validation)
        self.history.append(Epoch(epoch + 1, self._summed / len(self.data.y_train), accuracy, self._seconds))
        self._summed, self._seconds = 0.0, 0.0

    def check_gradients(self) -> None:
        """Raise NonFinite, naming parameters, when the last step's gradients or the weights are not finite."""
        named = [(name, p) for name, p in self.rule.named_parameters() if p.requires_grad]
        found = [t for _, p in named for t in (p.grad, p.detach()) if t is not None]
        if not found or math.isfinite(float(torch.nn.utils.get_total_norm(found))):
            return
        names = [n for n, p in named if not all(torch.isfinite(t).all() for t in (p.grad, p.detach()) if t is not None)]
        raise NonFinite(
            f"step {self.done} of {self.total}: gradients or weights that are not finite in {', '.join(names[:5])}"
            f"{' and others' * (len(names) > 5)}; lower the learning rate, or clip gradients (clip=1.0)"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`load` needs: tensors by name, and plain data."""
        tensors = {f"rule.{key}": value for key, value in self.rule.state_dict().items()}
        tensors["generator"] = torch.get_rng_state()
        if self.optimizer is not None:
            for i, slots in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in slots.items()}
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
        own = {key.removeprefix("rule."): value for key, value in tensors.items() if key.startswith("rule.")}
        self.rule.load_state_dict(own)
        torch.set_rng_state(tensors["generator"])
        self.optimizer = self._optimizer()
        if self.optimizer is not None:
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer."):
                    _, i, name = key.split(".", 2)
                    slots.setdefault(int(i), {})[name] = value
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
            ``rmsprop``), ``lr``, ``schedule`` (``constant``, ``cosine`` or ``linear``, to zero over all steps; these
            three by default the card's), ``seed`` of the order of batches, ``weight_decay``, ``clip``, ``accumulate``,
            ``autocast``.

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


def evaluate(rule: Any, x: Tensor, y: Tensor, *, batch_size: int = 1000) -> float:
    """The share of labels (of those that are not -100) that have the highest score, in evaluation mode.

    Args:
        rule: a rule, or any module that gives scores.
        x: inputs ``[N, ...]``.
        y: labels ``[N]`` or ``[N, T]``.
        batch_size: rows scored at a time.
    """
    training = rule.training
    rule.eval()
    right = counted = 0
    try:
        with torch.no_grad():
            for start in range(0, len(y), batch_size):
                labels = y[start : start + batch_size]
                best = rule(x[start : start + batch_size]).argmax(-1)
                right += int(((best == labels) & (labels != -100)).sum())
                counted += int((labels != -100).sum())
    finally:
        rule.train(training)
    return right / counted if counted else 0.0
