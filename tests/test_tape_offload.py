"""Offloading when things go wrong, and what a tape may not make coarser: what the claims do not say."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from torch import nn

import weft.tape
from weft.errors import WeftError
from weft.testing.savings import backward, transformer

SIZE = 128 * 128 * 4
QUEUE = 4 * SIZE


@pytest.fixture
def x():
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).div(8).requires_grad_()


def chain(x, h, steps=24):
    """States of a recurrence that saves two tensors of SIZE in each step, of which two in a row are one."""
    states = []
    for _ in range(steps):
        h = (h @ x).tanh()
        states.append(h)
    return states


def grad(x, **options):
    return torch.autograd.grad(chain(x, x)[-1].sum(), x, **options)[0]


def left():
    """Threads and descriptors of this process."""
    gc.collect()
    return sorted(t.name for t in threading.enumerate()), sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_left(tmp_path):
    before = left()
    yield
    assert left() == before
    assert not list(tmp_path.iterdir())


def run(code, folder):
    start = "import resource, sys, torch, weft.tape\nfrom tests.test_tape_offload import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


KILLED = """
with weft.tape.Offload(folder=sys.argv[1], queue_bytes=QUEUE).on(nn.Identity()):
    x = torch.ones(128, 128).requires_grad_()
    h = chain(x, x)
    print("packed", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_leaves_nothing(tmp_path):
    with run(KILLED, tmp_path) as process:
        assert process.stdout.readline() == "packed\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


FULL = """
x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).div(8).requires_grad_()
wanted = [torch.autograd.grad(h.sum(), x, retain_graph=True)[0] for h in chain(x, x)]
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * SIZE + 1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
states, h = [], x
try:
    with weft.tape.Offload(folder=sys.argv[1], queue_bytes=QUEUE).on(nn.Identity()):
        for _ in range(24):
            h = chain(x, h, 1)[0]
            states.append(h)
except weft.errors.WeftError as error:
    print(error)
found = torch.autograd.grad(states[-1].sum(), x, retain_graph=True)[0]
assert 4 <= len(states) < 24 and torch.equal(found, wanted[len(states) - 1])
assert torch.equal(torch.autograd.grad(states[3].sum(), x)[0], wanted[3])
del h, states
assert left()[0] == ["MainThread"], left()
"""


def test_a_full_disk_is_an_error_and_what_was_packed_is_right(tmp_path):
    with run(FULL, tmp_path) as process:
        out, err = process.communicate()
    assert process.returncode == 0 and out.startswith(f"cannot write what is kept to {tmp_path}: "), out + err
    assert "another folder" in out and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_left")
def test_a_slow_disk_changes_nothing(x, tmp_path):
    write, read = os.pwrite, os.preadv

    def later(call):
        def slowly(*args):
            time.sleep(0.003)
            return call(*args)

        return slowly

    with (
        mock.patch.multiple(os, pwrite=later(write), preadv=later(read)),
        weft.tape.Offload(folder=tmp_path, queue_bytes=QUEUE).on(nn.Identity()) as session,
    ):
        found = grad(x)
    assert torch.equal(found, grad(x)) and session.peak_bytes <= QUEUE


@pytest.mark.usefixtures("nothing_left")
def test_a_folder_that_is_missing_or_cannot_be_written(x, tmp_path):
    def refused(*args, **options):
        raise PermissionError(13, "Permission denied")

    for folder, change in ((tmp_path / "none", {}), (tmp_path, {"TemporaryFile": refused})):
        tape = weft.tape.Offload(folder=folder)
        with (
            mock.patch.multiple("tempfile", **change) if change else mock.MagicMock(),
            pytest.raises(WeftError, match=r"cannot make a file in .*give Offload a folder"),
            tape.on(nn.Identity()),
        ):
            raise AssertionError
    with tape.on(nn.Identity()):  # the folder can be written now
        assert grad(x).any()


@pytest.mark.usefixtures("nothing_left")
def test_one_object_serves_one_session_at_a_time(x, tmp_path):
    tape, wanted, refused = weft.tape.Offload(folder=tmp_path), grad(x), []

    def enter():
        try:
            with tape.on(nn.Identity()):
                time.sleep(0.1)
        except WeftError as error:
            refused.append(str(error))

    with tape.on(nn.Identity()):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert torch.equal(grad(x), wanted)
    threads = [threading.Thread(target=enter) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(refused) == 1 + 3 and all("make another Offload" in text for text in refused)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_forward_pass(error, x, tmp_path):
    class Fails(nn.Module):
        def forward(self, h):
            h = chain(x, h, 12)[-1]
            raise error

    tape, model = weft.tape.Offload(folder=tmp_path, queue_bytes=QUEUE), Fails()
    with pytest.raises(error), tape.on(model):
        model(x)
    with tape.on(model):
        found = grad(x)
    assert torch.equal(found, grad(x))


@pytest.mark.usefixtures("nothing_left")
def test_backward_after_the_session_twice_and_not_at_all(x, tmp_path):
    wanted = grad(x)
    tape = weft.tape.Offload(folder=tmp_path, queue_bytes=QUEUE)
    with tape.on(nn.Identity()) as session:
        loss, other = (chain(x, x)[-1].sum() for _ in range(2))
        other, lost = other * 1, chain(x, x)
        del lost
    assert not [t for t in threading.enumerate() if t.name == "weft-offload"]
    for retain in (True, True, False):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=retain)[0], wanted)
    del loss, other
    assert session.total_bytes == 0


