"""Attend to the keys whose codes agree with the query's, and keep those weights alone for the backward pass.

Queries and keys [T, d] are cut into M parts, each coded by its nearest codeword (L1) of one codebook [M, C, d / M]:

    s(i, j) = #{m : code_m(q_i) = code_m(k_j)},    S_i = the l keys with the largest s(i, .),    j <= i where causal
    p_ij = softmax over S_i of q_i . k_j / sqrt(d),    o_i = sum_{j in S_i} p_ij v_j

Kept are p [T, l] and the indices of S_i, in place of p [T, T]. The backward pass is that of the sparse softmax,
dA = p (dP - sum p dP); codes have no derivative. Among equal scores the nearest keys win, the earlier of two.

As in the authors' code: L1 distances, one codebook for both, 16 codewords of 8 numbers, l = T / 8. Unlike there,
no logit is clamped to 10, no key enters twice, and products are computed for blocks of queries and all keys, so that
time is dense attention's and memory that of one block. Its codebook is trained by gradients of a loss of its own
(`weft.ops.product_codes.codebook_loss`) beside dense attention; `SparseAttention.fit_codebook` takes means instead.

Paper: "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification", Yuntao Gui, Xiao Yan,
Peiqi Yin, Han Yang, James Cheng, 2023, arXiv:2312.10365.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import DataError, Unsupported, UsageError
from weft.method import method
from weft.ops.indexed_attention import IndexedAttention
from weft.ops.product_codes import chosen, codes
from weft.session import kept
from weft.testing.example import Example

INDICES = {"int32": torch.int32, "int16": torch.int16}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    keep: float = 1 / 8,
    causal: bool = False,
    ignore: Tensor | None = None,
    index: str = "int32",
) -> Tensor:
    """Attention over the fraction ``keep`` of the keys; differentiable once.

    Args:
        q: queries ``[B, H, T, d]``.
        k: keys ``[B, H, S, d]``; S = T where causal.
        v: values ``[B, H, S, e]``.
        codebook: ``[M, C, d / M]``.
        keep: each query takes ceil(keep S) keys.
        causal: a query sees the keys up to its own place.
        ignore: ``[B, S]``, True for keys that no query sees.
        index: how indices are kept: ``"int32"``, or ``"int16"`` for at most 32,768 keys.

    Raises:
        UsageError: for another fraction, index or codebook, and more keys than the index can name.
        DataError: for a causal call with T keys and another number of queries.
    """
    if not 0 < keep <= 1 or index not in INDICES:
        raise UsageError(f"keep={keep!r}, index={index!r}; keep is above 0 and at most 1, index one of {list(INDICES)}")
    if codebook.ndim != 3 or codebook.shape[0] * codebook.shape[2] != q.shape[-1]:
        raise UsageError(f"a codebook {tuple(codebook.shape)} for vectors of {q.shape[-1]}; it is [M, C, d / M]")
    size = k.shape[-2]
    if size > torch.iinfo(INDICES[index]).max + 1:
        raise UsageError(f"{size} keys do not fit into {index}; use index='int32'")
    if causal and q.shape[-2] != size:
        raise DataError(f"{q.shape[-2]} queries and {size} keys; where causal they are the same places")
    with torch.no_grad():
        at = chosen(q, k, codebook, math.ceil(keep * size - 1e-9), causal, ignore).to(INDICES[index])
    out: Tensor = IndexedAttention.apply(q, k, v, at, causal, ignore)[0]
    return out


@method("sparse-attention", contract="layer", family="tape", papers=[214])
class SparseAttention(Convertible):
    """An ``nn.MultiheadAttention`` that attends to the keys chosen by product quantisation.

    Called as the layer is, ``layer(x, x, x)``; returns (output, None), as weights are not made. The codebook is a
    buffer: random normal until `fit_codebook`.

    Args:
        layer: batch first, without dropout, added keys or keys and values of other sizes; it is used, not copied.
        keep, causal, index: see `sparse_attention`; ``is_causal=True`` in a call does the same as ``causal``.
        codeword: numbers in each part of a head's vectors.
        codewords: C.
        seed: of the first codebook.

    Raises:
        Unsupported: for other layers; in a call, for a mask that is not causal.
        UsageError: for heads that are not a multiple of ``codeword``.
    """

    converts = (nn.MultiheadAttention,)
    codebook: Tensor
    batch_first, in_proj_bias = True, None  # without a bias torch's encoder layers call this layer, not go past it

    def __init__(
        self,
        layer: nn.Module,
        *,
        keep: float = 1 / 8,
        causal: bool = False,
        index: str = "int32",
        codeword: int = 8,
        codewords: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if type(layer) is not nn.MultiheadAttention:
            raise Unsupported(f"{type(layer).__name__} is not nn.MultiheadAttention", "nn.MultiheadAttention")
        plain = isinstance(layer.in_proj_weight, nn.Parameter) and layer.bias_k is None and not layer.add_zero_attn
        if not (plain and layer.batch_first) or layer.dropout:
            raise Unsupported(f"{layer} is not batch first, drops out, or adds or resizes keys", "batch_first=True")
        if codeword < 1 or codewords < 1 or layer.head_dim % codeword:
            raise UsageError(f"heads of {layer.head_dim} are no multiple of codeword={codeword}; codewords={codewords}")
        self.layer, self.keep, self.causal, self.index = layer, keep, causal, index
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(layer.head_dim // codeword, codewords, codeword, generator=draw)
        self.register_buffer("codebook", start.to(layer.in_proj_weight))

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> SparseAttention:
        """The layer with sparse attention, on the same parameters."""
        return cls(layer, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """``[B, T, D] -> [B, T, D]``, or without B, and None; keys and values are the queries unless given."""
        if query.ndim == 2:
            key, value, key_padding_mask = (None if t is None else t[None] for t in (key, value, key_padding_mask))
            out, _ = self(query[None], key, value, key_padding_mask, attn_mask=attn_mask, is_causal=is_causal)
            return out[0], None
        if attn_mask is not None and not is_causal:
            raise Unsupported("a mask of each query's own", "is_causal=True, or key_padding_mask of bools")
        ignore = key_padding_mask
        if ignore is not None and ignore.dtype != torch.bool:
            if not bool(((ignore == 0) | ignore.isneginf()).all()):
                raise Unsupported("a padding mask of numbers", "bools, True for padding")
            ignore = ignore.isneginf()
        key = query if key is None else key
        q, k, v = self._heads(query, key, key if value is None else value)
        how: dict[str, Any] = {"keep": self.keep, "causal": self.causal or is_causal, "index": self.index}
        out = sparse_attention(q, k, v, self.codebook, ignore=ignore, **how)
        return self.layer.out_proj(out.transpose(1, 2).flatten(2)), None

    @torch.no_grad()
    def fit_codebook(self, x: Tensor, *, steps: int = 10) -> None:
        """Codewords as means of the parts of queries and keys nearest to them, ``steps`` times, for ``x [B, T, D]``."""
        q, k, _ = self._heads(x, x, x)
        parts = torch.cat([q.flatten(0, 2), k.flatten(0, 2)]).unflatten(-1, (len(self.codebook), -1))
        number = self.codebook.shape[1]
        self.codebook.copy_(parts[torch.linspace(0, len(parts) - 1, number, device=x.device).long()].transpose(0, 1))
        for _ in range(steps):
            near = F.one_hot(codes(parts.flatten(1), self.codebook), number).to(parts)
            count, total = near.sum(0)[..., None], torch.einsum("nmc,nmd->mcd", near, parts)
            self.codebook.copy_(torch.where(count > 0, total / count.clamp(min=1), self.codebook))

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        layer = self.layer
        weights = layer.in_proj_weight.chunk(3)
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        made = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return [h.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for h in made]


def example() -> Example:
    """Two heads of four numbers, and three sequences of eight tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 8, 8)
    return Example(layer, (x, x.clone(), x.clone()), torch.arange(3), {"keep": 0.5, "codeword": 2})


