"""Ordinary layers on given numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["linear_of"]


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An ordinary layer with copies of these, which torch's generator has no part in."""
    outputs, features = weight.shape
    layer = nn.Linear(features, outputs, bias is not None, device="meta", dtype=weight.dtype).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
