"""Layers with experts against a loop over the experts and against dense layers: one training step, one thread.

The loop is a fair one: a weight of its own for each expert, rows by index_select, results by index_add_. ``dense`` has
the hidden units that are active for a token (the same operations, without a router), ``wide`` all hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ratios import ratio
from weft.ffn import PEER, AvgK, MoEPlusPlus

COPIES = 4  # inputs in turn
BLOCKS = (8, 32, 128, 512)  # cells that Avg-K takes together
BARE = {"zero": 0, "copy": 0, "constant": 0, "tau": 1.0, "capacity": None, "balance": 0.0}
MIXTURES = [  # experts, active, d, hidden, tokens
    *((64, 2, 512, 256, tokens) for tokens in (2048, 32, 256, 8192)),
    (8, 2, 512, 1024, 2048),
    (64, 2, 64, 32, 2048),
]


class Loop(nn.Module):
    """A mixture's experts, one after another."""

    def __init__(self, mixture: MoEPlusPlus) -> None:
        super().__init__()
        self.router, self.active = mixture.router, mixture.active
        self.up, self.down = mixture.up, mixture.down
        self.up_bias = nn.ParameterList([*mixture.up_bias.detach()])
        self.down_bias = nn.ParameterList([*mixture.down_bias.detach()])

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        gates, chosen = F.linear(x.float(), self.router.float()).softmax(1).topk(self.active)
        gates = (gates / gates.sum(1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for e in range(len(self.up)):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            h = F.gelu(F.linear(x.index_select(0, rows), self.up[e], self.up_bias[e]))
            y = F.linear(h, self.down[e], self.down_bias[e])
            out.index_add_(0, rows, y * gates[rows, place, None])
        return out


class Grouped(Loop):
    """The same by torch's grouped product on stacked weights."""

    def __init__(self, mixture: MoEPlusPlus) -> None:
        super().__init__(mixture)
        self.up, self.down = (nn.Parameter(torch.stack([w.detach() for w in ws])) for ws in (mixture.up, mixture.down))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``; without biases, which the operator does not take on CPUs."""
        gates, chosen = F.linear(x.float(), self.router.float()).softmax(1).topk(self.active)
        gates = (gates / gates.sum(1, keepdim=True)).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=len(self.up)).cumsum(0).to(torch.int32)
        rows = order // self.active
        h = F.gelu(F.grouped_mm(x.index_select(0, rows), self.up.mT, offs=ends))
        y = F.grouped_mm(h, self.down.mT, offs=ends) * gates.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, rows, y)


def feed_forward(d: int, hidden: int) -> nn.Sequential:
    """The dense layer."""
    return nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))


def step(layer: nn.Module, inputs: list[Tensor]) -> Callable[[int], None]:
    """Forward and backward from gradients that are not there, as after ``zero_grad``."""

    def run(i: int) -> None:
        layer.zero_grad()
        x = inputs[i % COPIES]
        x.grad = None
        layer(x).sum().backward()

    return run


def compared(
    case: str, base: nn.Module, others: dict[str, nn.Module], tokens: int, d: int, rounds: int
) -> list[dict[str, Any]]:
    """How many times faster than ``base`` each of the others is, each in its own dtype."""
    rows = []
    for name, layer in others.items():
        runs = []
        for one in (base, layer):
            dtype = next(one.parameters()).dtype
            runs.append(step(one, [torch.randn(tokens, d).to(dtype).requires_grad_() for _ in range(COPIES)]))
        rows.append({"case": case, "way": name, **ratio(runs[0], runs[1], rounds=rounds)})
    return rows


def run(say: Callable[[str], None], rounds: int = 9) -> list[dict[str, Any]]:
    """Mixtures against the loop in float32 and in bfloat16; the other layers against dense ones in float32."""
    rows = list[dict[str, Any]]()
    for experts, active, d, hidden, tokens in MIXTURES:
        case = f"{experts} experts, top {active}, d {d}, hidden {hidden}, {tokens} tokens"
        for dtype in (torch.float32, torch.bfloat16):
            ours = MoEPlusPlus(d, hidden, experts=experts, active=active, **BARE).to(dtype)
            others = {
                "ours": ours,
                "grouped_mm": Grouped(ours),
                "dense": feed_forward(d, hidden * active).to(dtype),
                "dense bf16": feed_forward(d, hidden * active).bfloat16(),
            }
            name = f"{case}, {str(dtype).removeprefix('torch.')}, to the loop"
            found = compared(name, Loop(ours), others, tokens, d, rounds)
            sizes = {"experts": experts, "hidden": hidden, "tokens": tokens, "dtype": str(dtype)[6:]}
            rows += [sizes | row for row in found]
            say(_told(rows[-len(others) :]))
    d, tokens = 512, 2048
    experts = MoEPlusPlus(d, 256, experts=8, capacity=None, balance=0.0)
    skipping = MoEPlusPlus(d, 256, experts=8, capacity=None, balance=0.0)
    with torch.no_grad():
        skipping.router[8:] *= 2.0  # more tokens for experts that compute nothing
    cells = feed_forward(d, 4096)
    cases: list[tuple[str, nn.Module, dict[str, nn.Module], int]] = [
        ("MoE++ 8 + 4, top 2, to dense of the same active units", feed_forward(d, 512),
         {"ours": experts, "ours, more skipped": skipping}, tokens),
        ("4096 hidden units, to dense of all of them", cells,
         {f"Avg-K, blocks of {g}, 1 of 8": AvgK(cells, block=g, active=0.125) for g in BLOCKS}, tokens),
        ("PEER, 65,536 experts, 8 x 16, to dense of 128 units", feed_forward(d, 128),
         {"ours": PEER(d, 65536), "ours, sparse": PEER(d, 65536, sparse=True)}, 256),
    ]  # fmt: skip
    for case, base, others, count in cases:
        others["dense bf16"] = copy.deepcopy(base).bfloat16()
        rows += compared(case, base, others, count, d, rounds)
        say(_told(rows[-len(others) :]))
    return rows


def _told(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['case']}: " + ", ".join(f"{row['way']} {row['ratio']:.2f}" for row in rows)
