"""Feed-forward layers of two linear layers, as methods take them apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.errors import Unsupported
from weft.ops.token_layers import POINTWISE, own_weights

__all__ = ["two_layers"]


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
