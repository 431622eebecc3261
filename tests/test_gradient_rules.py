"""Scans, seeded perturbations, stationary feedback and highways: what the contract checks and claims leave open."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weft import models
from weft.errors import DataError, StageError, Unsupported, UsageError
from weft.measure import exact_gradient
from weft.models.transformer import CharTransformer
from weft.ops.auxiliary import add_loss
from weft.ops.perturbation import CHUNK, Perturbed, combined, normal, shift_
from weft.ops.scan import LinearFeedback, linear_scan
from weft.rules.backprop import Backprop
from weft.rules.highway_backprop import HighwayBackprop
from weft.rules.stationary_feedback import StationaryFeedback
from weft.rules.zeroth_order import ZerothOrder


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 13])
@pytest.mark.parametrize("kind", ["each", "channel", "time"])
def test_scan_is_the_recurrence(reverse, length, kind):
    terms = seeded(2, length, 3)
    decay = seeded(*{"each": (2, length, 3), "channel": (3,), "time": (length, 1)}[kind], seed=1)
    whole, state, wanted = decay.expand(2, length, 3), torch.zeros(2, 3).double(), torch.empty_like(terms)
    for t in range(length)[:: -1 if reverse else 1]:
        state = terms[:, t] + whole[:, t] * state
        wanted[:, t] = state
    assert torch.allclose(linear_scan(terms, decay, dim=1, reverse=reverse), wanted, rtol=0, atol=1e-9)


def test_scan_refuses_a_decay_of_another_length():
    with pytest.raises(UsageError, match="is T"):
        linear_scan(torch.zeros(4, 2), torch.zeros(3, 2))


def test_tangents_and_gradients_of_the_feedback_are_adjoint():
    x, v, g, decay = (seeded(2, 5, 3, seed=s) for s in range(4))
    decay = decay[0, 0]
    x.requires_grad_()

    def run(steps):
        return LinearFeedback.apply(steps, x.detach(), decay)

    _, tangent = torch.func.jvp(run, (x,), (v,))
    (gradient,) = torch.autograd.grad(run(x), x, g)
    assert torch.allclose((tangent * g).sum(), (gradient * v).sum())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_stationary_feedback_takes_every_shape(kind):
    for how in ({}, {"batch_first": True}, {"bias": False, "num_layers": 2}, {"bidirectional": True}):
        dense = kind(3, 4, **how)
        layer = StationaryFeedback.from_dense(dense)
        for x in (torch.randn(6, 2, 3), torch.randn(6, 3)):
            for training in (True, False):
                layer.train(training)
                with torch.set_grad_enabled(training):
                    (a, last), (b, plain) = layer(x), dense(x)
                assert torch.allclose(a, b, atol=1e-6)
                for one, other in zip(*((t if kind is nn.LSTM else (t,)) for t in (last, plain)), strict=True):
                    assert torch.allclose(one, other, atol=1e-6)


def test_stationary_feedback_refuses():
    layer = StationaryFeedback.from_dense(nn.GRU(3, 4))
    with pytest.raises(Unsupported, match="detach"):
        layer(torch.randn(5, 2, 3), torch.zeros(1, 2, 4, requires_grad=True))
    with pytest.raises(Unsupported, match="padded"):
        layer(nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]))
    with pytest.raises(DataError, match="3 features"):
        layer(torch.randn(5, 2, 4))
    with pytest.raises(DataError, match="initial states"):
        layer(torch.randn(5, 2, 3), torch.zeros(1, 3, 4))
    with pytest.raises(Unsupported, match="proj_size"):
        StationaryFeedback.from_dense(nn.LSTM(3, 4, proj_size=2))
    for decay in ((0.0, 2.0), (0.0,), torch.zeros(3)):
        with pytest.raises(UsageError):
            StationaryFeedback.from_dense(nn.GRU(3, 4), decay=decay)


def error(model, x, y, **options):
    wanted = torch.cat([g.flatten() for g in exact_gradient(model, x, y).values()])
    model.zero_grad(set_to_none=True)
    HighwayBackprop(model, **options).step(x, y)
    return float((torch.cat([p.grad.flatten() for p in model.parameters()]) - wanted).norm() / wanted.norm())


def test_highways_of_a_resnet_and_a_transformer():
    resnet = models.build("resnet", input_shape=(3, 8, 8), classes=10, seed=0).double()
    x, y = seeded(4, 3, 8, 8), torch.arange(4)
    errors = [error(resnet, x, y, iterations=k) for k in (0, 1)]
    assert errors[0] > 0.1 and errors[1] < 1e-9
    for tied in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = CharTransformer(20, width=16, layers=4, tied=tied).double()
        tokens = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(0))
        errors = [error(transformer, tokens, tokens.roll(1, 1), iterations=k) for k in range(4)]
        assert errors[3] < 1e-9 < errors[2] < errors[0]  # what one more iteration may do on the way is not promised


class Inner(nn.Module):
    def __init__(self, residual=True):
        super().__init__()
        self.layer, self.residual = nn.Linear(4, 4), residual

    def forward(self, h):
        return (h if self.residual else 0) + self.layer(h).tanh()


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), Inner(), Inner(), nn.Linear(4, 4)

    def forward(self, x):
        h = self.b(self.a(x))
        return self.d(self.c(h) + h)


def test_what_has_no_highway_is_refused():
    x, y = torch.randn(3, 4), torch.arange(3)
    with pytest.raises(Unsupported, match="no residual path"):
        HighwayBackprop(models.build("mlp", input_shape=(4,), classes=3, seed=0))
    chain = nn.Sequential(nn.Linear(4, 4), Inner(residual=False), Inner(residual=False), nn.Linear(4, 4))
    with pytest.raises(Unsupported, match="is h \\+ block"):
        HighwayBackprop(chain).step(x, y)
    with pytest.raises(StageError, match="across a cut"):
        HighwayBackprop(Skip(), at=["a", "b", "c"]).step(x, y)
    with pytest.raises(UsageError, match="gamma"):
        HighwayBackprop(chain, gamma=1.5)


def test_a_direction_is_the_same_however_it_is_drawn():
    for p in (seeded(2 * CHUNK + 77), seeded(3, 5, 4, 2).to(memory_format=torch.channels_last)):
        before = p.clone()

        def draw(p):
            return torch.Generator().manual_seed(3)

        z = normal(p, draw(p))
        assert torch.equal(combined(p, [2.0], [draw]), 2 * z)
        assert torch.allclose(combined(p, [2.0, 1.0], [draw, draw]), 3 * z)
        assert combined(p, [2.0], [draw]).stride() == p.stride()
        with Perturbed([p], draw, 0.5):
            moved = p + 0
        assert torch.equal(p, before) and torch.equal(moved, 0.5 * z + p)
        shift_([p], draw, 0.5)
        assert torch.allclose(p, moved)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.GRU(8, 8, batch_first=True),
        nn.LSTM(8, 8, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.PReLU()),
    ],
    ids=["transformer", "gru", "lstm", "weight_norm", "dropout"],
)
def test_both_ways_to_perturb_agree(model):
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = copy.deepcopy(model), nn.Parameter(torch.ones(()))

        def forward(self, x):
            out = self.inner(x)
            return (out[0] if isinstance(out, tuple) else out).mean(1) * self.scale.exp()

    x, y, found = seeded(6, 5, 8), torch.arange(6), []
    for perturb in ("call", "in-place"):
        rule = ZerothOrder(Scores().double(), perturb=perturb, directions=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            rule.step(x, y)
            found.append([p.grad for p in rule.trainable()] + [torch.rand(3)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-12)


def test_a_loss_without_a_derivative():
    def wrong(scores, y):
        return (scores.argmax(1) != y).double().mean()

    model = nn.Linear(8, 3)
    rule = ZerothOrder(model, loss=wrong, eps=1.0, directions=20)
    rule.step(seeded(64, 8, dtype=torch.float32), torch.arange(64) % 3)
    assert bool(model.weight.grad.any())


def test_zeroth_order_refuses():
    for options in ({"eps": 0.0}, {"directions": 0}, {"perturb": "inplace"}):
        with pytest.raises(UsageError):
            ZerothOrder(nn.Linear(2, 2), **options)

    class Deaf(nn.Linear):
        def forward(self, x):
            return F.linear(x, torch.ones(3, 2))

    with pytest.raises(Unsupported, match="in-place"):
        ZerothOrder(Deaf(2, 3)).step(torch.ones(1, 2), torch.tensor([0]))


def test_auxiliary_losses_are_scaled_with_the_loss():
    """A micro-batch's share, a GradScaler's factor: both reach what a layer adds to the loss."""

    class Decayed(nn.Linear):
        def forward(self, x):
            return add_loss(super().forward(x), self.weight.square().sum())

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=draw), torch.arange(6) % 3
    rule = Backprop(nn.Sequential(Decayed(4, 3)))
    found = []
    for scale in (1.0, torch.tensor(8.0)):
        rule.zero_grad(set_to_none=True)
        rule.step(x, y, scale=scale)
        found.append(rule.model[0].weight.grad / scale)
    assert torch.allclose(*found, rtol=1e-5)
