"""Products by rows that are not skipped are those of the reference, whatever the shapes, dtypes and threads."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from weft.errors import Unsupported, UsageError
from weft.kernels import row_skipping
from weft.kernels.row_skipping import (
    skip_rows,
    skip_rows_reference,
    wanted_rows,
    wanted_rows_reference,
    worth_skipping,
)
from weft.ops.thresholded import ThresholdedGate, ThresholdedLinear, centres, gated, quantile_threshold
from weft.testing.gated import Gated

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(tokens, inputs, width, zeros=0.5, dtype=torch.float32, seed=0):
    """x ``[N, H]`` with zeros, a weight ``[H, D]``, biases for both ways, thresholds."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=draw)
    x = x * (torch.rand(tokens, inputs, generator=draw) >= zeros)
    weight, bias, other = (torch.randn(*s, generator=draw) for s in ((inputs, width), (width,), (inputs,)))
    threshold = torch.rand(inputs, generator=draw)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), other.to(dtype), threshold.to(dtype)


def close(found, wanted, dtype):
    assert found.dtype == wanted.dtype == dtype and found.shape == wanted.shape
    if found.numel():
        scale = max(1e-30, float(wanted.double().abs().max()))
        assert float((found.double() - wanted.double()).abs().max()) <= TOLERANCE[dtype] * scale


def exact_skip(x, weight, bias, threshold):
    kept = x.double() if threshold is None else x.double() * (x.abs() >= threshold)
    out = kept @ weight.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)


