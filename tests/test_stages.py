"""Cuts on models of many kinds: bit-equal forwards, exact gradients when signals are carried, leaks found."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft import StageError, Unsupported, models, stages


def carried(cut, x, y, loss=F.cross_entropy):
    """Gradients by carrying each boundary's signal back one stage at a time."""
    outputs = []
    out = cut.run(x, lambda k, h: outputs.append(h), signals=True)
    parameters = list(cut.model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    head, signal = loss(out, y), None
    for k in reversed(range(len(cut))):
        entries = [cut.entry(k - 1)] if k else []
        grads = torch.autograd.grad(head, [*parameters, *entries], signal, allow_unused=True, retain_graph=True)
        total = [t if g is None else t + g for t, g in zip(total, grads, strict=False)]
        if k:
            head, signal = outputs[k - 1], grads[-1]
    return out, total


def exact(model, x, y, loss=F.cross_entropy):
    out = model(*x) if isinstance(x, tuple) else model(x)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(out, y), parameters, allow_unused=True)
    return out, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_carries(model, at, x, y):
    """The cut forward is bit-equal, and carried signals give the exact gradient."""
    twin = copy.deepcopy(model)
    want, grads = exact(twin, x, y)
    cut = stages.cut(copy.deepcopy(model), at)
    statistics = any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules()) and model.training
    for _ in range(1 if statistics else 3):  # the first run copies at boundaries, later ones only where they must
        out, found = carried(cut, x, y)
        assert torch.equal(out, want)
        for g, f in zip(grads, found, strict=True):
            torch.testing.assert_close(f, g, rtol=1e-5, atol=1e-7)
    hooks = sum(len(v) for m in cut.model.modules() for k, v in vars(m).items() if k.endswith("_hooks"))
    assert hooks == 0, "a hook was left behind"
    return cut


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
def test_resnet_cut_inside_a_layer(training):
    model = models.build("resnet", input_shape=(1, 8, 8), classes=4).train(training)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert_carries(model, ["layer1.0", "layer2.0", "layer2.1"], x, y)
    assert stages.cut(model).at == ("layer1", "layer2", "layer3")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        if mask is not None:  # control flow that no tracer follows
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            a = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a)
        return x + self.ff(self.norm2(x))


