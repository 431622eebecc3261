"""Operations with weights, taken apart: forward pass, gradient of the input, gradients of weight and bias.

Every input has at least one leading batch dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from weft.errors import Unsupported
from weft.ops.token_layers import own_weights

__all__ = ["Affine", "Convolution", "Linear", "Lookup", "operation"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """``[B, ..., in] -> [B, ..., out]``.

    Attributes:
        least: fewest dimensions of an input.
        cast: whether autocast computes it in its dtype.
    """

    cast: ClassVar[bool] = True

    @property
    def least(self) -> int:
        return 2

    def before(self, x: Tensor) -> Tensor:
        """What comes first and has no weights; differentiated by autograd."""
        return x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def inputs(self, grad: Tensor, weight: Tensor, shape: Size) -> Tensor:
        return grad @ weight

    def weight(self, grad: Tensor, x: Tensor, shape: Size) -> Tensor:
        return grad.flatten(0, -2).T @ x.flatten(0, -2)

    def bias(self, grad: Tensor) -> Tensor:
        return grad.flatten(0, -2).sum(0)


@dataclasses.dataclass(frozen=True)
class Affine(Linear):
    """A LayerNorm over the last dimensions: it normalises before."""

    cast = False
    shape: tuple[int, ...]
    eps: float

    @property
    def least(self) -> int:
        return len(self.shape) + 1

    def before(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x * weight
        return (out if bias is None else out + bias).to(x.dtype)

    def inputs(self, grad: Tensor, weight: Tensor, shape: Size) -> Tensor:
        return (grad * weight).to(grad.dtype)

    def weight(self, grad: Tensor, x: Tensor, shape: Size) -> Tensor:
        return self.bias(grad * x)

    def bias(self, grad: Tensor) -> Tensor:
        return grad.flatten(0, -self.least).sum(0)


@dataclasses.dataclass(frozen=True)
class Convolution(Linear):
    """``[B, C, H, W] -> [B, K, H', W']``; padding by other numbers than zeros comes before."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    dilation: tuple[int, ...]
    groups: int

    @property
    def least(self) -> int:
        return 4

    @property
    def how(self) -> tuple[Any, ...]:
        return self.stride, self.padding if self.mode == "zeros" else (0, 0), self.dilation, self.groups

    def before(self, x: Tensor) -> Tensor:
        (high, wide), mode = self.padding, self.mode
        return x if mode == "zeros" else F.pad(x, [wide, wide, high, high], mode)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, *self.how)

    def inputs(self, grad: Tensor, weight: Tensor, shape: Size) -> Tensor:
        return conv2d_input(shape, weight, grad, *self.how)

    def weight(self, grad: Tensor, x: Tensor, shape: Size) -> Tensor:
        return conv2d_weight(x, shape, grad, *self.how)

    def bias(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))


@dataclasses.dataclass(frozen=True)
class Lookup(Linear):
    """Rows of a table by number; a row ``padding`` gets no gradient."""

    cast = False
    padding: int

    @property
    def least(self) -> int:
        return 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def weight(self, grad: Tensor, x: Tensor, shape: Size) -> Tensor:
        rows = grad.reshape(-1, shape[1])
        rows = rows * (x.reshape(-1, 1) != self.padding)
        return rows.new_zeros(shape).index_add(0, x.reshape(-1), rows)


def operation(layer: nn.Module) -> Linear:
    """The operation of a layer.

    Raises:
        Unsupported: for anything but an ``nn.Linear``, ``nn.Conv2d``, ``nn.LayerNorm`` or ``nn.Embedding``, for a
            convolution padded "same" by an even kernel, for tables of rows that are sparse, renormalised or scaled, and
            for weights that a hook makes anew for each call (pruning, weight norm).
    """
    own_weights(layer)
    if type(layer) is nn.Linear:
        return Linear()
    if type(layer) is nn.LayerNorm:
        return Affine(tuple(layer.normalized_shape), layer.eps)
    if type(layer) is nn.Embedding:
        if layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None:
            raise Unsupported("a table with sparse, scaled or renormalised rows", "a plain nn.Embedding")
        return Lookup(-1 if layer.padding_idx is None else layer.padding_idx)
    if type(layer) is not nn.Conv2d:
        raise Unsupported(f"{type(layer).__name__} is not taken apart", "nn.Linear, Conv2d, LayerNorm or Embedding")
    padding: Any = layer.padding
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if padding == "same" and any(r % 2 for r in reach):
        raise Unsupported("padding 'same' is uneven for this kernel", "F.pad, and padding 0")
    padding = {"same": tuple(r // 2 for r in reach), "valid": (0, 0)}.get(padding, padding)
    return Convolution(layer.stride, padding, layer.padding_mode, layer.dilation, layer.groups)
