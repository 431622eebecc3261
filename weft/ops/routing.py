"""Which tokens go to which group, and how evenly.

Slots are pairs of a token and one of the groups chosen for it; they are sorted by group, so that each group's weight is
multiplied with one block of rows (`weft.kernels.grouped.grouped_linear`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Slots", "balance_loss", "sorted_slots", "top_gates", "within_capacity"]


class Slots(NamedTuple):
    """Slots in the order of their groups.

    Attributes:
        rows: ``[N]``, the token of each slot.
        places: ``[N]``, the slot's place among ``T * K``, token by token.
        sizes: ``[G]``, slots of each group; their sum is N.
    """

    rows: Tensor
    places: Tensor
    sizes: Tensor


def sorted_slots(chosen: Tensor, groups: int, *, every: bool = False) -> Slots:
    """The slots of the first ``groups`` groups, of each group in the order of the tokens.

    Args:
        chosen: ``[T, K]``, groups of each token; numbers from ``groups`` on belong to none of them and are left out.
        groups: G.
        every: no number is ``groups`` or more, so that N is T K.
    """
    of, places = chosen.reshape(-1).sort(stable=True)
    sizes = _counts(of, groups)
    places = places if every else places[of < groups]
    return Slots(places // chosen.shape[1], places, sizes)


def within_capacity(chosen: Tensor, capacity: Tensor) -> Tensor:
    """Whether each slot ``[T, K]`` is among the first ``capacity [G]`` of its group, in the order of the tokens."""
    of, places = chosen.reshape(-1).sort(stable=True)
    sizes = _counts(of, len(capacity))
    number = torch.arange(of.shape[0], device=of.device) - (sizes.cumsum(0) - sizes)[of]
    return torch.empty_like(of, dtype=torch.bool).scatter_(0, places, number < capacity[of]).view_as(chosen)


def _counts(of: Tensor, groups: int) -> Tensor:
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=of.device)
    return counts.index_add_(0, of.clamp(max=groups), torch.ones_like(of))[:groups]


def top_gates(logits: Tensor, active: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``softmax(logits)`` ``[T, G]``; of the ``active`` largest, values and groups ``[T, K]``.

    Args:
        logits: ``[T, G]``; computed in float32 at least.
        active: K.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = wide.softmax(-1)
    gates, chosen = probabilities.topk(active, -1)
    return probabilities, gates, chosen


def balance_loss(probabilities: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_i weight_i f_i P_i``: f_i is the share of tokens that chose group i, P_i the mean of its probabilities.

    Least where tokens spread evenly over the groups: K / G for weights of one. 0 without tokens.

    Args:
        probabilities: ``[T, G]``; the gradient flows through them alone.
        chosen: ``[T, K]``.
        weights: ``[G]``; None for ones.
    """
    tokens, groups = max(probabilities.shape[0], 1), probabilities.shape[1]
    share = torch.zeros(groups, dtype=probabilities.dtype, device=probabilities.device)
    share = share.index_add(0, chosen.reshape(-1), share.new_ones(chosen.numel())) / tokens
    return (share if weights is None else share * weights.to(share)) @ probabilities.sum(0) / tokens
