"""Figures of `weft.measure` against numbers computed by hand, and that measuring leaves no state."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft import measure
from weft._profile import peak_of_events
from weft.errors import WeftError
from weft.measure import (
    cosine,
    environment,
    exact_gradient,
    kept_bytes,
    operations,
    peak_bytes,
    step_ratio,
    take_apart,
)
from weft.session import Kept, Saved, Tape, kept


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def batch(n: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 64), torch.randint(10, (n,))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that measuring must leave: values and identities, gradients, modes, hooks, the global generator."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {k: (id(t), t.detach().clone(), t.requires_grad) for k, t in tensors.items()},
        "grads": {k: None if p.grad is None else (id(p.grad), p.grad.clone()) for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


# --- bytes kept


def test_kept_bytes_by_hand() -> None:
    model, (x, y) = mlp(), batch()
    report = kept_bytes(lambda: F.cross_entropy(model(x), y).backward(), model)
    assert report.by_module == {"0": 32 * 64 * 4, "1": 32 * 128 * 4, "(outside)": 32 * 10 * 4 + 32 * 8 + 4}
    assert report.peak_bytes == sum(report.by_module.values()) == 26_116
    assert (report.left_bytes, report.weight_copy_bytes) == (0, 0)
    assert json.loads(json.dumps(report.to_dict()))["peak_bytes"] == 26_116


def test_kept_bytes_of_a_step_with_several_passes_is_the_largest() -> None:
    layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(5)])

    def local() -> None:
        h = torch.ones(16, 64)
        for layer in layers:
            h = layer(h.detach())
            h.square().sum().backward()

    report = kept_bytes(local, layers)
    # One layer's input and output; five layers deep it is no more than one.
    assert report.peak_bytes == 2 * 16 * 64 * 4 and report.left_bytes == 0
    graph = []
    assert kept_bytes(lambda: graph.append(layers[0](torch.ones(16, 64))), layers).left_bytes == 16 * 64 * 4


def test_kept_bytes_of_a_step_with_a_tape() -> None:
    class Half(Tape):
        def pack(self, tensor: Tensor, saved: Saved) -> Kept:
            return Kept.of(tensor, tensor.half())

        def unpack(self, kept: Kept) -> Tensor:
            return kept.tensors[0].to(kept.dtype)

        def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
            return 2 * shape.numel()

    model, (x, y) = mlp(), batch(128)

    def step() -> None:
        with Half().on(model):
            F.cross_entropy(model(x), y).backward()

    assert kept_bytes(step, model).by_module == {"0": 128 * 64 * 2, "1": 128 * 128 * 2, "(outside)": 128 * 48 + 4}


def test_kept_bytes_inside_a_session_is_an_error() -> None:
    model = mlp()
    with kept(model), pytest.raises(WeftError, match="already active"):
        kept_bytes(lambda: None, model)


# --- bytes allocated


def test_peak_bytes_of_known_allocations() -> None:
    older = [torch.zeros(7777)]

    def step() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a  # level 2,000
        older.clear()  # a block from before the start: does not sink the level
        older.append(torch.empty(10))  # 40, stays
        c = torch.empty(3000)  # 14,040
        del b, c
        torch.empty(100)

    assert [peak_bytes(step) for _ in range(3)] == [2_000 + 40 + 12_000] * 3


def test_peak_bytes_with_and_without_gradients() -> None:
    weight = nn.Parameter(torch.ones(1000, 10))
    before = torch.full_like(weight, 3.0)
    weight.grad = before

    def step() -> None:
        (weight * 2.0).sum().backward()

    # Forward: the product, 40,000, freed as soon as it is summed. Backward: the sum's gradient is expanded, not
    # allocated; the weight's, 40,000, becomes .grad or is added to it. A few scalars besides.
    inside = [peak_bytes(step, parameters=[weight]) for _ in range(3)]
    assert len(set(inside)) == 1 and 40_000 <= inside[0] < 40_100
    assert 40_000 <= peak_bytes(step, parameters=[weight], gradients=False) < 40_100
    assert weight.grad is before and torch.equal(before, torch.full_like(weight, 3.0))

    model, (x, y) = mlp(), batch(4)
    size = sum(p.numel() * 4 for p in model.parameters())

    def train() -> None:
        F.cross_entropy(model(x), y).backward()

    with_gradients = peak_bytes(train, parameters=model.parameters())
    without = peak_bytes(train, parameters=model.parameters(), gradients=False)
    assert with_gradients >= size > without >= size // 2  # the largest gradient is made before it is added
    assert all(p.grad is None for p in model.parameters())


def test_peak_bytes_cleans_up(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parameter = nn.Parameter(torch.ones(3))
    calls = []

    def fails_when_measured() -> None:
        calls.append(1)
        os.write(2, b"from the step\n")
        if len(calls) == 2:
            raise ValueError("boom")
        parameter.sum().backward()

    with pytest.raises(ValueError, match="boom"):
        peak_bytes(fails_when_measured, parameters=[parameter])
    assert parameter.grad is None and not list(tmp_path.iterdir())
    assert peak_bytes(lambda: torch.zeros(100)) == 400
    assert not list(tmp_path.iterdir())
    out, err = capfd.readouterr()
    assert out == "" and err == "from the step\n" * 2  # and nothing of the profiler's
    with pytest.raises(WeftError, match="profilers do not nest"):
        peak_bytes(lambda: peak_bytes(lambda: None))
    assert peak_bytes(lambda: torch.zeros(100)) == 400


def test_peak_of_events() -> None:
    def event(ts: float, nbytes: int, address: int, kind: int = 0) -> dict[str, Any]:
        return {"ts": ts, "args": {"Bytes": nbytes, "Addr": address, "Device Type": kind}}

    events = [event(3, 30, 2), event(1, 10, 1), event(2, -10, 1), event(0, -99, 9), event(4, 5, 3), event(5, 900, 4, 1)]
    assert peak_of_events(events) == 35
    assert peak_of_events([]) == 0


# --- operations


def test_operations_by_hand() -> None:
    model, (x, y) = mlp(), batch()
    found = operations(lambda: F.cross_entropy(model(x), y).backward(), model)
    first, last = 2 * 32 * 64 * 128, 2 * 32 * 128 * 10
    assert found["forward_by_module"] == {"0": first, "2": last}
    assert found["forward"] == first + last
    assert found["rest"] == first + 2 * last  # the first layer's input needs no gradient
    assert found["total"] == sum(found["by_operator"].values()) == 2 * first + 3 * last
    assert set(found["by_operator"]) == {"aten.addmm", "aten.mm"}
    assert operations(lambda: model(x))["forward"] is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    json.dumps(found)


# --- gradients


def test_cosine() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [1.0]])
    assert cosine([a, b], [a, b]) == pytest.approx(1.0, abs=1e-15)
    assert cosine([a, None], [-a, None]) == -1.0
    assert cosine([a, b], [a, None]) == pytest.approx(1 / math.sqrt(3))
    assert cosine([a], [None]) is None and cosine([None], [None]) is None and cosine([], []) is None
    assert cosine([a * math.nan], [a]) is None and cosine([a * math.inf], [a]) is None
    tiny = torch.full((4,), 1e-30)  # its squares vanish in float32
    assert cosine([tiny], [tiny]) == pytest.approx(1.0)
    with pytest.raises(WeftError, match="one length"):
        cosine([a], [])
    with pytest.raises(WeftError, match="position 0"):
        cosine([a], [b])


class Odd(nn.Module):
    """Two inputs, token scores, statistics, dropout, a frozen weight, an unused one, tied ones, a replaced buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.emb.weight
        self.mix.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        self.seen = self.seen + 1
        h = self.norm(self.emb(tokens).mT).mT + shift
        return self.head(F.dropout(self.mix(h), 0.3, self.training))


