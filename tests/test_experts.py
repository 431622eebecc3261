"""Layers with experts where their claims do not look: auxiliary losses, pathways, compilers, capacity, options."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weft
from weft.errors import Unsupported, UsageError
from weft.ffn import PEER, AvgK, MoEPlusPlus
from weft.measure import operations
from weft.models.transformer import CharTransformer
from weft.ops.auxiliary import add_loss, loss_scale
from weft.ops.pathway import Pathway
from weft.ops.product_keys import product_key_topk
from weft.ops.replay import Replay, devices_of
from weft.ops.routing import balance_loss, sorted_slots, within_capacity


def dense(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64, bias), nn.GELU(), nn.Linear(64, 16, bias))


LAYERS = {
    "moe++": lambda: MoEPlusPlus.from_dense(dense(), experts=4),
    "moe": lambda: MoEPlusPlus.from_dense(dense(), experts=4, zero=0, copy=0, constant=0, capacity=None),
    "peer": lambda: PEER.from_dense(dense(), heads=2, active=4, key_features=8),
    "avg-k": lambda: AvgK(dense(), block=8, active=2),
    "cells": lambda: AvgK(dense(), block=1, active=8),
}


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def test_an_auxiliary_loss_is_part_of_the_objective():
    w, x = torch.randn(3, requires_grad=True), torch.randn(4, 3)
    y = add_loss(x * w, w.square().sum())
    assert torch.equal(y, x * w)
    assert torch.allclose(gradients(y.sum(), w)[0], x.sum(0) + 2 * w)
    assert add_loss(x, x.sum()) is x and add_loss(w, torch.ones(())) is w
    with torch.no_grad():
        assert add_loss(w, w.sum()) is w
    with pytest.raises(UsageError, match="one number"):
        add_loss(x, w)


@pytest.mark.parametrize("scale", [65536.0, torch.tensor([65536.0])])
def test_a_scaled_loss_scales_its_auxiliary_loss_when_it_says_so(scale):
    w, x = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3).double()
    y = add_loss(x * w, w.square().sum())
    with loss_scale(scale):
        found = gradients(65536 * y.sum(), w)[0]
    assert torch.allclose(found / 65536, x.sum(0) + 2 * w)
    assert torch.allclose(gradients(65536 * add_loss(x * w, w.square().sum()).sum(), w)[0], 65536 * x.sum(0) + 2 * w)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
def test_auxiliary_losses_under_transforms_and_the_compiler():
    w, x = torch.randn(3), torch.randn(4, 3)

    def run(w):
        return add_loss(x * w, w.square().sum()).sum()

    assert torch.allclose(torch.func.grad(run)(w), x.sum(0) + 2 * w)
    assert torch.allclose(torch.func.jvp(run, (w,), (torch.ones(3),))[1], x.sum())
    compiled, w = torch.compile(run, backend="aot_eager", fullgraph=True), w.requires_grad_()
    for scale in (1.0, 3.0):
        with loss_scale(scale):
            assert torch.allclose(gradients(compiled(w), w)[0], x.sum(0) + 2 * scale * w)


def test_a_layer_adds_its_balance_loss_in_training_alone():
    """Micro-batches and a factor on the loss: as in the sum of all losses, written out."""
    plain = MoEPlusPlus(6, 4, experts=3, balance=0.0, capacity=None).double()
    layer = MoEPlusPlus(6, 4, experts=3, balance=0.3, capacity=None).double()
    layer.load_state_dict(plain.state_dict())
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(2)]
    for x in batches:
        with loss_scale(64 / 2):
            (64 / 2 * layer(x).square().mean()).backward()
        scores = x @ plain.router.T
        eta = torch.tensor([1.0] * 3 + [0.75] * 4).double()
        loss = balance_loss(scores.softmax(1), scores.topk(2).indices, eta)
        assert torch.allclose(loss.detach(), layer.balance_loss) and not layer.balance_loss.requires_grad
        (64 / 2 * (plain(x).square().mean() + 0.3 * loss)).backward()
    for mine, wanted in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, wanted.grad)
    layer.eval()
    found, wanted = (gradients(m(batches[0]).sum(), m.router)[0] for m in (layer, plain))
    assert torch.allclose(found, wanted)


def test_balance_is_least_for_an_even_load():
    probabilities = torch.full((8, 4), 0.25)
    even = torch.tensor([[0, 1], [2, 3]] * 4)
    assert balance_loss(probabilities, even) == 0.5
    assert balance_loss(torch.zeros(0, 4), even[:0]) == 0


def converted(checkpointed=False):
    torch.manual_seed(0)
    model = CharTransformer(11, width=16, heads=2, layers=3, context=8)
    weft.convert_(model, MoEPlusPlus.options(experts=4, pathway=Pathway(), balance=0.1), where="blocks.*.mlp")
    if checkpointed:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def test_layers_of_a_model_share_a_pathway():
    model, x = converted(), torch.randint(11, (3, 8))
    layers = [block.mlp for block in model.blocks]
    assert [layer.place for layer in layers] == [0, 1, 2] and layers[0].residual is None
    model(x).square().mean().backward()
    assert all(layer.residual.grad.any() for layer in layers[1:])
    assert torch.allclose(layers[1].scores, layers[1].pathway.previous(2, 24))
    with pytest.raises(UsageError, match="had 24 tokens"):
        layers[1](torch.randn(3, 16))
    with pytest.raises(UsageError, match="has not run"):
        copy.deepcopy(layers[2])(torch.randn(3, 16))


def test_copies_of_a_model_have_a_pathway_of_their_own():
    model, x = converted(), torch.randint(11, (3, 8))
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pathways = {id(block.mlp.pathway) for block in twin.blocks}
        assert len(pathways) == 1 and id(model.blocks[0].mlp.pathway) not in pathways
        assert torch.equal(twin(x), out)


def test_pathways_pass_through_activation_checkpointing():
    x, found = torch.randint(11, (3, 8)), []
    for checkpointed in (False, True):
        model = converted(checkpointed)
        model(x).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scores_of_the_layer_before_can_be_an_argument():
    pathway, x = Pathway(), torch.randn(5, 6)
    layers = [MoEPlusPlus(6, 4, experts=3, pathway=pathway, seed=s) for s in range(2)]
    out = layers[1](layers[0](x))
    assert torch.equal(layers[1](layers[0](x), previous=layers[0].scores), out)
    assert not torch.equal(layers[1](layers[0](x), previous=-layers[0].scores), out)


def test_slots_and_capacity():
    chosen = torch.tensor([[0, 2], [0, 1], [3, 0], [0, 3]])
    slots = sorted_slots(chosen, 3)
    assert slots.rows.tolist() == [0, 1, 2, 3, 1, 0] and slots.sizes.tolist() == [4, 1, 1]
    assert chosen.flatten()[slots.places].tolist() == [0, 0, 0, 0, 1, 2]
    kept = within_capacity(chosen, torch.tensor([2, 5, 0, 1]))
    assert kept.tolist() == [[True, False], [True, True], [True, False], [False, False]]


@pytest.mark.parametrize(("expert", "served"), [(0, 2), (2, 3)])  # ceil(tau unit), ceil(unit)
def test_an_expert_of_either_kind_takes_its_capacity(expert, served):
    layer = MoEPlusPlus(4, 3, experts=2, constant=0, active=1, capacity=0.9, tau=0.75, balance=0.0)
    with torch.no_grad():
        layer.router.zero_()[expert] = 1.0
    x = torch.rand(10, 4) + 0.1  # unit = 0.9 * 10 / (0.75 * 2 + 2)
    assert [bool(row.any()) for row in layer(x)] == [i < served for i in range(10)]
    assert layer.eval()(x).any(1).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by the compiler itself
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_and_exported(name):
    layer, x, y = LAYERS[name](), torch.randn(3, 5, 16), torch.randn(4, 7, 16)
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for given in (x, y):
        for m in (layer, compiled):
            m(given).square().sum().backward()
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))
    with torch.no_grad():
        assert torch.allclose(torch.compile(twin, backend="aot_eager", fullgraph=True)(x), layer(x), atol=1e-6)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=100)},))
    assert torch.allclose(program.module()(y[:, :5]), layer(y[:, :5]), atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_threads_give_the_same(name):
    layer, x, found = LAYERS[name](), torch.randn(300, 16), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([y := layer(x), *gradients(y.square().sum(), list(layer.parameters()))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_without_bias_and_put_back(bias):
    layer, x = dense(bias=bias), torch.randn(3, 16)
    for made in (MoEPlusPlus.from_dense(layer, experts=4), PEER.from_dense(layer, active=4, key_features=8)):
        assert torch.allclose(made.to_dense()(x), layer(x), atol=1e-6)
        assert made(x).shape == x.shape
    full = AvgK(layer, block=8, active=8)
    assert torch.allclose(full(x), layer(x), atol=1e-6)


def test_experts_train_with_sparse_gradients():
    layer = PEER(8, 10_000, heads=2, active=4, key_features=8, sparse=True)
    assert layer.first.shape == (100, 4)
    rest = [p for name, p in layer.named_parameters() if name not in ("up", "down")]
    optimizers = torch.optim.SparseAdam([layer.up, layer.down], lr=0.01), torch.optim.Adam(rest, lr=0.01)
    x, losses = torch.randn(32, 8), []
    for _ in range(30):
        loss = F.mse_loss(layer(x), x.flip(1))
        layer.zero_grad()
        loss.backward()
        assert layer.up.grad.is_sparse
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_one_token_takes_the_running_statistics():
    layer = PEER(6, 16, heads=1, active=2, key_features=4)
    token = torch.randn(1, 6)
    found = layer(token)
    assert torch.equal(layer.eval()(token), found) and not layer.norm.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.0, None])
def test_queries_are_normalised_as_batch_norm_does_it(momentum):
    layer = PEER(6, 16, heads=2, active=2, key_features=4, seed=3)
    layer.norm.momentum = momentum
    norm, x = copy.deepcopy(layer.norm), 3 + torch.randn(3, 4, 6)
    for _ in range(2):
        layer(x)
        norm(x.flatten(0, 1) @ layer.query.T)
    state, wanted = layer.norm.state_dict(), norm.state_dict()
    assert state["num_batches_tracked"] == 2 and bool(state["running_mean"].any()) == (momentum != 0)
    assert all(torch.allclose(state[key], wanted[key], atol=1e-6) for key in wanted)
    layer.eval(), norm.eval()
    query = norm(x.flatten(0, 1) @ layer.query.T).view(12, 2, 4)
    assert torch.allclose(layer.search(x.flatten(0, 1))[0], product_key_topk(query, layer.first, layer.second, 2)[0])
    alone = torch.cat([layer(token[None]) for token in x.flatten(0, 1)])
    assert torch.allclose(alone, layer(x).flatten(0, 1), atol=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in copy.deepcopy(layer).norm.state_dict().items())


def test_a_replayed_layer_counts_a_batch_once():
    layer, x = PEER(6, 16, heads=2, active=2, key_features=4), torch.randn(5, 6)
    run = Replay(layer.modules(), devices_of([x]))
    with torch.no_grad(), run.recorded():
        first = layer(x)
    mean = layer.norm.running_mean.clone()
    with run.again(run.tensors):
        assert torch.equal(layer(x), first)
    assert layer.norm.num_batches_tracked == 1 and torch.equal(layer.norm.running_mean, mean)


def test_sparse_gradients_under_autocast():
    layer = PEER(8, 64, heads=2, active=4, key_features=8, sparse=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(5, 8))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.up.grad.is_sparse and layer.up.grad.dtype == torch.float32


def test_product_keys_with_ties_and_few_keys():
    first, second = torch.zeros(2, 3), torch.eye(3)
    scores, numbers = product_key_topk(torch.ones(4, 6), first, second, 6)
    assert torch.equal(scores, torch.ones(4, 6)) and all(row.sort().values.tolist() == [*range(6)] for row in numbers)
    for query, k in ((torch.ones(4, 6), 7), (torch.ones(4, 5), 2)):
        with pytest.raises(UsageError):
            product_key_topk(query, first, second, k)


def test_blocks_that_are_not_chosen_are_not_computed():
    layer = dense()
    x = torch.randn(50, 16)
    full = operations(lambda: layer(x))["total"]
    assert operations(lambda: AvgK(layer, block=16, active=1)(x))["total"] == full // 4 + full // 32
    assert AvgK(layer, block=8, active=0.25).active == 2


def test_what_does_not_fit_is_refused():
    for call in (
        lambda: MoEPlusPlus(8, 4, tau=0),
        lambda: MoEPlusPlus(8, 4, active=99),
        lambda: MoEPlusPlus(8, 0),
        lambda: MoEPlusPlus(8, 4, out_features=9),
        lambda: MoEPlusPlus.from_dense(dense(), experts=7),
        lambda: PEER(8, 16, active=17),
        lambda: PEER(8, 16, key_features=3),
        lambda: AvgK(dense(), block=7),
        lambda: AvgK(dense(), block=8, active=9),
    ):
        with pytest.raises(UsageError, match="give"):
            call()
    for kind in (MoEPlusPlus, PEER, AvgK):
        with pytest.raises(Unsupported):
            kind.from_dense(nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.Linear(2, 2)))