@pytest.mark.usefixtures("nothing_left")
def test_what_was_read_ahead_gives_way_to_what_is_packed(x, tmp_path):
    """A part of a backward pass, one that packs as it goes, and one that computes again leave room for the next."""

    def part():
        states = chain(x, x)
        torch.autograd.grad(states[-1].sum(), states[-2], retain_graph=True)
        time.sleep(0.05)
        return torch.autograd.grad(states[-1].sum() + chain(x, states[-1])[-1].sum(), x)[0]

    def double():
        return torch.autograd.grad(grad(x, create_graph=True).sum(), x)[0]

    def recomputed():
        h = torch.utils.checkpoint.checkpoint(lambda t: chain(x, t, 12)[-1], chain(x, x)[-1], use_reentrant=True)
        x.grad = None
        h.sum().backward()
        return x.grad.clone()

    for passes in (part, double, recomputed):
        wanted, found = passes(), []

        def session(passes=passes, found=found):
            with weft.tape.Offload(folder=tmp_path, queue_bytes=QUEUE).on(nn.Identity()) as count:
                found.append(passes())
            found.append(count.peak_bytes)

        thread = threading.Thread(target=session, daemon=True)  # so that waiting for ever is seen
        thread.start()
        thread.join(20)
        assert len(found) == 2 and torch.equal(found[0], wanted)
        assert found[1] <= QUEUE + SIZE


@pytest.mark.usefixtures("nothing_left")
def test_the_file_does_not_grow_with_the_steps_of_a_session(x, tmp_path):
    tape, sizes = weft.tape.Offload(folder=tmp_path, queue_bytes=QUEUE), []
    with tape.on(nn.Identity()):
        for rows in (128, 64, 96, 32, 112):
            loss = chain(x, x[:rows].clone())[-1].sum()
            loss.backward()
            del loss
            while tape._file.blocks:  # the last one may be with the thread
                time.sleep(0.001)
            sizes.append(os.fstat(tape._file.file.fileno()).st_size)
    assert max(sizes) <= 26 * SIZE


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("bits", [2, 4])
def test_quantised_and_offloaded(bits, tmp_path):
    model, tokens, targets = transformer(0, width=32, layers=2, length=32, batch=4)
    composed = weft.tape.Quantise(bits=bits) | weft.tape.Offload(folder=tmp_path, queue_bytes=2**14)
    alone, both = (
        [g.clone() for g in backward(model, tokens, targets, tape)]
        for tape in (weft.tape.Quantise(bits=bits), composed)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo().min, -1e9, -1e4])
def test_attention_masks_are_not_quantised(bits, low):
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    generator = torch.Generator().manual_seed(0)
    for p in attention.parameters():
        nn.init.uniform_(p, -0.3, 0.3, generator=generator)
    x = torch.randn(4, 72, 32, generator=generator)
    hidden = (torch.rand(72, 72, generator=generator) < 0.5) & ~torch.eye(72, dtype=torch.bool)
    mask, parameters = torch.zeros(72, 72).masked_fill(hidden, low), list(attention.parameters())

    def gradients():
        out = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().mean(), parameters)])

    tape, wanted = weft.tape.Quantise(bits=bits), gradients()
    with tape.on(attention):
        found = gradients()
    assert (found - wanted).norm() <= tape.error * wanted.norm()


def test_numbers_that_are_not_finite_or_of_another_kind_stay_as_they_are():
    x = torch.linspace(-2, 2, 4096).view(64, 64)
    x[3, 5] = -torch.inf
    leaf = x.clone().requires_grad_()
    with weft.tape.Quantise(bits=4).on(nn.Identity()):
        found = torch.autograd.grad((leaf * 1).logsumexp(1).sum(), leaf)[0]
    assert torch.allclose(found, x.softmax(1), atol=1e-6)

    class Eight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t.to(torch.float8_e4m3fn))
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].to(grad.dtype)

    leaf = torch.ones(64, 64, requires_grad=True)
    with weft.tape.Quantise(bits=4).on(nn.Identity()):
        assert torch.equal(torch.autograd.grad(Eight.apply(leaf).sum(), leaf)[0], torch.ones(64, 64))
