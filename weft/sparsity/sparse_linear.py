"""A linear layer that stores a part of its weights, and costs as much less, forward and backward.

    y_o = b_o + sum_{k in row o} v_k x_{c(k)},   dx_i = sum_{k in column i} v_k g_{r(k)},   dv_k = <x_{c(k)}, g_{r(k)}>

with g = dL/dy and, for each stored weight v_k, its row r(k) and column c(k): three products of as many multiplications
as there are stored weights, for each sample. Zeros are nowhere in memory and get no gradient. Stored weights are found
by row and, transposed, by column (CSR both), so that every sum is formed in one place; samples stand side by side, so
that one weight multiplies vectors of them, tile by tile of at most 64 samples, the last one filled up to 16, 32 or 64.

Paper: "SparseProp: Efficient Sparse Backpropagation for Faster Training of Neural Networks", Mahdi Nikdan, Tommaso
Pegolotti, Eugenia Iofinova, Eldar Kurtic, Dan Alistarh, 2023, arXiv:2302.04852.

The authors' code has the index by rows alone and adds to the input's gradient in memory, weight by weight; it turns the
whole batch round and keeps that for the way back, where here the input is kept as it came. The paper's masks come from
elsewhere; `weft.ops.sparse_masks` has some. In float32 it pays from about 80 % zeros on, with widths of some hundreds
and more than a few samples; against a dense layer in bfloat16, where the CPU multiplies that in hardware, from about
90 %. For a single sample, and for small layers, whose time is that of calls in Python, the ordinary layer is faster.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import DataError
from weft.measure import operations
from weft.method import method
from weft.ops.sparse_masks import cosine_fraction, cubic_density, magnitude_mask, random_mask, rigl_mask
from weft.sparsity.sparse import SparseLayer, dense_gradients, starts_of
from weft.testing.example import Example


@method("sparse-linear", contract="layer", family="sparsity", papers=[127], tags=set())
class SparseLinear(SparseLayer):
    """An ``nn.Linear`` that stores, multiplies and trains a part of its weights.

    The stored weights are the parameter ``values``, a vector in the order of the rows; the bias is the ordinary
    layer's own. Runs in its own loops on CPUs in float32 and half types, in plain torch elsewhere. A state with another
    number of stored weights can be loaded. `set_mask_` changes the mask in the middle of training.

    Args:
        layer: the ordinary layer.
        density: part of the weights that is stored, from 0 to 1.
        mask: ``"magnitude"``: the largest; ``"random"``; or booleans in the weight's shape, in place of the density
            (``layer.weight != 0`` after pruning).
        seed: of a random mask.
        rescale: the stored weights get the ordinary weight's sum of squares, so that the output of a layer that is yet
            to be trained keeps its size; a deep network of few weights learns much faster then.

    Raises:
        Unsupported: for other layers.
        UsageError: for a density or a mask that does not fit.
    """

    converts = (nn.Linear,)
    index_names = ("row_starts", "columns", "column_starts", "rows", "order")

    def __init__(
        self, layer: nn.Module, *, density: float = 0.05, mask: str | Tensor = "magnitude", seed: int = 0,
        rescale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(layer, density=density, mask=mask, seed=seed, rescale=rescale)

    def index(self, mask: Tensor) -> dict[str, Tensor]:
        """The index by rows, and that by columns with the order in which those take the values."""
        rows, columns = mask.nonzero(as_tuple=True)
        order = columns.argsort(stable=True)
        turned = {"column_starts": starts_of(mask.sum(0)), "rows": rows[order].int(), "order": order.int()}
        return super().index(mask) | turned

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., O]``."""
        if x.ndim < 1 or x.shape[-1] != self.shape[1]:
            raise DataError(f"an input {list(x.shape)}: the layer takes {self.shape[1]} features in the last dimension")
        rows = x.reshape(math.prod(x.shape[:-1]), self.shape[1])
        return self.product(rows, None).view(*x.shape[:-1], self.shape[0])

    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """``[O, I]``, for ``x [..., I]`` and ``grad [..., O]``."""
        return grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).to(grad.dtype)

    def to_dense(self) -> nn.Module:
        """An ``nn.Linear`` with zeros where nothing is stored."""
        dense = nn.Linear(self.shape[1], self.shape[0], device="meta")
        dense.weight = nn.Parameter(self.weight.detach(), self.values.requires_grad)
        dense.register_parameter("bias", self.bias)
        return dense


