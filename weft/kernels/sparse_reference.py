"""Products with a sparse weight in plain torch, by gathering and adding some stored weights at a time.

As `weft.kernels.sparse` has them, whose operators run these where there are no loops of Weft's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 1 << 20  # numbers that are gathered at a time

Pair = tuple[int, int]


def conv2d_geometry(
    shape: tuple[int, ...], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Pair, Pair]:
    """Heights and widths of the padded input ``[B, C, H, W]`` and of the output."""
    padded = shape[2] + 2 * padding[0], shape[3] + 2 * padding[1]
    out = [(padded[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return (padded[0], padded[1]), (out[0], out[1])


def patches(padded: Pair, out: Pair, stride: list[int], device: Any = None) -> Tensor:
    """How far the patch of each output pixel is from the first one, in an image's memory."""
    down = torch.arange(out[0], device=device) * (stride[0] * padded[1])
    return (down[:, None] + torch.arange(out[1], device=device) * stride[1]).flatten()


def taps_of(columns: Tensor, padded: Pair, kernel: list[int], dilation: list[int]) -> Tensor:
    """Where each stored weight's tap lies in the first patch, counted over the channels' padded images."""
    size = kernel[0] * kernel[1]
    channel, tap = columns // size, columns % size
    down, right = tap // kernel[1] * dilation[0], tap % kernel[1] * dilation[1]
    return (channel * padded[0] + down) * padded[1] + right


# plain torch


def _rows(starts: Tensor, count: int) -> Tensor:
    """The row of each stored weight."""
    ones = torch.arange(len(starts) - 1, device=starts.device)
    return ones.repeat_interleave(starts.diff(), output_size=count)


def _gathered(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor, shifts: Tensor
) -> Tensor:
    """``y[b, o, p] = bias[o] + sum of values[k] * x[b, columns[k] + shifts[p]]`` over the row's k."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count, pixels = len(values), len(shifts)
    rows = _rows(starts, count)
    y = x.new_zeros(len(starts) - 1, pixels, len(x), dtype=wide)
    turned, step = x.T.to(wide), max(1, AT_ONCE // max(1, pixels * len(x)))
    for k in range(0, count, step):
        part = turned[columns[k : k + step, None] + shifts]
        y.index_add_(0, rows[k : k + step], part * values[k : k + step, None, None].to(wide))
    if bias is not None:
        y += bias[:, None, None].to(wide)
    return y.permute(2, 0, 1).to(x.dtype).contiguous()


def _gathered_backward(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, shifts: Tensor, flags: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_gathered` for ``grad [B, O, P]``; empty where a flag of (x, values, bias) is not set."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count = len(values)
    rows, above, turned = _rows(starts, count), grad.permute(1, 2, 0).to(wide), x.T.to(wide)
    of_x = torch.zeros_like(turned, memory_format=torch.contiguous_format) if flags[0] else turned.new_empty(0)
    of_values = turned.new_zeros(count if flags[1] else 0)
    step = max(1, AT_ONCE // max(1, len(shifts) * len(x)))
    for k in range(0, count, step):
        at, errors = columns[k : k + step, None] + shifts, above[rows[k : k + step]]
        if flags[0]:
            of_x.index_add_(0, at.flatten(), (errors * values[k : k + step, None, None].to(wide)).flatten(0, 1))
        if flags[1]:
            of_values[k : k + step] = (errors * turned[at]).sum((1, 2))
    of_bias = above.sum((1, 2)) if flags[2] else turned.new_empty(0)
    of_x = of_x.T.contiguous() if flags[0] else of_x
    return of_x.to(x.dtype), of_values.to(values.dtype), of_bias.to(values.dtype)


def sparse_linear_reference(x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor) -> Tensor:
    """`sparse_linear` in plain torch."""
    return _gathered(x, values, bias, starts, columns, columns.new_zeros(1)).flatten(1)


def sparse_linear_backward_reference(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, other_starts: Tensor, other_rows: Tensor,
    order: Tensor, of_x: bool, of_values: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sparse_linear_backward` in plain torch."""
    flags = of_x, of_values, of_bias
    return _gathered_backward(grad[..., None], x, values, starts, columns, columns.new_zeros(1), flags)


def sparse_conv2d_reference(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, columns: Tensor, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """`sparse_conv2d` in plain torch."""
    padded, out = conv2d_geometry(tuple(x.shape), kernel, stride, padding, dilation)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).flatten(1)
    taps = taps_of(columns, padded, kernel, dilation)
    return _gathered(x, values, bias, starts, taps, patches(padded, out, stride, x.device)).unflatten(2, out)


def sparse_conv2d_backward_reference(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], of_x: bool, of_values: bool, of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sparse_conv2d_backward` in plain torch."""
    padded, out = conv2d_geometry(tuple(x.shape), kernel, stride, padding, dilation)
    image = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    taps, shifts = taps_of(columns, padded, kernel, dilation), patches(padded, out, stride, x.device)
    flags = of_x, of_values, of_bias
    found, *others = _gathered_backward(grad.flatten(2), image.flatten(1), values, starts, taps, shifts, flags)
    if of_x:
        found = found.view_as(image)
        found = F.pad(found, (-padding[1], -padding[1], -padding[0], -padding[0])).contiguous()
    return found, others[0], others[1]
