"""A discrete diffusion of label embeddings: how much of the label is in each step, and the step between two."""

from __future__ import annotations

import math

from torch import Tensor


def cosine_schedule(steps: int) -> list[float]:
    """A_0 .. A_T: the share of a noised label's variance that is the label, from nearly none to nearly all."""
    return [1e-3 + 0.998 * math.cos((1 - t / steps) * math.pi / 2) ** 2 for t in range(steps + 1)]


def transition(before: float, after: float) -> tuple[float, float, float]:
    """a, b and c of ``z_t = a u + b z_{t-1} + sqrt(c) e``, from A_{t-1} to A_t; a^2 / c is S_t - S_{t-1}."""
    ratio, noise = before / after, 1 - before
    a = math.sqrt(after) * (1 - ratio) / noise
    return a, math.sqrt(ratio) * (1 - after) / noise, (1 - after) * (1 - ratio) / noise


def noised(label: Tensor, kept: float, noise: Tensor) -> Tensor:
    """A draw of q(z|y), from embeddings ``[B, K]`` and standard normal ``noise`` ``[B, K]``."""
    return math.sqrt(kept) * label + math.sqrt(1 - kept) * noise
