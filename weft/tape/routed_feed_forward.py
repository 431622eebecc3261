"""Give each token a few blocks of a feed-forward layer, chosen and weighted by a router.

Hidden units are cut into G blocks; W1_g, b1_g are their rows of the first layer, W2_g their columns of the second:

    r = sigmoid(W_r x + b_r) in R^G,   S = the a largest of r
    y = b2 + sum_{g in S} 2 r_g W2_g act(2 r_g W1_g x + b1_g)

Tokens are gathered by block, so that products are done, and hidden units kept, for a / G of the layer; kept besides are
x, once, and a few numbers for each token and block. By the factors
2 r_g the router gets its gradient; where r = 1/2 and every block is active, y is the dense layer's. The authors' code
has four blocks, two of them active, and the factors on the products of the frozen layers, not of the low-rank adapters
that it adds (adapters are other methods here). Here the factor leaves the bias b1 as it is.

Paper: "SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification", Yuntao Gui, Xiao Yan,
Peiqi Yin, Han Yang, James Cheng, 2023, arXiv:2312.10365.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import UsageError
from weft.measure import operations
from weft.method import method
from weft.ops.feed_forward import two_layers
from weft.session import kept
from weft.testing.example import Example


class _Scaled(torch.autograd.Function):
    """``factor * x[rows] W^T``, where x is kept whole, once for all blocks, and neither its rows nor the product."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor | None, weight: Tensor, factor: Tensor) -> Tensor:
        return factor * F.linear(x if rows is None else x[rows], weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, rows, weight, factor), needs = ctx.saved_tensors, ctx.needs_input_grad
        part = x if rows is None else x[rows]
        back = grad @ weight if needs[0] or needs[3] else None  # without the factor, whose gradient needs it so
        of_x = factor * back if needs[0] and back is not None else None
        if of_x is not None and rows is not None:
            of_x = torch.zeros_like(x).index_add(0, rows, of_x)
        of_weight = (factor * grad).T @ part if needs[2] else None
        return of_x, None, of_weight, (back * part).sum(1, True) if needs[3] and back is not None else None


def routed(
    x: Tensor,
    first: nn.Linear,
    act: Callable[[Tensor], Tensor],
    second: nn.Linear,
    scores: Tensor,
    active: int,
) -> Tensor:
    """``[N, D] -> [N, D']`` through the ``active`` blocks with the largest of the scores ``[N, G]``, each in (0, 1)."""
    blocks, kind, dtype = scores.shape[1], x.device.type, x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    x, scores = x.to(dtype), scores.to(dtype)
    with torch.no_grad():
        on = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(active, sorted=False).indices, True)
    biases = (None,) * blocks if first.bias is None else first.bias.chunk(blocks)
    weights = zip(first.weight.chunk(blocks), biases, second.weight.chunk(blocks, 1), strict=True)
    out: Tensor | None = None
    for g, (up, bias, down) in enumerate(weights):
        rows = on[:, g].nonzero().squeeze(1)
        factor = 2 * scores[rows, g, None]
        h = _Scaled.apply(x, rows, up.to(dtype), factor)
        h = act(h if bias is None else h + bias.to(dtype)).to(dtype)
        part = _Scaled.apply(h, None, down.to(dtype), factor)
        out = part.new_zeros(len(x), down.shape[0]) if out is None else out
        out = out.index_put((rows,), part, accumulate=True)  # index_add would keep the part
    assert out is not None
    return out if second.bias is None else out + second.bias.to(out.dtype)


