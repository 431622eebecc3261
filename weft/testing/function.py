"""The contract of functions as checks: a plain function of tensors and modules beside what it stands for.

The example's ``x`` are the arguments, ``model`` is what the function stands for, called with the same arguments, and
``options`` are the keyword arguments of the method alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.cards import Card
from weft.errors import WeftError
from weft.testing.tools import raises, same, snapshot

Check = Callable[[Card], None]


def function_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every function must pass, with their names; ``exact`` is checked where it is declared."""
    for check in (*EVERY, *((exact,) if "exact" in card.tags else ())):
        yield check.__name__, check


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """The outputs, and the gradients of a fixed random sum of them by every floating tensor and parameter given."""
    arguments = copy.deepcopy(arguments)
    leaves: list[Tensor] = []
    for one in arguments:
        if isinstance(one, Tensor) and one.is_floating_point():
            leaves.append(one.requires_grad_())
        elif isinstance(one, nn.Module):
            leaves += [p for p in one.parameters() if p.requires_grad]
    before = [snapshot(one)["hooks"] for one in arguments if isinstance(one, nn.Module)]
    out = function(*arguments, **options)
    outs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
    draw = torch.Generator().manual_seed(0)  # a plain sum says little of what has a constant sum, as softmax
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.device) for t in outs]
    total = sum((t.double() * w).sum() for t, w in zip(outs, weights, strict=True) if t.requires_grad)
    assert isinstance(total, Tensor), "no output depends on the arguments"
    total.backward()
    assert before == [snapshot(one)["hooks"] for one in arguments if isinstance(one, nn.Module)], "a hook was left"
    return [t.detach() for t in outs] + [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def _made(card: Card) -> tuple[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]]:
    made = card.example()
    return card.load(), made.model, tuple(made.x), {**card.preset, **made.options}


def repeatable(card: Card) -> None:
    """The same arguments give the same outputs and gradients, finite; torch's global generator is not drawn from."""
    function, _, arguments, options = _made(card)
    state = torch.get_rng_state()
    first = _run(function, arguments, options)
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator was used"
    assert all(torch.isfinite(t).all() for t in first if t.is_floating_point()) and any(bool(t.any()) for t in first)
    assert same(_run(function, arguments, options), first), "a second call gave something else"


def unknown_options(card: Card) -> None:
    """An option of a wrong kind is refused, with an error that says so."""
    function, _, arguments, options = _made(card)
    for name, value in options.items():
        if isinstance(value, int) and not isinstance(value, bool):
            raises(WeftError, functools.partial(function, *arguments, **{**options, name: -7}))


def exact(card: Card) -> None:
    """Outputs and gradients are those of what it stands for."""
    function, plain, arguments, options = _made(card)
    found, wanted = _run(function, arguments, options), _run(plain, arguments, {})
    assert same(found, wanted, tolerance=1e-5), "outputs or gradients are not those of the plain computation"


EVERY: tuple[Check, ...] = (repeatable, unknown_options)
