"""Feed-forward layers of two linear layers, as methods take them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import Unsupported, UsageError
from weft.ops.token_layers import POINTWISE, own_weights

__all__ = ["rows_of", "two_layers"]


def two_layers(layer: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    """The parts of ``nn.Sequential(nn.Linear, activation, nn.Linear)``, whose hidden units can be divided.

    Raises:
        Unsupported: for other layers: the activation is elementwise and has no parameters, and weights are parameters
            of their own, not made by a hook.
    """
    parts: list[Any] = list(layer) if type(layer) is nn.Sequential else []
    if len(parts) != 3 or not type(parts[0]) is type(parts[2]) is nn.Linear or type(parts[1]) not in POINTWISE:
        raise Unsupported(f"{layer} has no hidden units to divide", "nn.Sequential(nn.Linear, nn.GELU(), nn.Linear)")
    own_weights(*parts)
    return parts[0], parts[1], parts[2]


def rows_of(x: Tensor, features: int, weight: Tensor) -> Tensor:
    """``[..., D]`` as ``[N, D]``.

    Raises:
        UsageError: for another number of features, or another dtype than the weight's without autocast.
    """
    if not x.ndim or x.shape[-1] != features:
        raise UsageError(f"x {list(x.shape)}: give [..., {features}]")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise UsageError(f"x is {x.dtype}, the weights are {weight.dtype}: convert one of them, by .to()")
    return x.reshape(-1, features)
