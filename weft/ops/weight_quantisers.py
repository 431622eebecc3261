"""What holds a weight matrix in few bits, for methods that take any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.bits import pack_bits, unpack_bits

__all__ = ["GroupQuantiser", "Quantiser"]


class Quantiser(Protocol):
    """What holds a weight in few bits; any object with these two methods is one."""

    def quantise(self, weight: Tensor) -> Mapping[str, Any]:
        """The state of a weight ``[out, in]``: tensors by name, and whatever else `dequantise` needs."""

    def dequantise(self, state: Mapping[str, Any]) -> Tensor:
        """The weight ``[out, in]`` of a state, the same each time, on the device of its tensors."""


class GroupQuantiser:
    """Affine round-to-nearest with ``bits`` a code, and 16 bits for each end of a group of consecutive weights.

    Raises:
        UsageError: for other bits than 2, 3, 4 and 8, or a group of less than two weights.
    """

    def __init__(self, bits: int = 3, group: int = 64) -> None:
        if bits not in (2, 3, 4, 8) or group < 2:
            raise UsageError(f"bits={bits!r}, group={group!r}; bits are 2, 3, 4 or 8, and a group has at least 2")
        self.bits, self.group = bits, group

    def quantise(self, weight: Tensor) -> dict[str, Any]:
        flat = weight.detach().float().flatten()
        short = -flat.numel() % self.group
        groups = torch.cat([flat, flat[-1:].expand(short)]).view(-1, self.group)
        ends = torch.stack([groups.amin(1), groups.amax(1)], 1).bfloat16()
        low, step = self._grid(ends)
        codes = ((groups - low) / step.where(step > 0, 1)).round().clamp(0, 2**self.bits - 1)
        codes = codes.byte().flatten()[: flat.numel()]
        return {"codes": pack_bits(codes, self.bits), "ends": ends, "shape": weight.shape}

    def dequantise(self, state: Mapping[str, Any]) -> Tensor:
        shape = state["shape"]
        codes = unpack_bits(state["codes"], self.bits, shape.numel())
        codes = F.pad(codes, (0, -shape.numel() % self.group)).view(-1, self.group)
        low, step = self._grid(state["ends"])
        return torch.addcmul(low, codes, step).flatten()[: shape.numel()].view(shape)

    def _grid(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        low, high = ends.float().split(1, 1)
        return low, (high - low) / (2**self.bits - 1)
