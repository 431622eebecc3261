"""Select blocks of a feed-forward layer's hidden units by the mean of their keys: a router without parameters.

Hidden units are memory cells, the first layer's rows their keys and the second's columns their values. For blocks of g
cells, with K_i, b_i and V_i those of block i:

    s_i = x . mean_j k_ij + mean_j b_ij        the mean pre-activation of block i
    y = c + sum_{i in S} V_i act(K_i x + b_i)      S: the blocks with the largest s

Nothing is multiplied by a gate, so that with all blocks chosen y is the layer's own output, and the choice has no
gradient: keys learn to be found as they learn to match. No loss balances the blocks.

Paper: "Towards A Unified View of Sparse Feed-Forward Network in Pretraining Large Language Model", Leo Liu,
Tim Dettmers, Xi Lin, Ves Stoyanov, Xian Li, 2023, arXiv:2305.13999.

The mean of the biases in s is this file's reading of the paper, whose equations leave them out. Scores take 1 / g of
the first product's operations. For blocks of one cell they are the pre-activations: the first product is done in full
and the second over a mask, so that no time is saved. Small blocks select best, large ones multiply fastest.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import UsageError
from weft.ffn.mixture import compute_dtype
from weft.ffn.moe_plus_plus import MoEPlusPlus
from weft.kernels.grouped import grouped_linear
from weft.measure import operations
from weft.method import method
from weft.ops.feed_forward import rows_of, two_layers
from weft.ops.routing import sorted_slots
from weft.testing.example import Example


def block_scores(x: Tensor, keys: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """s ``[T, H / size]`` of tokens ``[T, D]`` for keys ``[H, D]`` and biases ``[H]`` in blocks of ``size``."""
    means = keys.unflatten(0, (-1, size)).mean(1)
    return F.linear(x, means, None if bias is None else bias.unflatten(0, (-1, size)).mean(1))


def chosen_blocks(
    x: Tensor, first: nn.Linear, act: nn.Module, second: nn.Linear, size: int, active: int
) -> tuple[Tensor, Tensor]:
    """``[T, D] -> [T, D']`` through the ``active`` blocks of ``size`` cells with the largest scores; and the scores."""
    dtype, blocks = x.dtype, first.out_features // size
    keys, values = first.weight.to(dtype), second.weight.to(dtype)
    bias, last = (None if b is None else b.to(dtype) for b in (first.bias, second.bias))
    if size == 1 or active == blocks:
        h = F.linear(x, keys, bias)
        scores = h.detach().unflatten(1, (-1, size)).mean(2)
        on = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(active, 1).indices, True)
        h = act(h).to(dtype) * (on if size == 1 else on.repeat_interleave(size, 1))
        return F.linear(h, values, last), scores
    with torch.no_grad():
        scores = block_scores(x, keys, bias, size)
        slots = sorted_slots(scores.topk(active, 1).indices, blocks, every=True)
    biases = None if bias is None else bias.view(blocks, size)
    h = act(grouped_linear(x, keys.split(size), slots.sizes, bias=biases, rows=slots.rows)).to(dtype)
    parts = grouped_linear(h, values.split(size, 1), slots.sizes)
    start = parts.new_zeros(x.shape[0], second.out_features) if last is None else last.repeat(x.shape[0], 1)
    return start.index_add(0, slots.rows, parts), scores


@method("avg-k", contract="layer", family="ffn", papers=[185])
class AvgK(Convertible):
    """An ``nn.Sequential(nn.Linear, activation, nn.Linear)`` of which each token takes some blocks of hidden units.

    Its parameters are the ordinary layer's, shared; it has none of its own. A new one is made from a new layer:
    ``AvgK(nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64)), block=1, active=64)``.

    Args:
        layer: hidden units a multiple of ``block``, an elementwise activation without parameters.
        block: g, cells of a block.
        active: blocks of a token; below 1 a fraction of all.

    Raises:
        Unsupported: for other layers.
        UsageError: for numbers that do not fit.
    """

    converts = (nn.Sequential,)

    def __init__(self, layer: nn.Module, *, block: int = 64, active: float = 0.125) -> None:
        super().__init__()
        hidden = two_layers(layer)[0].out_features
        blocks = hidden // block if block > 0 else 0
        count = max(1, round(active * blocks)) if 0 < active < 1 else int(active)
        if not blocks or hidden % block or not 1 <= count <= blocks:
            raise UsageError(
                f"active={active} of blocks of block={block} for {hidden} hidden units: give a divisor, at most all"
            )
        self.layers, self.block, self.active = layer, block, count

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> AvgK:
        """The layer, of whose blocks each token takes some."""
        return cls(layer, **options)

    def extra_repr(self) -> str:
        """Sizes of the selection."""
        return f"block={self.block}, active={self.active}"

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        first, act, second = cast(Any, self.layers)
        flat = rows_of(x, first.in_features, first.weight).to(compute_dtype(x))
        y, _ = chosen_blocks(flat, first, act, second, self.block, self.active)
        return y.view(*x.shape[:-1], second.out_features)


