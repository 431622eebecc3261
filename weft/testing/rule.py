"""The contract of rules as checks: each promise of :class:`weft.rules.base.Rule`, on the method's own example.

``check_rule("my-rule")`` runs them all. None is left out by name: what does not apply is decided by tags and by what
the rule's class declares, and what cannot work must be raised as :class:`weft.Unsupported`.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from weft.cards import Card
from weft.errors import DataError, StageError, Unsupported, UsageError
from weft.testing import gradient, tags
from weft.testing.example import classification
from weft.testing.tools import (
    assert_unchanged,
    build,
    gradients,
    leaves,
    raises,
    run_all,
    same,
    snapshot,
)

Check = Callable[[Card], None]


def check_rule(name: str | Card) -> list[str]:
    """Run every check of the contract on one rule.

    Args:
        name: a method's name or its card.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: by the first promise that is not kept.
    """
    return run_all(name, rule_checks)


def rule_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that apply to a card, by its tags and by whether it gives gradients."""
    updates = card.load().updates
    assert updates in ("grad", "self"), f"updates={updates!r}; it is 'grad' or 'self'"
    for check in EVERY + (gradient.CHECKS if updates == "grad" else SELF):
        yield check.__name__, check
    for tag in sorted(card.tags):
        assert tag in tags.CHECKS, f"tag {tag!r} of {card.name} is measured by no test; known: {sorted(tags.CHECKS)}"
        yield f"tag_{tag}", tags.CHECKS[tag]


def equal_seeds(card: Card) -> None:
    """Equal seeds give equal gradients, also in a deep copy, and every step's draws can be repeated."""
    one, x, y = build(card, seed=3)
    two, _, _ = build(card, seed=3)
    for _ in range(3):
        assert same(leaves(one, x, y), leaves(two, x, y)), "equal seeds gave different results"
    three = copy.deepcopy(one)
    assert same(leaves(one, x, y), leaves(three, x, y)), "a deep copy goes on differently"


def _numpy_state() -> str:
    return repr(numpy.random.get_state(legacy=False))


def global_rng(card: Card) -> None:
    """Building, stepping and predicting leave every global generator as it was."""
    made = card.example()
    model = copy.deepcopy(made.model)
    before = (torch.get_rng_state(), random.getstate(), _numpy_state())
    rule = card.build(model, **made.options)
    rule.step(made.x, made.y)
    rule(made.x)
    assert torch.equal(before[0], torch.get_rng_state()), "torch's global generator was used"
    assert before[1] == random.getstate(), "random's global generator was used"
    assert before[2] == _numpy_state(), "numpy's global generator was used"


def prediction(card: Card) -> None:
    """``rule(x)`` gives a row of scores for each label, the same each time, and changes nothing."""
    rule, x, y = build(card)
    rule.step(x, y)
    rule.zero_grad(set_to_none=True)
    for training in (True, False):
        rule.train(training)
        state = {k: v.clone() for k, v in rule.state_dict().items()}
        with torch.no_grad():
            one, two = rule(x), rule(x)
        assert one.shape[: y.ndim] == y.shape and one.ndim == y.ndim + 1, f"scores {tuple(one.shape)}"
        assert torch.equal(one, two), "two predictions differ"
        assert all(torch.equal(v, rule.state_dict()[k]) for k, v in state.items()), "predicting changed the state"
        assert all(p.grad is None for p in rule.parameters())


def one_statistics_update(card: Card) -> None:
    """BatchNorm's running statistics are updated at most once a step."""
    made = classification(batch=8)
    model = nn.Sequential(made.model[0], nn.BatchNorm1d(12), *list(made.model)[1:])
    try:
        rule = card.build(model, **card.preset)
        rule.step(made.x, made.y)
    except (Unsupported, StageError):
        return
    batch_norm = model[1]
    assert isinstance(batch_norm, nn.BatchNorm1d)
    assert int(batch_norm.num_batches_tracked or 0) <= 1, "running statistics were updated more than once"


