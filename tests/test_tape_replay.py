"""Methods that run modules once more on the way back: under sessions, and with what is changed in between."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weft.errors import DataError, Unsupported, UsageError
from weft.ops.silo import Silo
from weft.session import kept
from weft.tape.division import Division
from weft.tape.gradient_cache import gradient_cache
from weft.tape.reversible_pyramid import reversible_pyramid


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def pyramid() -> tuple[nn.ModuleList, list[torch.Tensor]]:
    torch.manual_seed(0)
    silos = nn.ModuleList([Silo((4, 6), inputs=1), Silo((4, 6, 8), inputs=2)]).double()
    return silos, [torch.randn(2, 4, 8, 8, dtype=torch.float64)]


def plain(silos, *levels):
    for silo in silos:
        levels = silo(*levels)
    return levels


def squares(outputs):
    return sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).square().sum() for t in outputs)


def test_gradients_inside_a_session():
    f, x = encoder(), torch.randn(10, 6)
    wanted = torch.autograd.grad(f(x).square().sum(), list(f.parameters()))
    silos, levels = pyramid()
    wanted += torch.autograd.grad(squares(plain(silos, *levels)), list(silos.parameters()))
    with kept(f):
        found = torch.autograd.grad(gradient_cache(f, x, lambda e: e.square().sum(), chunk=3), list(f.parameters()))
    with Division().on(silos):  # nothing here is large enough for it
        found += torch.autograd.grad(squares(reversible_pyramid(silos, *levels)), list(silos.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["inputs", "weights"])
def test_what_needs_no_gradient_gets_none(frozen):
    silos, levels = pyramid()
    levels[0].requires_grad_(frozen != "inputs")
    silos.requires_grad_(frozen != "weights")
    squares(reversible_pyramid(silos, *levels)).backward()
    assert (levels[0].grad is None) == (frozen == "inputs")
    assert all((p.grad is None) == (frozen == "weights") for p in silos.parameters())


def test_weights_that_change_between_the_passes_raise():
    f, x = encoder(), torch.randn(10, 6)
    silos, levels = pyramid()
    losses = [gradient_cache(f, x, lambda e: e.square().sum()), squares(reversible_pyramid(silos, *levels))]
    with torch.no_grad():
        for p in (*f.parameters(), *silos.parameters()):
            p.add_(1)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_one_encoder_for_pairs_accumulates_into_grad():
    f, x, y = encoder(), torch.randn(9, 6), torch.randn(9, 6)
    loss = gradient_cache([f, f.forward], [x, (y,)], lambda a, b: F.cross_entropy(a @ b.t(), torch.arange(9)), chunk=4)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in f.parameters()]
    loss.backward()
    for p, g in zip(f.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_bad_input():
    f, x = encoder(), torch.randn(10, 6)
    with pytest.raises(UsageError, match="parameters="):
        gradient_cache(lambda x: f(x), x, torch.sum)
    with pytest.raises(UsageError, match="one of each"):
        gradient_cache([f, f], [x], torch.sum)
    with pytest.raises(DataError, match="rows"):
        gradient_cache(f, (x, x[:3]), torch.sum)
    with pytest.raises(Unsupported, match="BatchNorm1d"):
        gradient_cache(nn.Sequential(f, nn.BatchNorm1d(4)), x, torch.sum)
    silos, levels = pyramid()
    with pytest.raises(DataError, match="level 1"):
        reversible_pyramid([Silo((4, 6))], levels[0].float(), torch.randn(2, 6, 3, 3))
    with pytest.raises(DataError, match="takes 1"):
        reversible_pyramid(silos, *levels, *levels)
    with pytest.raises(UsageError, match="Linear"):
        reversible_pyramid([nn.Linear(2, 2)], *levels)
    with pytest.raises(UsageError, match="2 levels"):
        Silo((4,))
