"""Linear layers that keep less than their input: what their claims do not say."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import weft.tape
from weft.convert import convert_, restore_
from weft.errors import DataError, Unsupported, UsageError
from weft.session import kept

LAYERS = [
    weft.tape.VeLoRA.options(length=4),
    weft.tape.CompAct.options(rank=0.25),
    weft.tape.RandomisedLinear.options(ratio=0.25),
]
each = pytest.mark.parametrize("made", LAYERS, ids=repr)


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 8)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return layer


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 0.3


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_of_output_and_gradient_for_any_shape(made, bias, dtype):
    plain = nn.Linear(16, 8, bias=bias, dtype=dtype)
    layer = made(copy.deepcopy(plain))
    for shape in ((16,), (1, 16), (33, 16), (3, 5, 16), (2, 3, 5, 16)):
        whole = inputs(*shape).to(dtype)
        for x in (whole, whole.mT.contiguous().mT if whole.ndim > 1 else whole[:]):
            found = []
            for m in (plain, layer):
                x = x.detach().requires_grad_()
                out = m(x)
                found.append((out, torch.autograd.grad(out, x, inputs(*out.shape).to(dtype))[0]))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each
def test_no_second_derivative_but_with_a_frozen_weight(made, dense):
    layer, x = made(dense), inputs(6, 16).requires_grad_()
    with pytest.raises(Unsupported, match="no second derivative"):
        torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    for p in layer.parameters():
        p.requires_grad_(False)
    grad = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(grad.sum(), x)[0].any()


@each
def test_nothing_is_kept_for_a_frozen_weight_and_no_copy_of_it_under_autocast(made, dense):
    layer, x = made(dense), inputs(64, 16).requires_grad_()
    with kept(layer) as count, torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.backward(torch.ones_like(out))
    assert count.peak_bytes <= 64 * 16 * 2 / 4 + 8 and count.weight_copy_bytes == 0
    assert x.grad.dtype == layer.target.grad.dtype == torch.float32
    for p in layer.parameters():
        p.requires_grad_(False)
    with kept(layer) as count:
        layer(x)
    assert count.peak_bytes == 0


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_a_checkpoint(made, dense, reentrant):
    x = inputs(64, 16).requires_grad_()
    grads = []
    for recompute in (False, True):
        layer = made(copy.deepcopy(dense))
        out = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        out.square().mean().backward()
        grads.append(layer.target.grad)
    if made.layer is weft.tape.RandomisedLinear:  # another sketch; that it is one and the same is a claim
        assert torch.isfinite(grads[1]).all() and grads[1].any()
    else:
        assert torch.equal(*grads)


@each
def test_inside_a_session_with_an_operation_in_place(made, dense):
    model = nn.Sequential(made(dense), nn.ReLU(inplace=True), nn.Linear(8, 3))
    with (weft.tape.Quantise(bits=8) | weft.tape.Offload(least_bytes=1)).on(model):
        model(inputs(64, 16)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@each
def test_a_model_trains_and_is_restored_with_what_it_learned(made, dense):
    model = nn.Sequential(dense, nn.Tanh(), nn.Linear(8, 1))
    start = dense.weight.detach().clone()
    convert_(model, made, where="0")
    with pytest.raises(DataError, match="expected"):
        model(inputs(6, 15))
    x = inputs(64, 16)
    y = x[:, :1] * x[:, 1:2]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = model(x)
    assert losses[-1] < 0.7 * losses[0]
    assert restore_(model) == ["0"] and model[0] is dense and dense.weight.requires_grad
    assert torch.equal(model(x), after) and not torch.equal(start, dense.weight)


def test_the_direction_waits_for_a_batch_that_has_one(dense):
    layer = weft.tape.VeLoRA(dense, length=4)
    for x in (torch.zeros(0, 16), torch.zeros(3, 16), torch.full((3, 16), torch.inf)):
        layer(x).sum()
        assert not layer.v.any()
    row = inputs(1, 16)
    out = layer(torch.cat([row, -row]))
    assert torch.isclose(layer.v.norm(), torch.tensor(1.0))
    v = layer.v.clone()
    layer(row)
    out.sum().backward()
    assert torch.equal(v, layer.v) and dense.weight.grad is not None


def test_a_dense_state_replaces_a_step_that_is_not_folded(dense):
    layer = weft.tape.CompAct(dense, rank=4)
    saved = {key: value.clone() for key, value in dense.state_dict().items()}
    with torch.no_grad():
        layer.compact.add_(1.0)
    layer.load_state_dict(saved, strict=False)
    x = inputs(3, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, saved["weight"], saved["bias"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: weft.tape.VeLoRA(layer),
        lambda layer: weft.tape.VeLoRA(layer, length=5),
        lambda layer: weft.tape.CompAct(layer, rank=17),
        lambda layer: weft.tape.CompAct(layer, rank=2.5),
        lambda layer: weft.tape.CompAct(layer, gap=0),
        lambda layer: weft.tape.RandomisedLinear(layer, ratio=1.0),
        lambda layer: weft.tape.RandomisedLinear(layer, kind="fourier"),
    ],
)
def test_options_that_do_not_fit(call, dense):
    with pytest.raises(UsageError):
        call(dense)
    assert dense.weight.requires_grad


@each
def test_a_frozen_layer_stays_frozen(made, dense):
    dense.requires_grad_(False)
    model = nn.Sequential(dense)
    convert_(model, made)
    x = inputs(6, 16).requires_grad_()
    model(x).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    restore_(model)
    assert not dense.weight.requires_grad


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "dct"])
def test_a_sketch_of_no_rows_and_of_another_seed(kind, dense):
    x, grads = inputs(64, 16), []
    for seed in (0, 0, 1):
        layer = weft.tape.RandomisedLinear(dense, kind=kind, seed=seed)
        grads.append(torch.autograd.grad(layer(x).square().sum(), dense.weight)[0])
    assert torch.equal(grads[0], grads[1]) and not torch.allclose(grads[0], grads[2])
    for shape in ((0, 16), (3, 0, 16)):
        assert not torch.autograd.grad(layer(inputs(*shape)).sum(), dense.weight)[0].any()


@each
def test_a_resumed_run_goes_on_bit_for_bit(made):
    xs = inputs(12, 24, 16)

    def net():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
        convert_(model, made, where="0")
        return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def train(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            for part in x.split(12):
                model(part).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    wanted = train(*net(), xs)
    first = net()
    states = copy.deepcopy((train(*first, xs[:7]), first[1].state_dict()))
    second = net()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    found = train(*second, xs[7:])
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