def test_exact_gradient_leaves_everything() -> None:
    model = Odd()
    x = (torch.randint(12, (8, 5)), torch.randn(8, 5, 16))
    y = torch.randint(12, (8, 5))
    y[0] = -100
    model.mix.weight.grad = torch.ones(16, 16)
    before = state(model)
    with torch.no_grad():
        found = exact_gradient(model, x, y)
    assert same(state(model), before)
    assert exact_gradient(model, x, y).keys() == found.keys() and same(found, exact_gradient(model, x, y))

    twin = copy.deepcopy(model)  # same masks: same state of the generator
    twin.mix.bias.requires_grad_(True)
    twin.zero_grad()
    F.cross_entropy(twin(*x).flatten(0, 1), y.flatten()).backward()
    want = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}
    assert found.keys() == want.keys() and "head.weight" not in found and not found["unused"].any()
    assert same(found, want)


def test_exact_gradient_with_another_loss_and_in_eval() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    found = exact_gradient(model, x, y, F.mse_loss)
    want = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    assert same(list(found.values()), list(want))
    with pytest.raises(WeftError, match="LSTM returned a tuple"):
        exact_gradient(nn.LSTM(4, 3), x, y)
    with pytest.raises(WeftError, match="depends on no parameter"):
        exact_gradient(nn.ReLU(), x, x, F.mse_loss)


