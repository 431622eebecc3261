"""Binary convolutions as users have them: of every shape, packed, compiled, exported, saved, trained."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import weft
from weft.errors import Unsupported, UsageError
from weft.precision.binary_connect_conv2d import BinaryConnectConv2d
from weft.precision.binary_conv2d import BinaryConv2d
from weft.precision.binary_linear import BinaryLinear

HOW = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": (2, 4), "padding": "same", "bias": False},
    {"kernel_size": 2, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "groups": 2},
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


def dense(channels=8, outputs=12, seed=0, **how):
    layer, draw = nn.Conv2d(channels, outputs, **(how or HOW[0])), torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        nn.init.normal_(p, generator=draw)
    return layer


def images(*shape, seed=3):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.masked_fill(x.abs() < 0.1, 0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("binary_inputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_eval_mode_and_packed_bits_are_training_mode_without_gradients(how, binary_inputs, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for channels, outputs in ((8, 12), (66, 6)):
        layer = BinaryConv2d.from_dense(dense(channels, outputs, **how).to(dtype), binary_inputs=binary_inputs)
        for shape in ((3, channels, 9, 7), (channels, 6, 8), (0, channels, 5, 5), (1, channels, 5, 5)):
            x = images(*shape).to(dtype)
            wanted = layer.train()(x).detach()
            packed = copy.deepcopy(layer).pack_()
            for one in (layer.eval(), packed):
                for mode in (torch.no_grad, torch.inference_mode):
                    with mode():
                        found = one(x)
                    assert found.dtype == dtype and found.shape == wanted.shape and found.is_contiguous()
                    size = float(wanted.abs().max()) if wanted.numel() else 1.0
                    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * size)


def test_filters_of_one_pixel_are_a_linear_layer():
    conv, x = dense(70, 9, kernel_size=1), images(2, 70, 3, 4)
    linear = nn.Linear(70, 9)
    linear.weight, linear.bias = nn.Parameter(conv.weight[:, :, 0, 0].detach()), conv.bias
    with torch.no_grad():
        found = BinaryConv2d.from_dense(conv, binary_inputs=True).eval()(x)
        wanted = BinaryLinear.from_dense(linear, binary_inputs=True).eval()(x.movedim(1, -1))
    torch.testing.assert_close(found, wanted.movedim(-1, 1), rtol=1e-5, atol=1e-4)


def test_images_in_channels_last_give_such_images():
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=True).eval(), images(2, 8, 6, 5)
    with torch.no_grad():
        found = layer(x.to(memory_format=torch.channels_last))
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, layer(x))
        torch.testing.assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), layer(x))


@pytest.mark.parametrize("binary_inputs", [False, True])
def test_states_copies_and_what_was_packed(binary_inputs):
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=binary_inputs), images(2, 8, 6, 5)
    wanted = layer(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(layer.eval())(x), wanted, rtol=1e-5, atol=1e-3)
        layer.weight.neg_()
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).train()(x), rtol=1e-5, atol=1e-3)
        layer.weight.neg_()
    assert layer.pack_() is layer and "packed" in repr(layer)
    state, file = layer.state_dict(), io.BytesIO()
    assert set(state) == {"packed", "scale", "bias"} and state["packed"].nbytes == 12 * 9
    torch.save(state, file)
    file.seek(0)
    other = BinaryConv2d.from_dense(dense(seed=9), binary_inputs=binary_inputs).pack_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-3)
    with pytest.raises(Unsupported, match="pack_"):
        layer(x.requires_grad_())


@pytest.mark.parametrize("binary_inputs", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compile_and_export(binary_inputs, packed):
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=binary_inputs).eval(), images(2, 8, 6, 5)
    if packed:
        layer.pack_()
    with torch.no_grad():
        wanted = layer(x)
        made = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted, rtol=1e-5, atol=1e-3)
    if not packed:
        torch.testing.assert_close(torch.vmap(layer)(x), wanted, rtol=1e-5, atol=1e-3)


def test_autocast():
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=True), images(2, 8, 6, 5)
    plain = layer(x).detach()
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))


def test_what_is_kept_for_the_padding_is_exact_under_autocast_and_for_later_calls():
    conv, x = dense(513, 8, kernel_size=3, padding=1), torch.ones(1, 513, 4, 4)
    with torch.no_grad():
        conv.weight.fill_(0.5)  # sums of 513 signs, which bfloat16 rounds
        layer = BinaryConv2d.from_dense(conv, binary_inputs=True)
        wanted = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer.eval()(x)
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("kind", [BinaryConv2d, BinaryLinear])
def test_bits_are_made_anew_where_what_pack_has_left_changes(kind):
    def packed(seed):
        given = dense(8, 12, seed, kernel_size=1, bias=False)
        if kind is BinaryLinear:
            linear = nn.Linear(8, 12, bias=False)
            linear.weight = nn.Parameter(given.weight[:, :, 0, 0].detach())
            given = linear
        return kind.from_dense(given, binary_inputs=True).pack_()

    layer, x = packed(0), images(2, 8, 3, 8)
    with torch.no_grad():
        for assign in (False, True):
            before, other = layer(x), packed(1 + assign)
            layer.load_state_dict(other.state_dict(), assign=assign)
            assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
        layer.to(torch.bfloat16)  # rounds the scales
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    with torch.inference_mode():
        layer = packed(0)
    assert not any(t.is_inference() for t in (layer.packed, layer.scale))


@pytest.mark.parametrize("binary_inputs", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_without_numbers(binary_inputs, packed):
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=binary_inputs), images(2, 8, 6, 5)
    if packed:
        layer.pack_()
    for mode in (False,) if packed else (True, False):
        layer.train(mode)
        with torch.no_grad():
            wanted = layer(x)
            found = copy.deepcopy(layer).to("meta")(x.to("meta"))
            assert found.is_meta and found.shape == wanted.shape
            fresh = copy.deepcopy(layer)
            traced = make_fx(fresh, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
            torch.testing.assert_close(traced(x), wanted, rtol=1e-5, atol=1e-3)
            assert torch.equal(fresh(x), wanted)  # nothing of the mode stays


def test_infinite_inputs_give_what_training_mode_gives():
    conv, x = dense(), images(1, 8, 5, 5)
    x[0, 0, 0, 0], x[0, 0, 4, 4] = torch.inf, -torch.inf
    with torch.no_grad():
        conv.weight.copy_(torch.where(conv.weight > 0, 0.5, -0.5))  # sums that are 0 are so exactly
        layer = BinaryConv2d.from_dense(conv, binary_inputs=True)
        torch.testing.assert_close(layer.eval()(x), layer.train()(x), equal_nan=True, rtol=1e-5, atol=1e-3)


def test_what_does_not_fit_is_refused():
    layer = BinaryConv2d.from_dense(dense(), binary_inputs=True).eval()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with torch.no_grad(), pytest.raises(UsageError, match="dtype"):
            layer(torch.ones(1, 8, 5, 5, dtype=dtype))
    with pytest.raises(Unsupported, match=r"nn\.Conv2d"):
        BinaryConv2d.from_dense(nn.Linear(2, 2))
    for binary_inputs in (False, True):
        layer = BinaryConv2d.from_dense(dense(), binary_inputs=binary_inputs)
        for mode in (True, False):
            layer.train(mode)
            for x in (images(2, 7, 6, 5), images(8, 6), images(1, 2, 8, 6, 5)):
                with torch.no_grad(), pytest.raises(UsageError, match="8"):
                    layer(x)
            with torch.no_grad(), pytest.raises(UsageError, match="smaller than"):
                layer(images(2, 8, 0, 5))


def test_a_converted_network_learns():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    assert weft.convert_(model, BinaryConv2d.options(binary_inputs=True), where="2") == ["2"]
    data = weft.data.load("digits")
    x, y = data.x_train.reshape(-1, 1, 8, 8), data.y_train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = slice(step * 64 % 1000, step * 64 % 1000 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        test = data.x_test.reshape(-1, 1, 8, 8)
        assert (model.eval()(test).argmax(1) == data.y_test).float().mean() > 0.8
        before = model(test)
        model[2].pack_()
        torch.testing.assert_close(model(test), before)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own layer
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_connected_filters(how, dtype):
    conv, x = dense(**how).to(dtype), images(2, 8, 7, 6).to(dtype)
    made, same = BinaryConnectConv2d.from_dense(conv), copy.deepcopy(conv)
    assert made.factor == pytest.approx((1.5 / (conv.weight[0, 0].numel() * sum(conv.weight.shape[:2]))) ** 0.5)
    with torch.no_grad():
        same.weight.copy_(torch.where(conv.weight >= 0, made.factor, -made.factor))
        wanted = same(x)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(made(x), wanted, **tolerance)
        for layer in (made.eval(), copy.deepcopy(made).pack_()):
            torch.testing.assert_close(layer(x), wanted, **tolerance)
            torch.testing.assert_close(layer(x[0]), wanted[0], **tolerance)
        exported = torch.export.export(made, (x,)).module()
        torch.testing.assert_close(exported(x), wanted, **tolerance)
    assert made.weight is conv.weight and conv.weight.abs().max() <= 1


def test_drawn_filters_repeat_with_the_state():
    layer, x = BinaryConnectConv2d.from_dense(dense(), stochastic=True, seed=5), images(2, 8, 6, 5)
    state = copy.deepcopy(layer.state_dict())
    first, second = layer(x), layer(x)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    layer.load_state_dict(state)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), first)
    with pytest.raises(Unsupported, match="stochastic=False"):
        layer.pack_()
    with pytest.raises(UsageError, match="scale"):
        BinaryConnectConv2d.from_dense(dense(), scale=0.0)
    with pytest.raises(UsageError, match="8"):
        layer(x[:, :7])


def test_frozen_convolutions():
    layer, x = BinaryConv2d.from_dense(dense(), binary_inputs=True).eval(), images(2, 8, 6, 5)
    with torch.no_grad():
        wanted = layer(x)
        frozen = layer.frozen()
        layer.weight.zero_()
        torch.testing.assert_close(frozen(x), wanted)
        torch.testing.assert_close(frozen(x[0]), wanted[0])
        with pytest.raises(UsageError, match="8"):
            frozen(x[:, :7])
    for other in (BinaryConv2d.from_dense(dense()), BinaryConnectConv2d.from_dense(dense())):
        with pytest.raises(Unsupported, match="bits"):
            other.frozen()
