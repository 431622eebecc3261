"""Retrieve a few of very many single-neuron experts for each token by product keys.

Expert (i, j) of n m has the key (c_i, c'_j). Each of h heads has a query of its own; keys and experts are shared:

    q = norm(W_q x) in R^d,   s_ij = q_1 . c_i + q_2 . c'_j,   I = the k largest over all n m keys
    y = sum_heads sum_{e in I} softmax_I(s)_e v_e act(u_e . x + b_e) + c

The search is exact and takes n + m products of d/2 numbers and k^2 sums for a query. Here b and c are those of a
feed-forward layer that the experts are cut from; the paper's experts have none.

Paper: "Mixture of A Million Experts", Xu Owen He, 2024, arXiv:2407.04153.

The paper has n = m = 1024, h = 8, k = 16 and batch normalisation of queries, which spreads the load over the experts
(statistics over all tokens, one for each query feature; fewer than two tokens take the running ones). It names softmax
and sigmoid for the gates; its code has softmax over a head's k. With ``sparse=True`` gradients of u and v are sparse
tensors for ``torch.optim.SparseAdam``: dense ones are as large as the experts' tables.
A token reads 2 h k vectors from memory, and its gradient writes as many: on a CPU a dense layer of h k hidden units,
whose weights serve all tokens, is faster. What it buys is parameters, not time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weft._keeping import plain_math
from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import UsageError
from weft.ffn.mixture import compute_dtype, uniform
from weft.kernels.rows import row_products, row_sums
from weft.measure import operations
from weft.method import method
from weft.ops.feed_forward import rows_of, two_layers
from weft.ops.product_keys import product_key_topk
from weft.testing.example import Example


def retrieved(
    x: Tensor, up: Tensor, down: Tensor, numbers: Tensor, gates: Tensor, act: Callable[[Tensor], Tensor] = F.gelu,
    *, bias: Tensor | None = None, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """``sum_j gates[t, j] act(u_e . x[t] + b_e) v_e`` for e = ``numbers[t, j]``: ``[T, D']``.

    Args:
        x: ``[T, D]``.
        up, down: u ``[N, D]`` and v ``[N, D']``.
        numbers, gates: ``[T, J]``.
        act: elementwise.
        bias: b ``[N]``.
        sparse: the tables' gradients are sparse tensors.
    """
    h = row_products(x, up, numbers, sparse=sparse)
    h = act(h if bias is None else h + bias[numbers])
    return row_sums(gates.to(h) * h, down, numbers, sparse=sparse)


@method("peer", contract="layer", family="ffn", papers=[209])
class PEER(Convertible):
    """``[..., D]`` to ``[..., D']`` through h k of N single-neuron experts.

    Args:
        features: D.
        experts: N; sub-keys are as nearly square as N's divisors allow (a prime number has no use for them).
        out_features: D'; None for D.
        heads: h.
        active: k, of each head.
        key_features: d, even.
        norm: batch normalisation of the queries.
        activation: called without arguments, gives an elementwise module.
        sparse: gradients of ``up`` and ``down`` are sparse tensors.
        seed: of the weights.

    Attributes:
        up, down: u ``[N, D]`` and v ``[N, D']``.
        first, second: sub-keys ``[n, d/2]`` and ``[m, d/2]``; expert i m + j has sub-keys i and j.

    Raises:
        UsageError: for numbers that do not fit.
    """

    converts = (nn.Sequential,)
    rebuilds = True

    def __init__(
        self, features: int, experts: int, *, out_features: int | None = None, heads: int = 8, active: int = 16,
        key_features: int = 128, norm: bool = True, activation: Callable[[], nn.Module] = nn.GELU,
        sparse: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        out = features if out_features is None else out_features
        if min(features, out, heads) < 1 or not 1 <= active <= experts or key_features < 2 or key_features % 2:
            raise UsageError(
                f"features={features}, out_features={out}, heads={heads}, active={active} of experts={experts}, "
                f"key_features={key_features}: give positive numbers, at most all experts, an even number for the keys"
            )
        self.features, self.out_features, self.heads, self.active, self.sparse = features, out, heads, active, sparse
        self.act = activation()
        draw, half = torch.Generator().manual_seed(seed), key_features // 2
        n = next(n for n in range(math.isqrt(experts), 0, -1) if experts % n == 0)
        self.query = nn.Parameter(uniform((heads * key_features, features), features, draw))
        self.norm = nn.BatchNorm1d(heads * key_features) if norm else None
        self.first = nn.Parameter(uniform((n, half), half, draw))
        self.second = nn.Parameter(uniform((experts // n, half), half, draw))
        self.up = nn.Parameter(uniform((experts, features), features, draw))
        self.down = nn.Parameter(uniform((experts, out), heads * active, draw))
        self.bias: nn.Parameter | None = None
        self.out_bias: nn.Parameter | None = None

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> PEER:
        """An expert for each hidden unit, with its weights and bias; ``up`` and the biases stay the layer's own.

        With every expert chosen and gates of one the output is the layer's.

        Args:
            layer: ``nn.Sequential(nn.Linear, activation, nn.Linear)``.
            options: of the class.
        """
        first, act, second = two_layers(layer)
        made = cls(
            first.in_features, first.out_features, out_features=second.out_features, activation=lambda: act, **options
        ).to(first.weight)
        weight: Any = first.weight
        made.up, made.bias, made.out_bias = weight, first.bias, second.bias
        made.down = nn.Parameter(second.weight.detach().t().clone(memory_format=torch.contiguous_format))
        return made

    def to_dense(self) -> nn.Sequential:
        """The feed-forward layer of all experts, with ``up`` and the biases shared."""
        first = nn.Linear(self.features, len(self.up), self.bias is not None, device="meta")
        second = nn.Linear(len(self.up), self.out_features, self.out_bias is not None, device="meta")
        first.weight, first.bias, second.bias = self.up, self.bias, self.out_bias  # type: ignore[assignment]
        second.weight = nn.Parameter(self.down.detach().t().clone(memory_format=torch.contiguous_format))
        return nn.Sequential(first, self.act, second)

    def extra_repr(self) -> str:
        """Sizes."""
        sizes = f"{self.features}, {len(self.up)}, out_features={self.out_features}"
        return f"{sizes}, heads={self.heads}, active={self.active}"

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers ``[T, h, k]`` of the chosen experts for tokens ``[T, D]``."""
        query = F.linear(x, self.query.to(x.dtype))
        if (norm := self.norm) is not None:
            if norm.training and x.shape[0] < 2:  # no statistics to take
                given = norm.running_mean, norm.running_var, norm.weight, norm.bias
                query = F.batch_norm(query, *given, eps=norm.eps)
            else:
                query = norm(query)
        query = query.to(x.dtype).view(x.shape[0], self.heads, 2 * self.first.shape[1])
        return product_key_topk(query, self.first.to(x.dtype), self.second.to(x.dtype), self.active)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D']``."""
        flat = rows_of(x, self.features, self.up).to(compute_dtype(x))
        scores, numbers = self.search(flat)
        gates = scores.softmax(-1).flatten(1)
        tables = self.up, self.down, numbers.flatten(1)  # in their own dtype: a copy of them costs more than it saves
        with plain_math(x.device):
            y = retrieved(flat.to(self.up.dtype), *tables, gates, self.act, bias=self.bias, sparse=self.sparse)
        y = y if self.out_bias is None else y + self.out_bias
        return y.to(flat.dtype).view(*x.shape[:-1], self.out_features)


def example() -> Example:
    """36 hidden units as experts, two heads that choose nine each, and six sequences of four tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(8, 36), nn.GELU(), nn.Linear(36, 8)), torch.randn(6, 4, 8)
    return Example(layer, x, torch.arange(6) % 2, {"heads": 2, "active": 9, "key_features": 8})


class _Sums(TorchFunctionMode):
    """Counts the floating-point elements that additions of tensors give."""

    scores = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ in ("add", "__add__") and out.is_floating_point():
            self.scores += out.numel()
        return out


@claim(
    "product-key top-k over 1,000,000 experts equals brute-force top-k over all composed keys exactly, by 2 x 1000 "
    "half-width dot products and k^2 sums for a query",
    row=209,
    mutants={
        "few candidates": ("topk(min(k, first.shape[0]), -1)", "topk(k // 2, -1)", "weft.ops.product_keys"),
        "halves exchanged": ("query[..., :half] @ first", "query[..., half:] @ first", "weft.ops.product_keys"),
        "larger of the halves": (
            "(a[..., :, None] + b[..., None, :]).flatten(-2)",
            "a[..., :, None].maximum(b[..., None, :]).flatten(-2)", "weft.ops.product_keys"),
        "rows for columns": ("i[..., :, None] * second.shape[0]", "i[..., :, None] * k", "weft.ops.product_keys"),
        "best of each half": ("sums.topk(k, -1)", "sums[..., : k].sort(-1, descending=True)", "weft.ops.product_keys"),
        "more keys scored": ("    sums = (a", "    query @ query.new_zeros(2 * half, 10)\n    sums = (a",
                             "weft.ops.product_keys"),
        "more sums": ("sums.topk(k, -1)", "(sums + 0.0).topk(k, -1)", "weft.ops.product_keys"),
    },
)  # fmt: skip
def exact_search(seed: int) -> list[Check]:
    """Float64, k from 8 to 32; k^2 is the size of the only sums of scores."""
    draw = torch.Generator().manual_seed(seed)
    k, d, n = 8 + seed % 25, 8, 1000
    query, first, second = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, d), (n, d // 2), (n, d // 2))
    )
    found: list[Tensor] = []
    with _Sums() as sums:
        spent = operations(lambda: found.extend(product_key_topk(query, first, second, k)))["total"]
    composed = torch.cat([first.repeat_interleave(n, 0), second.repeat(n, 1)], 1)
    wanted, where = (query @ composed.T).topk(k)
    return [
        Check(int((found[1] != where).sum()), 0, "==", "experts that differ"),
        Check(float((found[0] - wanted).abs().max()), 1e-12, what="scores"),
        Check(spent, 3 * 2 * (2 * n) * (d // 2), "==", "operations: a product and a sum for each number"),
        Check(sums.scores, 3 * k * k, "==", "sums of scores"),
    ]


@claim(
    "outputs and all gradients are those of the equations over every expert, to 1e-9 in float64, with queries "
    "normalised over the batch; with all experts and gates of one the output is that of the layer they are cut from",
    row=209,
    mutants={
        "gates over all heads": ("scores.softmax(-1).flatten(1)", "scores.flatten(1).softmax(-1)"),
        "running statistics": ("query = norm(query)", "query = norm.eval()(query)"),
        "gates inside": ("row_sums(gates.to(h) * h", "row_sums(act(gates.to(h) * h)"),
        "gates without gradient": ("gates = scores.softmax", "gates = scores.detach().softmax"),
        "heads share a query": ("self.query.to(x.dtype))", "self.query[:4].repeat(self.heads, 1).to(x.dtype))"),
        "no bias": ("h = act(h if bias is None else h + bias[numbers])", "h = act(h)"),
        "last writer wins": ("out.index_add_(0", "out.index_copy_(0", "weft.kernels.rows"),
    },
)  # fmt: skip
def every_expert(seed: int) -> list[Check]:
    """Two heads over 4 x 6 experts; the reference scores composed keys and computes all experts for all tokens."""
    torch.manual_seed(seed)
    dense: Any = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    layer = PEER.from_dense(dense, heads=2, active=5, key_features=4, seed=seed)
    x, errors = (torch.randn(11, d, dtype=torch.float64, requires_grad=True) for d in (5, 3))
    leaves = [x, *layer.parameters()]
    assert layer.norm is not None
    query = x @ layer.query.T
    query = (query - query.mean(0)) / (query.var(0, correction=0) + layer.norm.eps).sqrt()
    query = query * layer.norm.weight + layer.norm.bias
    keys = torch.stack([torch.cat([a, b]) for a in layer.first for b in layer.second])
    hidden = torch.tanh(x @ dense[0].weight.T + dense[0].bias)
    y: Any = dense[2].bias
    for head in range(2):
        scores = query[:, 4 * head : 4 * head + 4] @ keys.T
        least = scores.sort(1).values[:, -5:-4]
        gates = scores.masked_fill(scores < least, -torch.inf).softmax(1)
        y = y + (gates * hidden) @ layer.down
    out = layer(x)
    found, wanted = ([o, *torch.autograd.grad(o, leaves, errors, materialize_grads=True)] for o in (out, y))
    worst = max(float(((a - b).abs().max() / (1 + b.abs().max())).detach()) for a, b in zip(found, wanted, strict=True))
    numbers = torch.arange(24).repeat(11, 1)
    given = x, layer.up, layer.down, numbers, torch.ones(11, 24).double(), torch.tanh
    full = retrieved(*given, bias=layer.bias) + dense[2].bias
    others = full - dense(x), layer.to_dense()(x) - dense(x)
    floats = [torch.randn(shape) for shape in ((7, 83), (24, 83), (24, 83), (7, 6))]
    numbers, error = torch.randint(24, (7, 6)), torch.randn(7, 83)
    single, exact = ([t.to(kind).requires_grad_() for t in floats] for kind in (torch.float32, torch.float64))
    mine = retrieved(single[0], single[1], single[2], numbers, single[3], torch.tanh)
    units = exact[3] * torch.tanh((exact[0][:, None] * exact[1][numbers]).sum(2))
    right = (units[:, :, None] * exact[2][numbers]).sum(1)
    pairs = zip((mine, right), (single, exact), strict=True)
    a, b = ([o, *torch.autograd.grad(o, by, error.to(o.dtype))] for o, by in pairs)
    rounded = float(
        torch.stack([(p - q).detach().abs().max() / q.detach().abs().max() for p, q in zip(a, b, strict=True)]).max()
    )
    return [
        Check(worst, 1e-9, what="output and gradients"),
        Check(rounded, 1e-4, what="the same in float32, given the experts"),
        Check(max(float(o.detach().abs().max()) for o in others), 1e-12, what="all experts, and put back"),
    ]
