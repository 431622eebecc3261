"""A convolution that stores a part of its weights, and costs as much less, forward and backward.

    y_{o,p} = b_o + sum_{k of o} v_k x_{c(k), p + t(k)},   dx_{c(k), p + t(k)} += v_k g_{o,p} for all k of o, p

    dv_k = sum_p <x_{c(k), p + t(k)}, g_{o(k), p}>,   g = dL/dy

for each stored weight v_k, its output channel o(k), input channel c(k) and tap t(k), at each output pixel p: three
products of as many multiplications as there are stored weights, for each sample and output pixel, where taps on the
padding count (they multiply zeros). Zeros of the filter are nowhere in memory and get no gradient. Samples stand side
by side, 16 at a time, so that one stored weight multiplies vectors of them at 16 pixels in turn.

Paper: "SparseProp: Efficient Sparse Backpropagation for Faster Training of Neural Networks", Mahdi Nikdan, Tommaso
Pegolotti, Eugenia Iofinova, Eldar Kurtic, Dan Alistarh, 2023, arXiv:2302.04852.

The authors take vectors along the batch, or along an image's rows where images are large and batches small, square
filters without groups, and strides of 1 and 2; here it is the batch, and every stride, dilation, padding and grouping.
A batch is filled up to a multiple of 16 samples; with fewer than about 8, the ordinary layer is faster.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from weft.claim import Check, claim
from weft.errors import DataError
from weft.kernels.sparse_reference import conv2d_geometry
from weft.measure import operations
from weft.method import method
from weft.ops.borders import bordered, borders
from weft.sparsity.sparse import SparseLayer
from weft.testing.example import Example


@method("sparse-conv2d", contract="layer", family="sparsity", papers=[127], tags=set())
class SparseConv2d(SparseLayer):
    """An ``nn.Conv2d`` that stores, multiplies and trains a part of its weights.

    The stored weights are the parameter ``values``, a vector in the order of the output channels; the bias is the
    ordinary layer's own. Runs in its own loops on CPUs in float32 and half types, in plain torch elsewhere. A state
    with another number of stored weights can be loaded. `set_mask_` changes the mask in the middle of training.

    Args:
        layer: the ordinary layer, with any stride, padding, dilation and groups.
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

    converts = (nn.Conv2d,)

    def __init__(
        self, layer: nn.Module, *, density: float = 0.05, mask: str | Tensor = "magnitude", seed: int = 0,
        rescale: bool = False,
    ) -> None:  # fmt: skip
        given: Any = layer
        self.groups: int = getattr(given, "groups", 1)  # the index is made of it
        super().__init__(layer, density=density, mask=mask, seed=seed, rescale=rescale)
        self.kernel, self.stride, self.dilation = given.kernel_size, given.stride, given.dilation
        self.given_padding, self.padding_mode = given.padding, given.padding_mode
        self.padding, self.border = borders(given)

    def index(self, mask: Tensor) -> dict[str, Tensor]:
        """The index by output channels, with input channels counted over all groups."""
        found = super().index(mask)
        shifts = self._group_shifts(mask.shape).repeat_interleave(found["row_starts"].diff())
        return found | {"columns": found["columns"] + shifts.int()}

    def own_columns(self) -> Tensor:
        """Columns of the stored weights in the ordinary layer's flattened weight, whose groups share them."""
        return self.columns - self._group_shifts(self.shape).repeat_interleave(self.row_starts.diff())

    def _group_shifts(self, shape: torch.Size) -> Tensor:
        rows = torch.arange(shape[0], device=self.values.device)
        return rows // max(1, shape[0] // self.groups) * shape[1:].numel()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, O, H', W']``, or one sample without B."""
        channels = self.shape[1] * self.groups
        if x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise DataError(f"an input {list(x.shape)}: the layer takes [B, {channels}, H, W] or [{channels}, H, W]")
        image = bordered(x if x.ndim == 4 else x[None], self.border, self.padding_mode)
        how = self.kernel, self.stride, self.padding, self.dilation
        if min(conv2d_geometry(tuple(image.shape), *map(list, how))[1]) < 1:
            raise DataError(f"an input {list(x.shape)} is smaller than the filter {self.kernel} with its dilation")
        y = self.product(image, how)
        return y if x.ndim == 4 else y[0]

    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """``[O, C / groups, *kernel]``, for ``x [B, C, H, W]`` and ``grad [B, O, H', W']``."""
        x, grad = (t if t.ndim == 4 else t[None] for t in (x, grad))
        image = bordered(x, self.border, self.padding_mode).to(grad.dtype)
        how = self.stride, self.padding, self.dilation, self.groups
        return conv2d_weight(image, self.shape, grad, *how)

    def to_dense(self) -> nn.Module:
        """An ``nn.Conv2d`` with zeros where nothing is stored."""
        channels = self.shape[1] * self.groups, self.shape[0]
        dense = nn.Conv2d(
            *channels, self.kernel, self.stride, self.given_padding, self.dilation, self.groups,
            padding_mode=self.padding_mode, device="meta",
        )  # fmt: skip
        dense.weight = nn.Parameter(self.weight.detach(), self.values.requires_grad)
        dense.register_parameter("bias", self.bias)
        return dense


