"""The contract of tapes as checks: on four kinds of network, and on everything that autograd can do to what is saved.

The example's ``options`` build the tape; its model and batch are not used, since every tape must take every model.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.cards import Card
from weft.errors import WeftError
from weft.session import Reference, Saved, Session, Tape, kept
from weft.testing.networks import Tied, gradients_of, loss_of, networks
from weft.testing.tools import raises

Check = Callable[[Card], None]


def tape_checks(card: Card) -> Iterator[tuple[str, Check]]:
    """The checks that every tape must pass, with their names."""
    for check in EVERY:
        yield check.__name__, check


def built(card: Card) -> Tape:
    """The example's tape."""
    return card.build(**card.example().options)


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Of two lists of tensors, each taken as one vector, in norm."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (off / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def settled(session: Session, bytes: int, seconds: float = 10.0) -> bool:
    """Whether the session keeps that many bytes, as soon as threads of the tape have done their work."""
    end = time.monotonic() + seconds
    while session.total_bytes != bytes and time.monotonic() < end:
        time.sleep(0.002)
    return session.total_bytes == bytes


def _left() -> tuple[int, int]:
    """Threads and open files now."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return threading.active_count(), files


def gradients(card: Card) -> None:
    """On an MLP, a convnet, a transformer and an LSTM: the same loss, gradients within ``error``, something packed."""
    packed = False
    for name, (model, batch) in networks().items():
        tape, wanted = built(card), gradients_of(model, batch)
        plain = loss_of(model, *batch)
        with Reference().on(model) as reference:
            gradients_of(model, batch)
        with tape.on(model) as session:
            assert torch.equal(loss_of(model, *batch), plain), f"{name}: the forward pass changed"
            found = gradients_of(model, batch)
        error = relative_error(found, wanted)
        assert all(torch.isfinite(g).all() for g in found), f"{name}: a gradient is not finite"
        assert error <= tape.error, (
            f"{name}: the gradient is off by {error:.3g}, {tape.error} is what the tape promises"
        )
        if tape.exact:
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), f"{name}: not exact"
        assert session.total_bytes == 0, f"{name}: something is kept after the backward pass"
        packed = packed or session.peak_bytes < reference.peak_bytes
    assert packed, "on none of the networks is anything kept in fewer bytes"


def accounting(card: Card) -> None:
    """What is kept is what ``bytes()`` says, for every shape and dtype that it takes; exact tapes return every bit."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((128, 64), (8, 16, 16, 16), (33, 131), (8192,), (1, 4097)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            tape = built(card)
            if not tape.takes(Saved("", nn.Linear, torch.Size(shape), dtype, None, torch.Size(shape).numel())):
                continue
            x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            with tape.on(nn.Identity()) as session:
                out = x.clone().sin()
                wanted = tape.bytes(torch.Size(shape), dtype)
                assert settled(session, wanted), f"{shape} {dtype}: {session.total_bytes} kept, bytes() says {wanted}"
                assert wanted < x.numel() * dtype.itemsize, f"{shape} {dtype}: nothing is saved"
                (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.dtype == dtype and grad.shape == x.shape
            if tape.exact:
                assert torch.equal(grad, x.detach().cos()), f"{shape} {dtype}: not exact"


def left_alone(card: Card) -> None:
    """Integers, booleans and complex numbers come back as they were, whatever the tape takes."""
    model = nn.Embedding(50, 64)
    index = torch.randint(50, (40, 130), generator=torch.Generator().manual_seed(0))
    waves = torch.polar(torch.ones(70, 70), torch.arange(4900.0).view(70, 70)).requires_grad_()
    with built(card).on(model):
        out = model(index).sum() + (waves * waves).real.sum() + waves.abs()[waves.abs() > 0.5].sum()
        grads = torch.autograd.grad(out, [model.weight, waves])
    want = model(index).sum() + (waves * waves).real.sum() + waves.abs()[waves.abs() > 0.5].sum()
    wanted = torch.autograd.grad(want, [model.weight, waves])
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def shared(card: Card) -> None:
    """A tensor saved twice, and views of it, are kept once; tied weights are not packed."""
    model = Tied()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    tape = built(card)
    with tape.on(model) as session:
        loss = model(x).square().mean()
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert relative_error(list(found), list(wanted)) <= max(2 * tape.error, 1e-12)
    y = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if not tape.takes(Saved("", nn.Identity, y.shape, y.dtype, None, y.numel())):
        return
    for again in (lambda h: h, lambda h: h.view(64, 128)):
        with built(card).on(nn.Identity()) as session:
            h = y.clone()
            out = h.sin().sum() + again(h).cos().sum()
            assert settled(session, tape.bytes(y.shape, y.dtype)), "a tensor that is saved twice is kept twice"
            out.backward()


def strides(card: Card) -> None:
    """A transposed tensor and one with gaps come back with their numbers in place."""
    base = torch.randn(96, 80, 2, generator=torch.Generator().manual_seed(0))
    for view in (lambda t: t[..., 0].t(), lambda t: t[:, ::2, 1], lambda t: t.permute(2, 0, 1)):
        tape, x = built(card), base.clone().requires_grad_()
        with tape.on(nn.Identity()):
            (found,) = torch.autograd.grad(view(x * 1).sin().sum(), x)
        (wanted,) = torch.autograd.grad(view(x * 1).sin().sum(), x)
        assert relative_error([found], [wanted]) <= max(tape.error, 1e-12)


def modes(card: Card) -> None:
    """``no_grad`` keeps nothing; ``retain_graph`` gives the same twice; double backward works."""
    (model, batch), tape = networks()["MLP"], built(card)
    with tape.on(model) as session:
        with torch.no_grad():
            model(batch[0])
        assert session.peak_bytes == 0, "something is kept under no_grad"
        loss, ps = loss_of(model, *batch), list(model.parameters())
        first = torch.autograd.grad(loss, ps, retain_graph=True)
        second = torch.autograd.grad(loss, ps)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "a second pass gave other gradients"
        x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (slope,) = torch.autograd.grad(x.sin().square().sum(), x, create_graph=True)
        (bent,) = torch.autograd.grad(slope.sum(), x)
    (slope,) = torch.autograd.grad(x.sin().square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.sum(), x)
    assert relative_error([bent], [wanted]) <= max(4 * tape.error, 1e-6), "double backward is wrong"


def in_place(card: Card) -> None:
    """A change in place of what is kept as it is raises; a change of what was packed cannot reach it."""
    small = torch.randn(6, 5).requires_grad_()
    large = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tape = built(card)
    with tape.on(nn.Identity()):
        h = small * 2
        loss = h.square().sum()
        h.add_(1)
        raises(WeftError, loss.backward)
    found: list[Tensor] = []
    for changed in (False, True):
        tape.clock = 3
        with tape.on(nn.Identity()):
            h = large * 2
            loss = h.sin().sum()
            if changed:
                h.fill_(7.0)
            try:
                found += torch.autograd.grad(loss, large)
            except WeftError as error:
                assert changed and "in place" in str(error)
                return
    assert torch.equal(*found), "a change in place reached what was packed"


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError


def nothing_left(card: Card) -> None:
    """After success, an error forward and an error backward: no hook, file or thread, and the next session works."""
    model, batch = networks()["MLP"]
    before = _left()
    tape = built(card)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fails() -> None:
        with tape.on(model):
            model(batch[0])
            raise ZeroDivisionError

    def fails_backward() -> None:
        with tape.on(model):
            _Fails.apply(model(batch[0])).sum().backward()

    raises(ZeroDivisionError, fails)
    raises(ZeroDivisionError, fails_backward)
    for _ in range(2):
        with tape.on(model):
            found = gradients_of(model, batch)
    assert relative_error(found, gradients_of(model, batch)) <= max(tape.error, 1e-12)
    with tape.on(model):
        loss = loss_of(model, *batch)
        raises(WeftError, lambda: tape.on(model).__enter__())
    after = torch.autograd.grad(loss, list(model.parameters()))  # the graph outlives its session
    assert relative_error(list(after), gradients_of(model, batch)) <= max(tape.error, 1e-12)
    del loss, after
    assert hooks() == 0, "a hook is left on the model"
    assert _left() == before, f"threads and files before and after: {before}, {_left()}"


def generator_untouched(card: Card) -> None:
    """Torch's global generator is not drawn from, and the same clock gives the same gradients."""
    model, batch = networks()["MLP"]
    tape, state = built(card), torch.get_rng_state()
    found = []
    for _ in range(2):
        tape.clock = 3
        with tape.on(model):
            found.append(gradients_of(model, batch))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the same clock gave other gradients"
    assert torch.equal(state, torch.get_rng_state()), "torch's global generator was used"


def checkpointed(card: Card) -> None:
    """``torch.utils.checkpoint`` inside stays checkpointed, and its inputs are counted."""
    (model, (x, y)), tape = networks()["MLP"], built(card)
    assert isinstance(model, nn.Sequential)

    def loss() -> Tensor:
        h = checkpoint(model[:4], model[0](x) @ torch.eye(96, 64), use_reentrant=False)
        return F.cross_entropy(model[4](h), y)

    parameters = list(model.parameters())
    with kept(model) as count:
        wanted = torch.autograd.grad(loss(), parameters)
    with tape.on(model) as session:
        found = torch.autograd.grad(loss(), parameters)
    assert relative_error(list(found), list(wanted)) <= max(tape.error, 1e-12)
    assert 0 < session.peak_bytes <= count.peak_bytes


def autocast(card: Card) -> None:
    """Under autocast: the loss as without the tape, gradients near, copies of weights not packed."""
    (model, batch), tape = networks()["transformer"], built(card)
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_of(model, *batch)
        wanted = list(torch.autograd.grad(plain, list(model.parameters())))
        with tape.on(model) as session:
            loss = loss_of(model, *batch)
            found = list(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(loss, plain)
    assert relative_error(found, wanted) <= max(tape.error, 1e-12)
    assert session.weight_copy_bytes > 0


def functional_transforms(card: Card) -> None:
    """``torch.func.grad`` inside a session raises torch's own error: its transforms switch saved-tensor hooks off."""

    def inside() -> None:
        with built(card).on(nn.Identity()):
            torch.func.grad(lambda t: t.sin().sum())(torch.randn(5000))

    assert "saved tensor hooks" in raises(RuntimeError, inside)


EVERY: tuple[Check, ...] = (
    gradients,
    accounting,
    left_alone,
    shared,
    strides,
    modes,
    in_place,
    nothing_left,
    generator_untouched,
    checkpointed,
    autocast,
    functional_transforms,
)
