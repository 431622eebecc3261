"""Weights of one bit and one scale an output; inputs of one bit too, where asked for: products become counts of bits.

    W~_o = a_o sign(W_o),   a_o = mean |W_o|                          weights [O, D] alone: Binary-Weight-Network
    y    = K a_o <sign(x), sign(W_o)> + b_o,   K = mean |x|           inputs too: XNOR-Network
    <sign(x), sign(w)> = D - 2 popcount(bits(x) xor bits(w))
    dL/dW_i = dL/dW~_i (1/D + a [|W_i| <= 1]),   dsign(x)/dx = [|x| <= 1]

sign(0) is 1. Of all scales and signs, a and sign(W) are the nearest to W in squares. The float weights are what is
trained; both passes see W~. In eval mode, where no gradient is asked for, the layer works on packed bits, which it
makes anew whenever the weights have changed; `BinaryLinear.pack_` keeps the bits alone.

The paper's gradient of a weight has the scale's derivative by this weight alone (1/D), not what the scale does to the
rest of its row. The authors' code multiplies it by D (1 - 1/C), C input channels, which Adam takes out again; it clips
weights to [-1, 1], subtracts their mean over the channels before each step, and leaves K out. Of K's derivative the
paper says nothing: here it is the exact one. First and last layers stay in floats, and BatchNorm comes before the signs
of an input: those of a ReLU's output are all 1, so that binary inputs are an option here, off at first.

On CPUs a row of inputs costs a tenth of the ordinary layer's time and less where the weights do not stay in the caches,
and some thirtieth with binary inputs; where the CPU multiplies matrices of bfloat16 in hardware, large batches lose.

Paper: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", Mohammad Rastegari, Vicente
Ordonez, Joseph Redmon, Ali Farhadi, 2016, arXiv:1603.05279.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.method import method
from weft.ops.packed_signs import SignLinear
from weft.ops.straight_through import mean_magnitude, scaled_signs, sign_through
from weft.testing.example import Example
from weft.testing.linear import linear_of


def binary_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, binary_inputs: bool = False) -> Tensor:
    """``[..., D] -> [..., O]`` with the signs of ``weight [O, D]`` times its rows' mean magnitude, differentiable."""
    if not binary_inputs:
        return F.linear(x, scaled_signs(weight), bias)
    y = F.linear(sign_through(x), scaled_signs(weight))
    y = y * mean_magnitude(x).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


@method(
    "binary-linear",
    contract="layer",
    family="precision",
    papers=[288],
    variants={
        "xnor-linear": {
            "options": {"binary_inputs": True},
            "summary": "Weights and inputs of one bit, with their scales: products become counts of bits.",
        }
    },
)
class BinaryLinear(SignLinear):
    """An ``nn.Linear`` with weights of one bit, on the same parameters.

    Args:
        layer: the ordinary layer.
        binary_inputs: inputs of one bit and a scale too; normalise them to mean 0 before.

    Raises:
        Unsupported: for other layers.
    """

    def __init__(self, layer: nn.Module, *, binary_inputs: bool = False) -> None:
        super().__init__(layer)
        self.binary_inputs = bool(binary_inputs)
        self.inputs = "scaled signs" if binary_inputs else "floats"

    def extra_repr(self) -> str:
        """Sizes and what is binary."""
        return f"{super().extra_repr()}, binary_inputs={self.binary_inputs}"

    def differentiable(self, x: Tensor) -> Tensor:
        """By the float weights."""
        assert self.weight is not None
        return binary_linear(x, self.weight, self.bias, binary_inputs=self.binary_inputs)

    def scales(self, weight: Tensor) -> Tensor:
        """a."""
        return mean_magnitude(weight)[:, 0]


def example() -> Example:
    """Weights and inputs on both sides of 0, an input with two leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 10)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return Example(layer, torch.randn(6, 4, 24, generator=generator), torch.arange(6) % 5)


def _layer(generator: torch.Generator, features: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Normal weights, of which a tenth is 0, on both sides of -1 and 1."""
    values = torch.randn(outputs, features + 1, generator=generator)
    values.masked_fill_(torch.rand(values.shape, generator=generator) < 0.1, 0)
    return linear_of(values[:, 1:].to(dtype), values[:, 0].to(dtype))


