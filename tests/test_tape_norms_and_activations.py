"""Norms and activations that keep less: half types, options, layers in place, transforms of functions."""

import copy
import itertools

import pytest
import torch
from torch import nn

from weft.measure import kept_bytes
from weft.tape.approximate_activation import ApproximateActivation
from weft.tape.few_bit import FewBitActivation
from weft.tape.memory_sharing_norm import MemorySharingNorm

HALF = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("eps", [None, 1e-5, 0.5])
def test_norms_in_half_types(kind, eps, dtype):
    """Gradients beside float64's: weights next to zero and far below the bias, in either precision, over many rows."""
    generator = torch.Generator().manual_seed(0)
    for narrow_weights in (True, False) if kind is nn.LayerNorm else (True,):  # RMSNorm warns of two dtypes
        layer = kind(16, eps=eps if eps or kind is nn.RMSNorm else 1e-5)
        with torch.no_grad():
            layer.weight[:7] = torch.tensor([0.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 0.01])
            if kind is nn.LayerNorm:
                layer.bias[6:8] = torch.tensor([4.0, 20.0])
        layer = layer.to(dtype) if narrow_weights else layer
        exact = copy.deepcopy(layer).double()
        x, g = (torch.randn(512, 16, generator=generator).to(dtype) for _ in range(2))
        g = g + 1
        x.requires_grad_()
        wide = x.detach().double().requires_grad_()
        mine = MemorySharingNorm.from_dense(layer)(x)
        assert torch.equal(mine, layer(x))
        found = torch.autograd.grad(mine, [x, *layer.parameters()], g)
        wanted = torch.autograd.grad(exact(wide), [wide, *exact.parameters()], g.double())
        for a, b in zip(found, wanted, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < HALF[dtype]


def test_the_default_eps_of_small_inputs():
    layer, x = nn.RMSNorm(8), 1e-4 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, wanted = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (MemorySharingNorm(layer), layer))
    torch.testing.assert_close(found, wanted)


def test_norms_keep_nothing_for_a_gradient_of_the_bias_alone():
    layer = nn.LayerNorm(8)
    layer.weight.requires_grad_(False)
    assert kept_bytes(lambda: MemorySharingNorm.from_dense(layer)(torch.ones(4, 8)), layer).peak_bytes == 0


def test_tables_are_those_of_the_layer_and_the_domain():
    layers = nn.GELU(), nn.GELU("tanh"), nn.ELU(0.5), nn.ELU(2.0), nn.Softplus(2.0)
    tables = {
        (mine.borders, mine.levels)
        for layer, bits, domain in itertools.product(layers, (2, 3), (3.0, 10.0))
        for mine in [FewBitActivation.from_dense(layer, bits=bits, domain=domain)]
    }
    assert len(tables) == 20
    assert all(abs(border) < 3 for border in FewBitActivation.from_dense(nn.Tanh(), bits=4, domain=3.0).borders)


@pytest.mark.parametrize("method", [FewBitActivation, ApproximateActivation])
def test_layers_in_place_change_their_input_and_its_gradient(method):
    mine, other = (method.from_dense(nn.SiLU(inplace=inplace)) for inplace in (True, False))
    x = torch.linspace(-5, 5, 21).requires_grad_()
    h = 1 * x
    mine(h)
    assert torch.equal(h, other(x))
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (h, other(x))))


@pytest.mark.parametrize("layer", [FewBitActivation(nn.GELU()), MemorySharingNorm(nn.LayerNorm(6))])
def test_functional_gradients(layer):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(torch.func.grad(lambda h: layer(h).square().sum())(x.detach()), wanted)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