# --- time


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_step_ratio_interleaves_and_rotates() -> None:
    clock, log = Clock(), []

    def slow(x: int) -> None:
        log.append(("slow", x))
        clock.now += 3.0 + (100 if len(log) == 9 else 0)

    def fast(x: int) -> None:
        log.append(("fast", x))
        clock.now += 2.0

    found = step_ratio(slow, fast, rounds=5, warmup=1, clock=clock, inputs=[(1,), (2,)])
    assert [name for name, _ in log] == ["slow", "fast", "fast", "slow"] * 3
    assert [x for _, x in log] == [1, 1, 2, 2] * 3
    assert (found.ratio, found.seconds, found.baseline_seconds, found.low, found.rounds) == (1.5, 3.0, 2.0, 1.5, 5)
    json.dumps(found.to_dict())
    still = step_ratio(lambda: None, lambda: None, rounds=1, clock=Clock())
    assert still.ratio is None and still.low is None and still.high is None
    real = step_ratio(lambda: sum(range(20_000)), lambda: sum(range(2_000)))
    assert real.ratio is not None and real.low is not None and real.low <= real.high
    with pytest.raises(WeftError, match="at least one input"):
        step_ratio(slow, fast, inputs=[])
    with pytest.raises(WeftError, match="rounds=0"):
        step_ratio(slow, fast, rounds=0, inputs=[(1,)])


# --- one step taken apart


def test_take_apart_backprop() -> None:
    model = nn.Sequential(mlp(), nn.Dropout(0.5), nn.BatchNorm1d(10))
    x, y = batch()
    model[0][0].weight.grad = torch.ones(128, 64)
    x.requires_grad_()
    before = state(model)
    report = take_apart(model, x, y, rounds=3)
    assert same(state(model), before) and x.grad is None
    assert report.kept_by_module["0.0"] == 32 * 64 * 4
    assert report.kept_bytes == sum(report.kept_by_module.values())
    assert report.peak_bytes > report.peak_bytes_without_gradients > report.kept_bytes - x.numel() * 4 - y.numel() * 8
    assert report.operations["forward_by_module"] == {"0.0": 2 * 32 * 64 * 128, "0.2": 2 * 32 * 128 * 10}
    assert report.parameters == sum(p.numel() for p in model.parameters()) and report.why == {}
    assert None not in (report.forward_seconds, report.backward_seconds) and report.step_seconds > 0
    again = take_apart(model, x, y, rounds=1)
    exact = ("kept_bytes", "peak_bytes", "peak_bytes_without_gradients", "operations")
    assert all(getattr(again, name) == getattr(report, name) for name in exact)
    json.dumps(report.to_dict(), allow_nan=False)