@claim(
    "For 100 random 10-vectors the layer's weights are a sign(w) with a = mean |w|, and of all 1,024 sign patterns, "
    "each with its best scale, none is nearer to w; in eval mode they are the same to 1e-5.",
    row=288,
    budget=2.0,
    mutants={
        "no scale": ("size * signs(fixed)", "1.0 * signs(fixed)", "weft.ops.straight_through"),
        "the largest magnitude": (
            "return (x.abs().sum(-1, keepdim=True, dtype=wide) / max(x.shape[-1], 1)).to(x.dtype)",
            "return x.abs().amax(-1, keepdim=True)",
            "weft.ops.straight_through",
        ),
        "signs of what is above the mean": (
            "size * signs(fixed)",
            "size * signs(fixed - fixed.mean(1, keepdim=True))",
            "weft.ops.straight_through",
        ),
        "one scale for all outputs": (
            "return mean_magnitude(weight)[:, 0]",
            "return mean_magnitude(weight).mean(0).expand(len(weight))",
        ),
        "other bits": ("return pack_signs(self.rows(", "return pack_signs(-self.rows(", "weft.ops.packed_signs"),
    },
)
def nearest_in_squares(seed: int) -> list[Check]:
    """By brute force: how much worse the layer's squared error is than the best, relative to it."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(100, 10, generator=generator, dtype=torch.float64)
    patterns = 2.0 * (torch.arange(1024)[:, None] >> torch.arange(10) & 1).double() - 1
    along = w @ patterns.T / 10
    least = (w[:, None] - along[..., None] * patterns).square().sum(2).amin(1)
    checks = []
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = BinaryLinear.from_dense(linear_of(w.to(dtype))).train(dtype == torch.float64)
        with torch.no_grad():
            error = (w - layer(torch.eye(10, dtype=dtype)).T).square().sum(1)
        checks.append(Check(float((error / least - 1).max()), tolerance, what=f"excess, {dtype}"))
    return checks


@claim(
    "The bit-packed product by exclusive or and popcount is the product of signs exactly, zeros of both signs counted "
    "as 1, and packed weights have 32 times fewer bytes where 8 divides their length.",
    row=288,
    budget=2.0,
    mutants={
        "other signs": ("self.rows(weight)))", "self.rows(weight) - 1e-30))", "weft.ops.packed_signs"),
        "floats besides": (
            'self.register_buffer("packed", pack_signs(self.rows(weight)))',
            'self.register_buffer("packed", pack_signs(self.rows(weight))); self.register_buffer("floats", weight)',
            "weft.ops.packed_signs",
        ),
        "floats stay": ("self.weight = self._bits = None", "self._bits = None", "weft.ops.packed_signs"),
        "inputs stay floats": ('"scaled signs" if binary_inputs', '"floats" if binary_inputs'),
        "no K": ('"scaled signs" if binary_inputs', '"signs" if binary_inputs'),
    },
)
def exact_product_of_bits(seed: int) -> list[Check]:
    """Elements that are wrong, of magnitudes whose scales and products have no rounding; most bytes in the state."""
    generator, wrong, most = torch.Generator().manual_seed(seed), 0, 0.0
    for k in range(40):
        rows, outputs, length = k % 7, 1 + k, 8 * int(torch.randint(1, 40, (), generator=generator))
        x, w = torch.randn(rows, length, generator=generator), torch.randn(outputs, length, generator=generator)
        x, w = 4.0 * torch.where(x >= 0, 1, -1), 0.5 * torch.where(w >= 0, 1, -1)
        if k % 2:  # a quarter or half of the features 0, or -0, in the input or in the weights
            zero = (torch.arange(length) % 8 < 4) if k % 4 == 1 else (torch.arange(length) % 8 < 2)
            x, w = (x.where(~zero, -0.0), w) if k % 3 else (x, w.where(~zero, -0.0))
        wanted = torch.where(x >= 0, 1, -1) @ torch.where(w >= 0, 1, -1).T  # whole numbers
        scale = x.double().abs().mean(1, keepdim=True) * w.double().abs().mean(1)
        layer = BinaryLinear.from_dense(linear_of(w), binary_inputs=True).pack_()
        with torch.no_grad():
            wrong += int((layer(x).double() != wanted * scale).sum())
        kept = sum(t.nbytes for t in layer.state_dict().values()) - layer.scale.nbytes
        most = max(most, kept * 32 / w.nbytes)
    return [Check(wrong, 0, "==", "wrong elements"), Check(most, 1.0, "==", "bytes, in 32nds of the float weights'")]


@claim(
    "Gradients of weights are those of W~ times 1/D + a [|W| <= 1], those of binary inputs pass where |x| <= 1, and K "
    "and the bias have their exact ones: to 1e-9 in float64.",
    row=288,
    budget=1.0,
    mutants={
        "no derivative of the scale": ("<= 1) + 1 / max(w.shape[1], 1)", "<= 1)", "weft.ops.straight_through"),
        "weights far from 0 learn": ("(fixed.abs() <= 1)", "(fixed.abs() <= 9)", "weft.ops.straight_through"),
        "inputs far from 0 too": (
            "x.detach().abs() <= 1",
            "x.detach().abs() <= 9",
            "weft.ops.straight_through",
        ),
        "slope 1": ("w * (size * (fixed", "w * ((fixed", "weft.ops.straight_through"),
        "K held": ("mean_magnitude(x).to", "mean_magnitude(x.detach()).to"),
        "K in the bias too": (
            "    y = y * mean_magnitude(x).to(y.dtype)\n    return y if bias is None else y + bias.to(y.dtype)",
            "    y = y if bias is None else y + bias.to(y.dtype)\n    return y * mean_magnitude(x).to(y.dtype)",
        ),
    },
)
def straight_through_gradients(seed: int) -> Check:
    """Largest error of output and gradients, relative to the largest entry; W~ and the signs of x are leaves."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for binary_inputs in (False, True):
        dense = _layer(generator, 12, 7, torch.float64)
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        g = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        layer = BinaryLinear.from_dense(dense, binary_inputs=binary_inputs)
        mine = x.clone().requires_grad_()
        y = layer(mine)
        found = [y, *torch.autograd.grad(y, [mine, dense.weight, dense.bias], g)]
        w, b = dense.weight.detach(), dense.bias.detach()
        a = w.abs().sum(1, keepdim=True) / 12
        stand_in = (a * torch.where(w < 0, -1.0, 1.0)).requires_grad_()
        u = x.clone() if not binary_inputs else torch.where(x < 0, -1.0, 1.0).double()
        u.requires_grad_()
        k = (x.abs().sum(1, keepdim=True) / 12 if binary_inputs else torch.ones(5, 1).double()).requires_grad_()
        y = k * (u @ stand_in.T) + b
        by_u, by_w, by_k = torch.autograd.grad(y, [u, stand_in, k], g)
        by_x = by_u * (x.abs() <= 1) + by_k * x.sign() / 12 if binary_inputs else by_u
        wanted = [y, by_x, by_w * (1 / 12 + a * (w.abs() <= 1)), g.sum(0)]
        for one, other in zip(found, wanted, strict=True):
            worst = max(worst, float((one - other).detach().abs().max() / other.detach().abs().max()))
    return Check(worst, 1e-9)