def example() -> Example:
    """A third of the weights of 4 times 3 filters, on images with an odd side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(6, 3, 9, 8)
    return Example(layer, x, torch.arange(6) % 4, {"density": 0.3})


CASES: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "groups": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2, "groups": 4},
    {"kernel_size": 1},
)


def _case(seed: int, kind: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """An ordinary layer with weights of different sizes, a multiple of twenty, an input of 18 samples, dL/dy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Conv2d(4, 20, **CASES[kind]).to(dtype)
        n = layer.weight.numel()
        sizes = (torch.randperm(n) + 1) * (2 * torch.randint(2, (n,)) - 1) / n
        layer.weight.data.copy_(sizes.view_as(layer.weight))
        x = torch.randn(18, 4, 7 + seed % 3, 6 + seed % 5, dtype=dtype, requires_grad=True)
        g = torch.randn(layer(x.detach()).shape, dtype=dtype)
    return layer, x, g


@claim(
    "With 95 % of the weights zero, output and gradients of the input, of the stored weights and of the bias are those "
    "of autograd through the masked dense convolution to 1e-5 of their largest element.",
    row=127,
    mutants={
        "columns of the first group": (
            'found["columns"] + shifts.int()',
            'found["columns"] + 0 * shifts.int()',
        ),
        "padding before alone": (
            "return (0, 0), (before[1], after[1]",
            "return (0, 0), (0, before[1] + after[1]",
            "weft.ops.borders",
        ),
        "zeros on the border": (
            'F.pad(image, border, "constant" if mode == "zeros" else mode)',
            "F.pad(image, border)",
            "weft.ops.borders",
        ),
        "taps mirrored": ("flat = mask.flatten(1)", "flat = mask.flip(-1).flatten(1)", "weft.sparsity.sparse"),
        "other weights stored": ("weight.detach()[chosen]", "weight.detach()[chosen.flip(0)]", "weft.sparsity.sparse"),
        "gradients a little longer": ("run(grad, x, values,", "run(grad * 1.0001, x, values,", "weft.sparsity.sparse"),
    },
)
def masked_dense_gradients(seed: int) -> list[Check]:
    """Largest difference, for five kinds of convolution."""
    checks = []
    for kind in range(len(CASES)):
        dense, x, g = _case(seed, kind)
        layer: Any = SparseConv2d.from_dense(dense, density=0.05)
        size = dense.weight.detach().abs()
        stored = size > size.flatten().sort().values[-size.numel() // 20 - 1]
        y, biases = layer(x), [] if dense.bias is None else [layer.bias]
        found = [y.detach(), *torch.autograd.grad(y, (x, layer.values, *biases), g)]
        plain = copy.deepcopy(dense).double()
        with torch.no_grad():
            plain.weight *= stored
        input = x.detach().double().requires_grad_()
        y = plain(input)
        by_x, by_weight, *rest = torch.autograd.grad(y, (input, *plain.parameters()), g.double())
        pairs = zip(found, [y.detach(), by_x, by_weight[stored], *rest], strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        checks.append(Check(worst, 1e-5, what=f"{CASES[kind]}"))
    return checks


@claim(
    "Forward and backward perform exactly 5 % of the dense convolution's multiplications at 95 % zeros, taps on the "
    "padding included: by the operators' count, and by where an infinite input or gradient gets to (zeros that it is "
    "multiplied with give nan).",
    row=127,
    mutants={
        "stored twice as many": (
            "magnitude_mask(weight, density)",
            "magnitude_mask(weight, 2 * density)",
            "weft.sparsity.sparse",
        ),
        "zeros stored": ("magnitude_mask(weight, density)", "torch.ones_like(weight).bool()", "weft.sparsity.sparse"),
        "dense forward": (
            "y = self.product(image, how)",
            "y = torch.nn.functional.conv2d(image, self.weight, self.bias, *how[1:], self.groups)",
        ),
        "dense gradient of the weight": (
            "found = kernels.sparse_conv2d_backward(grad,",
            "torch.nn.grad.conv2d_weight(x, (20, x.shape[1], *how[0]), grad, *how[1:]); "
            "found = kernels.sparse_conv2d_backward(grad,",
            "weft.sparsity.sparse",
        ),
        "forward again on the way back": (
            "found = kernels.sparse_conv2d_backward(grad,",
            "_run(x, values, None, how, index); found = kernels.sparse_conv2d_backward(grad,",
            "weft.sparsity.sparse",
        ),
    },
)
def a_twentieth_of_the_products(seed: int) -> list[Check]:
    """Operations, times 20; and, without padding, outputs and input gradients that one infinite number reaches."""
    checks = []
    for kind in (0, 1, 4):
        dense, x, g = _case(seed, kind)
        layer = SparseConv2d.from_dense(dense, density=0.05)
        mine, plain = (operations(functools.partial(_passes, m, x, g)) for m in (layer, dense))
        checks.append(Check(mine["total"] * 20, plain["total"], "==", f"operations, {CASES[kind]}"))
    plain_conv, _, _ = _case(seed, 4)
    layer, count = SparseConv2d.from_dense(plain_conv, density=0.05), plain_conv.weight.numel()
    inf = torch.tensor(torch.inf)
    y = layer(torch.ones(4, 4).diagonal_scatter(inf.expand(4))[..., None, None])
    b, errors = torch.ones(20, 4, 1, 1, requires_grad=True), torch.ones(20, 20).diagonal_scatter(inf.expand(20))
    (back,) = torch.autograd.grad(layer(b), b, errors[..., None, None])
    return [
        *checks,
        Check(int((~y.isfinite()).sum()) * 20, count, "==", "products of a sample and pixel, forward"),
        Check(int((~back.isfinite()).sum()) * 20, count, "==", "products, for the input's gradient"),
    ]


def _passes(layer: nn.Module, x: Tensor, g: Tensor) -> None:
    layer(x).backward(g)


@claim(
    "First and second derivatives are right, by numbers: in reverse and forward mode, and of the backward pass itself.",
    mutants={
        "input's own part": ("back(x, by_values,", "back(x, 2 * by_values,", "weft.sparsity.sparse"),
        "values' own part": ("back(by_x, values,", "back(by_x + 1, values,", "weft.sparsity.sparse"),
        "one part of the gradient's": (
            "[product(by_x, values, None, ctx.how, *index)] if flags[0]",
            "[0 * product(by_x, values, None, ctx.how, *index)] if flags[0]",
            "weft.sparsity.sparse",
        ),
        "no tangent of the values": ("if by_values is not None else []", "if False else []", "weft.sparsity.sparse"),
    },
)
def second_derivatives(seed: int) -> Check:
    """Whether torch's numerical checks hold, of gradients in both modes and of gradients of gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=1, groups=2).double()
        layer: Any = SparseConv2d.from_dense(dense, density=0.4)
        x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))
        return y

    inputs = x, layer.values, layer.bias
    held = torch.autograd.gradcheck(of, inputs, check_forward_ad=True, raise_exception=False)
    with torch.random.fork_rng(devices=[]):
        held = held and torch.autograd.gradgradcheck(of, inputs, raise_exception=False)
    return Check(float(held), 1.0, "==")
