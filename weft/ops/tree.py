"""Binary trees of decisions over small networks: how leaves are mixed, how even their load is, one leaf for each row.

Nodes are numbered level by level from 0; those below node i are 2 i + 1, to the left, and 2 i + 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["entropy", "imbalance", "kernel_activation", "leaf_outputs", "mixed_leaves", "mixture"]


def mixture(c: Tensor) -> Tensor:
    """m ``[N, 2^d]`` from the probabilities c ``[N, 2^d - 1]`` of going right at each node, level by level."""
    m, first = torch.ones_like(c[:, :1]), 0
    while first < c.shape[1]:
        level = c[:, first : 2 * first + 1]
        m, first = torch.stack([m * (1 - level), m * level], 2).flatten(1), 2 * first + 1
    return m


def entropy(z: Tensor) -> Tensor:
    """Of a decision with the logit z, in nats."""
    return F.softplus(z) - z * z.sigmoid()


def imbalance(m: Tensor, taken: Tensor) -> Tensor:
    """``2^d sum_j mean(taken_j) mean(m_j)``, 1 where the load is even; both ``[N, 2^d]``."""
    return m.shape[1] * (taken.mean(0) * m.mean(0)).sum()


def leaf_outputs(
    x: Tensor,
    leaf: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: nn.Module,
) -> Tensor:
    """``[N, O]``: of each row of ``x [N, D]`` the leaf that ``leaf [N]`` names; rows with one leaf together."""
    if torch.compiler.is_compiling():  # no control flow by data
        h = activation(torch.einsum("nd,nwd->nw", x, up[leaf]) + (0 if up_bias is None else up_bias[leaf]))
        return torch.einsum("nw,nwo->no", h, down[leaf]) + (0 if down_bias is None else down_bias[leaf])
    order = leaf.argsort(stable=True)
    counts = leaf.bincount(minlength=len(up)).tolist()
    ups, downs = up.unbind(), down.unbind()  # one gradient for all leaves, not one of full size for each
    parts, rows = [], x[order].split(counts)
    for j, part in enumerate(rows):
        if counts[j] or j == 0:  # the first one makes an empty batch's output
            h = activation(F.linear(part, ups[j], None if up_bias is None else up_bias[j]))
            parts.append(F.linear(h, downs[j].mT, None if down_bias is None else down_bias[j]))
    return torch.cat(parts)[order.argsort()]


def mixed_leaves(
    x: Tensor,
    m: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: nn.Module,
) -> Tensor:
    """``[N, O]``: every leaf's output for ``x [N, D]``, weighted by m ``[N, L]`` and summed, in two products."""
    h = activation(F.linear(x, up.flatten(0, 1), None if up_bias is None else up_bias.flatten()))
    h = h.unflatten(1, up.shape[:2]) * m.unsqueeze(2).to(h.dtype)
    out = F.linear(h.flatten(1), down.flatten(0, 1).mT)
    return out if down_bias is None else out + F.linear(m.to(out.dtype), down_bias.mT)


def kernel_activation(activation: nn.Module) -> str | None:
    """The kernel's name of an activation, if it has it."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(activation))
