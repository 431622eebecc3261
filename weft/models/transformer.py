"""A decoder-only transformer over characters, written by hand.

Sources: A. Vaswani et al., "Attention is all you need", NeurIPS 2017; the order of normalisation from R. Xiong et al.,
"On layer normalization in the transformer architecture", ICML 2020 (pre-LayerNorm); learned positions, GELU and the
0.02 of the embeddings as in A. Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import DataError, UsageError


class Block(nn.Module):
    """``h = x + attention(norm1(x))``, then ``h + mlp(norm2(h))``: [B, T, D] to [B, T, D], causal.

    Args:
        width: D.
        heads: how many attention heads; divides D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention alone: [B, T, D] to [B, T, D]; place t sees the places up to t."""
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        h = x + self.attend(self.norm1(x))
        return h + self.mlp(self.norm2(h))


class CharTransformer(nn.Module):
    """Scores for the next token at each place: [B, T] int64 ids to [B, T, K], T at most ``context``.

    Args:
        classes: K, how many tokens there are.
        width: D.
        heads: attention heads of a block; divides D.
        layers: how many blocks.
        context: the most places that the model knows.
        tied: the head uses the embedding's weight (one parameter in two places); off by default.

    Attributes:
        embed: token ids to [B, T, D].
        positions: the learned positions, an embedding of [context, D].
        blocks: the ``Block`` modules.
        norm: the last LayerNorm.
        head: D to K, without bias.

    Raises:
        UsageError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        context: int = 64,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UsageError(f"heads={heads} does not divide width={width}: choose a divisor")
        self.context = context
        self.embed = nn.Embedding(classes, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        for embedding in (self.embed, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] int64 ids to [B, T, K] scores.

        Raises:
            DataError: x is not of shape [B, T], not of an integer dtype, or T is above ``context``.
        """
        if x.ndim != 2 or x.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"char-transformer got {x.dtype} of shape {tuple(x.shape)}; expected token ids, int64 of shape [B, T]"
            )
        length = x.shape[1]
        if length > self.context:
            raise DataError(
                f"char-transformer got T={length} tokens, but its context is {self.context}: cut the text into shorter "
                f"windows, or build it with context={length}"
            )
        h = self.embed(x) + self.positions(torch.arange(length, device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
