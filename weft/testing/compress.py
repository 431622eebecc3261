"""The contract of methods that compress a trained model, as checks on the method's own example.

The example's ``model`` is the trained model, ``x`` a list of calibration inputs, ``options`` those of the method.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.cards import Card
from weft.convert import restore_
from weft.errors import DataError, Unsupported, UsageError
from weft.testing.tools import raises, same, snapshot

Check = Callable[[Card], None]


def compress_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every such method must pass, with their names."""
    for check in (*EVERY, *((exact_without_sparsity,) if _has(card, "sparsity") else ())):
        yield check.__name__, check


def _has(card: Card, option: str) -> bool:
    return option in {found.name for found in card.options}


def _made(card: Card, **options: Any) -> tuple[nn.Module, list[Any], Any]:
    """A copy of the example's model in evaluation mode, calibration inputs, and the method."""
    made = card.example()
    return copy.deepcopy(made.model).eval(), list(made.x), card.build(**{**made.options, **options})


def _outputs(model: nn.Module, inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [model(*x) if isinstance(x, tuple) else model(x) for x in inputs]


def _form(model: nn.Module) -> dict[str, Any]:
    """What a restored model must have as before: types, parameters and how they lie in memory, modes, hooks."""
    named = list(model.named_parameters())
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.shape, p.dtype, p.stride(), p.requires_grad) for name, p in named},
        "state": list(model.state_dict()),
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": snapshot(model)["hooks"],
        "gradients": {name for name, p in named if p.grad is not None},
    }


