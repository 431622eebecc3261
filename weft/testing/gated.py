"""A small gated feed-forward layer and a transformer with one, with their equations written out in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``: ``[..., D] -> [..., D]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down_proj, self.act_fn = nn.Linear(hidden, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


def gate_and_up(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(W x + b)`` and ``W x + b`` of a `Gated`, ``[N, H]`` in float64."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    a = x.double() @ w["gate_proj.weight"].T + w["gate_proj.bias"]
    return a / (1 + (-a).exp()), x.double() @ w["up_proj.weight"].T + w["up_proj.bias"]


def masked(layer: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """The output of a `Gated` in float64, with the gates at zero where ``keep [N, H]`` is."""
    a, u = gate_and_up(layer, x)
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    return (a * u * keep) @ w["down_proj.weight"].T + w["down_proj.bias"]


def clear(sizes: Tensor, threshold: Tensor) -> Tensor:
    """Tokens ``[N]`` none of whose activations' sizes ``[N, H]`` is so near its threshold that rounding decides."""
    return ((sizes - threshold.double()).abs() > 1e-4 * threshold.double()).all(1)


def uneven(seed: int, width: int, hidden: int) -> Any:
    """A `Gated` whose up projections differ in size, in an ``nn.Sequential``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Gated(width, hidden)
        with torch.no_grad():
            layer.up_proj.weight.mul_(2 * torch.rand(hidden, 1))
    return nn.Sequential(layer)


class RowTransformer(nn.Module):
    """One block of attention and a `Gated` over the rows of images: ``[B, 1, 8, 8]`` to scores ``[B, 10]``."""

    def __init__(self, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.mix, self.feed = nn.Linear(width, 3 * width), nn.Linear(width, width), Gated(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        h = self.embed(x.view(-1, 8, 8)) + self.position
        q, k, v = self.qkv(self.norms[0](h)).chunk(3, -1)
        h = h + self.mix(F.scaled_dot_product_attention(q, k, v))
        out: Tensor = self.head((h + self.feed(self.norms[1](h))).mean(1))
        return out


def trained(seed: int, x: Tensor, y: Tensor, steps: int = 200) -> Any:
    """A `RowTransformer` after so many steps of Adam; torch's global generator is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RowTransformer()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            rows = torch.randint(0, len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model
