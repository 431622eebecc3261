"""Interception of calls, and the operators whose backward is not the transpose of their forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft import Unsupported
from weft.calls import Calls
from weft.ops.feedback import FeedbackFunction


def test_calls_see_functional_calls_and_shared_modules():
    layer = nn.Linear(3, 3)
    seen = []

    def linear(x, weight, bias=None):
        seen.append(weight)
        return x @ weight.detach().T

    with Calls({F.linear: linear}):
        layer(layer(torch.ones(1, 3)))
        F.linear(torch.ones(1, 3), layer.weight)
    assert len(seen) == 3 and all(w is layer.weight for w in seen)
    assert torch.equal(layer(torch.ones(1, 3)), F.linear(torch.ones(1, 3), layer.weight, layer.bias))


def test_strict_refuses_what_it_does_not_know():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return x @ self.w

    rule = weft.rules.FeedbackAlignment(Product())
    with pytest.raises(Unsupported, match="matmul"):
        rule.step(torch.ones(2, 4), torch.tensor([0, 1]))
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(attention, nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(Unsupported, match="attention"):
        weft.rules.FeedbackAlignment(model).step(torch.randn(2, 3, 8), torch.tensor([0, 1]))


CONV = ([1, 2], [1, 0], [1, 1], False, [0, 0], 2)


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("biased", [True, False])
def test_jvp_is_the_transpose_of_backward(conv, biased):
    """<g, jvp(v)> = <backward(g), v>, for inputs, weights and biases."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(5, 4) if conv is None else normal(2, 4, 6, 7)
    weight, feedback = (normal(3, 4), normal(3, 4)) if conv is None else (normal(6, 2, 3, 3), normal(6, 2, 3, 3))
    primals = [x, weight, *([normal(len(weight))] if biased else [])]
    tangents = [normal(*p.shape) for p in primals]

    def apply(*args):
        return FeedbackFunction.apply(args[0], args[1], args[2] if biased else None, feedback, conv)

    for some in (range(len(primals)), [0], [1]):
        leaves = [p.clone().requires_grad_(i in some) for i, p in enumerate(primals)]
        out = apply(*leaves)
        g = normal(*out.shape)
        back = torch.autograd.grad(out, [leaves[i] for i in some], g)
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(p, t) if i in some else p
                for i, (p, t) in enumerate(zip(primals, tangents, strict=True))
            ]
            slope = torch.autograd.forward_ad.unpack_dual(apply(*duals)).tangent
        left = float((g * slope).sum())
        right = sum(float((b * tangents[i]).sum()) for b, i in zip(back, some, strict=True))
        assert left == pytest.approx(right, rel=1e-10)


def test_chain_under_autocast():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    rule = weft.rules.FeedbackAlignment(model)
    with torch.autocast("cpu", torch.bfloat16):
        rule.step(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    assert all(p.grad.dtype == torch.float32 for p in rule.trainable())