@claim(
    "In eval mode without gradients the loop on bits runs, once a call, and bits follow the weights: after a step, a "
    "loaded state, other data under the same parameter, another bias, and after changes that torch does not count once "
    "the mode is set or a gradient asked for, the output is that of the float weights to 1e-4; packed, it stays so "
    "through a state.",
    budget=2.0,
    mutants={
        "steps unseen": ("(weight._version, weight.data_ptr(),", "(weight.data_ptr(),", "weft.ops.packed_signs"),
        "new data unseen": ("weight.data_ptr(), weight.stride()", "weight.stride()", "weft.ops.packed_signs"),
        "another bias unseen": ("bias._version, bias.data_ptr())", ")", "weft.ops.packed_signs"),
        "kept through modes": (
            "self._bits = None\n        return super().train",
            "return super().train",
            "weft.ops.packed_signs",
        ),
        "kept through gradients": ("self._bits = None  # the", "pass  # the", "weft.ops.packed_signs"),
        "floats in eval mode": (
            "self.training or self._differentiated(x)",
            "self.weight is not None",
            "weft.ops.packed_signs",
        ),
        "scale lost": ('self.register_buffer("scale", self', "self.scale = (self", "weft.ops.packed_signs"),
    },
)
def bits_follow(seed: int) -> list[Check]:
    """Runs too many or too few; largest difference between eval and train mode, relative to the largest output."""
    from weft.kernels.cpu import signs as loops

    generator, worst, runs, wanted_runs = torch.Generator().manual_seed(seed), 0.0, 0, 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    def compare(layer: nn.Module, x: Tensor, plain: nn.Module | None = None) -> None:
        nonlocal worst, wanted_runs
        plain = copy.deepcopy(plain or layer).train()
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                wanted = plain(x)
                for _ in range(2):
                    wanted_runs += 1
                    worst = max(worst, float((layer(x) - wanted).abs().max() / wanted.abs().max()))

    with loops.sums.followed(count), loops.product.followed(count):
        for binary_inputs in (False, True):
            dense, other = (_layer(generator, 37, 21) for _ in range(2))
            x = torch.randn(3, 37, generator=generator)
            layer = BinaryLinear.from_dense(dense, binary_inputs=binary_inputs).eval()
            compare(layer, x)
            dense.weight.detach().neg_()
            compare(layer, x)
            dense.weight.data = torch.randn(21, 37, generator=generator)
            compare(layer, x)
            dense.bias.data = dense.bias.detach() + 1
            compare(layer, x)
            layer.load_state_dict(other.state_dict())
            compare(layer, x)
            dense.weight.data.neg_()
            compare(layer.train().eval(), x)
            layer(x).sum().backward()
            dense.weight.data.neg_()
            compare(layer, x)
            plain, packed = copy.deepcopy(layer), layer.pack_()
            twin = BinaryLinear.from_dense(_layer(generator, 37, 21), binary_inputs=binary_inputs).pack_()
            twin.load_state_dict(packed.state_dict())
            compare(copy.deepcopy(packed), x, plain)
            compare(twin, x, plain)
    return [Check(runs - wanted_runs, 0, "==", "runs"), Check(worst, 1e-4)]
