"""Straight-through estimators: what has the derivative zero almost everywhere gets another one on the way back.

    y = f(x).detach() + (z - z.detach()),   dy/dx := dz/dx

What is added is exactly 0 where z is finite; forward mode, second derivatives and compilers need nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.kernels.signs import signs

__all__ = ["mean_magnitude", "scaled_signs", "sign_through", "straight_through"]


def straight_through(values: Tensor, z: Tensor) -> Tensor:
    """The values, with the gradient of z, which has their shape."""
    return values.detach() + (z - z.detach())


def mean_magnitude(x: Tensor) -> Tensor:
    """The mean of |x| over the last dimension, which stays; summed in float32 at least, 0 where there is nothing."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.abs().sum(-1, keepdim=True, dtype=wide) / max(x.shape[-1], 1)).to(x.dtype)


def sign_through(x: Tensor) -> Tensor:
    """1 where x >= 0, else -1; on the way back as if it were x in [-1, 1] and constant outside."""
    return straight_through(signs(x), torch.where(x.detach().abs() <= 1, x, 0))


def scaled_signs(w: Tensor) -> Tensor:
    """``a sign(w)`` with a = mean |w| of each row of w ``[O, D]``; on the way back ``g (1/D + a [|w| <= 1])``."""
    fixed = w.detach()
    size = mean_magnitude(fixed)
    return straight_through(size * signs(fixed), w * (size * (fixed.abs() <= 1) + 1 / max(w.shape[1], 1)))