def _assert_same_form(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    for key, value in before.items():
        assert after[key] == value, f"{when}: {key} of the model are others"


def keeps_form(card: Card) -> None:
    """Outputs keep shape and dtype and are finite; the report is JSON, names layers, and adds up."""
    model, inputs, method = _made(card)
    before = _outputs(model, inputs)
    report = method.compress_(model, inputs)
    for a, b in zip(before, _outputs(model, inputs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"the output was {a.shape} {a.dtype}, is {b.shape} {b.dtype}"
        assert torch.isfinite(b).all(), "the output is not finite"
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    modules = dict(model.named_modules())
    assert plain["layers"], "the report names no layer"
    for layer in plain["layers"]:
        assert layer["name"] in modules, f"the report names {layer['name']!r}, which the model has not"
        assert 0 <= layer["zeros"] <= 1, f"a share of {layer['zeros']} zeros"
    for key in ("operations_before", "operations_after", "bytes_before", "bytes_after"):
        total = sum(layer[key] for layer in plain["layers"])
        assert math.isclose(plain["total"][key], total), f"{key} of the layers do not add up to the total"
    for key in ("operations", "bytes"):
        assert plain["total"][f"{key}_after"] <= plain["total"][f"{key}_before"], f"more {key} than before"


def keeps_modes(card: Card) -> None:
    """Modes stay, where they are mixed too, and calibration runs in evaluation mode."""
    model, inputs, method = _made(card)
    method.compress_(model, inputs)
    found = _outputs(model, inputs)
    other, _, _ = _made(card)
    for k, module in enumerate(other.modules()):
        module.training = k % 3 != 0
    before = {name: module.training for name, module in other.named_modules()}
    names = method.compress_(other, inputs).names
    after = {name: module.training for name, module in other.named_modules()}
    for name, training in before.items():
        inside = any(name.startswith(f"{swapped}.") for swapped in names)
        assert inside or after[name] == training, f"the mode of {name!r} changed"
    assert same(_outputs(other.eval(), inputs), found, tolerance=1e-6), "calibration depends on the mode"


def deterministic(card: Card) -> None:
    """Twice the same model and data give the same; torch's global generator is as before."""
    state = torch.get_rng_state()
    outputs, reports = [], []
    for _ in range(2):
        model, inputs, method = _made(card)
        reports.append(method.compress_(model, iter(inputs)).to_dict())
        outputs.append(_outputs(model, inputs))
    assert reports[0] == reports[1], "the same data gave another report"
    assert same(outputs[0], outputs[1]), "the same data gave another model"
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator was used"


def restores(card: Card) -> None:
    """`weft.restore_` gives back the model bit for bit, with its own parameters, and can be followed by another one."""
    model, inputs, method = _made(card)
    before, form = _outputs(model, inputs), _form(model)
    first = method.compress_(model, inputs)
    hooks = snapshot(model)["hooks"]
    assert not any(hooks.values()), "a hook is left on the compressed model"
    assert not _form(model)["gradients"], "a gradient is left on the compressed model"
    assert sorted(restore_(model)) == sorted(first.names), "restore_ puts back other layers than the report names"
    _assert_same_form(form, _form(model), "restored")
    assert same(_outputs(model, inputs), before), "restored, it gives another output"
    assert method.compress_(model, inputs).to_dict() == first.to_dict(), "compressed again, the report is another"


def undoes_what_failed(card: Card) -> None:
    """An interruption at any call of the model leaves it as it was."""
    model, inputs, method = _made(card)
    calls = [0]
    handle = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    method.compress_(model, inputs)
    handle.remove()
    for at in range(1, calls[0] + 1):
        model, inputs, method = _made(card)
        before, form, left = _outputs(model, inputs), _form(model), [at]

        def interrupt(*_: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        handle = model.register_forward_pre_hook(interrupt)
        raises(KeyboardInterrupt, lambda m=method, n=model, x=inputs: m.compress_(n, x))  # type: ignore[misc]
        handle.remove()
        _assert_same_form(form, _form(model), f"interrupted at call {at} of {calls[0]}")
        assert same(_outputs(model, inputs), before), "after an interruption, it gives another output"


def copies(card: Card) -> None:
    """A deep copy gives the same output; a state loads into a model that was compressed by other data."""
    model, inputs, method = _made(card)
    other, _, _ = _made(card)
    method.compress_(model, inputs)
    wanted = _outputs(model, inputs)
    assert same(_outputs(copy.deepcopy(model), inputs), wanted), "a deep copy gives another output"
    method.compress_(other, [_moved(x) for x in inputs])
    other.load_state_dict(model.state_dict())
    assert same(_outputs(other, inputs), wanted), "with the state loaded, the output is another"


def _moved(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_moved(t) for t in x)
    return 2 * x + 1 if x.is_floating_point() else x


def other_models(card: Card) -> None:
    """A model without layers for the method is refused, and is as it was."""
    _, _, method = _made(card)
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    before = _form(model)
    message = raises(Unsupported, lambda: method.compress_(model, [torch.ones(2, 3)]))
    assert len(message) > 15, f"the message says too little: {message!r}"
    _assert_same_form(before, _form(model), "refused")


def bad_calibration(card: Card) -> None:
    """No data, rows without values, numbers that are not finite: DataError; what is no list of inputs: UsageError."""
    model, inputs, method = _made(card)
    form = _form(model)
    first = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0],)
    empty = tuple(t[:0] for t in first)
    bad: dict[str, tuple[type[Exception], Any]] = {
        "no inputs": (DataError, []),
        "inputs without rows": (DataError, [empty]),
        "a tensor": (UsageError, first[0]),
        "None": (UsageError, None),
    }
    if any(t.is_floating_point() for t in first):
        nans = tuple(t * float("nan") if t.is_floating_point() else t for t in first)
        bad["not a number"] = (DataError, [nans])
    for what, (kind, given) in bad.items():
        message = raises(kind, lambda given=given: method.compress_(model, given))  # type: ignore[misc]
        assert len(message) > 15, f"{what}: the message says too little: {message!r}"
        _assert_same_form(form, _form(model), what)


def exact_without_sparsity(card: Card) -> None:
    """With ``sparsity=0`` the outputs are those of the model, to rounding."""
    model, inputs, method = _made(card, sparsity=0.0)
    before = _outputs(model, inputs)
    method.compress_(model, inputs)
    assert same(_outputs(model, inputs), before, tolerance=1e-5), "with sparsity=0 the output is another"


EVERY: tuple[Check, ...] = (
    keeps_form,
    keeps_modes,
    deterministic,
    restores,
    undoes_what_failed,
    copies,
    other_models,
    bad_calibration,
)
