"""An ordinary training loop around ``rule.step``: batches, optimizer, schedule, evaluation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.errors import UsageError, WeftError, unknown
from weft.method import card

if TYPE_CHECKING:
    from weft.data import Dataset

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
}
DEFAULTS = {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine"}


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


def build_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """A torch optimizer by name: adam, adamw, sgd (momentum 0.9) or rmsprop.

    Raises:
        UsageError: for an unknown name or a learning rate that is not positive and finite.
    """
    if name not in OPTIMIZERS:
        raise UsageError(unknown("optimizer", name, list(OPTIMIZERS)))
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr={lr}; a learning rate is a positive number")
    return OPTIMIZERS[name](parameters, lr=lr)


def settings_of(rule: Any, **given: Any) -> dict[str, Any]:
    """Optimizer, learning rate and schedule: those given (not None), else the card's, else Weft's."""
    try:
        defaults = card(rule.method_name).defaults
    except WeftError:
        defaults = {}
    return {**DEFAULTS, **defaults, **{k: v for k, v in given.items() if v is not None}}


def fit(
    rule: Any,
    data: Dataset,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: str | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Epoch]:
    """Train a rule's model on the training part of a data set.

    Args:
        rule: any rule; its optimizer is built from ``rule.trainable()``.
        data: a :class:`weft.data.Dataset`.
        epochs: passes over the training part.
        batch_size: rows a step; the last batch of an epoch may be smaller.
        optimizer: ``adam``, ``adamw``, ``sgd`` or ``rmsprop``; by default the card's.
        lr: the learning rate at the start; by default the card's.
        schedule: ``constant``, ``cosine`` or ``linear``, to zero over all steps; by default the card's.
        seed: of the order of batches.
        on_epoch: called after each epoch.
        on_step: called with (steps done, steps in all) after each step.

    Raises:
        UsageError: for options that do not exist or make no sense.
        NonFinite: when a loss is not finite; the weights are those of the step before.
    """
    from weft.data import batches

    chosen = settings_of(rule, optimizer=optimizer, lr=lr, schedule=schedule)
    if chosen["schedule"] not in SCHEDULES:
        raise UsageError(unknown("schedule", chosen["schedule"], list(SCHEDULES)))
    if epochs < 1:
        raise UsageError(f"epochs={epochs}; at least one is needed")
    trains_itself = rule.updates == "self"
    built = None if trains_itself else build_optimizer(chosen["optimizer"], rule.trainable(), chosen["lr"])
    rows = len(data.y_train)
    total = epochs * math.ceil(rows / batch_size)
    done = 0
    history: list[Epoch] = []
    for epoch in range(epochs):
        rule.train()
        start, summed = time.process_time(), 0.0
        for index in batches(rows, batch_size, seed=seed, epoch=epoch):
            if built is not None:
                rate = chosen["lr"] * SCHEDULES[chosen["schedule"]](done / total)
                for group in built.param_groups:
                    group["lr"] = rate
                built.zero_grad()
            summed += len(index) * float(rule.step(data.x_train[index], data.y_train[index]))
            if built is not None:
                built.step()
            done += 1
            if on_step:
                on_step(done, total)
        if rule.grow(epoch) and built is not None:
            built = build_optimizer(chosen["optimizer"], rule.trainable(), chosen["lr"])
        require_match(rule, built)
        seconds = time.process_time() - start
        accuracy = None if data.y_validation is None else evaluate(rule, data.x_validation, data.y_validation)
        history.append(Epoch(epoch + 1, summed / rows, accuracy, seconds))
        if on_epoch:
            on_epoch(history[-1])
    return history


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