def round_trips(card: Card) -> None:
    """state_dict, deepcopy and pickle: the copy goes on as the original does."""
    rule, x, y = build(card, seed=5)
    for _ in range(2):
        rule.step(x, y)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.01)
    other, _, _ = build(card, seed=6)
    other.load_state_dict(rule.state_dict())
    copies = [other, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    want = leaves(rule, x, y)
    for made in copies:
        assert same(leaves(made, x, y), want), "a copy goes on differently"
        assert torch.equal(made(x), rule(x)) or rule.updates == "self"


def growth(card: Card) -> None:
    """What has grown can be built again from ``structure()``, which is JSON, and then takes the state."""
    rule, x, y = build(card, seed=5)
    for epoch in range(2):
        rule.step(x, y)
        before = [id(p) for p in rule.trainable()]
        grew = rule.grow(epoch)
        assert grew == (before != [id(p) for p in rule.trainable()]), "grow() says whether trainable() changed"
    other, _, _ = build(card, seed=6)
    if structure := json.loads(json.dumps(rule.structure())):
        other.rebuild(structure)
    other.load_state_dict(rule.state_dict())
    assert other.structure() == rule.structure(), "rebuilt, the structure is another"
    assert torch.equal(other(x), rule(x)), "rebuilt, it predicts otherwise"
    assert same(leaves(other, x, y), leaves(rule, x, y)), "rebuilt, it goes on differently"


def batch_of_one(card: Card) -> None:
    """A batch of one row works."""
    rule, x, y = build(card)
    one = tuple(part[:1] for part in x) if isinstance(x, tuple) else x[:1]
    assert torch.isfinite(rule.step(one, y[:1]))


def bad_input(card: Card) -> None:
    """Batches that do not fit raise DataError, unknown options UsageError, and both change nothing."""
    rule, x, y = build(card)
    before = snapshot(rule)
    first = x[0] if isinstance(x, tuple) else x
    rest = x[1:] if isinstance(x, tuple) else None

    def with_first(part: Any) -> Any:
        return part if rest is None else (part, *rest)

    classes = rule(x).shape[-1]
    bad = {
        "empty": (with_first(first[:0]), y[:0]),
        "lengths": (x, y[:-1]),
        "label shape": (x, y[:, None]),
        "label dtype": (x, y.float()),
        "label range": (x, y + classes),
        "negative label": (x, y - 1 - classes),
        "all ignored": (x, torch.full_like(y, -100)),
    }
    if first.is_floating_point():
        bad["input dtype"] = (with_first(first.double() if first.dtype == torch.float32 else first.float()), y)
    for what, (a, b) in bad.items():
        message = raises(DataError, lambda a=a, b=b: rule.step(a, b))  # type: ignore[misc]
        assert len(message) > 20, f"{what}: the message says too little: {message!r}"
        assert all(p.grad is None for p in rule.parameters()), f"{what}: a gradient was added"
    assert_unchanged(before, snapshot(rule))
    raises(UsageError, lambda: build(card, no_such_option=1))


def ignored_labels(card: Card) -> None:
    """Rows labelled -100 have no part in the gradient; exactly so where the rule draws nothing."""
    rule, x, y = build(card)
    if rule.loss is not F.cross_entropy or isinstance(x, tuple) or y.ndim > 1:
        return
    masked = y.clone()
    masked[-1] = -100
    found = gradients(rule, x, masked) if rule.updates == "grad" else []
    if rule.updates == "self":
        rule.step(x, masked)
    elif "deterministic" in card.tags:
        assert same(found, gradients(rule, x[:-1], y[:-1]), tolerance=1e-5)


def self_updates(card: Card) -> None:
    """A rule with ``updates="self"`` changes weights in ``step`` and takes neither ``scale`` nor ``ready``."""
    rule, x, y = build(card)
    before = snapshot(rule)["weights"]
    rule.step(x, y)
    assert any(not torch.equal(w, before[n]) for n, w in snapshot(rule)["weights"].items()), "no weight changed"
    raises(UsageError, lambda: rule.step(x, y, scale=2.0))
    raises(UsageError, lambda: rule.step(x, y, ready=lambda p: None))


EVERY: tuple[Check, ...] = (
    equal_seeds,
    global_rng,
    prediction,
    one_statistics_update,
    round_trips,
    growth,
    batch_of_one,
    bad_input,
    ignored_labels,
)
SELF: tuple[Check, ...] = (self_updates,)
