"""Convolutions of signs: by torch's own operations, and by bits, of which each pixel's are packed once.

    y_{o,p} = a_o K_p sum_{t inside, c} sign(x_{c, p + t}) sign(W_{o,c,t}) + b_o

Bits have no 0. A tap t of pixel p that is outside of the image counts as -1 in all channels, and what that adds,
``-sum_c sign(W_{o,c,t})``, is taken out again at the pixels on the border.
"""

from __future__ import annotations

import abc
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft._keeping import plain_math
from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, check_tensor
from weft.kernels.sign_words import image_words, window_product
from weft.kernels.signs import unpack_signs
from weft.kernels.sparse_reference import conv2d_geometry
from weft.ops.borders import bordered, borders
from weft.ops.packed_signs import SignLayer

__all__ = ["SignConv2d", "window_means"]


class SignConv2d(SignLayer):
    """A `SignLayer` for ``nn.Conv2d`` of any stride, padding, dilation and groups; abstract still.

    With binary inputs and one group, eval mode computes with bits; otherwise with floats, of which as many are
    multiplied as by the ordinary layer: packed, the weights alone are smaller.

    Attributes:
        binary_inputs: whether inputs are signs too.
        shape: of the ordinary layer's weight, ``[O, C / groups, kh, kw]``.
    """

    converts = (nn.Conv2d,)
    binary_inputs = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        given: Any = layer
        self.shape, self.groups = tuple(given.weight.shape), given.groups
        self.kernel_size, self.stride, self.dilation = given.kernel_size, given.stride, given.dilation
        self.given_padding, self.padding_mode = given.padding, given.padding_mode
        self.padding, self.border = borders(given)

    @abc.abstractmethod
    def by_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output for images ``[B, C, H, W]``, given the weights that are multiplied with, in their shape."""

    def extra_repr(self) -> str:
        """As the ordinary layer's, and whether the float weights are gone."""
        sizes = f"{self.shape[1] * self.groups}, {self.shape[0]}, kernel_size={self.kernel_size}, stride={self.stride}"
        sizes += f", padding={self.given_padding!r}, dilation={self.dilation}, groups={self.groups}"
        return f"{sizes}, bias={self.bias is not None}" + (", packed" if self.weight is None else "")

    def check(self, x: Tensor) -> None:
        """Raises UsageError for another number of channels, and images smaller than the filter."""
        channels = self.shape[1] * self.groups
        if x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise UsageError(f"x has the shape {list(x.shape)}: give [B, {channels}, H, W] or [{channels}, H, W]")
        sides = [*x.shape[-2:]]
        if self.border is not None:
            left, right, top, bottom = self.border
            sides = [sides[0] + top + bottom, sides[1] + left + right]
        if min(self._windows(*sides)) < 1:
            raise UsageError(f"x has the shape {list(x.shape)}: smaller than {self.kernel_size} with its dilation")

    def convolved(self, image: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[B, C, H, W] -> [B, O, H', W']`` as the ordinary layer has it."""
        image = bordered(image, self.border, self.padding_mode)
        return F.conv2d(image, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def rows(self, weight: Tensor) -> Tensor:
        """The channels of a tap stand together, as those of a pixel do."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def by_bits(self) -> bool:
        """With binary inputs and one group."""
        return self.binary_inputs and self.groups == 1

    def matrix(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> _Windows:
        """The product of bits."""
        return _Windows(self, self.signs_of(packed), scale, bias)

    def signs_of(self, packed: Tensor) -> Tensor:
        """1 and -1 in the weight's shape, float32."""
        outputs, channels, height, width = self.shape
        rows = unpack_signs(packed, outputs, channels * height * width)
        return rows.view(outputs, height, width, channels).permute(0, 3, 1, 2).contiguous()

    def from_packed(self, x: Tensor) -> Tensor:
        """By signs as floats."""
        dtype = x.dtype
        weight = (self.signs_of(self.packed) * self.scale.float()[:, None, None, None]).to(dtype)
        y = self.by_weights(x if x.ndim == 4 else x[None], weight, None if self.bias is None else self.bias.to(dtype))
        return y if x.ndim == 4 else y[0]

    def _windows(self, height: int, width: int) -> list[int]:
        """Places of the filter, down and across."""
        how = self.kernel_size, self.stride, self.padding, self.dilation
        shape = (1, self.shape[1] * self.groups, height, width)
        return list(conv2d_geometry(shape, *map(list, how))[1])


def window_means(layer: SignConv2d, x: Tensor) -> Tensor:
    """K: the mean of |x| over channels and taps of each window, ``[B, groups, H', W']``; on the padding x is 0."""
    height, width = layer.kernel_size
    wide = torch.promote_types(x.dtype, torch.float32)
    means = x.abs().unflatten(1, (layer.groups, -1)).mean(2, dtype=wide)
    box = means.new_full((layer.groups, 1, height, width), 1 / (height * width))
    with _unrounded(x):  # autocast would round what float sums are multiplied with
        return layer.convolved(means, box).to(x.dtype)


def _unrounded(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, which the meta device does not have."""
    return nullcontext() if x.is_meta else plain_math(x.device)


class _Windows:
    """Filters as words, and what the padding adds for the last size of images."""

    def __init__(self, layer: SignConv2d, signs: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.layer, self.scale, self.bias = layer, scale, bias
        self.filters, self.taps = image_words(signs)[0].flatten(1), signs.sum(1)  # [O, kh kw words], [O, kh, kw]
        self.box = signs.new_full((1, 1, *layer.kernel_size), 1 / math.prod(layer.kernel_size))
        self.missing: tuple[tuple[int, int], Tensor] | None = None  # for images of these sides

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` or ``[C, H, W]`` to float32 ``[B, O, H', W']`` or ``[O, H', W']``."""
        layer, x = self.layer, check_tensor("x", x, FLOATS)
        layer.check(x)
        image = (x if x.ndim == 4 else x[None]).float()
        if layer.padding_mode != "zeros":
            image = bordered(image, layer.border, layer.padding_mode)
        (words, means), zeros = image_words(image), self._zeros()
        words, means = F.pad(words, (0, 0, *zeros)), F.pad(means, zeros)
        (batch, height, width, count), (kh, kw), strides = words.shape, layer.kernel_size, words.stride()
        how = [kh, kw], [*layer.stride], [0, 0], [*layer.dilation]
        down, across = conv2d_geometry((1, 1, height, width), *how)[1]
        between = strides[0], strides[1] * layer.stride[0], strides[2] * layer.stride[1]
        inside = strides[1] * layer.dilation[0], strides[2] * layer.dilation[1], 1
        windows = words.as_strided((batch, down, across, kh, kw, count), (*between, *inside))
        windows = windows.reshape(batch, down * across, kh * kw * count)
        with _unrounded(x):
            factors = F.conv2d(means, self.box, None, layer.stride, 0, layer.dilation).flatten(1)
        given, columns = (self.filters, windows, self.scale), image.shape[1] * kh * kw
        if any(zeros):
            y = window_product(*given, torch.ones_like(factors), columns)
            y.add_(self._missing(image.shape[2], image.shape[3])).mul_(factors[:, None])
        else:
            y = window_product(*given, factors, columns)
        if self.bias is not None:
            y += self.bias[:, None]
        y = y.view(batch, len(self.scale), down, across)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return y.contiguous(memory_format=torch.channels_last)
        return y if x.ndim == 4 else y[0]

    def _zeros(self) -> tuple[int, int, int, int]:
        """Columns and rows of zeros around an image: left, right, top, bottom."""
        layer = self.layer
        if layer.padding_mode != "zeros":
            return 0, 0, 0, 0
        return layer.border or (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])

    def _missing(self, height: int, width: int) -> Tensor:
        """What is to be added to the outputs' windows ``[O, P]`` for taps outside, before factors."""
        found = self.missing  # read once: another thread may have images of other sides
        if found is None or found[0] != (height, width):
            outside = F.pad(self.taps.new_zeros(1, 1, height, width), self._zeros(), value=1.0)
            with _unrounded(outside):  # autocast would round the sums, for later calls too
                sums = F.conv2d(outside, self.taps[:, None], None, self.layer.stride, 0, self.layer.dilation)
            found = self.missing = (height, width), sums.flatten(2)[0] * self.scale[:, None]
        return found[1]
