"""Token-wise chains and routed blocks where their claims do not look: parameters of the moment, autocast, targets."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import weft
from weft.ops.memory_plan import fraction
from weft.tape import ModuLoRA, RoutedFeedForward, TokenWise, TwoStage
from weft.tape.token_wise import host_memory


def chain():
    torch.manual_seed(0)
    layers = [nn.Identity(), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Identity()]
    return nn.Sequential(*layers).double(), torch.randn(3, 8, 6).double().requires_grad_()


def gradients(run, leaves):
    return torch.autograd.grad(run().square().sum(), leaves)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_call_with_other_parameters_has_their_gradients(alpha):
    """The backward pass takes the parameters of the forward pass, not those that the layers have by then."""
    dense, x = chain()
    layer = TokenWise(dense, fraction=alpha)
    other = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
    plain = {name.removeprefix("layers."): p for name, p in other.items()}
    leaves = [x, *other.values()]
    found = gradients(lambda: torch.func.functional_call(layer, other, (x,)), leaves)
    torch.testing.assert_close(found, gradients(lambda: torch.func.functional_call(dense, plain, (x,)), leaves))


@pytest.mark.parametrize("frozen", [["1.weight"], ["2.weight", "4.bias"], ["1.bias", "2.bias"], ["4.weight"]])
def test_parameters_that_are_frozen(frozen):
    dense, x = chain()
    for name in frozen:
        dense.get_parameter(name).requires_grad_(False)
    leaves = [x, *(p for p in dense.parameters() if p.requires_grad)]
    torch.testing.assert_close(gradients(lambda: TokenWise(dense)(x), leaves), gradients(lambda: dense(x), leaves))


def test_rows_that_a_target_holds_are_dropped_by_the_backward_pass():
    dense, x = chain()
    held = []

    def target(rows):
        held.append(1)
        fetch = host_memory(rows)
        return lambda: held.pop() and fetch()

    layer, leaves = TokenWise(dense, target=target), [x, *dense.parameters()]
    loss, wanted = layer(x).square().sum(), gradients(lambda: dense(x), leaves)
    assert len(held) == 3
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), wanted)
    assert not held
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), wanted)
    assert layer.recomputed_tokens == 3 * (4 + 8)


@pytest.mark.parametrize("kind", [TokenWise, RoutedFeedForward, ModuLoRA])
def test_gradients_under_autocast_are_near_those_without(kind):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.Softplus(), nn.Linear(32, 16))
    layer, x = kind(dense[0] if kind is ModuLoRA else dense), torch.randn(4, 6, 16)
    if kind is RoutedFeedForward:
        layer.active = 4  # the choice of blocks jumps
    leaves, found = [p for p in layer.parameters() if p.requires_grad], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        found.append(torch.autograd.grad(out.float().square().mean(), leaves))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.03 * a.norm() and a.dtype == b.dtype
    assert kind is not TokenWise or any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_that_a_hook_makes_are_refused():
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    prune.l1_unstructured(dense[0], "weight", 0.5)
    for make in (lambda: TokenWise(dense), lambda: RoutedFeedForward(dense), lambda: TwoStage(dense[0])):
        with pytest.raises(weft.Unsupported, match=r"Linear.weight is made by a hook"):
            make()


def test_new_weights_start_as_those_of_linear_layers():
    dense = nn.Sequential(nn.Linear(400, 8), nn.ReLU(), nn.Linear(8, 4))
    for start in (RoutedFeedForward(dense).router.weight, ModuLoRA(dense[0]).A):
        assert 0.9 / 20 < start.abs().max() <= 1 / 20 and abs(float(start.detach().mean())) < 0.1 / 20


def test_a_fraction_of_nothing():
    assert fraction(10, 0, seconds=1, bandwidth=1) == 0 and fraction(1, 0, seconds=1, bandwidth=1) == 1
