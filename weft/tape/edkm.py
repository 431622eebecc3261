"""Train on weights drawn to K clusters, with an attention map kept for the distinct 16-bit weights alone.

    D_ij = (w_i - c_j)^2,   A = softmax over j of -D / tau,   c_j <- sum_i A_ij w_i / sum_i A_ij,   T times;   W~ = A c

The gradient goes through all iterations; the first centroids are constants. N weights of 16 bits take U <= 65,536
values, and a row of A depends on the value alone: kept are an index of one or two bytes a weight, once for all
iterations, and for each iteration a table [U, K], in place of several maps [N, K]. With u(i) the value of weight i, n_u
its count and G_u the sum of the gradients g_i of its weights, the weights' gradient is alpha_u(i) g_i + beta_u(i), so
that tables are all that either pass computes on; sums over weights are sums over values with n_u or G_u. In ``eval()``
each weight is its nearest centroid.

The authors make the full map and pack it by saved-tensor hooks, find equal tensors by a walk through the graph, and
divide the index among processes; the last is left out, and nothing is saved twice here. They start from the centroids
of the step before; here from quantiles of the weights, so that a step depends on the weights alone. Weights of 32 or 64
bits are rounded to bfloat16 first. Defaults: bits, tau and T as in Apple's coremltools.

Paper: "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models", Minsik Cho, Keivan A.
Vahid, Qichen Fu, Saurabh Adya, Carlo C Del Mundo, Mohammad Rastegari, Devang Naik, Peter Zatloukal, 2023,
arXiv:2309.00964.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.session import kept
from weft.testing.example import Example


def values_and_index(w: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of 16-bit weights, float32 ``[U]`` ascending, and each weight's place among them ``[N]``.

    Places are uint8, or int16 less 32,768 where there are more than 256.
    """
    codes = w.detach().reshape(-1).view(torch.int16).int() + 2**15
    present = torch.bincount(codes, minlength=2**16).nonzero()[:, 0]
    values = (present - 2**15).to(torch.int16).view(w.dtype).float()
    values, order = values.sort()
    place = torch.empty(2**16, dtype=torch.int32, device=w.device)
    place[present[order]] = torch.arange(len(present), dtype=torch.int32, device=w.device)
    index = place[codes]
    return values, index.to(torch.uint8) if len(values) <= 256 else (index - 2**15).to(torch.int16)


def places(index: Tensor) -> Tensor:
    """The index as int32 from 0."""
    return index.int() if index.dtype == torch.uint8 else index.int() + 2**15


