"""Convolve with filters of -1 and 1 alone in both passes; the gradient goes to real filters, which are kept in [-1, 1].

    W_b = sign(W), with sign(0) = 1,  or  W_b = 1 with probability clip((W + 1) / 2, 0, 1), else -1
    y = H (x * W_b) + b,   dL/dW := dL/dW_b,   W <- clip(W, -1, 1) after each step

``*`` is a convolution with stride, padding, dilation and groups of the layer. H is ``sqrt(1.5 / (kh kw (C + O)))`` for
filters of C channels, as in the authors' code, unless given; everything else is as in `weft.precision.binary_connect`,
which this is for filters of one pixel. In eval mode as many numbers are multiplied as by the ordinary layer; packed,
the filters are small.

Paper: "BinaryConnect: Training Deep Neural Networks with binary weights during propagations", Matthieu Courbariaux,
Yoshua Bengio, Jean-Pierre David, 2015, arXiv:1511.00363.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from weft.claim import Check, claim
from weft.method import method
from weft.ops.sign_conv2d import SignConv2d
from weft.precision import binary_conv2d
from weft.precision.binary_connect import ConnectedSigns
from weft.testing.example import Example


@method("binary-connect-conv2d", contract="layer", family="precision", papers=[100])
class BinaryConnectConv2d(ConnectedSigns, SignConv2d):
    """An ``nn.Conv2d`` that multiplies by -1 and 1 alone, on the same parameters; compilers take it as `BinaryConnect`.

    Args:
        layer: the ordinary layer.
        stochastic: draw the signs in training.
        scale: H; None for ``sqrt(1.5 / (kh kw (C + O)))``.
        seed: of the draws; how many there were is kept in a buffer.

    Raises:
        Unsupported: for other layers.
        UsageError: for a scale that is not above 0.
    """

    def __init__(
        self, layer: nn.Module, *, stochastic: bool = False, scale: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(layer, stochastic=stochastic, scale=scale, seed=seed)

    def differentiable(self, x: Tensor) -> Tensor:
        """By the real filters."""
        y = self.convolved(x if x.ndim == 4 else x[None], self.multiplied(self.draw())) * self.factor
        y = y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)
        return y if x.ndim == 4 else y[0]

    def by_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[B, C, H, W] -> [B, O, H', W']`` with filters H W_b."""
        return self.convolved(x, weight, bias)


def example() -> Example:
    """Weights on both sides of 0, images with an odd side."""
    return binary_conv2d.example()


@claim(
    "Both passes see filters of -1 and 1 alone, the same ones, times H; the gradient of the stored filters is that of "
    "the binary ones; through steps of any size stored filters stay in [-1, 1]; packed, the outputs are the same.",
    row=100,
    budget=2.0,
    mutants={
        "real filters": (
            "straight_through(signs(weight.detach()), weight)", "weight * 1", "weft.precision.binary_connect"
        ),
        "drawn anew on the way back": (
            "straight_through(drawn, weight)", "drawn * weight", "weft.precision.binary_connect"
        ),
        "not clipped": ("weight.clamp_(-1, 1)", "weight.clamp_(-2, 2)", "weft.precision.binary_connect"),
        "H of one tap": ("* math.prod(taps)", "", "weft.precision.binary_connect"),
        "H twice": ("self.draw())) * self.factor", "self.draw())) * self.factor**2"),
        "H in the bias": ("y + self.bias[:, None, None].to(y.dtype)", "y + self.factor * self.bias[:, None, None]"),
        "packed without H": ("self.signs_of(self.packed) * self.scale.float()[:, None, None, None]",
                             "self.signs_of(self.packed)", "weft.ops.sign_conv2d"),
        "packed in another order": ("rows.view(outputs, height, width, channels).permute(0, 3, 1, 2)",
                                    "rows.view(outputs, channels, height, width)", "weft.ops.sign_conv2d"),
    },
)  # fmt: skip
def only_signs(seed: int) -> list[Check]:
    """Against projected descent through torch's own gradients of a convolution, float64."""
    draw, wrong, off, most, packed = torch.Generator().manual_seed(seed), 0, 0.0, 0.0, 0.0
    for stochastic in (False, True):
        how: dict[str, Any] = {"stride": 1 + seed % 2, "padding": 1, "groups": 2}
        start = 0.6 * torch.randn(6, 2, 3, 2, generator=draw, dtype=torch.float64)
        start[torch.rand(start.shape, generator=draw) < 0.1] = 0
        dense = nn.Conv2d(4, 6, (3, 2), **how, dtype=torch.float64, device="meta").to_empty(device="cpu")
        weight, bias = dense.parameters()
        with torch.no_grad():
            weight.copy_(start)
            bias.copy_(torch.randn(6, generator=draw))
        layer = BinaryConnectConv2d.from_dense(dense, stochastic=stochastic, seed=seed)
        mine, factor = start.clamp(-1, 1), math.sqrt(1.5 / (3 * 2 * (2 + 6)))
        for _ in range(4):
            x = torch.randn(3, 4, 6, 5, generator=draw, dtype=torch.float64).requires_grad_()
            y = layer(x)
            g = 50 * torch.randn(y.shape, generator=draw, dtype=torch.float64)
            by_x, by_w, by_b = torch.autograd.grad(y, [x, weight, bias], g)
            binary = (
                _filters_seen(layer, x.detach(), (y - bias[:, None, None]).detach())
                if stochastic
                else 1 - 2.0 * (mine < 0)
            )
            wrong += int((binary.abs() != 1).sum())
            expected = factor * F.conv2d(x, binary.double(), None, **how) + bias[:, None, None]
            wanted = [
                expected,
                conv2d_input(x.shape, factor * binary.double(), g, **how),
                conv2d_weight(x.detach(), start.shape, factor * g, **how),
                g.sum((0, 2, 3)),
            ]
            for one, other in zip((y, by_x, by_w, by_b), wanted, strict=True):
                off = max(off, float((one - other).detach().abs().max() / other.detach().abs().max()))
            with torch.no_grad():
                weight.sub_(by_w)
            mine = (mine - wanted[2].detach()).clamp(-1, 1)
            most = max(most, float(layer.state_dict()["weight"].abs().max()))
            off = max(off, float((weight.detach() - mine).abs().max()))
        if not stochastic:
            with torch.no_grad():
                before = layer.eval()(x)
                packed = float((layer.pack_()(x.detach()) - before).abs().max() / before.abs().max())
    return [
        Check(wrong, 0, "==", "filters that are no signs"),
        Check(off, 1e-9, what="passes and descent"),
        Check(most, 1.0, what="stored filters"),
        Check(packed, 1e-6, what="packed"),
    ]


def _filters_seen(layer: BinaryConnectConv2d, x: Tensor, y: Tensor) -> Tensor:
    """The filters that gave y, which has no bias: the least squares' solution, one group after another."""
    groups, found = layer.groups, []
    columns = F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).unflatten(1, (groups, -1)).movedim(3, 1)
    outputs = (y / layer.factor).flatten(2).unflatten(1, (groups, -1)).movedim(3, 1)
    for g in range(groups):
        given, wanted = columns[:, :, g].flatten(0, 1), outputs[:, :, g].flatten(0, 1)
        found.append(torch.linalg.lstsq(given, wanted).solution.T)
    return torch.cat(found).view(layer.shape).round(decimals=6)
