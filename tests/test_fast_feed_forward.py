"""Trees of feed-forward layers beyond their contract: what eval mode does, conversion, compilers, learning."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

import weft
from weft.errors import Unsupported, UsageError
from weft.ffn import FastFeedForward, MasterLeafFeedForward
from weft.kernels.tree import leaves_of
from weft.ops.tree import leaf_outputs

KINDS = [FastFeedForward, MasterLeafFeedForward]


def layer(kind=FastFeedForward, **options):
    return kind(12, 7, **{"depth": 3, "leaf_width": 5, "seed": 3, **options})


def dense(features=12, hidden=40, out=7, act=None, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, hidden, bias), act or nn.GELU(), nn.Linear(hidden, out, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Identity(), nn.Tanh(), nn.ELU()])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_of_inference_agrees(kind, act, bias):
    made, x = layer(kind, activation=act, bias=bias).eval(), torch.randn(4, 9, 12)
    with torch.inference_mode():
        direct = made(x)
    by_operator = made.requires_grad_(False)(x)
    trained = made.requires_grad_(True)(x)
    assert direct.shape == (4, 9, 7) and trained.requires_grad
    assert torch.allclose(direct, by_operator, atol=1e-6) and torch.allclose(direct, trained, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(direct, copy.deepcopy(made).double()(x.double()).float(), atol=1e-5)
        rows = torch.cat([made(row[None]) for row in x.flatten(0, 1)])
    assert torch.allclose(rows, direct.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_eval_mode(kind):
    made = layer(kind, activation=nn.Tanh()).double().eval()
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    by = [p for name, p in made.named_parameters() if not name.startswith("node")]
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, *by))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_training_mode(kind):
    made = layer(kind, depth=2, leaf_width=2, hardening=0.0, balance=0.0, straight_through=False).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


def test_even_decisions_give_the_dense_layer():
    for bias in (True, False):
        given, x = dense(bias=bias), torch.randn(5, 12)
        for kind in KINDS:
            made = kind.from_dense(given, depth=3, straight_through=False)
            with torch.no_grad():
                made.node_weight.zero_()
                made.node_bias.zero_()
            assert torch.allclose(made(x), given(x), atol=1e-5)
            assert all(p.is_contiguous() for p in made.parameters())


@pytest.mark.parametrize("name", ["fast-feed-forward", "master-leaf"])
def test_the_published_training_has_a_name(name):
    """By the mixture, whatever its decisions; the loss has the paper's weights."""
    given = {"fast-feed-forward": (3.0, 0.0), "master-leaf": (1.0, 1.0)}[name]
    made = weft.create(f"soft-{name}", 12, 7, depth=3, leaf_width=5, dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64)
    z = x @ made.node_weight.T + made.node_bias
    c, m = z.sigmoid(), torch.ones(9, 1, dtype=torch.float64)
    for level in c.split([1, 2, 4], 1):
        m = torch.stack([m * (1 - level), m * level], 2).flatten(1)
    hidden = F.gelu(torch.einsum("nd,lwd->nlw", x, made.up_weight) + made.up_bias)
    y = torch.einsum("nl,nlo->no", m, torch.einsum("nlw,lwo->nlo", hidden, made.down_weight) + made.down_bias)
    if name == "master-leaf":
        k = made.kappa.sigmoid()
        y = k * y + (1 - k) * made.master(x)
    assert torch.allclose(made(x), y)
    entropy = -(c * c.log() + (1 - c) * (1 - c).log()).mean()
    taken = F.one_hot(leaves_of(x, made.node_weight, made.node_bias), 8).double()
    loss = y.square().sum() + given[0] * entropy + given[1] * 8 * (taken.mean(0) * m.mean(0)).sum()
    nodes = made.node_weight, made.node_bias
    wanted, found = torch.autograd.grad(loss, nodes), torch.autograd.grad(made(x).square().sum(), nodes)
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
    ours = weft.create(name, 12, 7, depth=3, leaf_width=5, dtype=torch.float64)
    assert not torch.allclose(ours(x), y) and torch.allclose(ours(x), ours.eval()(x))
    assert torch.equal(ours(x), made.eval()(x))


