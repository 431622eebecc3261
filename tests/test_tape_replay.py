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
from weft.tape.mini_sequence import MiniSequence, chunked_cross_entropy
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


class Scaled(nn.Module):
    """Rows of which the second input is not differentiated, times a number."""

    def forward(self, x, y, scale):
        return scale * (x + y.detach())


def test_inputs_of_no_dimension_and_inputs_without_gradient():
    x, y, scale = (torch.rand(shape).requires_grad_() for shape in ((7, 3), (7, 3), ()))
    found = torch.autograd.grad(gradient_cache(Scaled(), (x, y, scale), torch.sum, chunk=2), (x, y, scale))
    wanted = scale.expand(7, 3), torch.zeros(7, 3), (x + y).sum()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_an_encoder_that_cannot_be_run_again_raises():
    x = torch.randn(6, 4)
    with pytest.raises(Unsupported, match="in place"):  # twice through an ELU is not once
        MiniSequence(nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 2)))(x)
    with pytest.raises(DataError, match="rows"):
        gradient_cache(nn.Flatten(0), x, torch.sum, chunk=2)
    layer = MiniSequence(nn.Sequential(nn.Linear(4, 2)))
    given = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    loss = torch.func.functional_call(layer, given, (x,)).sum()
    with pytest.raises(UsageError, match="functional_call"):
        loss.backward()


def test_models_of_inference_mode():
    with torch.inference_mode():
        f = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
        assert torch.equal(gradient_cache(f, torch.ones(4, 4), torch.sum, chunk=2), f(torch.ones(4, 4)).sum())


@pytest.mark.parametrize("ignored", [-100, 0])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "autocast"])
def test_loss_of_a_head_with_a_bias(kind, ignored):
    """Gradients beside float64's; in half types the sums over chunks are in float32."""
    generator, cast = torch.Generator().manual_seed(0), kind == "autocast"
    dtype = torch.float32 if cast else kind
    h, w, b = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((512, 8), (5, 8), (5,)))
    labels = torch.randint(5, (512,), generator=generator).where(torch.rand(512, generator=generator) < 0.7, ignored)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        loss = chunked_cross_entropy(h, w, labels, b, chunks=128, ignore_index=ignored)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    plain = F.cross_entropy(F.linear(*exact), labels, ignore_index=ignored)
    found, wanted = torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(plain, exact)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        logits = F.linear(h, w, b).to(loss.dtype)
    assert abs(float(loss.detach() - F.cross_entropy(logits, labels, ignore_index=ignored))) < 1e-5
    for a, c in zip(found, wanted, strict=True):
        assert float((a - c).norm() / c.norm()) < (1e-12 if kind == torch.float64 else 0.01)


def test_loss_without_labels_has_gradients_of_zero():
    h, w = torch.randn(4, 3).requires_grad_(), torch.randn(5, 3).requires_grad_()
    loss = chunked_cross_entropy(h, w, torch.full((4,), -100), chunks=2)
    assert loss.isnan()
    assert not any(bool(g.any()) for g in torch.autograd.grad(loss, (h, w)))


class Counted(nn.Linear):
    """A linear layer times the number of its calls, which it counts in place."""

    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls.item()


def test_buffers_changed_in_place():
    f, x = Counted(), torch.ones(6, 4)
    (found,) = torch.autograd.grad(gradient_cache(f, x, torch.sum, chunk=2), f.bias)
    assert found.tolist() == [2 * (1 + 2 + 3)] * 2
    assert f.calls == 3
