"""Masks of sparse weights: which to begin with, and which to go on with, as functions of tensors.

- once for all: `random_mask`, `magnitude_mask`;
- gradual magnitude pruning: `magnitude_mask` of what is left, at the density of `cubic_density`:
  1 - s, s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3. M. Zhu, S. Gupta, "To prune, or not to prune", 2017,
  arXiv:1710.01878;
- RigL: `rigl_mask` drops the fraction f(t) = f / 2 (1 + cos(pi t / T)) of the stored weights, the smallest, and stores
  as many others, where the loss's gradient is largest; those begin at 0. U. Evci et al., "Rigging the Lottery: Making
  All Tickets Winners", 2020, arXiv:1911.11134. What was dropped may come back at once, and then keeps its value, as in
  the authors' code; ties are broken by position, where that code adds a little noise.

A sparse layer takes a new mask in the middle of training by ``layer.set_mask_(mask, optimizer)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.errors import DataError, UsageError

__all__ = ["cosine_fraction", "cubic_density", "magnitude_mask", "random_mask", "rigl_mask"]


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    """True at ``round(density * elements)`` places, each choice of places equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return magnitude_mask(torch.rand(shape, generator=generator, dtype=torch.float64), density)


def magnitude_mask(weight: Tensor, density: float, mask: Tensor | None = None) -> Tensor:
    """True where ``|weight|`` is among the ``round(density * elements)`` largest; of equal ones the first.

    Args:
        weight: any shape.
        density: part of all elements that stays, from 0 to 1.
        mask: what is stored so far; nothing else may stay, so that fewer may.

    Raises:
        UsageError: for a density outside [0, 1].
        DataError: for weights that are not finite, or a mask of another shape.
    """
    if not 0 <= density <= 1:
        raise UsageError(f"density={density!r}: give a number from 0 to 1")
    score = _magnitude("weight", weight, weight)
    count = round(density * weight.numel())
    if mask is not None:
        _check(weight, mask)
        score, count = torch.where(mask, score, -1.0), min(count, int(mask.sum()))
    return _largest(score, count)


def cubic_density(step: int, *, start: int, stop: int, final: float, initial: float = 1.0) -> float:
    """Part of the weights that stays at a step: ``initial`` up to ``start``, ``final`` from ``stop`` on.

    Raises:
        UsageError: where ``stop`` does not come after ``start``.
    """
    if stop <= start:
        raise UsageError(f"start={start}, stop={stop}: pruning ends after it starts")
    left = 1 - min(max(step - start, 0), stop - start) / (stop - start)
    return final + (initial - final) * left**3


def cosine_fraction(step: int, stop: int, initial: float = 0.3) -> float:
    """Part of the stored weights that RigL moves at a step: from ``initial`` at 0 down to 0 at ``stop``.

    Raises:
        UsageError: for ``stop`` below 1.
    """
    if stop < 1:
        raise UsageError(f"stop={stop}: give the last step at which masks change, at least 1")
    return initial / 2 * (1 + math.cos(math.pi * min(step, stop) / stop))


def rigl_mask(weight: Tensor, mask: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """The next mask, with as many places as this one.

    Args:
        weight: any shape; read where the mask is True.
        mask: of that shape.
        gradient: the loss's, by every place of the weight, those that are not stored among them.
        fraction: part of the stored weights that is dropped, from 0 to 1; rounded down to a whole number of them.

    Raises:
        UsageError: for a fraction outside [0, 1].
        DataError: for tensors that do not fit or are not finite.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"fraction={fraction!r}: give a number from 0 to 1")
    _check(weight, mask)
    _check(gradient, mask)
    dropped = int(fraction * int(mask.sum()))
    size = torch.where(mask, _magnitude("weight", weight, weight), -1.0)
    kept = _largest(size, int(mask.sum()) - dropped)
    return kept | _largest(torch.where(kept, -1.0, _magnitude("gradient", gradient, weight)), dropped)


def _largest(score: Tensor, count: int) -> Tensor:
    order = score.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(score, dtype=torch.bool).flatten().index_fill_(0, order, True).view(score.shape)


def _magnitude(name: str, t: Tensor, like: Tensor) -> Tensor:
    found = t.detach().to(like.device).abs().to(torch.promote_types(t.dtype, torch.float32))
    if not bool(torch.isfinite(found).all()):
        raise DataError(f"the {name} is not finite: there is no order of its elements; lower the learning rate")
    return found


def _check(t: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != t.shape:
        raise DataError(f"a mask {mask.dtype} {list(mask.shape)} for elements {list(t.shape)}: give booleans, one each")
