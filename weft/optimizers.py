"""Optimizers and schedules by name, and what a rule's card says of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weft.errors import UsageError, WeftError, unknown
from weft.method import card

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
}
RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 1e-1, "rmsprop": 1e-3}  # where another optimizer than the card's is given
DEFAULTS: Mapping[str, Any] = {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine", "clip": None}
UNUSED: Mapping[str, Any] = dict.fromkeys(DEFAULTS)  # by a rule that changes the weights itself


def build_optimizer(name: str, parameters: list[Any], lr: float, **options: Any) -> torch.optim.Optimizer:
    """A torch optimizer by name: adam, adamw, sgd (momentum 0.9) or rmsprop.

    Raises:
        UsageError: for an unknown name or a learning rate that is not positive and finite.
    """
    if name not in OPTIMIZERS:
        raise UsageError(unknown("optimizer", name, list(OPTIMIZERS)))
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr={lr}; a learning rate is a positive number")
    return OPTIMIZERS[name](parameters, lr=lr, **options)


def settings_of(rule: Any, **given: Any) -> dict[str, Any]:
    """Optimizer, learning rate, schedule and clip: those given (not None), else the card's, else Weft's."""
    try:
        defaults = card(rule.method_name).defaults
    except WeftError:
        defaults = {}
    return chosen({**DEFAULTS, **defaults}, **given)


def chosen(defaults: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Defaults under what is given (not None); another optimizer alone has its own learning rate, and no clip."""
    found = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    if found["optimizer"] != defaults["optimizer"]:
        found["clip"] = given.get("clip")
        if given.get("lr") is None:
            found["lr"] = RATES.get(found["optimizer"], found["lr"])
    return found