def test_what_cannot_be_converted():
    for given, options, error in (
        (dense(hidden=41), {"depth": 3}, UsageError),
        (dense(), {"depth": 0}, UsageError),
        (dense(), {"depth": 6}, UsageError),
        (dense(act=nn.ReLU(inplace=True)), {}, Unsupported),
        (dense(act=nn.Softmax(-1)), {}, Unsupported),
        (nn.Linear(3, 4), {}, Unsupported),
    ):
        with pytest.raises(error):
            FastFeedForward.from_dense(given, **options)
    with pytest.raises(UsageError):
        FastFeedForward(3, 4, depth=1, leaf_width=0)
    with pytest.raises(UsageError):
        MasterLeafFeedForward(3, 4, depth=1, leaf_width=2, master_width=0)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_states_are_their_own(kind):
    made, x = layer(kind).eval(), torch.randn(3, 12)
    with torch.inference_mode():
        before = made(x)
        copied = copy.deepcopy(made)
        file = io.BytesIO()
        torch.save(made.state_dict(), file)
        for p in made.parameters():
            p.mul_(0.5)
        assert torch.equal(copied(x), before) and not torch.equal(made(x), before)
        file.seek(0)
        made.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(made(x), before)
        other = layer(kind, seed=9).eval()
        other.load_state_dict(made.state_dict(), assign=True)
        assert torch.equal(other(x), before)
        whole = io.BytesIO()
        torch.save(made, whole)
        whole.seek(0)
        assert torch.equal(torch.load(whole, weights_only=False)(x), before)
        assert torch.equal(made.double().float()(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_and_exported(kind, training):
    made, x = layer(kind).train(training), torch.randn(6, 12)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
            assert torch.allclose(found, made(x), atol=1e-5)
    with torch.no_grad():
        program = torch.export.export(made, (x,))
        assert torch.allclose(program.module()(x), made(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_an_empty_batch_in_eval_mode(kind):
    made, given = layer(kind).eval(), dense().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = torch.randn(5, 12)
        assert made(x).dtype == given(x).dtype == torch.bfloat16
        low = made(x).float()
    with torch.no_grad():
        assert torch.allclose(low, made(x), atol=0.02)
        assert made(torch.randn(0, 3, 12)).shape == (0, 3, 7) and made(torch.randn(12)).shape == (7,)
    assert made(torch.randn(0, 12, requires_grad=True)).shape == (0, 7)
    for wrong in (torch.randn(3, 11), torch.randn(3, 12).double()):
        with torch.no_grad(), pytest.raises((UsageError, RuntimeError)):
            made(wrong)


def test_pruned_weights_are_seen():
    from torch.nn.utils import prune

    made, x = layer().eval(), torch.randn(3, 12)
    with torch.inference_mode():
        made(x)
    prune.random_unstructured(made, "up_weight", 0.5)
    with torch.no_grad():
        leaf = made.one_leaf(x)
        assert torch.equal(made(x), leaf)
        prune.remove(made, "up_weight")
        assert torch.allclose(made(x), leaf, atol=1e-6)


def test_one_gradient_for_all_leaves():
    """Rows of one leaf are computed together; each weight's gradient is formed once."""
    up = torch.randn(8, 3, 4, requires_grad=True)
    down = torch.randn(8, 3, 2)
    x, leaf = torch.randn(50, 4), torch.randint(8, (50,))
    out = leaf_outputs(x, leaf, up, None, down, None, nn.ReLU())
    wanted = torch.einsum("nw,nwo->no", torch.einsum("nd,nwd->nw", x, up[leaf]).relu(), down[leaf])
    assert torch.allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_network_learns_digits(kind):
    data = weft.data.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    weft.convert_(net, kind.options(depth=2))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for epoch in range(12):
        for index in data.batches(64, seed=0, epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(data.x_train[index]), data.y_train[index]).backward()
            optimizer.step()
    with torch.inference_mode():
        right = net.eval()(data.x_validation).argmax(1) == data.y_validation
    assert right.float().mean() > 0.9


def test_a_frozen_layer():
    layer, x = FastFeedForward(20, 6, depth=3, leaf_width=4), torch.randn(7, 20)
    frozen = layer.frozen()
    with torch.no_grad():
        wanted = layer.eval()(x)
        layer.up_weight.neg_()
        assert torch.equal(frozen(x), wanted) and not torch.equal(layer(x), wanted)
    with pytest.raises(Unsupported, match="activation"):
        FastFeedForward(20, 6, activation=nn.Tanh()).frozen()
    with pytest.raises(Unsupported, match="master leaf"):
        MasterLeafFeedForward(20, 6).frozen()


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_in_eval_mode_with_weights_that_do_not_learn(kind):
    made = layer(kind, activation=nn.Tanh()).double().eval().requires_grad_(False)
    x, t = torch.randn(2, 5, 12, dtype=torch.float64)
    out, found = torch.func.jvp(made, (x,), (t,))
    assert torch.allclose(out, made(x)) and found.abs().max() > 0.01
    assert torch.allclose(found, (made(x + 1e-6 * t) - made(x - 1e-6 * t)) / 2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_outlast_no_grad(kind):
    """`torch.no_grad` is no barrier to forward mode: of the input, or of a weight."""
    made, (x, t) = layer(kind).eval(), torch.randn(2, 5, 12)
    name, weight = next((n, p) for n, p in made.named_parameters() if "down" in n)
    with torch.no_grad():
        made(x)  # what is fast is ready
        with dual_level():
            assert unpack_dual(made(make_dual(x, t))).tangent.abs().max() > 0.01
            moved = {name: make_dual(weight.detach(), torch.randn_like(weight))}
            assert unpack_dual(torch.func.functional_call(made, moved, x)).tangent.abs().max() > 0.01
    if kind is FastFeedForward:
        run = made.frozen()
        with torch.no_grad(), dual_level(), pytest.raises(UsageError, match="no derivative"):
            run(make_dual(x, t))