class Tied(nn.Module):
    """Blocks with a mask, and a head that is the embedding's weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Block(16) for _ in range(3))
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, mask=None):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(h).mean(1)


def test_transformer_with_mask_and_tied_head():
    x = (torch.randint(0, 11, (3, 5)), torch.ones(5, 5, dtype=torch.bool).tril())
    y = torch.arange(3)
    cut = assert_carries(Tied(), None, x, y)
    assert cut.at == ("layers.0", "layers.1", "layers.2")
    assert cut.shared() == {"embed.weight": [0, 3]}
    with pytest.raises(StageError, match=r"embed\.weight \(stages 0, 3\)"):
        cut.require_unshared("a local rule")
    rule = weft.rules.MonoForward(Tied())
    with pytest.raises(StageError, match=r"embed\.weight"):
        rule.step(x, y)
    assert torch.isfinite(weft.rules.MonoForward(Tied(tied=False)).step(x, y))


def test_any_batch_size_and_mode_after_the_first_run():
    cut = stages.cut(Tied(tied=False))
    for batch, training in ((2, True), (5, False), (1, True)):
        cut.model.train(training)
        ids = torch.randint(0, 11, (batch, 4))
        assert torch.equal(cut.run(ids), cut.model(ids))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.join, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, u, v):
        return self.head(F.relu(self.join(F.relu(self.a(u) + self.b(v)))))


def test_two_inputs():
    x = (torch.randn(6, 4), torch.randn(6, 3))
    cut = assert_carries(TwoInputs(), ["join"], x, torch.arange(6) % 3)
    assert cut.names(0) == ["a.weight", "a.bias", "b.weight", "b.bias", "join.weight", "join.bias"]
    assert cut.names(1) == ["head.weight", "head.bias"]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.m, self.d = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, 3)

    def forward(self, x):
        h = torch.tanh(self.e(x))
        return self.d(torch.cat([torch.tanh(self.m(h)), h], 1))


def test_skip_across_a_cut_is_found_and_summed():
    cut = assert_carries(UNet(), ["m"], torch.randn(4, 5), torch.arange(4) % 3)
    assert cut.shared() == {"e.weight": [0, 1], "e.bias": [0, 1]}
    with pytest.raises(StageError, match=r"e\.weight"):
        weft.rules.MonoForward(UNet(), at=["m"]).step(torch.randn(4, 5), torch.arange(4) % 3)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


def test_module_used_twice():
    model, x, y = Twice(), torch.randn(4, 5), torch.arange(4) % 3
    with pytest.raises(StageError, match="'a' is used twice"):
        stages.cut(model, ["a"]).run(x)
    assert not any(module._forward_hooks for module in model.modules()), "a hook outlived the error"
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2] = model[0]  # the same module on both sides of a cut
    cut = assert_carries(model, ["1"], x, y)
    assert cut.shared() == {"0.weight": [0, 1], "0.bias": [0, 1]}


def test_in_place_operations_cannot_hurt_the_stage_before():
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ELU(inplace=True))
    model.append(nn.Linear(6, 3))
    x, y = torch.randn(4, 5), torch.arange(4) % 3

    class Scaled(nn.Module):
        def forward(self, h):
            return h.mul_(0.5)

    changed = nn.Sequential(model[0], model[1], Scaled(), *list(model)[2:])  # sigmoid keeps its output for backward
    cut = stages.cut(changed, ["1", "4"])
    twin = copy.deepcopy(changed)
    for p in twin.parameters():
        p.requires_grad_(True)
    for _ in range(3):
        out, found = carried(cut, x, y)
        plain = nn.Sequential(*[m if not isinstance(m, Scaled) else _Half() for m in twin])
        want, grads = exact(plain, x, y)
        torch.testing.assert_close(out, want)
        for g, f in zip(grads, found, strict=True):
            torch.testing.assert_close(f, g)
    assert_carries(
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)), ["0"], x, y
    )


class _Half(nn.Module):
    def forward(self, h):
        return h * 0.5


def test_dropout_draws_once_in_the_models_own_forward():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(4, 5)
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    assert torch.equal(stages.cut(model, ["0", "1"]).run(x), want)


def test_default_cuts_of_a_sequential():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )
    cut = stages.cut(model)
    assert cut.at == ("2", "4")
    assert [cut.width(k) for k in range(3)] == [4, 6, 3]
    assert torch.equal(cut.stages[1](cut.stages[0](torch.ones(1, 1, 8, 8))), model[:5](torch.ones(1, 1, 8, 8)))
    assert stages.cut(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).at == ("2",)
    with pytest.raises(Unsupported, match=r"nn\.Sequential"):
        _ = stages.cut(Tied()).stages


def test_clear_errors():
    with pytest.raises(StageError, match="did you mean head"):
        stages.cut(Tied(), ["haed"])
    with pytest.raises(StageError, match="named twice"):
        stages.cut(Tied(), ["head", "head"])
    with pytest.raises(StageError, match="say where to cut"):
        stages.cut(UNet())
    with pytest.raises(StageError, match="order"):
        stages.cut(UNet(), ["m", "e"]).run(torch.randn(2, 5))
    model = Tied()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(StageError, match="did not pass"):
        stages.cut(model, ["unused"]).run(torch.randint(0, 11, (2, 3)))

    class Pair(nn.Module):
        def forward(self, x):
            return {"scores": x}

    with pytest.raises(StageError, match="dict"):
        stages.cut(nn.Sequential(nn.Linear(2, 2), Pair()), ["0"]).run(torch.ones(1, 2))


class Wrapped(nn.Module):
    """Like a library's classifier: blocks two levels down, each giving a tuple."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(6, 6)

        def forward(self, h):
            a = torch.tanh(self.dense(h))
            return a, a.detach().mean()

    def __init__(self):
        super().__init__()
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(self.Layer() for _ in range(2))
        self.classifier = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.bert.encoder.layer:
            x = layer(x)[0]
        return self.classifier(x)


def test_blocks_that_give_tuples():
    cut = assert_carries(Wrapped(), None, torch.randn(4, 6), torch.arange(4) % 3)
    assert cut.at == ("bert.encoder.layer.0", "bert.encoder.layer.1")


def test_black_box():
    def outside(h):
        return torch.from_numpy(h.numpy().round(1))

    box = stages.BlackBox(outside)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), box, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    cut = stages.cut(model)
    assert "1" in cut.at
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    rule = weft.rules.MonoForward(model)
    rule.step(x, y)
    assert box.derivative_calls == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in rule.trainable())
    with pytest.raises(StageError, match="no derivative"):
        weft.rules.Backprop(model).step(x, y)
    assert box.derivative_calls == 1


def test_copies_and_pickles():
    cut = stages.cut(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    x = torch.randn(3, 2)
    want = cut.run(x, signals=True)
    for made in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        assert torch.equal(made.run(x), want)


def test_frozen_statistics_after_an_error_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffer = model[1].running_mean
    with pytest.raises(RuntimeError), stages.frozen_statistics(model):
        model(torch.randn(8, 3))
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[1].running_mean is buffer


def test_parameters_found_anew_after_unfreezing():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    rule = weft.rules.MonoForward(model, backward="stage")
    x, y = torch.randn(4, 3), torch.arange(4) % 2
    rule.step(x, y)
    model[0].requires_grad_(True)
    rule.step(x, y)
    assert float(model[0].weight.grad.abs().max()) > 0