def _dense(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Dense attention, without the places that are hidden."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bhje->bhie", logits.masked_fill(hidden, -math.inf).softmax(-1), v)


def _apart(found: Tensor, wanted: Tensor, leaves: list[Tensor], errors: Tensor) -> float:
    """Largest relative error of outputs and gradients."""
    pairs = [(found, wanted)]
    pairs += zip(*(torch.autograd.grad(out, leaves, errors) for out in (found, wanted)), strict=True)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


@claim(
    "with all keys kept, outputs and gradients are dense attention's to 1e-9 in float64, causal, padded and neither",
    row=214,
    mutants={
        "future seen": ("masked_fill(at > row, -math.inf)", "clone()", "weft.ops.indexed_attention"),
        "padding seen": (".gather(-1, at), -math.inf)", ".gather(-1, at), 0.0)", "weft.ops.indexed_attention"),
        "unscaled": ("(scale * part @ k.mT)", "(part @ k.mT)", "weft.ops.indexed_attention"),
        "softmax without its sum": ("(dp - (weights * dp).sum(-1, keepdim=True))", "dp", "weft.ops.indexed_attention"),
        "keys of the last block": ("dk += da.mT", "dk = da.mT", "weft.ops.indexed_attention"),
        "values forgotten": ("dv += _spread", "dv -= 0 * _spread", "weft.ops.indexed_attention"),
        "gradient unscaled": ("da = scale * weights", "da = weights", "weft.ops.indexed_attention"),
    },
)
def all_keys(seed: int) -> list[Check]:
    """Two heads and more queries than one block has."""
    torch.manual_seed(seed)
    size = 260 + seed % 30
    q, k, v, errors = (torch.randn(2, 2, size, 6, dtype=torch.float64, requires_grad=True) for _ in range(4))
    codebook, future = torch.randn(3, 5, 2), torch.ones(size, size, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, size, dtype=torch.bool)
    padding[0, 3:9] = padding[1, -5:] = True
    checks = []
    for causal, ignore in ((False, None), (True, None), (False, padding), (True, padding)):
        hidden = future & causal if ignore is None else future & causal | ignore[:, None, None]
        found = sparse_attention(q, k, v, codebook, keep=1.0, causal=causal, ignore=ignore)
        worst = _apart(found, _dense(q, k, v, hidden), [q, k, v], errors)
        checks.append(Check(worst, 1e-9, what=f"causal={causal}, padding={ignore is not None}"))
    return checks


