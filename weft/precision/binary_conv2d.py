"""Filters of one bit and one scale an output; inputs of one bit too, where asked for: convolutions that count bits.

    W~_o = a_o sign(W_o),   a_o = mean |W_o|                          filters [O, C, kh, kw] alone: BWN
    y    = K a_o (sign(x) * sign(W_o)) + b_o,   K = (mean_c |x|) * k,   k_t = 1 / (kh kw)    inputs too: XNOR-Network
    dL/dW_i = dL/dW~_i (1/n + a [|W_i| <= 1]),   n = C kh kw,   dsign(x)/dx = [|x| <= 1]

``*`` is a convolution with the layer's stride, padding and dilation; of several groups each has its own K. Zeros of the
padding stay 0: they come around the signs, as in the authors' code, and around |x|. Everything else is as in
`weft.precision.binary_linear`, whose product this is for filters of one pixel.

In eval mode, where no gradient is asked for, a layer with binary inputs and one group packs each pixel's channels into
words once and makes windows of these; filters alone of one bit are multiplied as floats, and are small once packed.
Channels fill whole words of 64: with fewer than 32 or so, the ordinary layer is faster. The first layer stays in
floats, and BatchNorm comes before the signs.

Paper: "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", Mohammad Rastegari, Vicente
Ordonez, Joseph Redmon, Ali Farhadi, 2016, arXiv:1603.05279. K is in the paper; the authors' code leaves it out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.method import method
from weft.ops.sign_conv2d import SignConv2d, window_means
from weft.ops.straight_through import mean_magnitude, scaled_signs, sign_through
from weft.testing.example import Example


@method(
    "binary-conv2d",
    contract="layer",
    family="precision",
    papers=[288],
    variants={
        "xnor-conv2d": {
            "options": {"binary_inputs": True},
            "summary": "Filters and inputs of one bit, with their scales: convolutions become counts of bits.",
        }
    },
)
class BinaryConv2d(SignConv2d):
    """An ``nn.Conv2d`` with filters of one bit, on the same parameters.

    Args:
        layer: the ordinary layer, with any stride, padding, dilation and groups.
        binary_inputs: inputs of one bit and a scale too; normalise them to mean 0 before.

    Raises:
        Unsupported: for other layers.
    """

    def __init__(self, layer: nn.Module, *, binary_inputs: bool = False) -> None:
        super().__init__(layer)
        self.binary_inputs = bool(binary_inputs)

    def extra_repr(self) -> str:
        """Sizes and what is binary."""
        return f"{super().extra_repr()}, binary_inputs={self.binary_inputs}"

    def scales(self, weight: Tensor) -> Tensor:
        """a."""
        return mean_magnitude(weight.flatten(1))[:, 0]

    def differentiable(self, x: Tensor) -> Tensor:
        """By the float weights."""
        assert self.weight is not None
        weight = scaled_signs(self.weight.flatten(1)).view_as(self.weight)
        y = self.by_weights(x if x.ndim == 4 else x[None], weight, self.bias)
        return y if x.ndim == 4 else y[0]

    def by_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[B, C, H, W] -> [B, O, H', W']`` with filters a sign(W)."""
        if not self.binary_inputs:
            return self.convolved(x, weight, bias)
        y, means = self.convolved(sign_through(x), weight), window_means(self, x)
        y = y * means.to(y.dtype).repeat_interleave(y.shape[1] // self.groups, 1)
        return y if bias is None else y + bias[:, None, None].to(y.dtype)


def example() -> Example:
    """Weights and inputs on both sides of 0, on images with an odd side."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=draw)
    return Example(layer, torch.randn(6, 6, 7, 6, generator=draw), torch.arange(6) % 5)


CASES: tuple[tuple[int, int, dict[str, Any]], ...] = (  # channels, outputs and how
    (70, 9, {"kernel_size": 3, "padding": 1}),
    (6, 8, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    (64, 3, {"kernel_size": (2, 4), "padding": "same", "bias": False}),
    (5, 10, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}),
    (12, 6, {"kernel_size": 3, "padding": 1, "groups": 3}),
    (128, 16, {"kernel_size": 1}),
)


def _case(seed: int, kind: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Tensor]:
    """An ordinary layer and two images, normal numbers of which a tenth is 0, on both sides of -1 and 1."""
    draw = torch.Generator().manual_seed(seed)
    channels, outputs, how = CASES[kind]

    def numbers(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        return x.masked_fill(torch.rand(shape, generator=draw) < 0.1, 0).to(dtype)

    layer = nn.Conv2d(channels, outputs, **how, device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(numbers(*p.shape))
    return layer, numbers(2, channels, 6 + seed % 3, 9 + seed % 4)


def _windows(layer: nn.Conv2d, image: Tensor) -> Tensor:
    """What each tap of each window sees, ``[B, C, kh kw, P]``, zeros outside of the image; by torch's `unfold`."""
    before = [(0, 0), (0, 0)]
    if layer.padding == "same":
        spare = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        before = [(n // 2, n - n // 2) for n in spare]
    elif not isinstance(layer.padding, str):
        before = [(n, n) for n in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    image = F.pad(image, (*before[1], *before[0]), mode)
    found = F.unfold(image, layer.kernel_size, layer.dilation, 0, layer.stride)
    return found.unflatten(1, (image.shape[1], -1))


def _by_windows(layer: nn.Conv2d, inputs: Tensor, filters: Tensor, sizes: Tensor | None) -> Tensor:
    """The equations, one group after another, ``[B, O, P]``: filters are a sign(W), sizes the |x| that make K."""
    parts, seen = [], _windows(layer, inputs)
    for g, own in enumerate(filters.chunk(layer.groups)):
        channels = slice(g * own.shape[1], (g + 1) * own.shape[1])
        parts.append(torch.einsum("bctp,oct->bop", seen[:, channels], own.flatten(2)))
        if sizes is not None:
            parts[g] = parts[g] * _windows(layer, sizes)[:, channels].mean((1, 2))[:, None]
    y = torch.cat(parts, 1)
    return y if layer.bias is None else y + layer.bias[:, None]


@claim(
    "The convolution of bits is that of signs exactly, zeros of both signs counted as 1 and those of the padding as 0, "
    "for every stride, dilation, padding and number of channels; packed weights have 32 times fewer bytes where 8 "
    "divides their number.",
    row=288,
    budget=2.0,
    mutants={
        "the padding counts": ("[0] * self.scale[:, None]", "[0] * 0", "weft.ops.sign_conv2d"),
        "windows of other images": ("strides[1] * layer.stride[0]", "strides[1]", "weft.ops.sign_conv2d"),
        "taps mixed up": ("(0, 2, 3, 1).flatten(1)", "(0, 3, 2, 1).flatten(1)", "weft.ops.sign_conv2d"),
        "channels that are not there": ("image.shape[1] * kh * kw", "64 * count * kh * kw", "weft.ops.sign_conv2d"),
        "K of the whole image": ("mul_(factors[:, None])", "mul_(factors.mean())", "weft.ops.sign_conv2d"),
        "the padding has a size": ("F.pad(means, zeros)", "F.pad(means, zeros, value=9.0)", "weft.ops.sign_conv2d"),
        "floats in eval mode": ("self.binary_inputs and self.groups == 1", "False", "weft.ops.sign_conv2d"),
        "images of one size": ("found[0] != (height, width)", "math.prod(found[0]) != height * width",
                               "weft.ops.sign_conv2d"),
    },
)  # fmt: skip
def exact_convolution_of_bits(seed: int) -> list[Check]:
    """Elements off by 0.01, where one wrong sign makes 3; runs of the loop too many; most bytes in the state."""
    from weft.kernels.cpu import sign_words as loops

    wrong, runs, wanted_runs, most = 0, 0, 0, 0.0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    with loops.window_product.followed(count), torch.no_grad():
        for kind in range(len(CASES)):
            dense, x = _case(seed, kind, torch.float32)
            dense.weight.copy_(torch.where(dense.weight >= 0, 0.5, -0.5))
            if dense.bias is not None:
                dense.bias.zero_()
            layer = BinaryConv2d.from_dense(dense, binary_inputs=True).eval()
            magnitude = 3.0 * layer.kernel_size[0] * layer.kernel_size[1]  # a window on the border keeps a whole number
            packed = copy.deepcopy(layer).pack_()
            for rows in (x[:1, :, 1:, 1:], x, x[0], *([x.mT] if kind == 0 else [])):
                signs = torch.where(rows >= 0, 1.0, -1.0)
                one = signs if rows.ndim == 4 else signs[None]
                wanted = _by_windows(dense, one, dense.weight, one.abs() * magnitude)
                for found in (layer(signs * magnitude), packed(signs * magnitude)):
                    wanted_runs += int(dense.groups == 1)
                    wrong += int(((found if rows.ndim == 4 else found[None]).flatten(2) - wanted).abs().gt(0.01).sum())
            if dense.weight[0].numel() % 8 == 0:
                most = max(most, packed.packed.nbytes * 32 / dense.weight.nbytes)
    return [
        Check(wrong, 0, "==", "wrong elements"),
        Check(runs - wanted_runs, 0, "==", "runs of the loop on words"),
        Check(most, 1.0, "==", "bytes, in 32nds of the float weights'"),
    ]


@claim(
    "Output and gradients, in training and in eval mode, are those of the equations over every window: of filters times"
    " 1/n + a [|W| <= 1], of binary inputs where |x| <= 1, of K and the bias exactly, to 1e-9 in float64.",
    row=288,
    budget=2.0,
    mutants={
        "a scale for each channel": (
            "mean_magnitude(weight.flatten(1))[:, 0]", "mean_magnitude(weight[:, 0].flatten(1))[:, 0]"
        ),
        "filters' rows by channel": (
            "scaled_signs(self.weight.flatten(1)).view_as(self.weight)",
            "scaled_signs(self.weight.flatten(0, 1).flatten(1)).view_as(self.weight)",
        ),
        "K held": ("window_means(self, x)", "window_means(self, x.detach())"),
        "no K": ("window_means(self, x)", "torch.ones_like(window_means(self, x))"),
        "K of all groups": ("unflatten(1, (layer.groups, -1)).mean(2, dtype=wide)",
                            "mean(1, keepdim=True, dtype=wide).expand(-1, layer.groups, -1, -1)",
                            "weft.ops.sign_conv2d"),
        "K in the bias too": (
            "return y if bias is None else y + bias[:, None, None].to(y.dtype)",
            "return y if bias is None else y + bias[:, None, None].to(y.dtype) * means.mean(1, keepdim=True)",
        ),
        "signs after the padding": ("self.convolved(sign_through(x), weight), window",
                                    "self.convolved(x, weight), window"),
        "weights far from 0 learn": ("(fixed.abs() <= 1)", "(fixed.abs() <= 9)", "weft.ops.straight_through"),
    },
)  # fmt: skip
def straight_through_gradients(seed: int) -> list[Check]:
    """Largest errors, relative to the largest entry; filters and signs of x are leaves of the reference."""
    worst, worst_eval = 0.0, 0.0
    for kind in range(len(CASES)):
        for binary in (False, True):
            dense, x = _case(seed, kind)
            layer, mine, params = BinaryConv2d.from_dense(dense, binary_inputs=binary), x.clone(), [*dense.parameters()]
            y = layer(mine.requires_grad_()).flatten(2)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            found = [y, *torch.autograd.grad(y, [mine, *params], g)]
            w = dense.weight.detach()
            a = w.abs().flatten(1).mean(1)[:, None, None, None]
            filters = (a * torch.where(w < 0, -1.0, 1.0)).requires_grad_()
            u = (torch.where(x < 0, -1.0, 1.0).double() if binary else x.clone()).requires_grad_()
            sizes = x.abs().requires_grad_()
            out = _by_windows(dense, u, filters, sizes if binary else None)
            by_u, by_w, by_k = torch.autograd.grad(out, [u, filters, sizes], g, materialize_grads=True)
            by_x = by_u * (x.abs() <= 1) + by_k * x.sign() if binary else by_u
            n = w[0].numel()
            wanted = [out, by_x, by_w * (1 / n + a * (w.abs() <= 1)), g.sum((0, 2))][: len(found)]
            for one, other in zip(found, wanted, strict=True):
                worst = max(worst, float((one - other).detach().abs().max() / other.detach().abs().max()))
            with torch.no_grad():
                calm = layer.eval().float()(x.float()).flatten(2)
            worst_eval = max(worst_eval, float((calm - out).detach().abs().max() / out.detach().abs().max()))
    return [Check(worst, 1e-9), Check(worst_eval, 1e-5, what="eval mode, float32")]
