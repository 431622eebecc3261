"""SaRA beyond its contract: convolutions, selection, steps of every kind, states, compilers, learning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft.errors import Unsupported, UsageError
from weft.ops.nuclear_norm import nuclear_gradient
from weft.sparsity import SaRA


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(20, 15)


@pytest.mark.parametrize(
    "kind", [{"padding": 1}, {"padding_mode": "circular", "padding": 1}, {"groups": 2}, {"bias": False}]
)
def test_convolutions(kind):
    torch.manual_seed(0)
    given, x = nn.Conv2d(4, 6, 3, **kind), torch.randn(2, 4, 8, 8)
    wanted = given(x).detach()
    made = SaRA.from_dense(given, fraction=0.2)
    assert torch.equal(made(x), wanted) and len(made.compact) == round(0.2 * given.weight.numel())
    made(x).square().sum().backward()
    assert made.compact.grad is not None and given.weight.grad is None
    channels_last = copy.deepcopy(made).to(memory_format=torch.channels_last)
    assert torch.allclose(channels_last(x), wanted, atol=1e-5)
    with torch.no_grad():
        channels_last.compact.add_(1.0)
        made.compact.add_(1.0)
    assert torch.allclose(channels_last(x), made(x), atol=1e-4) and not torch.allclose(made(x), wanted)


def test_selection():
    layer = linear()
    small = layer.weight.detach().abs().flatten().sort().values
    assert torch.equal(SaRA(linear(), fraction=0.1).compact.detach().abs().sort().values, small[:30])
    made = SaRA(layer, threshold=float(small[44]))
    assert len(made.compact) == 45 and made.compact.abs().max().item() <= made.threshold.item()
    for options in ({"fraction": 0.0}, {"fraction": 1.1}, {"threshold": 0.0}):
        with pytest.raises(UsageError):
            SaRA(linear(), **options)
    for other in (nn.Identity(), nn.Conv1d(2, 2, 3), torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))):
        with pytest.raises(Unsupported):
            SaRA(other)


@pytest.mark.parametrize("how", ["plain", "fused", "data"])
def test_steps_of_every_kind_are_written(how):
    layer, x = linear(), torch.randn(7, 20)
    made = SaRA(layer, fraction=0.3)
    optimizer = torch.optim.Adam([made.compact], lr=0.1, fused=how == "fused")
    for _ in range(3):
        optimizer.zero_grad()
        made(x).square().mean().backward()
        if how == "data":
            made.compact.data -= 0.1 * made.compact.grad
        else:
            optimizer.step()
        weight = layer.weight.detach().clone().put_(made.index, made.compact.detach())
        assert torch.equal(made(x), F.linear(x, weight, layer.bias))


def test_passes_may_share_a_weight_and_a_step_between_is_noticed():
    made, x = SaRA(linear()), torch.randn(7, 20, requires_grad=True)
    (made(x).sum() + made(2 * x).sum()).backward()
    out = made(x).sum()
    with torch.no_grad():
        made.compact.add_(1.0)
    made(x)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.backward()


def test_restored_layers_have_the_steps_and_train_again():
    net = nn.Sequential(linear(), nn.ReLU(), nn.Conv2d(1, 1, 1))
    net[0].bias.requires_grad_(False)
    assert weft.convert_(net, SaRA.options(fraction=0.5)) == ["0", "2"]
    assert [p.requires_grad for p in net[0].parameters()] == [False, False, True]
    with torch.no_grad():
        net[0].compact.fill_(3.0)
    state = net.state_dict()
    assert int((state["0.weight"] == 3.0).sum()) == 150
    weft.restore_(net)
    assert int((net[0].weight == 3.0).sum()) == 150
    assert net[0].weight.requires_grad and not net[0].bias.requires_grad and net[2].bias.requires_grad


def test_a_weight_has_one_trainer():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    with pytest.raises(Unsupported, match="another SaRA trains the same weight"):
        weft.convert_(net, SaRA.options(fraction=0.3))
    assert type(net[0]) is nn.Linear and all(p.requires_grad for p in net.parameters())
    assert weft.convert_(net, SaRA.options(fraction=0.3), where="0") == ["0"]
    weft.restore_(net)
    assert weft.convert_(net, SaRA.options(fraction=0.3), where="2") == ["2"]


def test_frozen_layers_stay_frozen():
    layer = linear().requires_grad_(False)
    made = SaRA(layer, fraction=0.5)
    made.reselect()
    assert not any(p.requires_grad for p in made.parameters())
    made.to_dense()
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_loaded_layer_goes_on_with_the_same_threshold():
    made, other = SaRA(linear(), fraction=0.5), SaRA(linear(1), fraction=0.1)
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        other.compact[::2] = 1.01 * made.threshold
    assert other.reselect() == len(made.compact) // 2


def test_reselection_may_let_go_of_all():
    made, x = SaRA(linear()), torch.randn(3, 20)
    with torch.no_grad():
        made.compact.fill_(9.0)
    wanted = made(x).detach()
    assert made.reselect() == 0
    made(x).sum().backward()
    assert torch.equal(made(x), wanted) and made.compact.shape == (0,)
    assert torch.equal(copy.deepcopy(made)(x), wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself
def test_compiled_and_exported():
    made, x = SaRA(linear(), fraction=0.3), torch.randn(7, 20)
    with torch.no_grad():
        made.compact.add_(1.0)
    plain = torch.autograd.grad(made(x).square().sum(), made.compact)[0]
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.allclose(torch.autograd.grad(compiled(x).square().sum(), made.compact)[0], plain, atol=1e-4)
    program = torch.export.export(made, (x,))
    assert torch.allclose(program.module()(x), made(x), atol=1e-5)


def test_second_derivatives():
    made = SaRA(linear().double(), fraction=0.2)
    x = torch.randn(4, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: made(x).tanh(), (x,))


def test_the_penalty_lowers_the_rank():
    """With it alone, the trained weights' singular values fall; nothing but what is selected moves."""
    layer, x = linear(), torch.randn(5, 20)
    start = layer.weight.detach().clone()
    made = SaRA(layer, fraction=0.5, nuclear=0.1)
    optimizer = torch.optim.SGD([made.compact], lr=0.02)
    norms = []
    for _ in range(30):
        optimizer.zero_grad()
        (0 * made(x).sum()).backward()
        optimizer.step()
        norms.append(
            float(torch.linalg.matrix_norm(torch.zeros(15, 20).put_(made.index, made.compact.detach()), "nuc"))
        )
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.8 * norms[0]
    made.to_dense()
    assert int((layer.weight != start).sum()) <= 150


def test_the_norm_of_a_singular_matrix_has_its_smallest_gradient():
    """Of the subgradients, the one without a part outside of the singular vectors that belong to the matrix."""
    found = nuclear_gradient(torch.tensor([3.0, 0, 0, 0, 0, 0]), torch.arange(6), torch.Size([2, 3]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0, 0, 0, 0]))


def test_it_fine_tunes_digits():
    """A network trained on half of the classes learns the others by a fifth of its weights."""
    data = weft.data.load("digits")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = data.x_train, data.y_train

    def train(rows):
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        return float((net(data.x_validation).argmax(1) == data.y_validation).float().mean())

    before = train(y < 5)
    weft.convert_(net, SaRA.options(fraction=0.2))
    assert train(y >= 0) > max(0.85, before + 0.2)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == round(0.2 * 64 * 64) + round(0.2 * 640)
