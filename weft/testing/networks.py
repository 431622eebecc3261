"""Four kinds of network, each with a batch, that what is checked on every model is checked on."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.models.transformer import CharTransformer

Network = tuple[nn.Module, tuple[Tensor, ...]]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(24, 48, batch_first=True), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


class Tied(nn.Module):
    """One weight in two places, and one activation that two branches save."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.second(h) + F.linear(h.t(), h.t()[:, : self.first.in_features]).sum()


@functools.cache
def networks() -> dict[str, Network]:
    """An MLP, a convnet, a transformer and an LSTM, each with a batch; the same ones at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 5))
        conv = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        conv.extend([nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * 16, 5)])
        return {
            "MLP": (mlp, (torch.randn(128, 64), torch.arange(128) % 5)),
            "convnet": (conv, (torch.randn(8, 3, 16, 16), torch.arange(8) % 5)),
            "transformer": (
                CharTransformer(5, width=32, heads=2, layers=2, context=32),
                (torch.randint(5, (8, 32)), torch.randint(5, (8, 32))),
            ),
            "LSTM": (_Recurrent(), (torch.randn(16, 20, 24), torch.randint(5, (16, 20)))),
        }


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every label."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gradients_of(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Of `loss_of`, by every parameter."""
    return list(torch.autograd.grad(loss_of(model, *batch), list(model.parameters())))
