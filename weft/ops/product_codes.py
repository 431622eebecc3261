"""Product quantisation: vectors as the numbers of their parts' nearest codewords, and keys whose numbers agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chosen", "codebook_loss", "codes"]

BLOCK = 256  # queries at a time


def codes(z: Tensor, codebook: Tensor) -> Tensor:
    """Numbers of the nearest codewords ``[..., M]`` of vectors ``[..., d]``, by L1 distance."""
    parts = z.detach().float().unflatten(-1, (len(codebook), -1)).unbind(-2)
    words = codebook.detach().float()
    near = [
        torch.cdist(p.flatten(0, -2), w, p=1).argmin(-1).view(p.shape[:-1]) for p, w in zip(parts, words, strict=True)
    ]
    return torch.stack(near, -1)


def codebook_loss(z: Tensor, codebook: Tensor) -> Tensor:
    """The authors' loss of a codebook: vectors, their codewords, and means of all words by inverse distance, agree."""
    parts = z.unflatten(-1, (len(codebook), -1))
    distance = (parts[..., None, :] - codebook).abs().sum(-1)
    hard = codebook[torch.arange(len(codebook), device=z.device), codes(z, codebook)]
    soft = (torch.softmax(-distance.clamp(min=1e-5).log(), -1)[..., None] * codebook).sum(-2)
    return F.mse_loss(soft, hard) + F.mse_loss(parts, hard)


def chosen(
    q: Tensor, k: Tensor, codebook: Tensor, keep: int, causal: bool = False, ignore: Tensor | None = None
) -> Tensor:
    """Indices ``[B, H, T, keep]`` of the keys ``k [B, H, S, d]`` for each query, ascending and distinct.

    Where a query may not look at ``keep`` keys, keys that it may not look at fill up. ``ignore`` ``[B, S]`` is True for
    keys of padding.
    """
    ours, theirs, size = codes(q, codebook), codes(k, codebook), k.shape[-2]
    column, found = torch.arange(size, device=q.device), []
    lowest = torch.iinfo(column.dtype).min  # distances to keys of another sequence have no bound
    for start in range(0, q.shape[-2], BLOCK):
        part = ours[..., start : start + BLOCK, :]
        row = torch.arange(start, start + part.shape[-2], device=q.device)[:, None]
        score = sum((part[..., m, None] == theirs[..., None, :, m]).int() for m in range(len(codebook)))
        rank = score * (4 * size) - 2 * (row - column).abs() + (column < row)
        if causal:
            rank = rank.masked_fill(column > row, lowest)
        if ignore is not None:
            rank = rank.masked_fill(ignore[:, None, None], lowest)
        found.append(rank.topk(keep, sorted=False).indices.sort(-1).values)
    return torch.cat(found, -2) if found else column.new_zeros(*q.shape[:-1], keep)