def exact_wanted(x, gate, weight, bias, threshold):
    kept = gate.double() if threshold is None else gate.double() * (gate.abs() >= threshold)
    out = x.double() @ weight.double().T
    return (kept * (out if bias is None else out + bias.double())).to(x.dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 5), st.integers(0, 70), st.integers(0, 70), st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from(DTYPES), st.sampled_from(["no", "one", "each"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_products_are_the_exact_ones(tokens, inputs, width, zeros, dtype, thresholds, biased, seed):
    x, weight, bias, other, threshold = case(tokens, inputs, width, zeros, dtype, seed)
    given_threshold = {"no": None, "one": torch.full((1,), 0.4, dtype=dtype), "each": threshold}[thresholds]
    by_out, by_in = (bias, other) if biased else (None, None)
    close(skip_rows(x, weight, by_out, given_threshold), exact_skip(x, weight, by_out, given_threshold), dtype)
    close(
        skip_rows_reference(x, weight, by_out, given_threshold), exact_skip(x, weight, by_out, given_threshold), dtype
    )
    rows = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wanted = exact_wanted(rows, x, weight, by_in, given_threshold)
    close(wanted_rows(rows, x, weight, by_in, given_threshold), wanted, dtype)
    close(wanted_rows_reference(rows, x, weight, by_in, given_threshold), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_large_weights_and_two_threads_give_the_same(threads, dtype, tokens):
    x, weight, bias, other, threshold = case(tokens, 1100, 1037, 0.6, dtype)
    rows = torch.randn(tokens, 1037).to(dtype)
    found = []
    for count in (1, 2):
        threads(count)
        found.append((skip_rows(x, weight, bias, threshold), wanted_rows(rows, x, weight, other, threshold)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    close(found[0][0], exact_skip(x, weight, bias, threshold), dtype)
    close(found[0][1], exact_wanted(rows, x, weight, other, threshold), dtype)


def test_a_token_has_the_same_sums_alone_and_among_others():
    x, weight, bias, other, threshold = case(9, 300, 1200)
    rows = torch.randn(9, 1200)
    together, gates = skip_rows(x, weight, bias, threshold), wanted_rows(rows, x, weight, other, threshold)
    for k in range(9):
        close(skip_rows(x[k], weight, bias, threshold), together[k], torch.float32)
        assert torch.equal(wanted_rows(rows[k], x[k], weight, other, threshold), gates[k])


def test_what_is_given_stays_as_it_is():
    given_tensors = case(1, 40, 30)
    before = [t.clone() for t in given_tensors]
    x, weight, bias, other, threshold = given_tensors
    skip_rows(x, weight, bias, threshold)
    wanted_rows(torch.randn(1, 30), x, weight, other, threshold)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


def test_leading_dimensions_and_strides():
    x, weight, bias, _, threshold = case(24, 50, 30)
    wanted = skip_rows(x, weight, bias, threshold)
    assert torch.equal(skip_rows(x.view(2, 3, 4, 50), weight, bias, threshold), wanted.view(2, 3, 4, 30))
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous() and torch.equal(skip_rows(strided, weight, bias, threshold), wanted)
    assert torch.equal(skip_rows(x, weight.t().contiguous().t(), bias, threshold), wanted)
    assert skip_rows(x[:0], weight).shape == (0, 30)


def test_nan_and_inf_are_not_skipped():
    x, weight, _, _, threshold = case(1, 8, 4)
    x[0, 3] = torch.nan
    assert skip_rows(x, weight, None, threshold).isnan().all()
    x[0, 3] = torch.inf
    assert not torch.isfinite(skip_rows(x, weight, None, threshold)).any()
    weight[0], x[0, 0], x[0, 3] = torch.nan, 0.0, 0.0
    for some in (threshold, torch.zeros(1), None):
        assert torch.isfinite(skip_rows(x, weight, None, some)).all(), "a row whose input is zero is read"


@pytest.mark.parametrize("tokens", [1, 3])
def test_derivatives(tokens):
    x, weight, bias, other, threshold = (t.double() for t in case(tokens, 7, 5, 0.3))
    threshold = threshold.where((x.abs() - threshold).abs().min(0).values > 1e-2, torch.zeros(()).double())
    rows = torch.randn(tokens, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    check = {"check_forward_ad": True, "check_batched_grad": False}
    assert torch.autograd.gradcheck(lambda a, w, b: skip_rows(a, w, b, threshold), leaves, **check)
    assert torch.autograd.gradgradcheck(lambda a, w, b: skip_rows(a, w, b, threshold), leaves)
    more = [t.detach().clone().requires_grad_() for t in (rows, x + 2, weight, other)]
    assert torch.autograd.gradcheck(lambda a, g, w, b: wanted_rows(a, g, w, b, threshold), more, **check)
    assert torch.autograd.gradgradcheck(lambda a, g, w, b: wanted_rows(a, g, w, b, threshold), more)


def test_forward_mode_is_seen_without_gradients():
    x, weight, bias, other, threshold = case(2, 30, 20)
    with torch.no_grad(), forward_ad.dual_level():
        moved = torch.randn_like(x)
        out = forward_ad.unpack_dual(skip_rows(forward_ad.make_dual(x, moved), weight, bias, threshold))
        close(out.tangent, (moved * (x.abs() >= threshold)) @ weight, torch.float32)
        rows = forward_ad.make_dual(torch.randn(2, 20), torch.randn(2, 20))
        assert forward_ad.unpack_dual(wanted_rows(rows, x, weight, other, threshold)).tangent is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: skip_rows(torch.randn(2, 3), torch.randn(4, 5)),
        lambda: skip_rows(torch.randn(2, 3), torch.randn(3, 5).double()),
        lambda: skip_rows(torch.ones(2, 3).int(), torch.ones(3, 5).int()),
        lambda: skip_rows(torch.randn(2, 3), torch.randn(3)),
        lambda: skip_rows(torch.randn(2, 3), torch.randn(3, 5), torch.randn(4)),
        lambda: skip_rows(torch.randn(2, 3), torch.randn(3, 5), None, torch.rand(2)),
        lambda: skip_rows(torch.randn(()), torch.randn(3, 5)),
        lambda: wanted_rows(torch.randn(2, 4), torch.randn(2, 3), torch.randn(3, 5)),
        lambda: wanted_rows(torch.randn(1, 5), torch.randn(2, 3), torch.randn(3, 5)),
        lambda: wanted_rows(torch.randn(2, 5).double(), torch.randn(2, 3), torch.randn(3, 5)),
        lambda: wanted_rows(torch.randn(2, 5), torch.randn(2, 3), torch.randn(3, 5), torch.randn(5)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(UsageError, match="give"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_the_checks_of_torch(dtype):
    x, weight, bias, other, threshold = case(2, 20, 12, 0.5, dtype)
    rows = torch.randn(2, 12).to(dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(row_skipping._skip, (x, weight, bias, threshold), test_utils=tests)
    torch.library.opcheck(row_skipping._want, (rows, x, weight, None, None), test_utils=tests)
    torch.library.opcheck(row_skipping._want, (rows, x, weight, other, threshold), test_utils=tests)


def layers(always=True, dtype=torch.float32):
    """The three layers with thresholds, each with an input of one token and the dense one."""
    torch.manual_seed(0)
    dense, gate = nn.Linear(40, 24).to(dtype), Gated(24, 40).to(dtype)
    found = [
        (ThresholdedLinear(dense, threshold=torch.rand(40)), torch.randn(1, 40)),
        (ThresholdedLinear(copy.deepcopy(dense), threshold=torch.rand(1), centre=torch.randn(40)), torch.randn(1, 40)),
        (ThresholdedGate(gate, threshold=torch.rand(40) / 4), torch.randn(1, 24)),
    ]
    for layer, _ in found:
        layer.always = always
    return [(layer, x.to(dtype)) for layer, x in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_skip_where_they_can_and_give_the_dense_outputs(dtype, monkeypatch):
    import weft.ops.thresholded as module

    calls = []
    monkeypatch.setattr(module, "skip_rows", lambda *given: calls.append(1) or skip_rows(*given))
    for layer, x in layers(dtype=dtype):
        with torch.no_grad():
            found, before = layer(x), len(calls)
            layer.always = False
            wanted = layer(x)
        assert before and len(calls) == before
        close(found, wanted, dtype)
        calls.clear()


@pytest.mark.parametrize("kind", range(3))
def test_layers_compile_and_export(kind):
    layer, x = layers()[kind]
    with torch.no_grad():
        wanted = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        close(compiled(x), wanted, torch.float32)
        close(torch.export.export(layer, (x,)).module()(x), wanted, torch.float32)


def test_layers_train():
    for layer, x in layers():
        many = x.expand(3, -1).clone().requires_grad_()
        grads = []
        for always in (True, False):
            layer.always = always
            grads.append(torch.autograd.grad(layer(many).square().sum(), [many, *layer.parameters()]))
        for a, b in zip(*grads, strict=True):
            close(a, b, torch.float32)


def fused_step(layer):
    optimizer = torch.optim.Adam(layer.parameters(), 0.1, fused=True)
    with torch.enable_grad():
        layer(torch.randn(4, 40)).sum().backward()
    optimizer.step()


def in_place_before_eval(layer):
    layer.weight.data.mul_(2)
    layer.eval()


def doubled(layer):
    return {key: t.clone() * (2 if key == "weight" else 1) for key, t in layer.state_dict().items()}


CHANGES = {
    "weight": lambda layer: layer.weight.mul_(2),
    "bias": lambda layer: layer.bias.add_(2),
    "centre": lambda layer: layer.centre.mul_(2),
    "fused step": fused_step,
    "other memory": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "other parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.detach())),
    "loaded": lambda layer: layer.load_state_dict(doubled(layer)),
    "assigned": lambda layer: layer.load_state_dict(doubled(layer), assign=True),
    "in place before eval": in_place_before_eval,
}


def check_change(layer, x, change):
    first = layer(x)
    change(layer)
    found = layer(x)
    kept = torch.where((x - layer.centre).abs() < layer.threshold, layer.centre, x)
    close(found, nn.functional.linear(kept, layer.weight, layer.bias), torch.float32)
    assert not torch.allclose(found, first)


@pytest.mark.parametrize("name", CHANGES)
def test_a_centred_layer_sees_that_its_weights_have_changed(name):
    layer, x = layers()[1]
    with torch.no_grad():
        check_change(layer, x, CHANGES[name])


def test_a_copy_of_a_centred_layer_sees_it_too():
    """Copies count changes from zero on: as many of them as in the first layer are no sign of the same weights."""
    layer, x = layers()[1]
    with torch.no_grad():
        layer.load_state_dict(layer.state_dict())
        layer(x)
        check_change(copy.deepcopy(layer), x, lambda one: one.load_state_dict(doubled(one)))
        check_change(pickle.loads(pickle.dumps(layer)), x, lambda one: one.load_state_dict(doubled(one)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
def test_a_centred_layer_made_in_inference_mode_or_compiled_sees_it():
    with torch.inference_mode():
        check_change(*layers()[1], CHANGES["weight"])
    layer, x = layers()[1]
    with torch.no_grad():
        layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(x)
        layer.weight.mul_(2)
        close(compiled(x), layer(x), torch.float32)


def test_frozen_weights_are_skipped_while_inputs_are_differentiated(monkeypatch):
    import weft.ops.thresholded as module

    calls = []
    monkeypatch.setattr(module, "skip_rows", lambda *given: calls.append(1) or skip_rows(*given))
    layer, x = layers()[1]
    layer.requires_grad_(False)
    grads = []
    for layer.always in (True, False):
        grads.append(torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0])
    assert len(calls) == 1
    close(*grads, torch.float32)


def test_layers_under_autocast_have_the_dtype_of_ordinary_ones():
    for layer, x in layers():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_layout_comes_and_goes():
    dense = nn.Linear(12, 7)
    before = dense.weight
    layer = ThresholdedLinear(dense, threshold=torch.rand(12))
    assert layer.weight is before and layer.weight.t().is_contiguous()
    assert copy.deepcopy(layer).weight.t().is_contiguous()
    layer.to_dense()
    assert dense.weight is before and before.is_contiguous()
    assert not layer.skips(torch.randn(1, 12))


def test_layers_refuse_what_is_not_theirs():
    with pytest.raises(Unsupported):
        ThresholdedLinear(nn.Conv1d(3, 3, 1), threshold=torch.rand(3))
    with pytest.raises(Unsupported):
        ThresholdedGate(nn.Linear(3, 3), threshold=torch.rand(3))
    for wrong in ({"threshold": torch.rand(4)}, {"threshold": torch.rand(3), "zeros": 2.0}):
        with pytest.raises(UsageError):
            ThresholdedLinear(nn.Linear(3, 3), **wrong)
    with pytest.raises(UsageError):
        ThresholdedLinear(nn.Linear(3, 3), threshold=torch.rand(3), centre=torch.rand(2))
    assert gated(Gated(3, 4)) and not gated(nn.Linear(3, 3))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.floats(0, 0.999), st.integers(0, 99))
def test_as_many_scores_are_below_a_quantile_as_asked_for(n, sparsity, seed):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).double() + 1
    assert int((scores < quantile_threshold(scores, sparsity)).sum()) == int(sparsity * n)


def test_centres_of_constant_activations_are_the_constants():
    assert torch.equal(centres(torch.tensor([[1.0, 2.0]]).repeat(5, 1), torch.ones(2), 0.5), torch.tensor([1.0, 2.0]))


def test_centres_weigh_channels_by_their_sizes():
    a = torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 40.0]])
    assert torch.equal(centres(a, torch.tensor([1000.0, 1.0]), 0.5), torch.tensor([1.0, 5.0]))


def test_when_skipping_pays():
    large = 1 << 24
    assert worth_skipping(1, 0.5, large) and worth_skipping(8, 0.5, large) and worth_skipping(1000, 0.8, large)
    assert not worth_skipping(1, 0.1, large) and not worth_skipping(64, 0.5, large)
    assert not worth_skipping(64, 0.8, large, torch.bfloat16) and not worth_skipping(1, 0.9, 1000)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_weight_without_rows_or_columns(tokens):
    x, bias = torch.zeros(tokens, 0), torch.randn(5)
    assert torch.equal(skip_rows(x, torch.zeros(0, 5), bias), bias.expand(tokens, -1))
    gate = torch.ones(tokens, 5)
    assert torch.equal(wanted_rows(x, gate, torch.zeros(5, 0), bias), bias.expand(tokens, -1))
    assert wanted_rows(x, x, torch.zeros(0, 0)).shape == (tokens, 0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_of_no_account(default):
    x, weight, bias, other, threshold = case(3, 40, 30)
    rows = torch.randn(3, 30)
    torch.set_default_dtype(default)
    try:
        found = skip_rows(x, weight, bias, threshold), wanted_rows(rows, x, weight, other, threshold)
    finally:
        torch.set_default_dtype(torch.float32)
    close(found[0], exact_skip(x, weight, bias, threshold), torch.float32)
    close(found[1], exact_wanted(rows, x, weight, other, threshold), torch.float32)


def test_biases_and_thresholds_of_other_dtypes_and_strides():
    x, weight, bias, other, threshold = case(3, 40, 30)
    rows = torch.randn(3, 30)
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, lambda t: torch.stack([t, -t], 1)[:, 0]):
        b, o, t = change(bias), change(other), change(threshold)
        close(skip_rows(x, weight, b, t), exact_skip(x, weight, b, t), torch.float32)
        close(wanted_rows(rows, x, weight, o, t), exact_wanted(rows, x, weight, o, t), torch.float32)
    one = torch.full((1,), 0.4).expand(40)
    close(skip_rows(x, weight, bias[:1].expand(30), one), exact_skip(x, weight, bias[:1], one), torch.float32)
    turned = torch.randn(30, 40).t()
    close(wanted_rows(rows, x, turned, other, one), exact_wanted(rows, x, turned, other, one), torch.float32)
