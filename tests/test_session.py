"""The session and the tape contract: what is kept, how it is counted, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.errors import UsageError, WeftError
from weft.session import OUTSIDE, Kept, Reference, Saved, Tape, kept


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Cast(Tape):
    """Two bytes for four."""

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        return Kept.of(tensor, tensor.bfloat16())

    def unpack(self, kept: Kept) -> Tensor:
        return kept.tensors[0].to(kept.dtype)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 2 * shape.numel()


class Disk(Tape):
    """Holds no tensors; the file goes with the Kept."""

    exact = True
    terminal = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        self.count += 1
        path = self.folder / f"{self.count}.npy"
        np.save(path, tensor.contiguous().view(torch.uint8).numpy())
        kept = Kept.of(tensor, meta=path)
        weakref.finalize(kept, os.unlink, path)
        return kept

    def unpack(self, kept: Kept) -> Tensor:
        return torch.from_numpy(np.load(kept.meta)).view(kept.dtype).reshape(kept.shape)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 0


class Halves(Tape):
    """Keeps two tensors, one of them integers: what a quantiser leaves."""

    exact = True

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        return Kept.of(tensor, tensor.clone(), torch.arange(5))

    def unpack(self, kept: Kept) -> Tensor:
        assert torch.equal(kept.tensors[1], torch.arange(5))
        return kept.tensors[0]

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize + 40


def mlp(width: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def batch(n: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 64), torch.randint(10, (n,))


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def clean(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def hooks_active() -> bool:
    seen: list[int] = []
    with torch.autograd.graph.disable_saved_tensors_hooks("probe"):  # raises if any are active
        pass
    return bool(seen)


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((p - q).norm() / q.norm()) for p, q in zip(a, b, strict=True))


# --- counting


def test_mlp_bytes_by_hand() -> None:
    model, (x, y) = mlp(), batch(64)
    with kept(model) as count:
        loss = F.cross_entropy(model(x), y)
        # x 64x64; each ReLU's output, which is the next linear's input, once; log-softmax 64x10, labels 64 int64 and
        # the total weight of the labels, one float.
        assert count.by_module == {
            "0": 64 * 64 * 4,
            "1": 64 * 128 * 4,
            "3": 64 * 128 * 4,
            OUTSIDE: 64 * 10 * 4 + 64 * 8 + 4,
        }
        assert count.total_bytes == sum(count.by_module.values()) == 85_000 - 4
        loss.backward()
        assert count.total_bytes == 0 and count.by_module == {}
    assert count.peak_bytes == 84_996 and sum(count.peak_by_module.values()) == 84_996
    assert clean(model) and not hooks_active()


def test_views_count_their_whole_storage_once() -> None:
    model = nn.Linear(32, 32, bias=False)
    big = torch.randn(1000, 64)
    with kept(model) as count:
        out = model(big[:10, :32]) + model(big[10:20, 32:])
    assert count.by_module == {"": big.numel() * 4}
    del out
    assert count.total_bytes == 0


def test_flattened_view_is_packed_once() -> None:
    # ReLU saves [B, T, D], the linear after it the same numbers as [B*T, D].
    model = nn.Sequential(nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(8, 16, 64, requires_grad=True)
    with Cast().on(model) as session:
        loss = model(x).square().sum()
        assert session.by_module["0"] == x.numel() * 2 and "1" not in session.by_module
        loss.backward()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert relative([x.grad], [want]) < 0.01


def test_integers_and_statistics_are_counted_but_not_packed() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.LayerNorm(64))
    x = torch.randint(10, (64, 70))
    with Cast().on(model) as session:
        out = model(x)
    rows = 64 * 70
    assert session.by_module == {"0": rows * 8, "1": rows * 64 * 2 + 2 * rows * 4}
    assert out.requires_grad


def test_statistics_of_attention_and_log_probabilities_are_not_packed() -> None:
    offered: list[Saved] = []

    class Watched(Cast):
        def takes(self, saved: Saved) -> bool:
            offered.append(saved)
            return super().takes(saved)

    model = nn.Linear(32, 96)
    x = torch.randn(8, 600, 32)
    with Watched().on(model):
        q, k, v = model(x).view(8, 600, 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).flatten()
        loss = F.nll_loss(F.log_softmax(out.view(-1, 32), 1), torch.zeros(4800, dtype=torch.long))
    sums = [saved for saved in offered if saved.statistic]
    assert [saved.shape for saved in sums] == [torch.Size([8, 2, 600])] and not Cast().takes(sums[0])
    logs = [saved for saved in offered if saved.producer == "LogSoftmaxBackward0"]
    assert logs and not any(Cast().takes(saved) for saved in logs)
    packed = [saved.shape for saved in offered if Cast().takes(saved)]
    assert packed.count(torch.Size([8, 2, 600, 16])) == 4
    loss.backward()


def test_buffers_and_parameters_are_not_counted() -> None:
    model = nn.BatchNorm1d(16).eval()
    with kept(model) as count:
        out = model(torch.randn(8, 16))
    assert count.total_bytes == 8 * 16 * 4
    assert out.requires_grad


def test_counting_outlives_the_context_and_restarts_its_peak() -> None:
    model, (x, y) = mlp(), batch()
    count = kept(model)
    with count:
        first = F.cross_entropy(model(x), y)
    full = count.total_bytes
    with count:
        assert count.peak_bytes == full
        second = F.cross_entropy(model(x[:1]), y[:1])
    assert count.peak_bytes == count.total_bytes > full
    first.backward()
    assert 0 < count.total_bytes < full
    second.backward()
    assert count.total_bytes == 0


# --- tapes


@pytest.mark.parametrize("where", [None, "*", ["0", "2"]])
def test_reference_is_bit_identical(where: str | list[str] | None) -> None:
    model, (x, y) = mlp(), batch()
    want = gradients(model, x, y)
    with Reference().on(model, where) as session:
        got = gradients(model, x, y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with kept(model) as count:
        gradients(model, x, y)
    assert session.peak_by_module == count.peak_by_module


def test_cast_halves_bytes_and_keeps_gradients() -> None:
    model, (x, y) = mlp(), batch()
    want = gradients(model, x, y)
    with Cast().on(model) as session:
        got = gradients(model, x, y)
    assert 0 < relative(got, want) < 2**-7
    assert session.peak_by_module["0"] == 64 * 64 * 2 and session.peak_by_module["3"] == 64 * 128 * 2
    assert session.total_bytes == 0


def test_composition_packs_from_left_to_right(tmp_path: Path) -> None:
    model, (x, y) = mlp(), batch()
    with Cast().on(model):
        want = gradients(model, x, y)
    with (Cast() | Disk(tmp_path)).on(model) as session:
        loss = F.cross_entropy(model(x), y)
        files = list(tmp_path.iterdir())
        assert sorted(np.load(f).nbytes for f in files) == [64 * 64 * 2, 64 * 128 * 2, 64 * 128 * 2]
        assert list(session.by_module) == [OUTSIDE]
        once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert len(list(tmp_path.iterdir())) == 3
        twice = torch.autograd.grad(loss, list(model.parameters()))
        assert not list(tmp_path.iterdir())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(want, once, twice, strict=True))


def test_nothing_follows_a_tape_that_keeps_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r"Disk \| Cast.*Cast \| Disk"):
        Disk(tmp_path) | Cast()
    with pytest.raises(WeftError, match="left to right"):
        (Cast() | Disk(tmp_path)) | Cast()

    class Sly(Disk):
        terminal = False

    model, (x, _) = mlp(), batch()
    with pytest.raises(WeftError, match="put the one that keeps no tensors last"), (Sly(tmp_path) | Cast()).on(model):
        model(x)
    assert clean(model) and not list(tmp_path.iterdir())
    with pytest.raises(TypeError):
        Cast() | 3  # type: ignore[operator]


def test_every_part_is_packed_by_an_exact_tape_and_floats_by_others(tmp_path: Path) -> None:
    model, (x, y) = mlp(), batch()
    want = gradients(model, x, y)
    tape = Halves() | Disk(tmp_path)
    assert tape.exact and tape.terminal and str(tape) == "Halves | Disk"
    with tape.on(model):
        loss = F.cross_entropy(model(x), y)
        assert len(list(tmp_path.iterdir())) == 6
        got = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    mixed = Halves() | Cast()
    assert not mixed.exact and mixed.bytes(torch.Size([64, 64]), torch.float32) == 64 * 64 * 2 + 40
    triple = Halves() | (Halves() | Cast())
    with triple.on(model):
        assert relative(gradients(model, x, y), want) < 2**-7
    del loss
    assert not list(tmp_path.iterdir())


def test_a_composition_frees_what_the_next_tape_replaced(tmp_path: Path) -> None:
    parts: list[weakref.ref[Tensor]] = []

    class Watched(Cast):
        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            kept = super().pack(tensor, saved)
            parts.append(weakref.ref(kept.tensors[0]))
            return kept

    model, (x, y) = mlp(), batch()
    with (Watched() | Disk(tmp_path)).on(model):
        loss = F.cross_entropy(model(x), y)
        assert len(parts) == 3 and all(part() is None for part in parts)
        loss.backward()


def test_where_selects_modules_and_what_runs_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).sin()
            return x

    model, x = Net(), torch.randn(64, 128)
    full, half = 64 * 128 * 4, 64 * 128 * 2
    with Cast().on(model, "layers.[12]") as session:
        out = model(x)
    # Per layer: the linear's input (layer 0: x; later the sine's output), the tanh's output, which the sine saves too;
    # the sine is outside of the layer but comes second, as does every later linear after nothing: sin saves its input.
    assert session.by_module == {
        "layers.0.0": full,
        "layers.0.1": full,
        "layers.1.0": half,
        "layers.1.1": half,
        "": 2 * full,
        "layers.2.0": half,
        "layers.2.1": half,
    }
    del out
    with pytest.raises(UsageError, match=r"layer\.1.*nearest.*layers\.1"), Cast().on(model, "layer.1"):
        pass
    assert clean(model)


# --- what must raise


def test_in_place_change_of_a_reference_raises() -> None:
    x = torch.randn(10, requires_grad=True)
    model = nn.Identity()
    for tape in (None, Reference()):
        with kept(model) if tape is None else tape.on(model):
            hidden = x * 2
            loss = hidden.square().sum()
            hidden.add_(1)
            with pytest.raises(WeftError, match="changed in place"):
                loss.backward()
    big = torch.randn(5000, requires_grad=True)
    with Cast().on(model):  # a copy cannot be hurt
        hidden = big * 2
        loss = hidden.square().sum()
        hidden.add_(1)
        loss.backward()
    assert relative([big.grad], [8 * big.detach()]) < 0.01


def test_a_changed_tensor_is_packed_again() -> None:
    start = torch.full((5000,), 2.0, requires_grad=True)
    factor = torch.full((5000,), 2.0)  # saved at 2, changed in place, saved again at 3
    with Cast().on(nn.Identity()):
        first = start * factor
        second = first * factor.add_(1)
        second.sum().backward()
    assert torch.equal(start.grad, torch.full((5000,), 6.0))


def test_a_cast_that_returns_the_tensor_itself_is_watched() -> None:
    big = torch.randn(5000, dtype=torch.bfloat16, requires_grad=True)
    with Cast().on(nn.Identity()):
        hidden = big * 2
        loss = hidden.square().sum()
        hidden.add_(1)
        with pytest.raises(WeftError, match="changed in place"):
            loss.backward()


def test_in_place_modules_work() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(inplace=True), nn.Linear(128, 10))
    x, y = batch()
    want = gradients(model, x, y)
    with Reference().on(model):
        got = gradients(model, x, y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wrong", ["shape", "dtype", "kind"])
def test_what_comes_back_is_checked(wrong: str) -> None:
    class Wrong(Cast):
        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            return super().pack(tensor, saved) if wrong != "kind" else tensor  # type: ignore[return-value]

        def unpack(self, kept: Kept) -> Tensor:
            out = super().unpack(kept)
            return out.double() if wrong == "dtype" else out.flatten()

    model, (x, y) = mlp(), batch()
    match = {
        "shape": r"Wrong.unpack.*shape",
        "dtype": r"float64 instead of torch.float32",
        "kind": "must return a Kept",
    }
    with pytest.raises(WeftError, match=match[wrong]), Wrong().on(model):
        gradients(model, x, y)
    assert clean(model) and not hooks_active()


def test_sessions_do_not_nest_but_repeat() -> None:
    model, (x, y) = mlp(), batch()
    session = Cast().on(model)
    with session, pytest.raises(WeftError, match=r"compose by \|"), Reference().on(model):
        pass
    with session, pytest.raises(WeftError, match=r"compose by \|"), session:
        pass
    with session, pytest.raises(WeftError, match=r"compose by \|"), kept(model):
        pass
    with kept(model), pytest.raises(WeftError, match=r"compose by \|"), kept(model):
        pass
    with torch.autograd.graph.save_on_cpu(), pytest.raises(WeftError, match="save_on_cpu"), session:
        pass
    assert clean(model) and not hooks_active()
    for _ in range(2):
        with session:
            gradients(model, x, y)
            assert session.peak_by_module["0"] == 64 * 64 * 2


def test_a_tape_inside_counting_counts_what_the_tape_keeps() -> None:
    model, (x, y) = mlp(), batch()
    with kept(model) as count:
        with Cast().on(model):
            gradients(model, x, y)
        packed = count.peak_by_module
        gradients(model, x, y)
    assert packed["0"] == 64 * 64 * 2 and count.peak_by_module["0"] == 64 * 64 * 4
    assert clean(model) and not hooks_active()


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        raise ValueError("boom")


@pytest.mark.parametrize("place", ["forward", "backward", "pack", "unpack"])
def test_exceptions_leave_nothing_behind(place: str, tmp_path: Path) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if place == "forward":
                raise ValueError("boom")
            return Boom.apply(x) if place == "backward" else x

    class Bad(Cast):
        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            if place == "pack" and saved.module == "2":
                raise ValueError("boom")
            return super().pack(tensor, saved)

        def unpack(self, kept: Kept) -> Tensor:
            if place == "unpack":
                raise ValueError("boom")
            return super().unpack(kept)

    model = nn.Sequential(nn.Linear(64, 128), Fails(), nn.Linear(128, 10))
    x, y = batch()
    session = (Bad() | Disk(tmp_path)).on(model)
    with pytest.raises(ValueError, match="boom"), session:
        gradients(model, x, y)
    gc.collect()
    assert clean(model) and not hooks_active() and session.total_bytes == 0 and not list(tmp_path.iterdir())
    model[1] = nn.Identity()
    want = gradients(model, x, y)
    with Reference().on(model) as after:
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x, y), want, strict=True))
    assert "0" in after.peak_by_module


def test_a_caught_exception_inside_the_session_leaves_no_stale_name() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    model = nn.ModuleDict({"bad": nn.Sequential(nn.Linear(8, 8), Sometimes()), "good": nn.Linear(8, 8)})
    with kept(model) as count:
        with pytest.raises(ValueError):
            model["bad"](torch.ones(1, 8))
        gc.collect()
        out = model["good"](torch.ones(2, 8)).sin()
    assert count.by_module == {"good": 64, OUTSIDE: 64}
    assert out.requires_grad


def test_an_interrupt_leaves_no_stale_name() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Interrupted()
    session = kept(model)
    with pytest.raises(KeyboardInterrupt), session:
        model(torch.ones(1))
    with session:
        out = torch.ones(2, requires_grad=True).sin()
        assert session.by_module == {OUTSIDE: 8}
    assert out.requires_grad and clean(model)


def test_forwards_in_other_threads_do_not_disturb_the_names() -> None:
    model, entered, release = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self) -> None:
            entered.set()
            release.wait(10)

    model.append(Waits())
    with kept(model) as count:
        thread = threading.Thread(target=model[2])
        thread.start()
        entered.wait(10)
        out = model[0](torch.ones(2, 8)).sin()
        release.set()
        thread.join()
    assert count.by_module == {"0": 64, OUTSIDE: 64} and out.requires_grad


# --- autograd's other features


def test_checkpoint_inside_stays_checkpointed() -> None:
    class Net(nn.Module):
        def __init__(self, use_reentrant: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([mlp_block() for _ in range(3)])
            self.use_reentrant = use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
            return x

    def mlp_block() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh())

    for reentrant in (False, True):
        model = Net(reentrant)
        x = torch.randn(64, 64, requires_grad=True)
        model(x).sum().backward()
        want = x.grad.clone()
        x.grad = None
        calls = 0

        def count_calls(*_: object) -> None:
            nonlocal calls
            calls += 1

        handle = model.blocks[1][0].register_forward_hook(count_calls)
        with kept(model) as count:
            loss = model(x).sum()
            # The three blocks' inputs and nothing from inside them (plus what reentrant mode stores about itself).
            assert count.total_bytes == 3 * 64 * 64 * 4
            loss.backward()
        handle.remove()
        assert calls == 2  # computed again
        assert torch.equal(x.grad, want) and clean(model)
        with Cast().on(model):
            x.grad = None
            model(x).sum().backward()
        assert relative([x.grad], [want]) < 0.02


def test_retain_graph_and_backward_after_the_context(tmp_path: Path) -> None:
    model, (x, y) = mlp(), batch()
    want = gradients(model, x, y)
    with Disk(tmp_path).on(model) as session:
        loss = F.cross_entropy(model(x), y)
    watcher = weakref.ref(session)
    del session
    gc.collect()
    assert watcher() is None, "a graph must not keep its session alive"
    for again in (True, True, False):
        got = torch.autograd.grad(loss, list(model.parameters()), retain_graph=again)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not list(tmp_path.iterdir())


def test_double_backward() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))

    def penalty() -> Tensor:
        x = torch.linspace(-1, 1, 64 * 64).view(64, 64).requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return g.square().sum()

    parameters = [p for n, p in model.named_parameters() if n != "2.bias"]
    want = torch.autograd.grad(penalty(), parameters)
    with Reference().on(model):
        same = torch.autograd.grad(penalty(), parameters)
    with Cast().on(model):
        near = torch.autograd.grad(penalty(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(same, want, strict=True))
    assert relative(list(near), list(want)) < 0.02


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_weights_are_not_packed(frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128, bias=False), nn.Linear(128, 10))
    model[2].weight.requires_grad_(not frozen)
    x, y = batch()

    class Record(Cast):
        def __init__(self) -> None:
            self.seen: list[tuple[str, tuple[int, ...]]] = []

        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            self.seen.append((saved.module, tuple(saved.shape)))
            assert not torch.is_autocast_enabled("cpu")
            return Kept.of(tensor, tensor.half())

    tape = Record()
    with tape.on(model) as session:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        assert session.weight_copy_bytes == (128 * 128 + 128 * 10) * 2
        loss.backward()
    # Where the weight is frozen the linear saves no input, so its input is seen only as the ReLU's output.
    assert tape.seen == [("0", (64, 64)), ("1", (64, 128)), ("3", (64, 128))]


def test_tied_weights_and_transposes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(100, 64)
            self.head = nn.Linear(64, 100, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.emb(x).tanh()) @ self.emb.weight

    model, x = Tied(), torch.randint(100, (4, 16))
    want = torch.autograd.grad(model(x).square().sum(), model.emb.weight)[0]
    with Reference().on(model) as session:
        loss = model(x).square().sum()
        assert session.by_module == {"emb": 64 * 8, "": 64 * 64 * 4 + 64 * 100 * 4, OUTSIDE: 64 * 64 * 4}
        got = torch.autograd.grad(loss, model.emb.weight)[0]
    assert torch.equal(got, want)


def test_non_contiguous_tensors_come_back_bit_identical(tmp_path: Path) -> None:
    model = nn.Conv2d(8, 16, 3)
    x = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    wide = torch.randn(128, 64, requires_grad=True)

    def loss() -> Tensor:
        return model(x).square().sum() + (wide.t() @ wide).sin().sum() + wide.t()[::2].exp().sum()

    want = torch.autograd.grad(loss(), [x, wide, model.weight])
    with Disk(tmp_path).on(model):
        value = loss()
        assert list(tmp_path.iterdir())
        got = torch.autograd.grad(value, [x, wide, model.weight])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_tape_may_keep_sparse_tensors() -> None:
    class Sparse(Cast):
        exact = True

        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            return Kept.of(tensor, tensor.to_sparse())

        def unpack(self, kept: Kept) -> Tensor:
            return kept.tensors[0].to_dense()

    x = torch.zeros(100, 100)
    x[::10, 0] = 2.0
    x.requires_grad_()
    with Sparse().on(nn.Identity()) as session:
        loss = (x * x).sum()
        assert session.total_bytes == 10 * (4 + 2 * 8)  # ten values and their two int64 indices
        loss.backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_expanded_tensors_stay_references() -> None:
    column = torch.randn(64, 1, requires_grad=True)
    with Cast().on(nn.Identity()) as session:
        loss = column.expand(64, 512).sin().sum()
        assert session.total_bytes == 64 * 4
        loss.backward()


def test_tuple_inputs_and_kwargs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(32, 64)

        def forward(self, pair: tuple[Tensor, Tensor], *, gate: Tensor) -> Tensor:
            return self.a(pair[0]) * self.b(pair[1]) * gate

    model = Two()
    x, z, gate = torch.randn(128, 64), torch.randn(128, 32), torch.randn(128, 64)
    with kept(model) as count:
        out = model((x, z), gate=gate)
    assert count.by_module == {"a": 128 * 64 * 4, "b": 128 * 32 * 4, "": 3 * 128 * 64 * 4}
    assert out.requires_grad


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent(cell: type[nn.Module], tmp_path: Path) -> None:
    model = cell(32, 64, num_layers=2)
    x = torch.randn(24, 8, 32)
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(x)[0].square().sum(), parameters)
    for tape, bound in ((Reference(), 0.0), (Disk(tmp_path), 0.0), (Cast(), 0.02)):
        with tape.on(model) as session:
            got = torch.autograd.grad(model(x)[0].square().sum(), parameters)
        assert relative(list(got), list(want)) <= bound
        assert session.total_bytes == 0 and not list(tmp_path.iterdir())


# torch's own lazy import of its forward-mode decompositions warns of torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_and_vmap_pass() -> None:
    model, (x, _) = mlp(), batch(4)
    with kept(model) as count:
        out, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        rows = torch.func.vmap(model)(x)
    assert tangent.shape == (4, 10) and torch.allclose(rows, out, atol=1e-5)
    del out, tangent, rows
    assert count.total_bytes == 0


def test_copies_made_inside_are_quiet() -> None:
    model, (x, _) = mlp(), batch()
    with kept(model) as count:
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and count.total_bytes == 0


def test_other_users_hooks_and_global_rng_stay() -> None:
    model, (x, y) = mlp(), batch()
    calls: list[int] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    with (Halves() | Cast()).on(model):
        gradients(model, x, y)
    assert torch.equal(state, torch.get_rng_state()) and calls == [1]
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert clean(model) and all(p.grad is None for p in model.parameters())


def test_same_bytes_across_steps() -> None:
    # Freed addresses are given out again at once; a key without the held reference takes new tensors for old ones.
    model, want = mlp(), []
    with Cast().on(model) as session:
        for step in range(20):
            torch.manual_seed(step)
            x, y = batch()
            want.append((gradients(model, x, y), x, y))
    peaks = {session.peak_bytes}
    for got, x, y in want:
        with Cast().on(model) as session:
            assert all(torch.equal(a, b) for a, b in zip(got, gradients(model, x, y), strict=True))
        peaks.add(session.peak_bytes)
    assert len(peaks) == 1