@claim(
    "with one eighth of the keys kept, weights take exactly one eighth of dense attention's bytes, and indices "
    "as many in int32, half as many in int16",
    row=214,
    mutants={
        "all kept": ("math.ceil(keep * size - 1e-9)", "size"),
        "long indices": ('"int32": torch.int32', '"int32": torch.int64'),
        "weights twice": (
            "(q, k, v, index, output[1])",
            "(q, k, v, index, output[1], output[1].clone())",
            "weft.ops.indexed_attention",
        ),
    },
)
def bytes_kept(seed: int) -> list[Check]:
    """Bytes beyond queries, keys and values, in float32."""
    torch.manual_seed(seed)
    heads, size, checks = 1 + seed % 4, 8 * (8 + seed % 9), []
    for index, width in (("int32", 4), ("int16", 2)):
        q, k, v = (torch.randn(2, heads, size, 4, requires_grad=True) for _ in range(3))
        with kept(nn.Identity()) as count:
            out = sparse_attention(q, k, v, torch.randn(2, 16, 2), index=index, causal=bool(seed % 2))
        found = count.peak_bytes - 3 * q.nbytes
        checks.append(Check(found, 2 * heads * size * size * (4 + width) / 8, "==", f"{index}, {out.ndim} dimensions"))
    return checks


@claim(
    "the keys kept are those whose codes agree most, the nearest among equals, and gradients are those of attention to "
    "them alone",
    row=214,
    mutants={
        "fewest agree": ("score * (4 * size)", "score * (-4 * size)", "weft.ops.product_codes"),
        "furthest among equals": ("- 2 * (row - column).abs()", "+ 2 * (row - column).abs()", "weft.ops.product_codes"),
        "farthest codeword": (".argmin(-1)", ".argmax(-1)", "weft.ops.product_codes"),
        "Euclidean": ("w, p=1)", "w, p=2)", "weft.ops.product_codes"),
        "future chosen": ("rank.masked_fill(column > row, lowest)", "rank", "weft.ops.product_codes"),
    },
)
def keys_chosen(seed: int) -> list[Check]:
    """Against a search query by query; 40 queries, some with fewer keys before them than are kept."""
    torch.manual_seed(seed)
    drawn = (torch.randn(4, 1, 2, 40, 6, dtype=torch.float64) * 2**10).round() / 2**10  # distances without rounding
    q, k, v, errors = (t.clone().requires_grad_() for t in drawn)
    codebook, checks = (torch.randn(2, 4, 3) * 2**10).round() / 2**10, []

    def nearest(z: Tensor) -> list[int]:
        words = codebook.tolist()
        part = [z[:3].float().tolist(), z[3:].float().tolist()]
        away = [[sum(abs(a - b) for a, b in zip(part[m], w, strict=True)) for w in words[m]] for m in range(2)]
        return [min(range(4), key=away[m].__getitem__) for m in range(2)]

    for causal in (False, True):
        hidden = torch.ones(1, 2, 40, 40, dtype=torch.bool)
        for h in range(2):
            ours, theirs = ([nearest(z) for z in t.detach()[0, h]] for t in (q, k))
            for i in range(40):
                order = sorted(
                    range(i + 1 if causal else 40),
                    key=lambda j: (-sum(map(int.__eq__, ours[i], theirs[j])), abs(i - j), j),
                )
                hidden[0, h, i, order[:5]] = False
        found = sparse_attention(q, k, v, codebook, causal=causal)
        checks.append(Check(_apart(found, _dense(q, k, v, hidden), [q, k, v], errors), 1e-9, what=f"causal={causal}"))
    return checks
