"""The contract of solvers as checks, on the method's own example."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from weft.cards import Card
from weft.errors import DataError, UsageError
from weft.testing.tools import build, raises, snapshot

Check = Callable[[Card], None]


def solver_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every solver must pass, with their names."""
    for check in EVERY:
        yield check.__name__, check


def _fitted(card: Card, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    solver, x, y = build(card, **options)
    solver.fit(x, y)
    return solver, x, y


def finds_weights(card: Card) -> None:
    """The report is finite and JSON, the scores are one row for each input, and better than a constant guess."""
    solver, x, y = build(card)
    report = solver.fit(x, y)
    assert all(map(math.isfinite, [report.loss, *report.history])), "the report is not finite"
    assert report.steps >= 1, f"{report.steps} steps"
    scores = solver(x)
    assert scores.ndim == 2 and scores.shape[0] == len(y), f"scores {tuple(scores.shape)} for {len(y)} inputs"
    assert torch.isfinite(scores).all(), "scores are not finite"
    most = int(y.bincount().max()) / len(y)
    assert float((scores.argmax(1) == y).double().mean()) > most, "no better than the most frequent class"
    assert torch.equal(scores, solver(x)), "two predictions differ"


def begins_anew(card: Card) -> None:
    """Equal seeds give equal weights; a second call finds the same again."""
    one, x, y = _fitted(card, seed=3)
    two, _, _ = _fitted(card, seed=3)
    want = one(x)
    assert torch.equal(want, two(x)), "equal seeds gave different networks"
    one.fit(x, y)
    assert torch.equal(want, one(x)), "a second call went on from the first"


def leaves_the_rest_alone(card: Card) -> None:
    """The global generator, hooks, and the user's model where the card is tagged ``own-model``."""
    made = card.example()
    model = copy.deepcopy(made.model)
    before, state = snapshot(model), torch.get_rng_state()
    solver = card.build(model, **made.options)
    solver.fit(made.x, made.y)
    solver(made.x)
    after = snapshot(model)
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator was used"
    for key in ("hooks", "modes"):
        assert before[key] == after[key], f"{key} of the model changed"
    if "own-model" in card.tags:
        assert all(torch.equal(w, after["weights"][n]) for n, w in before["weights"].items()), "the model was changed"
    assert all(p.grad is None for p in model.parameters()), "a gradient was left behind"


def ignored_rows(card: Card) -> None:
    """Rows labelled -100 are as if they were not there."""
    made = card.example()
    one, x, y = build(card, seed=1)
    masked = torch.cat([y, torch.full((3,), -100)])
    one.fit(torch.cat([x, 100 * x[:3]]), masked)
    two, _, _ = build(card, seed=1)
    two.fit(made.x, made.y)
    assert torch.equal(one(x), two(x)), "ignored rows have a part in the weights"


def round_trips(card: Card) -> None:
    """What was found can be built again from ``structure()`` and ``state_dict()``; deep copies predict alike."""
    solver, x, _ = _fitted(card, seed=5)
    other, _, _ = build(card, seed=6)
    if structure := json.loads(json.dumps(solver.structure())):
        other.rebuild(structure)
    other.load_state_dict(solver.state_dict())
    assert torch.equal(other(x), solver(x)), "rebuilt, it predicts otherwise"
    assert torch.equal(copy.deepcopy(solver)(x), solver(x)), "a deep copy predicts otherwise"


def bad_input(card: Card) -> None:
    """Data that does not fit raises DataError, unknown options UsageError."""
    solver, x, y = build(card)
    bad = {
        "empty": (x[:0], y[:0]),
        "lengths": (x, y[:-1]),
        "label shape": (x, y[:, None]),
        "label dtype": (x, y.float()),
        "negative label": (x, y - 1),
        "all ignored": (x, torch.full_like(y, -100)),
        "not a number": (x * float("nan"), y),
    }
    for what, (a, b) in bad.items():
        message = raises(DataError, lambda a=a, b=b: solver.fit(a, b))  # type: ignore[misc]
        assert len(message) > 15, f"{what}: the message says too little: {message!r}"
    raises(UsageError, lambda: build(card, no_such_option=1))


EVERY: tuple[Check, ...] = (
    finds_weights,
    begins_anew,
    leaves_the_rest_alone,
    ignored_rows,
    round_trips,
    bad_input,
)