def test_take_apart_a_rule() -> None:
    class Local(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.model = model
            self.head = nn.Linear(128, 10)
            self.calls = 0

        def trainable(self) -> list[nn.Parameter]:
            return [*self.model[0].parameters(), *self.head.parameters()]

        def step(self, x: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            loss = F.cross_entropy(self.head(self.model[1](self.model[0](x))), y)
            loss.backward()
            return loss.detach()

    model, (x, y) = mlp(), batch()
    rule = Local(model)
    before = state(rule)
    report = take_apart(model, x, y, rule=rule, rounds=2)
    assert same(state(rule), before) and rule.calls == 0
    assert report.kept_by_module["model.0"] == 32 * 64 * 4 and "model.2" not in report.kept_by_module
    assert report.forward_seconds is None and report.backward_seconds is None and report.step_seconds > 0
    assert set(report.why) == {"forward_seconds", "backward_seconds"}
    assert report.parameters == 64 * 128 + 128 + 128 * 10 + 10
    json.dumps(report.to_dict(), allow_nan=False)


def test_take_apart_needs_a_copy() -> None:
    model = mlp()
    model.cache = model[0].weight * 2  # a tensor with a graph cannot be copied
    with pytest.raises(WeftError, match="cannot be copied"):
        take_apart(model, *batch())


def test_environment() -> None:
    found = environment()
    assert found["torch"] == torch.__version__ and found["threads"] == 1 and found["cores"] >= 1
    assert {"python", "numpy", "weft", "platform", "cpu", "cuda", "commit"} <= found.keys()
    json.dumps(found, allow_nan=False)


class Twice(nn.Module):
    """A layer used twice and one that is not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


@pytest.mark.parametrize("spec", ["mlp", "conv", "twice"])
def test_passes_of_plain_backpropagation(spec):
    """Each layer's weight is needed transposed, but that of the first, whose input needs no gradient."""
    nets = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        "conv": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)),
        "twice": Twice,
    }
    model = nets[spec]()
    x = torch.randn(8, 1, 6, 6) if spec == "conv" else torch.randn(8, 6)
    y = torch.arange(8) % 3
    found = measure.passes(lambda: F.cross_entropy(model(x), y).backward(), lambda: model(x), model, 8)
    if spec == "twice":
        assert found == {"forward": 1.5, "backward": 1.5, "transposed": 2}
    else:
        assert found == {"forward": 1.0, "backward": 1.0, "transposed": 2}
    with torch.no_grad():
        found = measure.passes(lambda: model(torch.cat([x, x])), lambda: model(x), model, 8)
    assert found["forward"] == (3.0 if spec == "twice" else 2.0) and found["backward"] == found["transposed"] == 0
    assert not any(m._forward_hooks for m in model.modules())


def test_passes_of_rules():
    digits = weft.data.load("digits")
    x, y = digits.x_train[:16], digits.y_train[:16]
    found = {}
    for name in ("backprop", "direct-feedback-alignment", "forward-forward", "pepita", "forward-gradient"):
        model = weft.models.build("mlp:16x16", input_shape=(1, 8, 8), classes=10)
        found[name] = measure.take_apart(model, x, y, rule=weft.create(name, model)).passes
    assert found["backprop"] == {"forward": 1.0, "backward": 1.0, "transposed": 2}
    assert found["direct-feedback-alignment"]["transposed"] == 0
    assert found["forward-forward"] == {"forward": 3.0, "backward": 2.0, "transposed": 0}
    assert found["pepita"]["forward"] == 2.0
    assert found["forward-gradient"] == {"forward": 1.0, "backward": 0.0, "transposed": 0}


def test_converted_layers_at_inference():
    found = weft.measure_step("mlp:32x32", convert="sparse-linear:density=0.25,where=3")["change"]["inference"]
    assert set(found) == {"1", "128"}
    dense, sparse = 64 * 32 + 32 * 32 + 32 * 10, 64 * 32 + 32 * 32 // 4 + 32 * 10
    for rows, one in found.items():
        assert one["operations"]["plain"] == 2 * int(rows) * dense
        assert one["operations"]["changed"] <= 2 * max(16, int(rows)) * sparse  # batches are filled up to 16
        assert one["time"]["seconds"] > 0
    assert weft.measure_step("mlp:32x32", tape="quantise:bits=4")["change"]["inference"] == {}