def example() -> Example:
    """Six blocks of four cells, of which each token of six sequences of four takes three."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(6, 4, 8)
    return Example(layer, x, torch.arange(6) % 2, {"block": 4, "active": 3})


@claim(
    "block scores equal the mean pre-activation over each block to 1e-6, with zero router parameters",
    row=185,
    mutants={
        "sums": (".mean(1)\n    return F.linear(x, means", ".sum(1)\n    return F.linear(x, means"),
        "strided blocks": ("keys.unflatten(0, (-1, size)).mean(1)", "keys.unflatten(0, (size, -1)).mean(0)"),
        "without biases": ("None if bias is None else bias.unflatten(0, (-1, size)).mean(1)", "None"),
        "mean of activations": ("scores = h.detach().unflatten", "scores = act(h).detach().unflatten"),
        "a router": ("self.layers, self.block, self.active = layer, block, count",
                     "self.layers, self.block, self.active = layer, block, count\n"
                     "        self.router = nn.Linear(2, hidden)"),
    },
)  # fmt: skip
def scores_are_means(seed: int) -> list[Check]:
    """Blocks of 1 to 16 cells in float32, of pre-activations below 1; the means are taken in float64."""
    torch.manual_seed(seed)
    dense: Any = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))
    x, checks = 2 * torch.rand(50, 40) - 1, list[Check]()
    exact = x.double() @ dense[0].weight.T.double() + dense[0].bias.double()
    for size in (1, 2, 4, 16):
        layer = AvgK.from_dense(dense, block=size, active=2)
        found = chosen_blocks(x, dense[0], dense[1], dense[2], size, 2)[1]
        means = torch.stack([part.mean(1) for part in exact.split(size, 1)], 1)
        checks.append(Check(float((found - means).detach().abs().max()), 1e-6, what=f"blocks of {size}"))
        own = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in dense.parameters())
        checks.append(Check(own, 0, "==", "router parameters"))
    return checks


@claim(
    "outputs and gradients are those of the layer with all blocks but the chosen masked, to 1e-9 in float64; products "
    "take the active blocks' share of the dense layer's operations, and 1 / (2 g) for the scores",
    row=185,
    mutants={
        "smallest chosen": ("scores.topk(active, 1).indices, blocks", "(-scores).topk(active, 1).indices, blocks"),
        "one block too few": ("scores.topk(active, 1).indices, blocks", "scores.topk(active - 1, 1).indices, blocks"),
        "bias per block": ("parts = grouped_linear(h, values.split(size, 1), slots.sizes)",
                           "parts = grouped_linear(h, values.split(size, 1), slots.sizes) + last"),
        "a gate": ("rows=slots.rows)).to(dtype)",
                   "rows=slots.rows)).to(dtype) * scores.sigmoid().flatten()[slots.places][:, None]"),
        "values of other cells": ("values.split(size, 1)", "values.flip(1).split(size, 1)"),
        "all computed": ("if size == 1 or active == blocks:", "if True:"),
    },
)  # fmt: skip
def masked_blocks(seed: int) -> list[Check]:
    """Every number of active blocks of 1 and of 3 cells."""
    torch.manual_seed(seed)
    dense: Any = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    x, errors = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randn(9, 5).double()
    leaves, checks = [x, *dense.parameters()], list[Check]()
    plain = operations(lambda: dense(x))["total"]
    for size, active in [(1, a) for a in (1, 5, 12)] + [(3, a) for a in range(1, 5)]:
        h = x @ dense[0].weight.T + dense[0].bias
        means = torch.stack([part.mean(1) for part in h.split(size, 1)], 1)
        least = means.sort(1, descending=True).values[:, active - 1 : active]
        y = ((means >= least).repeat_interleave(size, 1) * torch.tanh(h)) @ dense[2].weight.T + dense[2].bias
        layer = AvgK.from_dense(dense, block=size, active=active)
        found, wanted = ([o, *torch.autograd.grad(o, leaves, errors)] for o in (layer(x), y))
        worst = max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, wanted, strict=True))
        checks.append(Check(worst, 1e-9, what=f"{active} blocks of {size}"))
        if size == 3 and active < 4:
            spent = operations(functools.partial(layer, x))["total"]
            checks.append(Check(spent * 12, plain * (3 * active + 2), "==", "operations"))
    return checks


@claim(
    "with one-cell blocks the validation loss of a small language model is no higher than with Switch (top-1 of "
    "experts of 64 cells, gate and balance loss) at equal active FFN parameters, mean of 3 seeds",
    row=185,
    tier="slow",
    budget=600.0,
    mutants={"smallest scores": ("scores.topk(active, 1).indices, True", "(-scores).topk(active, 1).indices, True")},
)
def language_model(seed: int) -> Check:
    """Avg-K's loss less Switch's, in nats per character: tinyshakespeare, 2 blocks of width 64, 64 of 1024 cells."""
    gaps = [_loss(s, "avg-k") - _loss(s, "switch") for s in range(3 * seed, 3 * seed + 3)]
    return Check(sum(gaps) / 3, 0.0)


def _loss(seed: int, kind: str, steps: int = 400) -> float:
    """Validation loss after ``steps`` batches of 32 windows, by AdamW from 2e-3 with a cosine to zero."""
    from weft.data import load
    from weft.models.transformer import CharTransformer

    data = load("tinyshakespeare")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharTransformer(data.classes, width=64, heads=4, layers=2)
    for i, block in enumerate(model.blocks):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(97 * seed + i)
            cells = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))
        made: Any = AvgK(cells, block=1, active=64)
        if kind == "switch":
            given: dict[str, Any] = {"zero": 0, "copy": 0, "constant": 0, "active": 1, "renormalise": False}
            made = MoEPlusPlus(
                64,
                64,
                experts=16,
                activation=nn.ReLU,
                tau=1.0,
                capacity=1.25,
                balance=0.16,
                seed=97 * seed + i,
                **given,
            )
        block.mlp = made
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.x_train), (32,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x_train[rows]).flatten(0, 1), data.y_train[rows].flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        x, y = data.x_validation[:500], data.y_validation[:500]
        return float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