def example() -> Example:
    """A fifth of 16 times 10 weights, on an input with two leading dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Linear(16, 10), torch.randn(6, 4, 16)
    return Example(layer, x, torch.arange(6) % 5, {"density": 0.2})


def _case(seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    """An ordinary layer with weights of different sizes, a multiple of twenty, an input of 2 x 75 samples, dL/dy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(40 + 20 * (seed % 3), 37 + seed % 17).to(dtype)
        n = layer.weight.numel()
        sizes = (torch.randperm(n) + 1) * (2 * torch.randint(2, (n,)) - 1) / n
        layer.weight.data.copy_(sizes.view_as(layer.weight))
        x, g = (torch.randn(2, 75, d, dtype=dtype) for d in (layer.in_features, layer.out_features))
    return layer, x.requires_grad_(), g


def _masked(dense: nn.Linear, x: Tensor, g: Tensor, stored: Tensor) -> list[Tensor]:
    """Output and gradients of x, the stored weights and the bias, through a masked dense product in float64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, dense.weight, dense.bias))
    y = x @ (weight * stored).T + bias
    by_x, by_weight, by_bias = torch.autograd.grad(y, (x, weight, bias), g.double())
    return [y.detach(), by_x, by_weight[stored], by_bias]


@claim(
    "With 95 % of the weights zero, output and gradients of the input, of the stored weights and of the bias are those "
    "of autograd through the masked dense layer to 1e-5 of their largest element.",
    row=127,
    mutants={
        "columns in the order of rows": ('"order": order.int()', '"order": order.sort().values.int()'),
        "rows not turned round": ("rows[order].int()", "rows.int()"),
        "columns unordered": ("columns.argsort(stable=True)", "columns.flip(0).argsort(stable=True)"),
        "lengths of other columns": ("starts_of(mask.sum(0))", "starts_of(mask.sum(0).flip(0))"),
        "other weights stored": ("weight.detach()[chosen]", "weight.detach()[chosen.flip(0)]", "weft.sparsity.sparse"),
        "smallest stored": (
            "score.flatten().argsort(descending=True",
            "score.flatten().argsort(descending=False",
            "weft.ops.sparse_masks",
        ),
        "gradients a little longer": ("run(grad, x, values,", "run(grad * 1.0001, x, values,", "weft.sparsity.sparse"),
        "other rows' lengths": ("flat.sum(1)", "flat.sum(1).flip(0)", "weft.sparsity.sparse"),
        "bias lost": ("x, values, bias, *index[:2])", "x, values, None, *index[:2])", "weft.sparsity.sparse"),
    },
)
def masked_dense_gradients(seed: int) -> list[Check]:
    """Largest difference, for the largest weights and for random ones."""
    dense, x, g = _case(seed)
    checks = []
    for mask in ("magnitude", "random"):
        layer: Any = SparseLinear.from_dense(dense, density=0.05, mask=mask, seed=seed)
        y = layer(x)
        found = [y.detach(), *torch.autograd.grad(y, (x, layer.values, layer.bias), g)]
        size = dense.weight.detach().abs()
        stored = size > size.flatten().sort().values[-size.numel() // 20 - 1]
        if mask == "random":
            stored = random_mask((dense.out_features, dense.in_features), 0.05, seed)
        pairs = zip(found, _masked(dense, x, g, stored), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        checks += [Check(worst, 1e-5, what=mask), Check(int(stored.sum()) * 20, size.numel(), "==", "stored, of 1/20")]
    return checks


@claim(
    "Forward and backward perform exactly 5 % of the dense layer's multiplications at 95 % zeros: by the operators' "
    "count, and by where an infinite input or gradient gets to (zeros that it is multiplied with give nan).",
    row=127,
    mutants={
        "stored twice as many": (
            "magnitude_mask(weight, density)",
            "magnitude_mask(weight, 2 * density)",
            "weft.sparsity.sparse",
        ),
        "zeros stored": ("magnitude_mask(weight, density)", "torch.ones_like(weight).bool()", "weft.sparsity.sparse"),
        "dense forward": (
            "self.product(rows, None)",
            "torch.nn.functional.linear(rows, self.weight, self.bias)",
        ),
        "dense gradient of the weight": (
            "found = kernels.sparse_linear_backward(grad,",
            "grad.mT @ x; found = kernels.sparse_linear_backward(grad,",
            "weft.sparsity.sparse",
        ),
        "forward again on the way back": (
            "found = kernels.sparse_linear_backward(grad,",
            "_run(x, values, None, how, index); found = kernels.sparse_linear_backward(grad,",
            "weft.sparsity.sparse",
        ),
    },
)
def a_twentieth_of_the_products(seed: int) -> list[Check]:
    """Operations, times 20; and outputs and input gradients that one infinite number in each sample reaches."""
    dense, x, g = _case(seed)
    layer, count = SparseLinear.from_dense(dense, density=0.05), dense.weight.numel()
    mine, plain = (operations(functools.partial(_passes, m, x, g)) for m in (layer, dense))
    (outputs, inputs), inf = dense.weight.shape, torch.tensor(torch.inf)
    a, b = torch.ones(inputs, inputs), torch.ones(outputs, inputs, requires_grad=True)
    y = layer(a.diagonal_scatter(inf.expand(inputs)))
    (back,) = torch.autograd.grad(layer(b), b, torch.ones(outputs, outputs).diagonal_scatter(inf.expand(outputs)))
    values: Any = layer.values
    return [
        Check(mine["total"] * 20, plain["total"], "==", "operations"),
        Check(int((~y.isfinite()).sum()) * 20, count, "==", "products of a sample, forward"),
        Check(int((~back.isfinite()).sum()) * 20, count, "==", "products of a sample, for the input's gradient"),
        Check(values.grad.numel() * 20, count, "==", "gradients, each of a product with every sample"),
    ]


def _passes(layer: nn.Module, x: Tensor, g: Tensor) -> None:
    layer(x).backward(g)


@claim(
    "Trained by Adam, with masks by RigL and gradual pruning in between, the layer goes where a dense layer goes whose "
    "weight, gradient and optimizer state are masked by the definitions.",
    mutants={
        "state forgotten": ("= carried(value)", "= value.new_zeros(len(new))", "weft.sparsity.sparse"),
        "values forgotten": ("= carried(self.values)", "= self.values.new_zeros(len(new))", "weft.sparsity.sparse"),
        "new ones begin elsewhere": ("t.new_zeros(len(new))", "t.new_ones(len(new))", "weft.sparsity.sparse"),
        "neighbours' values": ("old[at] == new if", "old[at] == old[at] if", "weft.sparsity.sparse"),
        "largest dropped": ("size = torch.where(mask, ", "size = -torch.where(mask, -1e9 + ", "weft.ops.sparse_masks"),
        "smallest grow": ('-1.0, _magnitude("gradient"', '-1e9, -_magnitude("gradient"', "weft.ops.sparse_masks"),
        "dropped ones stay away": ("torch.where(kept, -1.0", "torch.where(mask, -1.0", "weft.ops.sparse_masks"),
        "grown by stored gradients": (").to(grad.dtype)", ").to(grad.dtype) * float(self.mask.all())"),
        "linear decay": (
            "(1 + math.cos(math.pi * min(step, stop) / stop))",
            "2 * (1 - step / stop)",
            "weft.ops.sparse_masks",
        ),
        "quadratic pruning": ("left**3", "left**2", "weft.ops.sparse_masks"),
    },
)
def goes_where_masked_dense_goes(seed: int) -> list[Check]:
    """Largest difference of the weights relative to the largest, after 12 steps with 4 changes of the mask; float64."""
    dense, x, _ = _case(seed, torch.float64)
    x, y = x.detach()[0], torch.randn(75, dense.out_features, generator=torch.Generator().manual_seed(seed)).double()
    layer = SparseLinear.from_dense(dense, density=0.4, mask="random", seed=seed)
    model = nn.Sequential(layer)
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    w, b, on = (t.detach().clone() for t in (dense.weight, dense.bias, layer.mask))
    m, v, mb, vb = (torch.zeros_like(t) for t in (w, w, b, b))
    w, off = w * on, 0
    for t in range(1, 13):
        adam.zero_grad()
        with dense_gradients(model) as gradients:
            (layer(x) - y).square().mean().backward()
        adam.step()
        error = 2 * (x @ w.T + b - y) / y.numel()
        whole, by_bias = error.T @ x, error.sum(0)
        for p, first, second, g in ((w, m, v, whole * on), (b, mb, vb, by_bias)):
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            p -= 0.02 * first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        w *= on
        before = on.clone()
        if t in (3, 6):
            layer.set_mask_(rigl_mask(layer.weight, layer.mask, gradients[layer], cosine_fraction(t, 10, 0.6)), adam)
            moved = int(0.3 * (1 + math.cos(math.pi * t / 10)) * int(on.sum()))
            on[tuple(_places(w.abs(), on)[:moved].T)] = False
            on[tuple(_places(whole.abs(), ~on)[-moved:].T)] = True
        if t in (8, 11):
            density = cubic_density(t, start=6, stop=11, initial=0.4, final=0.1)
            layer.set_mask_(magnitude_mask(layer.weight, density, layer.mask), adam)
            fewer = round((0.1 + 0.3 * (1 - (t - 6) / 5) ** 3) * on.numel())
            on[tuple(_places(w.abs(), on)[:-fewer].T)] = False
        for part in (w, m, v):
            part *= on & before
        off += int((on != layer.mask).sum())
    worst = float((layer.weight.detach() - w).abs().max() / w.abs().max())
    return [Check(worst, 1e-8), Check(off, 0, "==", "places that differ between the masks")]


def _places(score: Tensor, among: Tensor) -> Tensor:
    """Row and column of the elements that are ``among``, by ascending score."""
    found = among.nonzero()
    return found[score[among].argsort()]
