"""What layers with routed experts share: the weights, cut from a feed-forward layer or drawn, and their products.

Expert e is V_e act(W_e x + b_e) + c_e. The gate multiplies the hidden units and c_e, so that what is kept for its
gradient is as wide as an expert, not as the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.convert import Convertible
from weft.errors import UsageError
from weft.kernels.grouped import grouped_linear
from weft.ops.feed_forward import two_layers
from weft.ops.routing import Slots

__all__ = ["Mixture", "compute_dtype", "uniform"]


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Numbers as torch's linear layers begin with, between ``-fan_in ** -0.5`` and ``fan_in ** -0.5``, float32."""
    return (2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of a layer's products: autocast's, where it is on and x is not float64, else x's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class Mixture(Convertible):
    """The experts' weights, without a router: ``up`` and ``down`` hold one parameter for each expert.

    Args:
        features: D.
        hidden: hidden units of one expert.
        out_features: D'; None for D.
        experts: E.
        activation: called without arguments, gives an elementwise module.
        bias: whether experts have b and c.
        seed: of the weights.

    Attributes:
        up: E weights ``[hidden, D]``.
        down: E weights ``[D', hidden]``.
        up_bias, down_bias: ``[E, hidden]`` and ``[E, D']``, or None.
    """

    converts = (nn.Sequential,)
    rebuilds = True

    def __init__(
        self, features: int, hidden: int, *, out_features: int | None = None, experts: int = 8,
        activation: Callable[[], nn.Module] = nn.GELU, bias: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        out = features if out_features is None else out_features
        if min(features, hidden, out, experts) < 1:
            raise UsageError(
                f"features={features}, hidden={hidden}, out_features={out}, experts={experts}: give 1 or more"
            )
        self.features, self.hidden, self.out_features = features, hidden, out
        self.act = activation()
        draw = torch.Generator().manual_seed(seed)
        self.up = nn.ParameterList(uniform((hidden, features), features, draw) for _ in range(experts))
        self.down = nn.ParameterList(uniform((out, hidden), hidden, draw) for _ in range(experts))
        self.up_bias = nn.Parameter(uniform((experts, hidden), features, draw)) if bias else None
        self.down_bias = nn.Parameter(uniform((experts, out), hidden, draw)) if bias else None

    @classmethod
    def from_dense(cls, layer: nn.Module, *, experts: int = 8, **options: Any) -> Any:
        """Experts cut from the layer's hidden units, in their order, each with an E-th of its second bias.

        With all experts active and gates of one the output is the layer's; the router's gates are smaller.

        Args:
            layer: ``nn.Sequential(nn.Linear, activation, nn.Linear)``.
            experts: E, divides the hidden units.
            options: of the class.
        """
        first, act, second = two_layers(layer)
        if experts < 1 or first.out_features % experts:
            raise UsageError(f"experts={experts!r} of {first.out_features} hidden units: give a divisor")
        biases = {first.bias is None, second.bias is None}
        made = cls(
            first.in_features, first.out_features // experts, out_features=second.out_features, experts=experts,
            activation=lambda: act, bias=biases != {True}, **options,
        ).to(first.weight)  # fmt: skip
        with torch.no_grad():
            for mine, given in zip(made.up, first.weight.chunk(experts), strict=True):
                mine.copy_(given)
            for mine, given in zip(made.down, second.weight.chunk(experts, 1), strict=True):
                mine.copy_(given)
            if made.up_bias is not None and made.down_bias is not None:
                made.up_bias.copy_(0 * made.up_bias if first.bias is None else first.bias.view(experts, -1))
                made.down_bias.copy_(0 * made.down_bias if second.bias is None else second.bias / experts)
        return made

    def to_dense(self) -> nn.Sequential:
        """The feed-forward layer of all experts' hidden units, without router and gates."""
        like, bias = self.up[0], self.up_bias is not None
        wide = self.hidden * len(self.up)
        first = nn.Linear(self.features, wide, bias, device="meta", dtype=like.dtype)
        second = nn.Linear(wide, self.out_features, bias, device="meta", dtype=like.dtype)
        first.weight = nn.Parameter(torch.cat([w.detach() for w in self.up]))
        second.weight = nn.Parameter(torch.cat([w.detach() for w in self.down], 1))
        if self.up_bias is not None and self.down_bias is not None:
            first.bias = nn.Parameter(self.up_bias.detach().flatten().clone())
            second.bias = nn.Parameter(self.down_bias.detach().sum(0))
        return nn.Sequential(first, self.act, second)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.features}, {self.hidden}, out_features={self.out_features}, experts={len(self.up)}"

    def experts(self, x: Tensor, slots: Slots, gates: Tensor) -> Tensor:
        """``[N, D']``: the chosen expert's output for each slot, times its gate.

        Args:
            x: ``[T, D]``.
            slots: of x's tokens.
            gates: ``[N]``, in the slots' order.
        """
        dtype = compute_dtype(x)
        up, down = ([w.to(dtype) for w in weights] for weights in (self.up, self.down))
        up_bias, down_bias = (None if b is None else b.to(dtype) for b in (self.up_bias, self.down_bias))
        gates = gates.to(dtype)
        h = self.act(grouped_linear(x.to(dtype), up, slots.sizes, bias=up_bias, rows=slots.rows)).to(dtype)
        return grouped_linear(h * gates[:, None], down, slots.sizes, bias=down_bias, scale=gates)
