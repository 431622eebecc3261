"""What the contract checks share: fresh instances, gradients of one step, comparisons and snapshots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.cards import Card
from weft.errors import Unsupported, UsageError
from weft.method import card as find
from weft.testing.example import Example


def run_all(name: str | Card, checks: Callable[[Card], Iterator[tuple[str, Callable[[Card], None]]]]) -> list[str]:
    """Run the ``checks`` of a card, given or found by its name, one after another; the names of those that ran."""
    card = find(name) if isinstance(name, str) else name
    ran = []
    for label, check in checks(card):
        check(card)
        ran.append(label)
    return ran


def build(card: Card, made: Example | None = None, **options: Any) -> tuple[Any, Any, Tensor]:
    """A fresh rule on a deep copy of the example's model, with its batch."""
    made = made or card.example()
    return card.build(copy.deepcopy(made.model), **{**made.options, **options}), made.x, made.y


def gradients(rule: Any, x: Any, y: Tensor, **how: Any) -> list[Tensor]:
    """Gradients of one step from none, in the order of ``trainable()``; the rule's clock is put back."""
    clock = list(rule.clock)
    rule.zero_grad(set_to_none=True)
    rule.step(x, y, **how)
    rule.clock = clock
    return [p.grad.clone() for p in rule.trainable()]


def same(a: list[Tensor], b: list[Tensor], *, factor: float = 1.0, tolerance: float = 0.0) -> bool:
    """Whether lists of tensors agree in shape and ``a = factor * b``, to a tolerance relative to the largest entry."""
    if [p.shape for p in a] != [q.shape for q in b]:
        return False
    pairs = [(p.double(), factor * q.double()) for p, q in zip(a, b, strict=True)]
    return all(float((p - q).abs().max()) <= tolerance * max(1e-30, float(q.abs().max())) for p, q in pairs)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a step may not change: weights, modes, requires_grad, hooks."""
    hooks = {n: sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks")) for n, m in model.named_modules()}
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": hooks,
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare two snapshots."""
    for key in ("modes", "requires_grad", "hooks"):
        assert before[key] == after[key], f"{key} changed"
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name]), f"{name} changed"


def raises(kind: type[BaseException], call: Callable[[], Any]) -> str:
    """The message of the error that ``call`` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def modes(card: Card) -> list[dict[str, Any]]:
    """Options under which gradients must agree: every value of ``backward`` that the rule takes."""
    if "backward" not in {option.name for option in card.options}:
        return [{}]
    found = []
    for value in ("joint", "stage"):
        try:
            build(card, backward=value)
            found.append({"backward": value})
        except (Unsupported, UsageError):
            continue
    assert found, "backward= takes neither 'joint' nor 'stage'"
    return found


def double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(double(part) for part in x)
    return x.double() if x.is_floating_point() else x


def leaves(rule: Any, x: Any, y: Tensor) -> list[Tensor]:
    rule.zero_grad(set_to_none=True)
    rule.step(x, y)
    return [(p if p.grad is None else p.grad).detach().clone() for p in rule.parameters()]
