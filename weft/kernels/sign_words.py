"""Convolutions of signs: 64 channels of a pixel in a word, windows made of words, and their products with filters.

Beside `weft.kernels.signs.sign_product`, which packs what it is given: windows of an image share their bits, so that
each pixel is packed once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, check_tensor, check_whole, operator, share
from weft.kernels.signs import BLOCK, vector

WORD = 64
PART = 64  # outputs that a part of the work has


def image_words(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signs of a pixel's channels, and the mean of their magnitudes.

    Args:
        x: ``[B, C, H, W]``, float32, float64, float16 or bfloat16.

    Returns:
        int64 ``[B, H, W, ceil(C / 64)]``, a bit for each channel, the lowest first, set where x >= 0, and 0 beyond C;
        and float32 ``[B, 1, H, W]``.

    Raises:
        UsageError: for another dtype or number of dimensions.
    """
    x = check_tensor("x", x, FLOATS, ndim=4)
    if x.dtype == torch.float64:  # small numbers would become 0
        return image_words_reference(x)
    found: tuple[Tensor, Tensor] = _words(x.float().contiguous())
    return found


def window_product(weights: Tensor, windows: Tensor, scale: Tensor, factors: Tensor, columns: int) -> Tensor:
    """``scale_o factors_p <signs of filter o, signs of window p>``, float32 ``[B, O, P]``; without derivative.

    Args:
        weights: int64 words ``[O, L]``.
        windows: int64 words ``[B, P, L]``.
        scale: float32 ``[O]``.
        factors: float32 ``[B, P]``.
        columns: bits that count. Of the others, each is the same in weights and windows.

    Raises:
        UsageError: for other dtypes or numbers of elements.
    """
    weights = check_tensor("weights", weights, (torch.int64,), ndim=2)
    windows = check_tensor("windows", windows, (torch.int64,), ndim=3)
    outputs, length = weights.shape
    scale, factors = vector("scale", scale, outputs), check_tensor("factors", factors, (torch.float32,), ndim=2)
    if windows.shape[2] != length or factors.shape != windows.shape[:2]:
        found = f"weights {list(weights.shape)}, windows {list(windows.shape)}, factors {list(factors.shape)}"
        raise UsageError(f"{found}: give [O, L], [B, P, L] and [B, P]")
    check_whole("columns", columns, 0, WORD * length)
    y: Tensor = _product(weights.contiguous(), windows.contiguous(), scale, factors.contiguous(), columns)
    return y


def image_words_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`image_words` in plain torch."""
    bits = F.pad((x >= 0).long().movedim(1, 3), (0, -x.shape[1] % WORD)).unflatten(3, (-(-x.shape[1] // WORD), WORD))
    means = x.abs().sum(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) / max(x.shape[1], 1)
    return (bits << torch.arange(WORD, device=x.device)).sum(4), means.float()


def window_product_reference(weights: Tensor, windows: Tensor, scale: Tensor, factors: Tensor, columns: int) -> Tensor:
    """`window_product` in plain torch."""
    a, b = (
        (2.0 * (t[..., None] >> torch.arange(WORD, device=t.device) & 1) - 1).flatten(-2) for t in (weights, windows)
    )
    return (a @ b.mT - (a.shape[-1] - columns)) * scale[:, None] * factors[:, None]


def _words_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    words = x.new_empty(batch, height, width, (channels + WORD - 1) // WORD, dtype=torch.int64)
    return words, x.new_empty(batch, 1, height, width)


def _product_fake(weights: Tensor, windows: Tensor, scale: Tensor, factors: Tensor, columns: int) -> Tensor:
    return scale.new_empty(windows.shape[0], weights.shape[0], windows.shape[1])


def _words_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
    from weft.kernels.cpu import sign_words as loops

    words, means = _words_fake(x)
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    args, cost = (x.data_ptr(), words.data_ptr(), means.data_ptr(), channels, pixels), max(1, channels * pixels)
    share(lambda start, stop: loops.image_words(*args, start // cost, stop // cost), batch * cost, cost)
    return words, means


def _product_cpu(weights: Tensor, windows: Tensor, scale: Tensor, factors: Tensor, columns: int) -> Tensor:
    from weft.kernels.cpu import sign_words as loops

    found, (batch, places, length) = _product_fake(weights, windows, scale, factors, columns), windows.shape
    outputs, height, left = weights.shape[0], min(places, BLOCK), places % BLOCK
    if places > BLOCK and left:  # eight at once cost less than the last few one by one
        windows = torch.cat([windows[:, : places - left], windows[:, -BLOCK:]], 1)
    blocks = windows.unflatten(1, (-1, height)).transpose(2, 3).contiguous() if places else windows
    parts = [t.data_ptr() for t in (weights, blocks, scale, factors, found)]
    parts += [outputs, places, length, columns]
    cost = max(1, PART * places * (length // 4 + 1))
    share(
        lambda start, stop: loops.window_product(*parts, start // cost, stop // cost),
        batch * -(-outputs // PART) * cost,
        cost,
    )
    return found


_words = operator(
    "image_words(Tensor x) -> (Tensor, Tensor)",
    image_words_reference,
    fake=_words_fake,
    cpu=_words_cpu,
    cuda=image_words_reference,
)
_product = operator(
    "window_product(Tensor weights, Tensor windows, Tensor scale, Tensor factors, int columns) -> Tensor",
    window_product_reference,
    fake=_product_fake,
    cpu=_product_cpu,
    cuda=window_product_reference,
)
