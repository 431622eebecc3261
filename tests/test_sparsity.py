"""Sparse layers: what they stand in for, masks, changes of masks in training, states, and torch's own tools."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft.errors import DataError, Unsupported, UsageError
from weft.ops import sparse_masks as masks
from weft.sparsity.sparse import dense_gradients
from weft.sparsity.sparse_conv2d import SparseConv2d
from weft.sparsity.sparse_linear import SparseLinear


def layer_and_input(kind="linear", seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(24, 17, **options), torch.randn(3, 11, 24)
        return nn.Conv2d(4, 6, 3, padding=1, **options), torch.randn(5, 4, 9, 8)


def sparse_of(layer, **options):
    made = SparseLinear if type(layer) is nn.Linear else SparseConv2d
    return made.from_dense(layer, **{"density": 0.3, **options})


KINDS = ["linear", "conv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_the_layer_is_the_ordinary_one_with_zeros(kind, mask):
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense, mask=mask)
    assert len(layer.values) == round(0.3 * dense.weight.numel()) == int(layer.mask.sum())
    assert layer.bias is dense.bias
    assert torch.equal(layer.weight, dense.weight * layer.mask)
    back = layer.to_dense()
    assert type(back) is type(dense) and back.bias is dense.bias and str(back) == str(dense)
    torch.testing.assert_close(layer(x), back(x))
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, torch.ones_like(layer.values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_rescaled_weights_have_the_ordinary_sum_of_squares(kind, mask):
    dense, _ = layer_and_input(kind)
    plain, scaled = (sparse_of(dense, mask=mask, rescale=rescale) for rescale in (False, True))
    torch.testing.assert_close(scaled.values.norm(), dense.weight.norm())
    torch.testing.assert_close(
        scaled.values / plain.values, (scaled.values[0] / plain.values[0]).expand_as(plain.values)
    )
    assert len(sparse_of(dense, density=0.0, rescale=True).values) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_stay_frozen(kind):
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense.requires_grad_(False))
    assert not any(p.requires_grad for p in (*layer.parameters(), *layer.to_dense().parameters()))
    assert not layer(x).requires_grad


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of torch, for the ordinary layer
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_layers_without_weights(shape):
    dense = nn.Linear(*shape)
    for x in (torch.ones(2, 4, shape[0]), torch.ones(shape[0]), torch.ones(0, shape[0])):
        assert torch.equal(SparseLinear(dense)(x), dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_layer_keeps_its_pattern(kind):
    dense, x = layer_and_input(kind)
    with torch.no_grad():
        dense.weight[dense.weight.abs() < 0.1] = 0
    layer = sparse_of(dense, mask=dense.weight != 0)
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.to_dense().weight, dense.weight)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_can_be_stored(density):
    for kind in KINDS:
        dense, x = layer_and_input(kind)
        layer = sparse_of(dense, density=density)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer(x).sum().backward()
        assert layer.values.grad.shape == layer.values.shape


@pytest.mark.parametrize(
    "how",
    [
        {"stride": 2, "bias": False},
        {"groups": 2, "dilation": 2, "padding": (2, 0)},
        {"groups": 4, "out_channels": 8},
        {"padding": "same", "dilation": 3},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "valid"},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": (1, 2), "padding_mode": "reflect", "kernel_size": (3, 5), "stride": (2, 1)},
        {"padding": 1, "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_every_kind_of_convolution(how):
    dense = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **how})
    layer = SparseConv2d.from_dense(dense, density=0.4)
    x = torch.randn(19, 4, 9, 8, requires_grad=True)
    back = layer.to_dense()
    assert str(back) == str(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wanted = back(x)
    found, grad = layer(x), torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    by_x, by_weight = torch.autograd.grad(wanted, (x, back.weight), grad)
    torch.testing.assert_close(torch.autograd.grad(found, (x, layer.values), grad)[0], by_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.dense_gradient(x.detach(), grad), by_weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for_is_computed_and_kept(kind):
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense)
    layer.requires_grad_(False)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not any(t.shape == x.shape or t.numel() == x.numel() for t in kept)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(layer.to_dense()(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)
    assert layer.values.grad is None


def test_functional_transforms():
    dense, x = layer_and_input()
    layer, plain = sparse_of(dense), None
    plain = layer.to_dense()
    state = dict(layer.named_parameters())

    def loss(state):
        return torch.func.functional_call(layer, state, (x,)).square().mean()

    found = torch.func.grad(loss)(state)
    (by_weight,) = torch.autograd.grad(plain(x).square().mean(), plain.weight)
    torch.testing.assert_close(found["values"], by_weight[layer.mask])
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(forward, tangent @ plain.weight.T)


# states


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_another_number_of_weights_is_loaded(kind, tmp_path):
    dense, x = layer_and_input(kind)
    full, half = sparse_of(dense, density=0.4), sparse_of(dense, density=0.1, mask="random")
    values = full.values
    full(x).sum().backward()
    torch.save(half.state_dict(), tmp_path / "state.pt")
    full.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert full.values is values and len(values) == len(half.values) and values.grad is None
    assert torch.equal(full(x), half(x)) and torch.equal(copy.deepcopy(full)(x), half(x))
    full(x).sum().backward()
    assert values.grad.shape == values.shape
    state = half.state_dict()
    state["columns"] = state["columns"].flip(0)
    with pytest.raises(DataError, match="no sparse layer's"):
        full.load_state_dict(state)
    state = half.state_dict() | {"columns": half.columns + 10**6}
    with pytest.raises(DataError, match="no sparse layer's"):
        full.load_state_dict(state)


def test_a_model_is_converted_and_restored():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.randn(4, 1, 8, 8)
    names = weft.convert_(
        model, {nn.Linear: SparseLinear.options(density=0.05), nn.Conv2d: SparseConv2d.options(density=0.5)}
    )
    assert names == ["0", "2", "4"]
    y = model(x)
    assert weft.restore_(model) == names
    torch.testing.assert_close(model(x), y)


# masks


def test_masks_have_as_many_places_as_asked_for():
    w = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    for density in (0.0, 0.05, 0.5, 1.0):
        for mask in (masks.random_mask((13, 7), density, 3), masks.magnitude_mask(w, density)):
            assert mask.shape == w.shape and int(mask.sum()) == round(density * 91)
    assert torch.equal(masks.random_mask((5, 5), 0.3, 1), masks.random_mask((5, 5), 0.3, 1))
    assert not torch.equal(masks.random_mask((5, 5), 0.3, 1), masks.random_mask((5, 5), 0.3, 2))
    mask = masks.magnitude_mask(w, 0.3)
    assert w[mask].abs().min() > w[~mask].abs().max()
    assert torch.equal(masks.magnitude_mask(torch.zeros(4), 0.5), torch.tensor([True, True, False, False]))
    fewer = masks.magnitude_mask(torch.ones(4), 0.75, torch.tensor([False, True, True, False]))
    assert torch.equal(fewer, torch.tensor([False, True, True, False]))


def test_random_masks_are_uniform():
    """Over 4000 seeds each of 20 places is taken a quarter of the time, to within six standard deviations."""
    count = sum(masks.random_mask((4, 5), 0.25, seed).int() for seed in range(4000))
    assert (count - 1000).abs().max() < 6 * math.sqrt(4000 * 0.25 * 0.75)


def test_schedules():
    cubic = [masks.cubic_density(t, start=10, stop=20, final=0.1, initial=0.9) for t in (0, 10, 15, 20, 99)]
    assert cubic == pytest.approx([0.9, 0.9, 0.1 + 0.8 / 8, 0.1, 0.1])
    cosine = [masks.cosine_fraction(t, 100) for t in (0, 50, 100, 200)]
    assert cosine == pytest.approx([0.3, 0.15, 0, 0])


def test_rigl_by_hand():
    weight = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, True, False, False])
    gradient = torch.tensor([9.0, 0.0, 0.0, 9.0, 1.0, -2.0])
    one = masks.rigl_mask(weight, mask, gradient, 0.25)
    assert one.tolist() == [True, True, False, True, False, True]
    two = masks.rigl_mask(weight, mask, torch.tensor([0.0, 0.1, 5.0, 0.0, 0.2, 0.3]), 0.5)
    assert two.tolist() == [True, False, True, True, False, True]  # the third is dropped and comes back
    assert torch.equal(masks.rigl_mask(weight, mask, gradient, 0.0), mask)


def test_a_dropped_weight_that_comes_back_keeps_its_value():
    layer = SparseLinear.from_dense(nn.Linear(6, 1, bias=False), mask=torch.tensor([[True] * 4 + [False] * 2]))
    before = layer.weight.detach().clone()
    gradient = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]) + 5 * layer.mask
    new = masks.rigl_mask(layer.weight, layer.mask, gradient, 0.5)
    layer.set_mask_(new, None)
    assert torch.equal(new, torch.tensor([[True] * 4 + [False] * 2])) and torch.equal(layer.weight, before)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_goes_on_with_what_stays(kind, name):
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense, mask="random")
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    def dense_view(t):
        return torch.zeros(layer.shape).masked_scatter(layer.mask, t)

    values, old = layer.values, layer.mask
    names = [k for k, t in optimizer.state[values].items() if isinstance(t, torch.Tensor) and t.shape == values.shape]
    assert names
    for density in (0.3, 0.2, 0.5):  # as many, fewer, more
        new = masks.random_mask(tuple(layer.shape), density, seed=int(density * 10))
        old, before = layer.mask, {k: dense_view(optimizer.state[values][k]) for k in names}
        weight, grad = layer.weight.detach(), dense_view(values.grad)
        layer.set_mask_(new, optimizer)
        assert layer.values is values and torch.equal(layer.mask, new) and len(values) == int(new.sum())
        assert torch.equal(layer.weight, weight * (old & new)) and torch.equal(
            dense_view(values.grad), grad * (old & new)
        )
        for k in names:
            assert torch.equal(dense_view(optimizer.state[values][k]), before[k] * (old & new))
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


def test_dense_gradients_are_those_of_the_dense_layer():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)).double()
    weft.convert_(model, {nn.Conv2d: SparseConv2d.options(density=0.4), nn.Linear: SparseLinear.options(density=0.1)})
    plain = copy.deepcopy(model)
    weft.restore_(plain)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    with dense_gradients(model) as found:
        model(x[:3]).square().sum().backward()
        model(x[3:]).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(found[model[0]], plain[0].weight.grad)
    torch.testing.assert_close(found[model[3]], plain[3].weight.grad)
    torch.testing.assert_close(model[3].values.grad, plain[3].weight.grad[model[3].mask])
    assert not any(m._forward_hooks for m in model)


def test_a_mask_between_forward_and_backward_is_an_error():
    for density in (0.3, 0.1):
        dense, x = layer_and_input()
        layer = sparse_of(dense)
        y = layer(x.requires_grad_())
        layer.set_mask_(masks.random_mask((17, 24), density, 5), None)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# use


def wrong_optimizer():
    layer, other = sparse_of(nn.Linear(24, 17)), nn.Linear(2, 2)
    layer.set_mask_(layer.mask, torch.optim.SGD(other.parameters(), 0.1))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: SparseLinear.from_dense(nn.Conv2d(1, 1, 1)), Unsupported, "Conv2d is no nn.Linear"),
        (lambda: SparseConv2d.from_dense(nn.Linear(1, 1)), Unsupported, "Linear is no nn.Conv2d"),
        (
            lambda: SparseLinear.from_dense(nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))),
            Unsupported,
            "no nn.Linear",
        ),
        (lambda: sparse_of(nn.Linear(4, 4), density=5), UsageError, "density=5: give a number from 0 to 1"),
        (lambda: sparse_of(nn.Linear(4, 4), mask="best"), UsageError, "mask='best': give 'magnitude', 'random'"),
        (lambda: sparse_of(nn.Linear(4, 4), mask=torch.ones(4, 5) > 0), UsageError, "[4, 5] for a weight [4, 4]"),
        (
            lambda: sparse_of(nn.Linear(4, 4))(torch.ones(2, 5)),
            DataError,
            "an input [2, 5]: the layer takes 4 features",
        ),
        (lambda: sparse_of(nn.Linear(4, 4))(torch.ones(2, 4).double()), DataError, "torch.float64"),
        (lambda: sparse_of(nn.Conv2d(2, 4, 3))(torch.ones(2, 3, 9, 9)), DataError, "[B, 2, H, W]"),
        (lambda: sparse_of(nn.Conv2d(2, 4, 3))(torch.ones(2, 2, 9, 2)), DataError, "is smaller than the filter"),
        (wrong_optimizer, UsageError, "does not hold this layer's values"),
        (lambda: dense_gradients(nn.Linear(1, 1)).__enter__(), UsageError, "no sparse layer"),
        (lambda: masks.cubic_density(1, start=3, stop=3, final=0.1), UsageError, "start=3, stop=3"),
        (lambda: masks.cosine_fraction(1, 0), UsageError, "stop=0"),
        (lambda: masks.rigl_mask(torch.ones(3), torch.ones(3) > 0, torch.ones(3), 2.0), UsageError, "fraction=2.0"),
        (lambda: masks.magnitude_mask(torch.tensor([torch.nan]), 1.0), DataError, "the weight is not finite"),
    ],
)
def test_wrong_use_is_an_error_that_says_what_to_give(call, error, says):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it reads autograd functions
@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_the_layer(kind):
    torch._dynamo.reset()
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    found, wanted = compiled(x), layer(x)
    torch.testing.assert_close(found, wanted)
    by = x, *layer.parameters()
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), by), torch.autograd.grad(wanted.square().sum(), by), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export_takes_the_layer(kind):
    dense, x = layer_and_input(kind)
    layer = sparse_of(dense)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast_and_half_types():
    for kind in KINDS:
        dense, x = layer_and_input(kind)
        layer = sparse_of(dense)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)
        y.sum().backward()
        assert layer.values.grad.dtype == x.grad.dtype == torch.float32


def test_a_small_network_learns_as_well_as_the_dense_one():
    """Digits, 64-256-10, a tenth of the hidden weights, RigL's masks: near the dense network after a few epochs."""
    data = weft.data.load("digits")
    x, y = data.x_train.flatten(1), data.y_train
    scores = []
    for sparse in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        if sparse:
            weft.convert_(model, SparseLinear.options(density=0.1, mask="random"), where="0")
        adam = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(200):
            index = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
            adam.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            adam.step()
            if sparse and step % 40 == 39 and step < 150:
                with dense_gradients(model) as found:
                    F.cross_entropy(model(x[index]), y[index]).backward()
                layer = model[0]
                fraction = masks.cosine_fraction(step, 150)
                layer.set_mask_(masks.rigl_mask(layer.weight, layer.mask, found[layer], fraction), adam)
        with torch.no_grad():
            scores.append(float((model(data.x_test.flatten(1)).argmax(1) == data.y_test).float().mean()))
    assert scores[1] > scores[0] - 0.03 and scores[1] > 0.9
