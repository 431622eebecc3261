"""What a layer that stands in for an ordinary one must do wherever the ordinary one does it.

The example's ``model`` is the ordinary layer, ``x`` its input (a tensor or a tuple), ``options`` those of `from_dense`.
Where the ordinary layer itself refuses an input or a dtype, the layer that stands in for it may refuse too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from weft.cards import Card
from weft.convert import Convertible, convert_, restore_
from weft.errors import Unsupported, UsageError, WeftError
from weft.measure import kept_bytes
from weft.testing.tools import raises, same

Check = Callable[[Card], None]


def conversion_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every `Convertible` must pass, with their names; ``lean`` is checked where it is declared."""
    for check in (*EVERY, *((lean,) if "lean" in card.tags else ())):
        yield check.__name__, check


def _made(card: Card, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    made = card.example()
    dense = copy.deepcopy(made.model).to(dtype)
    x = made.x if isinstance(made.x, tuple) else (made.x,)
    x = tuple(t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in x)
    return dense, card.load().from_dense(dense, **{**card.preset, **made.options}), x


def _first(out: Any) -> Tensor:
    while isinstance(out, tuple | list):
        out = out[0]
    return out


def _run(layer: nn.Module, x: tuple[Any, ...], cotangent: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of its mean square, or its product, by every floating input and parameter."""
    x = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in x)
    state = copy.deepcopy(layer.state_dict())
    out = _first(layer(*x))
    by = [t for t in (*x, *layer.parameters()) if t.requires_grad]
    value = out.float().square().mean() if cotangent is None else (out * cotangent).sum()
    grads = torch.autograd.grad(value, by, allow_unused=True)
    layer.load_state_dict(state)  # what it draws next is what it drew now
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(by, grads, strict=True))]


def _as_dense(dense: nn.Module, layer: nn.Module, x: tuple[Any, ...]) -> list[Tensor] | None:
    """What the layer gives, after the ordinary one has taken the same; None where that one refuses."""
    try:
        plain = _run(dense, x)
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    found = _run(layer, x)
    assert found[0].shape == plain[0].shape and found[0].dtype == plain[0].dtype, "output of another shape or dtype"
    return found


def dtypes(card: Card) -> None:
    """Float64, bfloat16 and float16: outputs and gradients in that dtype, finite."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        dense, layer, x = _made(card, dtype)
        for t in _as_dense(dense, layer, x) or []:
            assert torch.isfinite(t).all(), f"{dtype}: not finite"


def forward_mode(card: Card) -> None:
    """In eval mode, tangents of inputs and parameters fit the gradients, or differences of outputs, or are refused.

    A backward pass may be another than the forward pass's own; of tangents nothing may be lost in silence.
    """
    _, layer, x = _made(card, torch.float64)
    layer.eval()
    state, draw = copy.deepcopy(layer.state_dict()), torch.Generator().manual_seed(1)
    learned = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def run(values: Iterable[Tensor]) -> Tensor:
        layer.load_state_dict(state)  # what it draws is always the same
        rest = iter(values)
        inputs = tuple(next(rest) if t.is_floating_point() else t for t in x)
        return _first(torch.func.functional_call(layer, dict(zip(learned, rest, strict=True)), inputs))

    floats = [t.detach() for t in x if t.is_floating_point()]
    before = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        run([*floats, *(p + 1 for p in learned.values())])
    if not all(map(torch.equal, layer.parameters(), before)):
        learned = {}  # its parameters are an optimizer's alone: other values of theirs are taken for a step
    given = [*floats, *learned.values()]
    moves = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in given]
    with torch.no_grad():
        outs = [run(t + step * v for t, v in zip(given, moves, strict=True)) for step in (-1e-6, 1e-6)]
    cotangent = torch.randn(outs[0].shape, generator=draw, dtype=outs[0].dtype)
    try:
        with forward_ad.dual_level():
            out = run(forward_ad.make_dual(t, v) for t, v in zip(given, moves, strict=True))
            moved = forward_ad.unpack_dual(out).tangent
    except (NotImplementedError, Unsupported):
        return
    layer.load_state_dict(state)
    gradients = _run(layer, x, cotangent)[1:]
    layer.load_state_dict(state)
    assert moved is not None, "the tangents are lost"
    moved = moved.detach()
    away = (outs[1] - outs[0]) / 2e-6 - moved
    by_gradients = sum(float((g * v).sum()) for g, v in zip(gradients, moves, strict=bool(learned)))
    found, size = float((moved * cotangent).sum()), float(moved.norm() * cotangent.norm()) + 1e-3
    fits = abs(found - by_gradients) <= 1e-9 * size or float(away.norm()) <= 1e-5 * float(moved.norm() + 1e-3)
    assert fits, "the tangents are neither those of the backward pass nor the differences of outputs"


def strided(card: Card) -> None:
    """An input that is not contiguous gives what its contiguous copy gives."""
    _, layer, x = _made(card)
    wide = tuple(torch.stack([t, t + 1], -1)[..., 0] if t.is_floating_point() else t for t in x)
    assert any(not t.is_contiguous() for t in wide) or not any(t.is_floating_point() for t in x)
    assert same(_run(layer, wide), _run(layer, x), tolerance=1e-5)


def empty(card: Card) -> None:
    """A batch without rows passes, where it passes the ordinary layer."""
    dense, layer, x = _made(card)
    for t in (_as_dense(dense, layer, tuple(t[:0] for t in x)) or [])[1:]:
        assert not t.any(), "a batch without rows gave a gradient"


def _refuses(layer: nn.Module, x: tuple[Any, ...]) -> bool:
    try:
        layer(*x)
    except (WeftError, RuntimeError, ValueError, AssertionError):
        return True
    return False


def wrong_shapes(card: Card) -> None:
    """What the ordinary layer refuses for its shape is refused, with rows and without."""
    dense, layer, x = _made(card)
    for dim in range(x[0].ndim):
        other = torch.cat([x[0], x[0]], dim)
        try:
            dense(other, *x[1:])
        except (RuntimeError, ValueError, AssertionError):
            for wrong in (other, other[:0]) if dim else (other,):
                assert _refuses(layer, (wrong, *x[1:])), f"{tuple(wrong.shape)} is taken: the ordinary one refuses it"


def pickled(card: Card) -> None:
    """What comes back from a file, by `torch.save`, gives the same output."""
    _, layer, x = _made(card)
    file = io.BytesIO()
    torch.save(layer.eval(), file)
    file.seek(0)
    with torch.no_grad():
        found = torch.load(file, weights_only=False)(*x)
        assert same([_first(found)], [_first(layer(*x))]), "another output"


def compiled(card: Card) -> None:
    """`torch.compile` gives the same output and gradients, in training and without gradients, or refuses."""
    for training in (True, False):
        _, layer, x = _made(card)
        layer.train(training)
        torch.compiler.reset()
        made = cast(nn.Module, torch.compile(copy.deepcopy(layer), backend="aot_eager"))
        with contextlib.suppress(Unsupported), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left to plain torch
            if training:
                assert same(_run(made, x), _run(layer, x), tolerance=1e-5), "another output, or other gradients"
                continue
            with torch.no_grad():
                assert same([_first(made(*x))], [_first(layer(*x))], tolerance=1e-5), "another output in eval mode"


def autocast(card: Card) -> None:
    """Under autocast the output has the dtype of the ordinary layer's."""
    dense, layer, x = _made(card)
    with torch.autocast("cpu", torch.bfloat16):
        _as_dense(dense, layer, x)


def no_gradients(card: Card) -> None:
    """Under ``no_grad``, and for an input that needs no gradient, the output is the same and nothing breaks."""
    _, layer, x = _made(card)
    with torch.no_grad():
        plain = _first(layer(*x))
    assert same([_first(layer(*x)).detach()], [plain], tolerance=1e-6)
    for p in layer.parameters():
        p.requires_grad_(False)
    found = _run(layer, x)
    assert same(found[:1], [plain], tolerance=1e-6) and torch.isfinite(found[1]).all()


def converts_and_back(card: Card) -> None:
    """In a model: `convert_` swaps it, the state loads into another, `restore_` gives the ordinary layer back."""
    made, layer = card.example(), card.load()
    x = made.x if isinstance(made.x, tuple) else (made.x,)
    named = issubclass(layer, Convertible) and {type(made.model), nn.Module} & {*layer.converts}
    assert named, "converts does not name the example"
    model = nn.ModuleDict({"one": copy.deepcopy(made.model), "two": copy.deepcopy(made.model), "other": nn.Identity()})
    before = _first(model["one"](*x)).detach()
    options = {**card.preset, **made.options}
    assert convert_(model, layer.options(**options), where="one") == ["one"]
    assert convert_(model, {type(made.model): layer.options(**options)}) == ["two"], "what was swapped is swapped again"
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin["one"].parameters():
            p.mul_(0.9)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(_first(twin["one"](*x)), _first(model["one"](*x))), "a loaded state gives another output"
    with torch.no_grad():
        for p in model["one"].parameters():
            p.div_(0.9)
    assert sorted(restore_(model)) == ["one", "two"] and type(model["one"]) is type(made.model)
    assert restore_(model) == []
    if "same-forward" in card.tags:
        assert same([_first(model["one"](*x)).detach()], [before], tolerance=1e-4), "restored, it gives another output"
    raises(WeftError, lambda: convert_(nn.ModuleDict({"other": nn.Identity()}), layer.options(**options)))
    raises(UsageError, lambda: convert_(model, layer.options(**options), where="nowhere*"))


def lean(card: Card) -> None:
    """It keeps fewer bytes for the way back than the ordinary layer."""
    _, layer, x = _made(card)
    dense = copy.deepcopy(card.example().model)
    mine, plain = (kept_bytes(functools.partial(_run, m, x), m).peak_bytes for m in (layer, dense))
    assert mine < plain, f"{mine} bytes are kept, {plain} by the ordinary layer"


EVERY: tuple[Check, ...] = (dtypes, forward_mode, strided, empty, autocast, no_gradients, converts_and_back)
EVERY += (wrong_shapes, pickled, compiled)
