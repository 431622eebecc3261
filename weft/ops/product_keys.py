"""The best of n m keys, each a pair of sub-keys, found by scoring the n + m sub-keys."""

from __future__ import annotations

from torch import Tensor

from weft.errors import UsageError

__all__ = ["product_key_topk"]


def product_key_topk(query: Tensor, first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers ``[..., k]`` of the k best of all keys (c_i, c'_j), number i m + j: exactly those, in order.

    The k best pairs are among the pairs of the k best sub-keys of each half: any other has k pairs above it.

    Args:
        query: ``[..., d]``, its first half for the first sub-keys.
        first, second: ``[n, d/2]`` and ``[m, d/2]``.
        k: 1 to n m.

    Raises:
        UsageError: for shapes or a k that do not fit.
    """
    half = query.shape[-1] // 2
    if query.shape[-1] != 2 * half or not first.shape[1:] == second.shape[1:] == (half,):
        raise UsageError(f"queries of {query.shape[-1]} for sub-keys {tuple(first.shape)} and {tuple(second.shape)}")
    if not 1 <= k <= first.shape[0] * second.shape[0]:
        raise UsageError(f"k={k} of {first.shape[0] * second.shape[0]} keys")
    a, i = (query[..., :half] @ first.t()).topk(min(k, first.shape[0]), -1)
    b, j = (query[..., half:] @ second.t()).topk(min(k, second.shape[0]), -1)
    sums = (a[..., :, None] + b[..., None, :]).flatten(-2)
    scores, best = sums.topk(k, -1)
    numbers = (i[..., :, None] * second.shape[0] + j[..., None, :]).flatten(-2)
    return scores, numbers.gather(-1, best)
