"""Layers of binary weights as users have them: packed, compiled, exported, saved, trained."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft.errors import Unsupported, UsageError
from weft.kernels.signs import signs
from weft.precision.binary_connect import BinaryConnect
from weft.precision.binary_linear import BinaryLinear, binary_linear

KINDS = [
    lambda layer: BinaryLinear.from_dense(layer),
    lambda layer: BinaryLinear.from_dense(layer, binary_inputs=True),
    lambda layer: BinaryConnect.from_dense(layer),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Code compiled for one test's layers counts against no other's limit."""
    yield
    torch.compiler.reset()


def dense(features=40, outputs=21, seed=0):
    layer, draw = nn.Linear(features, outputs), torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        nn.init.normal_(p, generator=draw)
    return layer


def inputs(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_eval_mode_is_training_mode_without_gradients(kind, dtype):
    layer, x = kind(dense().to(dtype)), inputs(3, 4, 40).to(dtype)
    wanted = layer(x).detach()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    layer.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                found = layer(x)
                assert found.dtype == dtype
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_there_in_eval_mode_too(kind):
    layer, x = kind(dense()).eval(), inputs(5, 40).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers(kind):
    layer, x = kind(dense()), inputs(5, 40)
    wanted = layer(x).detach()
    held = sum(p.nbytes for p in layer.parameters())
    assert layer.pack_() is layer and not layer.training and "packed" in repr(layer)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)
    state = layer.state_dict()
    assert set(state) == {"packed", "scale", "bias"} and state["packed"].nbytes == 21 * 5
    assert sum(t.nbytes for t in state.values()) < held / 10
    file = io.BytesIO()
    torch.save(state, file)
    other = kind(dense(seed=9)).pack_()
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(other)(x), layer(x))
    assert layer.pack_() is layer
    with pytest.raises(Unsupported, match="pack_"):
        layer(x.requires_grad_())
    with pytest.raises(Unsupported, match="pack_"):
        layer.train()(x.detach())


def test_packing_a_converted_model_lets_go_of_its_floats():
    model = nn.Sequential(dense(), nn.ReLU(), dense(21, 5))
    weft.convert_(model, BinaryLinear, where="0")
    model[0].pack_()
    assert weft.restore_(model) == [] and type(model[0]) is BinaryLinear
    assert not any(p.shape == (21, 40) for p in model.parameters())
    assert not any(isinstance(v, nn.Linear) for v in vars(model[0]).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_compile_and_export(kind, packed):
    layer, x = kind(dense()).eval(), inputs(5, 40)
    if packed:
        layer.pack_()
    with torch.no_grad():
        wanted = layer(x)
        made = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted, rtol=1e-5, atol=1e-4)
    if not packed:
        layer.train()
        made = torch.compile(layer, backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(made(x).square().sum(), layer.weight)
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func(kind):
    layer, x = kind(dense()), inputs(5, 40)
    wanted = layer(x).detach()
    torch.testing.assert_close(torch.vmap(layer)(x), wanted, rtol=1e-5, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), wanted, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        layer(x)
        torch.testing.assert_close(torch.vmap(layer)(x.unsqueeze(1)).squeeze(1), wanted, rtol=1e-5, atol=1e-4)
    named = {name: -p.detach() for name, p in layer.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(layer, named, (x,))
    assert not torch.allclose(found, wanted) and torch.allclose(layer(x).detach(), wanted, rtol=1e-4, atol=1e-3)


def test_products_with_tangents_pass_the_straight_through_way():
    w, x, t = dense().weight.detach().double(), inputs(5, 40).double(), inputs(5, 40, seed=4).double()
    _, found = torch.func.jvp(lambda x: binary_linear(x, w, binary_inputs=True), (x,), (t,))
    rows = torch.func.vjp(lambda x: binary_linear(x, w, binary_inputs=True), x)[1]
    g = inputs(5, 21, seed=5).double()
    assert torch.allclose((found * g).sum(), (rows(g)[0] * t).sum())


def test_a_layer_made_under_inference_mode():
    with torch.inference_mode():
        layer, x = BinaryLinear.from_dense(dense(), binary_inputs=True).eval(), inputs(2, 40)
        before = layer(x)
        layer.weight.neg_()
        torch.testing.assert_close(layer(x) - layer.bias, -(before - layer.bias))


def test_autocast_in_eval_mode():
    layer, x = BinaryLinear.from_dense(dense(), binary_inputs=True).eval(), inputs(2, 40)
    with torch.inference_mode():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), plain, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_of_sizes_0_and_1():
    for features, outputs in ((0, 3), (3, 0), (1, 1)):
        layer = nn.Linear(features, outputs, device="meta").to_empty(device="cpu")
        nn.init.ones_(layer.bias)
        if layer.weight.numel():
            nn.init.ones_(layer.weight)
        for kind in KINDS:
            made = kind(layer)
            x = inputs(2, features)
            wanted = made(x).detach()
            with torch.no_grad():
                torch.testing.assert_close(made.eval()(x), wanted)


def test_stored_weights_are_clipped_by_the_next_pass_and_before_a_state():
    layer = BinaryConnect.from_dense(dense(), scale=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(inputs(8, 40)) - 1).square().mean().backward()
        optimizer.step()
        assert layer.state_dict()["weight"].abs().max() <= 1
    with torch.no_grad():
        layer.weight.mul_(9)
    twice = (layer(inputs(2, 40)) + layer(inputs(3, 40)[:2])).sum()  # weights used twice in a graph are clipped once
    assert layer.weight.abs().max() <= 1
    twice.backward()


def test_drawn_signs_repeat_with_the_state_and_leave_torch_alone():
    layer, x = BinaryConnect.from_dense(dense(), stochastic=True, seed=5), inputs(2, 40)
    before = torch.get_rng_state()
    state = copy.deepcopy(layer.state_dict())
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    layer.load_state_dict(state)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight * layer.factor, layer.bias))
    with pytest.raises(Unsupported, match="stochastic=False"):
        layer.pack_()
    layer.train().load_state_dict(state)
    with pytest.raises(Exception, match="Generator"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(x), first)