def attention(values: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """A for each value, float32 ``[U, K]``."""
    return ((values[:, None] - centroids).square() / -temperature).softmax(1)


def quantiles(values: Tensor, counts: Tensor, clusters: int) -> Tensor:
    """The centroids to start from ``[K]``: the middles of K equal parts of the weights."""
    wanted = (torch.arange(clusters, device=values.device) + 0.5) * (counts.sum() / clusters)
    return values[torch.searchsorted(counts.cumsum(0).double(), wanted.double()).clamp_max(len(values) - 1)]


class _Cluster(torch.autograd.Function):
    """Clustered weights, from 16-bit ones; sums in float64."""

    @staticmethod
    def forward(w: Tensor, clusters: int, temperature: float, iterations: int) -> tuple[Tensor, ...]:
        values, index = values_and_index(w)
        counts = torch.bincount(places(index), minlength=len(values))
        centroids = [quantiles(values, counts, clusters)]
        tables = []
        for _ in range(iterations):
            tables.append(attention(values, centroids[-1], temperature))
            mass = tables[-1].double() * counts[:, None]
            total = mass.sum(0)
            moved = (mass * values[:, None]).sum(0) / total
            centroids.append(torch.where(total > 0, moved, centroids[-1].double()).float())
        found = (tables[-1] @ centroids[-1])[places(index)].view(w.shape).to(w.dtype)
        return found, torch.stack(centroids), index, values, *tables

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.temperature = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        centroids, index, values, *tables = ctx.saved_tensors
        g, at = grad.reshape(-1).double(), places(index)
        w, c = values.double()[:, None], centroids.double()
        counts = torch.bincount(at, minlength=len(values)).double()[:, None]
        sums = torch.zeros(len(values), 1, dtype=torch.float64, device=g.device).index_add_(0, at, g[:, None])
        last = tables[-1].double()
        along = last * (c[-1] - last @ c[-1][:, None]) / -ctx.temperature  # of D, for each unit of g_i
        alpha = 2 * (along * (w - c[-2])).sum(1)
        beta = torch.zeros_like(alpha)
        into = (last * sums).sum(0)  # of the centroids
        for t in range(len(tables) - 1, -1, -1):
            a = tables[t].double()
            total = (a * counts).sum(0)
            share = torch.where(total > 0, into / total, 0)
            beta += a @ share
            each = share * (w - c[t + 1])
            each = a * (each - (a * each).sum(1, keepdim=True)) / -ctx.temperature
            beta += 2 * (each * (w - c[t])).sum(1)
            weighted = counts * each + (sums * along if t == len(tables) - 1 else 0)
            into = -2 * (weighted * (w - c[t])).sum(0)
        found = (alpha[at] * g + beta[at]).view(grad.shape).to(grad.dtype)
        return found, None, None, None


@method("edkm", contract="layer", family="tape", papers=[348])
class EDKM(Convertible):
    """An ``nn.Linear`` or ``nn.Conv2d`` that computes with clustered weights; it trains the layer's own.

    Args:
        layer: used, not copied.
        bits: of an index into the centroids; K = 2^bits.
        temperature: tau, in squares of a weight; small beside the squared distance of clusters, A is nearly 0 or 1.
        iterations: T.

    Raises:
        Unsupported: for other layers.
        UsageError: for options out of range.
    """

    converts = (nn.Linear, nn.Conv2d)

    def __init__(self, layer: nn.Module, *, bits: int = 4, temperature: float = 1e-4, iterations: int = 3) -> None:
        super().__init__()
        if type(layer) not in self.converts:
            raise Unsupported(f"{type(layer).__name__} is no layer whose weights it clusters", "nn.Linear or nn.Conv2d")
        if not (isinstance(bits, int) and 1 <= bits <= 8 and isinstance(iterations, int) and iterations >= 1):
            raise UsageError(f"bits={bits!r}, iterations={iterations!r}; 1 to 8 bits, at least 1 iteration")
        if not temperature > 0:
            raise UsageError(f"temperature={temperature!r}; it is above 0")
        self.layer = layer
        self.bits, self.temperature, self.iterations = bits, float(temperature), iterations

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> EDKM:
        """The layer with clustered weights, on the same parameters."""
        return cls(layer, **options)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, temperature={self.temperature}, iterations={self.iterations}"

    def _clustered(self) -> tuple[Tensor, ...]:
        weight = cast(Tensor, self.layer.weight)
        w = weight if weight.dtype in (torch.bfloat16, torch.float16) else weight.bfloat16()
        return _Cluster.apply(w, 2**self.bits, self.temperature, self.iterations)

    @torch.no_grad()
    def palette(self) -> tuple[Tensor, Tensor]:
        """What is stored in the end: centroids ``[K]``, and the nearest one of each weight, uint8 in its shape."""
        _, centroids, index, values, *_ = self._clustered()
        nearest = (values[:, None] - centroids[-1]).abs().argmin(1).to(torch.uint8)
        return centroids[-1], nearest[places(index)].view_as(cast(Tensor, self.layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for ``x``, with soft clusters in training and the nearest ones in ``eval()``."""
        weight = cast(Tensor, self.layer.weight)
        if self.training:
            clustered = self._clustered()[0]
        else:
            centroids, nearest = self.palette()
            clustered = centroids[nearest.int()]
        return functional_call(self.layer, {"weight": clustered.to(weight.dtype)}, (x,))


def example() -> Example:
    """Four clusters for the weights of a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Linear(12, 10), torch.randn(6, 12)
    return Example(layer, x, torch.arange(6) % 2, {"bits": 2, "temperature": 1e-2})


def _plain(w: Tensor, c: Tensor, temperature: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """DKM as it is written, on all weights, in the dtype of ``w``: clustered weights, the last map and centroids."""
    x = w.reshape(-1, 1)
    for _ in range(iterations):
        before = c
        a = torch.softmax(-((x - c) ** 2) / temperature, dim=1)
        c = (a * x).sum(0) / a.sum(0)
    return (a @ c).view(w.shape), a, before


@claim(
    "for a 1M-weight bfloat16 layer with 8 centroids and a float32 map, what is unpacked is bitwise the map of all "
    "weights and at least 10 times fewer bytes are kept than by DKM",
    row=348,
    mutants={
        "an index of four bytes": ("(index - 2**15).to(torch.int16)", "index - 2**15"),
        "places of codes": ("place[present[order]]", "place[present]"),
        "places off by one": ("else index.int() + 2**15", "else (index.int() + 2**15 - 1).relu()"),
        "another temperature": ("/ -temperature).softmax(1)", "/ -temperature / 1.01).softmax(1)"),
    },
)
def map_and_bytes(seed: int) -> list[Check]:
    """Rows that differ in any bit, and bytes kept by both, one iteration; weights of deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(1024, 1024, generator=generator) * 0.02).bfloat16().requires_grad_()
    with kept(nn.Identity()) as count:
        out, centroids, index, _, table = _Cluster.apply(w, 8, 1e-4, 1)
        mine = count.total_bytes
    with kept(nn.Identity()) as count:
        plain, full, _ = _plain(w.float(), centroids[0], 1e-4, 1)
        dkm = count.total_bytes
    off = int((table[places(index).clamp_max(len(table) - 1)] != full).any(1).sum())
    error = float((out.detach().float() - plain.detach()).abs().max() / plain.detach().abs().max())
    return [
        Check(dkm / mine, 10, ">=", "bytes of DKM beside those kept"),
        Check(
            mine, 2 * w.numel() + (8 + 1) * 4 * len(w.detach().unique()) + 64, "<=", "index, table, values, centroids"
        ),
        Check(off, 0, "==", "rows of the map that differ"),
        Check(error, 2**-8 + 1e-3, what="clustered weights, rounded to bfloat16"),
    ]


@claim(
    "the gradient of the weights through one to four iterations is DKM's under autograd, rounded as they are",
    row=348,
    mutants={
        "centroids held": ("into = -2 * (weighted * (w - c[t])).sum(0)", "into = 0 * into"),
        "own part alone": ("beta += a @ share", "beta += 0"),
        "weights once each": ("weighted = counts * each", "weighted = each"),
        "map held": ("alpha = 2 *", "alpha = 0 *"),
        "no softmax": ("(each - (a * each).sum(1, keepdim=True))", "each"),
        "centroids of before": ("share * (w - c[t + 1])", "share * (w - c[t])"),
        "sums unweighted": ("mass = tables[-1].double() * counts[:, None]", "mass = tables[-1].double()"),
    },
)
def gradients(seed: int) -> list[Check]:
    """Relative error, with DKM in float64 on the same 16-bit weights and from the same first centroids."""
    generator, checks = torch.Generator().manual_seed(seed), []
    for iterations, tau, dtype in ((1, 2e-3, torch.bfloat16), (2, 1e-3, torch.float16), (4, 2e-4, torch.bfloat16)):
        w = (torch.randn(40, 60, generator=generator) * 0.02).to(dtype)
        error = torch.randn(40, 60, generator=generator).to(dtype)
        leaf = w.clone().requires_grad_()
        out, centroids, *_ = _Cluster.apply(leaf, 8, tau, iterations)
        (found,) = torch.autograd.grad(out, leaf, error)
        twin = w.double().requires_grad_()
        plain, _, _ = _plain(twin, centroids[0].double(), tau, iterations)
        (wanted,) = torch.autograd.grad(plain, twin, error.double())
        off = float((found.double() - wanted.to(dtype).double()).norm() / wanted.norm())
        checks.append(Check(off, 2e-3, what=f"{iterations} iterations, {dtype}"))
    return checks