@method("routed-feed-forward", contract="layer", family="tape", papers=[214], tags={"lean"})
class RoutedFeedForward(Convertible):
    """An ``nn.Sequential(nn.Linear, activation, nn.Linear)`` of which each token takes ``active`` of ``blocks`` blocks.

    Its output is near the ordinary layer's only after training; the layer's parameters stay shared, the router's are
    new: random weights as torch's linear layers have them, no bias at first.

    Args:
        layer: hidden units a multiple of ``blocks``, an elementwise activation without parameters.
        blocks: G.
        active: a, from 1 to G.
        seed: of the router's weights.

    Raises:
        Unsupported: for other layers.
        UsageError: for numbers that do not fit.
    """

    converts = (nn.Sequential,)

    def __init__(self, layer: nn.Module, *, blocks: int = 4, active: int = 2, seed: int = 0) -> None:
        super().__init__()
        first = two_layers(layer)[0]
        if not 1 <= active <= blocks or first.out_features % blocks:
            raise UsageError(f"active={active!r} of blocks={blocks!r} for {first.out_features} hidden units")
        self.layers, self.active = layer, active
        self.router = nn.Linear(first.in_features, blocks, device="meta")
        start = torch.rand(blocks, first.in_features, generator=torch.Generator().manual_seed(seed))
        self.router.weight = nn.Parameter(((2 * start - 1) * first.in_features**-0.5).to(first.weight))
        self.router.bias = nn.Parameter(first.weight.new_zeros(blocks))

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> RoutedFeedForward:
        """The layer with a router before it."""
        return cls(layer, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        parts: Any = self.layers
        first, act, second = parts
        flat = x.reshape(-1, x.shape[-1])
        out = routed(flat, first, act, second, self.router(flat).sigmoid(), self.active)
        return out.view(*x.shape[:-1], -1) if out.numel() else out.view(*x.shape[:-1], second.out_features)


def example() -> Example:
    """Hidden units four times the width, in four blocks, and six sequences of five tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)), torch.randn(6, 5, 32)
    return Example(layer, x, torch.arange(6) % 2)


@claim(
    "outputs and gradients, the router's too, are those of the equation over masked dense blocks to 1e-9 in float64; "
    "with every block active and an indifferent router they are the dense layer's",
    row=214,
    mutants={
        "smallest chosen": ("scores.topk(active, sorted=False)", "(-scores).topk(active, sorted=False)"),
        "one block too few": ("scores.topk(active,", "scores.topk(max(active - 1, 1),"),
        "factor on one product": ("part = _Scaled.apply(h, None, down.to(dtype), factor)", "part = F.linear(h, down)"),
        "bias in the factor": (
            "_Scaled.apply(x, rows, up.to(dtype), factor)",
            "factor * F.linear(x[rows], up, bias) - bias",
        ),
        "factor untrained": ("2 * scores[rows, g, None]", "(scores + scores.detach())[rows, g, None]"),
        "last bias for each block": (
            "_Scaled.apply(h, None, down.to(dtype), factor)",
            "factor * F.linear(h, down, second.bias)",
        ),
        "factor not twice": ("factor = 2 * scores", "factor = scores"),
        "input's gradient without the factor": ("of_x = factor * back", "of_x = back"),
        "weight's gradient without the factor": ("(factor * grad).T @ part", "grad.T @ part"),
        "factor's gradient from half": ("(back * part).sum(1", "(back * part)[:, ::2].sum(1"),
        "rows of one block for another": ("index_add(0, rows, of_x)", "index_add(0, rows.flip(0), of_x)"),
    },
)
def masked_blocks(seed: int) -> list[Check]:
    """Largest relative error; G from 2 to 4, every number of active blocks."""
    torch.manual_seed(seed)
    blocks, width = 2 + seed % 3, 2 + seed % 2
    dense = nn.Sequential(nn.Linear(4, blocks * width), nn.Tanh(), nn.Linear(blocks * width, 3)).double()
    x, errors = torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 2, 3).double()
    layers: list[Any] = list(dense)
    first, second, checks = layers[0], layers[2], list[Check]()
    for active in range(1, blocks + 1):
        layer = RoutedFeedForward.from_dense(dense, blocks=blocks, active=active, seed=seed)
        leaves = [x, *layer.parameters()]
        r = torch.sigmoid(torch.einsum("btd,gd->btg", x, layer.router.weight) + layer.router.bias)
        least = r.sort(-1, descending=True).values[..., active - 1 : active]
        factor = (2 * r * (r >= least).detach()).repeat_interleave(width, -1)
        hidden = torch.tanh(factor * (x @ first.weight.T) + first.bias)
        plain = (factor * hidden) @ second.weight.T + second.bias
        wanted, found = ([y, *torch.autograd.grad(y, leaves, errors)] for y in (plain, layer(x)))
        worst = max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, wanted, strict=True))
        checks.append(Check(worst, 1e-9, what=f"{active} of {blocks}"))
    nn.init.zeros_(layer.router.weight)
    leaves = [x, *dense.parameters()]
    wanted, found = ([y, *torch.autograd.grad(y, leaves, errors)] for y in (dense(x), layer(x)))
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))
    return [*checks, Check(worst, 1e-9, what="all blocks, indifferent router")]


@claim(
    "with half of the blocks active the products of both passes take half of the dense layer's operations, beside the "
    "router's, and half of the hidden units are kept, beside a few numbers for each token and block",
    row=214,
    mutants={
        "all computed": ("rows = on[:, g].nonzero().squeeze(1)", "rows = torch.arange(len(x))"),
        "one more active": ("scores.topk(active,", "scores.topk(active + 1,"),
        "products kept": ("_Scaled.apply(h, None, down.to(dtype), factor)", "factor * F.linear(h, down)"),
        "rows of the input kept": ("_Scaled.apply(x, rows, up.", "_Scaled.apply(x[rows], None, up."),
    },
)
def half_the_products(seed: int) -> list[Check]:
    """Operations of matrix products, for inputs that need a gradient themselves; bytes kept.

    Those are a factor and a row number for each of a token's two blocks, and four scores.
    """
    torch.manual_seed(seed)
    d, wide, tokens = 3 + seed % 4, 8 * (2 + seed % 3), 10 + seed % 9
    dense = nn.Sequential(nn.Linear(d, wide), nn.GELU(), nn.Linear(wide, d))
    layer, x = RoutedFeedForward.from_dense(dense, seed=seed), torch.randn(tokens, d, requires_grad=True)
    mine = operations(lambda: layer(x).sum().backward())["total"]
    plain = operations(lambda: dense(x).sum().backward())["total"]
    with kept(layer) as count:
        layer(x)
    few = tokens * (2 * (4 + 8) + 4 * 4)
    return [
        Check(mine, plain / 2 + 3 * 2 * tokens * d * 4, "==", "operations"),
        Check(count.peak_bytes, x.nbytes + 2 * tokens * wide // 2 * 4 + few, "==", "bytes, with GELU's in- and output"),
    ]
