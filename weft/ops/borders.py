"""What stands around an image before a convolution, for every kind of padding that ``nn.Conv2d`` takes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["bordered", "borders"]


def borders(layer: Any) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """What the convolution itself puts around images, as its ``padding``, and what `bordered` puts there before.

    Zeros, as many on all sides, are the convolution's; others are (left, right, top, bottom).

    Args:
        layer: an ``nn.Conv2d``.
    """
    if layer.padding == "valid":
        before = after = (0, 0)
    elif layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before, after = (total[0] // 2, total[1] // 2), (total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        before = after = layer.padding
    if before == after and layer.padding_mode == "zeros":
        return before, None
    return (0, 0), (before[1], after[1], before[0], after[0])


def bordered(image: Tensor, border: tuple[int, int, int, int] | None, mode: str) -> Tensor:
    """``[B, C, H, W]`` with the border of `borders`; ``mode`` is the layer's ``padding_mode``."""
    return image if border is None else F.pad(image, border, "constant" if mode == "zeros" else mode)
