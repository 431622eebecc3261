"""A pipeline over two processes whose weight gradients wait for the end of the step."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weft
from weft.ops.pipeline import simulate
from weft.tape import TwoStage
from weft.tape.two_stage import deferred

COMMON = """
import torch
from torch import nn


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 9), nn.Tanh(),
                          nn.Linear(9, 4)).double()
    return model, torch.randn(4, 5, 6).double()
"""
WORKER = (
    COMMON
    + """
import sys
import torch.distributed as dist
from safetensors.torch import save_file
from weft.convert import convert_
from weft.tape import TwoStage
from weft.tape.two_stage import deferred

dist.init_process_group("gloo")
rank, (model, x) = dist.get_rank(), parts()
stage = model[:4] if rank == 0 else model[4:]
convert_(stage, TwoStage)
inputs, outputs, sent, order = {}, {}, [], []


def forward(m):
    h = x[m]
    if rank:
        h = torch.empty(5, 9).double()
        dist.recv(h, 0)
    inputs[m] = h.requires_grad_(bool(rank))
    outputs[m] = stage(h)
    if rank == 0:
        sent.append((outputs[m].detach(), dist.isend(outputs[m].detach(), 1)))


def backward(m):
    if rank:
        outputs[m].square().mean().backward()
        sent.append((inputs[m].grad, dist.isend(inputs[m].grad, 0)))
    else:
        grad = torch.empty(5, 9).double()
        dist.recv(grad, 1)
        outputs[m].backward(grad)


first = 2 - rank  # 1F1B: as many forward passes before the first backward pass as there are stages from here on
with deferred() as later:
    for m in range(first):
        forward(m)
    for m in range(4):
        backward(m)
        if first + m < 4:
            forward(first + m)
for _, message in sent:
    message.wait()
assert all(p.grad is None for p in stage.parameters()) and later.nbytes > 0
later.finish()
assert later.nbytes == 0
save_file({n: p.grad for n, p in stage.named_parameters()}, f"{sys.argv[1]}/{rank}.safetensors")
dist.destroy_process_group()
"""
)


def test_a_pipeline_of_two_processes_gives_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env={**env, "WORLD_SIZE": "2", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    here = {}
    exec(COMMON, here)
    model, x = here["parts"]()
    for batch in x:
        model(batch).square().mean().backward()
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    for rank, stage in enumerate((model[:4], model[4:])):
        found = load_file(tmp_path / f"{rank}.safetensors")
        wanted = dict(stage.named_parameters())
        assert set(found) == set(wanted)
        for name, p in wanted.items():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-12, atol=1e-15)


def small():
    torch.manual_seed(0)
    return TwoStage.from_dense(nn.Linear(3, 2)), torch.randn(4, 3)


def test_gradients_that_are_never_finished_are_named():
    layer, x = small()
    with deferred() as later:
        layer(x).sum().backward()
    with pytest.warns(ResourceWarning, match="1 calls were never finished"):
        del later


def test_an_error_inside_drops_what_is_held_and_ends_deferral():
    layer, x = small()
    with pytest.raises(ZeroDivisionError), deferred():
        layer(x).sum().backward()
        raise ZeroDivisionError
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with pytest.raises(weft.WeftError, match="deferred here already"), deferred(), deferred():
        pass


def test_an_input_changed_in_place_between_the_stages_is_noticed():
    layer, x = small()
    with deferred() as later:
        layer(x).sum().backward()
    x.add_(1)
    with pytest.raises(weft.WeftError, match="changed in place"):
        later.finish()
    assert layer.weight.grad is None


def test_hooks_on_parameters_run_in_both_stages():
    layer, x = small()
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with deferred() as later:
        layer(x).sum().backward()
    assert seen == [None]
    later.finish()
    torch.testing.assert_close(seen[1:], [x.sum(0).expand(2, 3)])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(2, 4, 3, padding="same", stride=1, groups=2), torch.randn(2, 5, 6)),
        (nn.Conv2d(2, 4, (3, 2), padding=(2, 1), padding_mode="reflect"), torch.randn(3, 2, 5, 6)),
        (nn.LayerNorm(5), torch.randn(5)),
        (nn.LayerNorm([2, 3], bias=False), torch.randn(4, 2, 3)),
        (nn.Linear(3, 2), torch.randn(3)),
        (nn.Linear(3, 2, bias=False), torch.randn(0, 3)),
        (nn.Conv2d(2, 3, 2), torch.randn(0, 2, 4, 4)),
        (nn.Embedding(4, 2), torch.tensor([[1, 3], [1, 0]])),
    ],
    ids=lambda one: repr(one) if isinstance(one, nn.Module) else "x".join(map(str, one.shape)),
)
def test_each_kind_of_layer_split_and_not(layer, x):
    split, double = TwoStage.from_dense(layer), x.is_floating_point()
    layer.double()
    x = x.double().requires_grad_() if double else x
    leaves = [*layer.parameters(), *([x] if double else [])]
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(split(x).square().sum(), leaves), wanted)
    with deferred() as later:
        split(x).square().sum().backward()
    later.finish(joined=True)
    torch.testing.assert_close([t.grad for t in leaves], list(wanted))
    if double and x.numel():
        torch.autograd.gradgradcheck(split, x)


def test_frozen_parameters_hold_nothing_that_nobody_needs():
    layer, x = small()
    layer.weight.requires_grad_(False)
    with deferred() as later:
        (layer(x) * torch.ones(4, 2)).sum().backward()
    assert later.nbytes == 4 * 2 * 4, "the output gradient alone"
    later.finish()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((2,), 4.0))
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(False)
    with deferred() as later:
        layer(x).sum().backward()
    later.finish()
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 3))


def test_what_is_held_keeps_no_graph_and_calls_of_other_lengths_are_not_joined():
    layer, x = small()
    given, seen = x.requires_grad_() * 2, []
    layer.weight.register_hook(lambda grad: seen.append(grad))
    with deferred() as later:
        (layer(given).sum() + layer(given.view(2, 2, 3)).sum() + layer(given.view(1, 4, 3)).sum()).backward()
    assert all(held.grad_fn is None for _, _, held, *_ in later._held)
    later.finish(joined=True)
    assert [grad is None or grad.requires_grad for grad in seen] == [True, False, False, False]
    torch.testing.assert_close(layer.weight.grad, 6 * x.detach().sum(0).expand(2, 3))


def test_batches_whose_weight_gradients_wait():
    assert simulate("1f1b", 4, 4, split="last").held == (4, 4, 4, 4)
    assert simulate("1f1b", 4, 8, split="fill").held == (5, 6, 7, 8)
    assert simulate("1f1b", 4, 8).held == (0, 0, 0, 0) and simulate("1f1b", 4, 8).fraction == 36 / (4 * 33)