def test_other_layers_and_scales_are_refused():
    for kind in KINDS:
        with pytest.raises(Unsupported, match=r"nn\.Linear"):
            kind(nn.Conv2d(1, 1, 1))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="scale"):
            BinaryConnect.from_dense(dense(), scale=scale)


def test_bits_are_made_once():
    layer, x = BinaryLinear.from_dense(dense(), binary_inputs=True).eval(), inputs(1, 40)
    with torch.inference_mode():
        layer(x)
        made = layer._bits
        layer(x)
        assert layer._bits is made
        signs(x)
    with torch.no_grad():
        layer.weight.add_(0)
        layer(x)
    assert layer._bits is not made and copy.deepcopy(layer)._bits is None


@pytest.mark.parametrize("kind", KINDS)
def test_bits_follow_an_optimizer_whose_steps_are_not_counted(kind):
    layer, x = kind(dense()).eval(), inputs(3, 40)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0, fused=True)
    with torch.no_grad():
        before = layer(x)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        found = layer(x)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, layer.train()(x).detach(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_made_between_a_gradient_and_a_step_that_is_not_counted(kind):
    layer, x = kind(dense()).train(), inputs(3, 40)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0, fused=True)
    layer(x).square().sum().backward()
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        optimizer.step()
        found = layer(x)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, copy.deepcopy(layer)(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_another_width_is_refused_even_where_the_bytes_are_as_many(kind, packed):
    layer = kind(dense()).eval()
    if packed:
        layer.pack_()
    for x in (inputs(2, 39), inputs(2, 0), torch.zeros(())):
        with torch.no_grad(), pytest.raises(UsageError, match="40"):
            layer(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_packed_layers_move_to_other_dtypes(kind, dtype):
    layer, x = kind(dense()).pack_(), inputs(3, 40)
    wanted, found = layer(x), layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [True, False])
def test_derivatives_and_ensembles_by_torch_func(kind, mode):
    def made(seed=0):
        layer = dense(seed=seed)
        layer.weight.data.clamp_(-1, 1)  # there is nothing to clip in the middle of a transformation
        return kind(layer).train(mode)

    layer, x = made().requires_grad_(False), inputs(3, 40)
    slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    wanted = torch.func.jvp(made().train(), (x,), (torch.ones_like(x),))[1]
    assert slope.any() and torch.allclose(slope, wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, slope)

    def loss(given, one):
        return torch.func.functional_call(layer, given, (one,)).sum()

    named = {name: p.detach() for name, p in layer.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(named, x)
    assert each["weight"].shape == (3, 21, 40) and each["weight"].any()
    several = [made(k) for k in range(3)]
    stacked, _ = torch.func.stack_module_state(several)
    found = torch.func.vmap(lambda given: torch.func.functional_call(layer, given, (x,)))(stacked)
    torch.testing.assert_close(found, torch.stack([one(x) for one in several]), rtol=1e-5, atol=1e-4)


def test_weights_written_past_torchs_count_are_clipped_too():
    layer = BinaryConnect.from_dense(dense())
    layer(inputs(2, 40))
    layer.weight.data.mul_(50)
    layer(inputs(2, 40))
    assert layer.weight.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    """Two classes by the sign of one feature, through a hidden layer of the kind, from standardised inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), kind(nn.Linear(64, 64)), nn.BatchNorm1d(64), nn.ReLU())
    model.append(nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = inputs(256, 10)
    y = (x[:, 3] > 0).long()
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize("kind", [*KINDS, lambda layer: KINDS[1](layer).pack_()])
def test_frozen_layers(kind):
    layer, x = kind(dense()), inputs(3, 4, 40)
    with torch.no_grad():
        wanted = layer.eval()(x)
        frozen = layer.frozen()
        for p in (*layer.parameters(), *layer.buffers()):
            p.share_memory_().zero_()  # which frees what was there
        torch.testing.assert_close(frozen(x), wanted)
        with torch.inference_mode():
            torch.testing.assert_close(frozen(x[0]), wanted[0])
            torch.testing.assert_close(frozen(x.bfloat16().float()).bfloat16(), frozen(x.bfloat16()).bfloat16())
    for wrong in (x[..., :39], x[..., :32], torch.zeros(())):
        with pytest.raises(UsageError, match="40"):
            frozen(wrong)


def test_what_does_not_compute_with_bits_is_not_frozen():
    with pytest.raises(Unsupported, match="bits"):
        BinaryConnect.from_dense(dense(), stochastic=True).frozen()
