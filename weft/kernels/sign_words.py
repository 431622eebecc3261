"""Signs of rows as words of 64 bits, and their products with packed signs of weights.

Beside `weft.kernels.signs.sign_product`, which packs what it is given: windows of an image share most of their bits, so
that a convolution packs each pixel once, and its windows are made of words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, check_tensor, check_whole, operator, share
from weft.kernels.signs import BLOCK, check_packed, unpack_signs, vector

WORD = 64


def sign_words(x: Tensor) -> Tensor:
    """int64 ``[R, ceil(C / 64)]``: a bit for each of ``x [R, C]``, the lowest first, set where x >= 0; 0 beyond C.

    Args:
        x: float32, float64, float16 or bfloat16.

    Raises:
        UsageError: for another dtype or number of dimensions.
    """
    x = check_tensor("x", x, FLOATS, ndim=2)
    if x.dtype == torch.float64:  # small numbers would become 0
        return sign_words_reference(x)
    found: Tensor = _words(x.float().contiguous())
    return found


def word_product(
    words: Tensor, packed: Tensor, scale: Tensor, columns: int, *, factors: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``factors * scale * <signs of words, signs of weights> + bias``, float32 ``[R, O]``; without derivative.

    Args:
        words: int64 ``[R, L]``, by `sign_words`.
        packed: by `pack_signs`, of weights ``[O, 64 L]``.
        scale: float32 ``[O]``.
        columns: bits that count. Of the others, each is the same in words and weights.
        factors: float32 ``[R]``.
        bias: float32 ``[O]``.

    Raises:
        UsageError: for other dtypes or numbers of elements.
    """
    words, scale = check_tensor("words", words, (torch.int64,), ndim=2), vector("scale", scale, None)
    length, outputs = words.shape[1], scale.shape[0]
    check_whole("columns", columns, 0, WORD * length)
    packed = check_packed(packed, outputs, WORD * length)
    bias = None if bias is None else vector("bias", bias, outputs)
    if factors is not None and (factors := vector("factors", factors, None)).shape[0] != words.shape[0]:
        raise UsageError(f"factors has {factors.shape[0]} elements for {words.shape[0]} rows")
    found: Tensor = _product(words.contiguous(), packed, scale, factors, bias, columns)
    return found


def sign_words_reference(x: Tensor) -> Tensor:
    """`sign_words` in plain torch."""
    bits = F.pad((x >= 0).long(), (0, -x.shape[1] % WORD)).view(x.shape[0], -(-x.shape[1] // WORD), WORD)
    return (bits << torch.arange(WORD, device=x.device)).sum(2)


def word_product_reference(
    words: Tensor, packed: Tensor, scale: Tensor, factors: Tensor | None, bias: Tensor | None, columns: int
) -> Tensor:
    """`word_product` in plain torch."""
    given = (2.0 * (words[:, :, None] >> torch.arange(WORD, device=words.device) & 1) - 1).flatten(1)
    weights = unpack_signs(packed, len(scale), given.shape[1])
    y = (given @ weights.T - (given.shape[1] - columns)) * scale
    y = y if factors is None else y * factors[:, None]
    return y if bias is None else y + bias


def _words_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], (x.shape[1] + WORD - 1) // WORD, dtype=torch.int64)


def _product_fake(
    words: Tensor, packed: Tensor, scale: Tensor, factors: Tensor | None, bias: Tensor | None, columns: int
) -> Tensor:
    return scale.new_empty(words.shape[0], scale.shape[0])


def _words_cpu(x: Tensor) -> Tensor:
    from weft.kernels.cpu import sign_words as loops

    found, (rows, columns) = _words_fake(x), x.shape
    source, target, line = x.data_ptr(), found.data_ptr(), 8 * found.shape[1]

    def run(start: int, stop: int) -> None:
        first, last = start // columns, stop // columns
        loops.words(source + 4 * columns * first, target + line * first, last - first, columns)

    if columns:
        share(run, rows * columns, columns)
    return found


def _product_cpu(
    words: Tensor, packed: Tensor, scale: Tensor, factors: Tensor | None, bias: Tensor | None, columns: int
) -> Tensor:
    from weft.kernels.cpu import sign_words as loops

    found, (rows, length) = _product_fake(words, packed, scale, factors, bias, columns), words.shape
    parts = [0 if t is None else t.data_ptr() for t in (words, packed, scale, factors, bias, found)]
    outputs, cost = scale.shape[0], rows * (length // 4 + 1)

    def run(start: int, stop: int) -> None:
        loops.product(*parts, rows, length, columns, outputs, start // cost, stop // cost)

    if rows:
        share(run, outputs * cost, BLOCK * cost)
    return found


_words = operator(
    "sign_words(Tensor x) -> Tensor",
    sign_words_reference,
    fake=_words_fake,
    cpu=_words_cpu,
    cuda=sign_words_reference,
)
_product = operator(
    "word_product(Tensor words, Tensor packed, Tensor scale, Tensor? factors, Tensor? bias, int columns) -> Tensor",
    word_product_reference,
    fake=_product_fake,
    cpu=_product_cpu,
    cuda=word_product_reference,
)
