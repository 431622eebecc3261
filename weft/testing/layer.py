"""The contract of layers as checks: ``from_dense(layer, **options)`` in place of an ordinary torch layer.

The example's ``model`` is the ordinary layer, ``x`` its input, ``options`` those of ``from_dense``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.cards import Card
from weft.errors import Unsupported
from weft.testing.example import Example
from weft.testing.tools import raises, same, snapshot

Check = Callable[[Card], None]


def layer_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every layer must pass, with their names; ``same-forward`` is checked where it is declared."""
    for check in (*EVERY, *((same_forward,) if "same-forward" in card.tags else ())):
        yield check.__name__, check


def _made(card: Card, made: Example | None = None) -> tuple[nn.Module, nn.Module, Any]:
    """The ordinary layer of an example, what it was turned into, and the input."""
    made = made or card.example()
    dense = copy.deepcopy(made.model)
    return dense, card.load().from_dense(dense, **{**card.preset, **made.options}), made.x


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _inputs(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _gradients(layer: nn.Module, x: Any) -> list[Tensor]:
    x = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in _inputs(x))
    layer.zero_grad(set_to_none=True)
    state = copy.deepcopy(layer.state_dict())
    _first(layer(*x)).square().mean().backward()
    layer.load_state_dict(state)  # what it draws next is what it drew now
    for t in x:
        assert t.grad is None or torch.isfinite(t.grad).all(), "the gradient of the input is not finite"
    return [t.grad.clone() for t in (*x, *layer.parameters()) if t.grad is not None]


def trains(card: Card) -> None:
    """Every parameter gets a finite gradient, the same each time; nothing is left behind in hooks or generators."""
    made = card.example()
    before, state = snapshot(made.model), torch.get_rng_state()
    dense, layer, x = _made(card, made)
    found = _gradients(layer, x)
    wanted = sum(p.requires_grad for p in layer.parameters()) + sum(t.is_floating_point() for t in _inputs(x))
    assert len(found) == wanted, "a parameter got no gradient"
    assert all(torch.isfinite(g).all() for g in found), "a parameter's gradient is not finite"
    assert any(bool(g.any()) for g in found), "every gradient is zero"
    assert same(_gradients(layer, x), found), "the same input gave other gradients"
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator was used"
    assert snapshot(dense)["hooks"] == before["hooks"], "a hook was left on the layer that was given"


def copies(card: Card) -> None:
    """A deep copy and a loaded state give the same output."""
    _, layer, x = _made(card)
    _, other, _ = _made(card)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.9)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(_first(copy.deepcopy(layer)(*_inputs(x))), _first(layer(*_inputs(x)))), (
            "a deep copy gives another output"
        )
        assert torch.equal(_first(other(*_inputs(x))), _first(layer(*_inputs(x)))), (
            "with the state loaded, the output is another"
        )


def other_layers(card: Card) -> None:
    """What it cannot stand in for is refused."""
    raises(Unsupported, lambda: card.load().from_dense(nn.Identity(), **card.preset))


def same_forward(card: Card) -> None:
    """The output is that of the ordinary layer, which shares its parameters."""
    dense, layer, x = _made(card)
    with torch.no_grad():
        assert same([_first(layer(*_inputs(x)))], [_first(dense(*_inputs(x)))], tolerance=1e-6), "the output is another"
    assert {id(p) for p in dense.parameters()} <= {id(p) for p in layer.parameters()}, "the parameters are copies"


EVERY: tuple[Check, ...] = (trains, copies, other_layers)
