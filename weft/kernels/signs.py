"""Signs as bits, and products of them: an exclusive or and a count of bits stand for 64 multiplications.

The signs of weights ``[O, D]`` are kept as ``O * ceil(D / 8)`` bytes in blocks of eight rows: for each 64 columns
eight bytes of the first row, of the second and so on, lowest bit first; then, one byte of each row at a time, the
columns that are left. The last block has the rows that are left. 0 counts as positive, nan as negative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, GRAIN, check_tensor, operator, share

BLOCK, WORD = 8, 8  # rows, bytes
INPUTS = "floats", "signs", "scaled signs"


def signs(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1, in x's dtype: `torch.sign` has a third value, which real data do contain."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def pack_signs(weight: Tensor) -> Tensor:
    """The signs of ``[O, D]``, uint8 ``[O * ceil(D / 8)]``: a thirty-second of float32 where 8 divides D.

    Args:
        weight: float32, float64, float16 or bfloat16.

    Raises:
        UsageError: for another dtype or number of dimensions.
    """
    weight = check_tensor("weight", weight, FLOATS, ndim=2)
    return _pack((signs(weight) if weight.dtype == torch.float64 else weight).float().contiguous())


def unpack_signs(packed: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `pack_signs` packed: 1 and -1, ``[rows, columns]``.

    Raises:
        UsageError: for another number of bytes.
    """
    packed = check_packed(packed, rows, columns)
    bits = _lines(packed, rows, columns)[:, :, None] >> torch.arange(8, device=packed.device) & 1
    return (2.0 * bits.flatten(1)[:, :columns] - 1).to(dtype)


def sign_product(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, factored: bool = False
) -> Tensor:
    """``scale * (sign(x) sign(W)^T) + bias``, float32 ``[..., O]``, without derivative; the product of signs is exact.

    Args:
        x: ``[..., D]``, float32, float64, float16 or bfloat16.
        packed: the signs of W ``[O, D]`` by `pack_signs`.
        scale: float32 ``[O]``.
        bias: float32 ``[O]`` or None.
        factored: each row of the product is multiplied by the mean of |x| over the row, too.

    Raises:
        UsageError: for other dtypes or numbers of elements.
    """
    return product_by(x, packed, scale, bias, "scaled signs" if factored else "signs")


def sign_sums(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``scale * (x sign(W)^T) + bias``, float32 ``[..., O]``, without derivative: x as it is, added up, not multiplied.

    Args:
        x, packed, scale, bias: as for `sign_product`.

    Raises:
        UsageError: for other dtypes or numbers of elements.
    """
    return product_by(x, packed, scale, bias, "floats")


def product_by(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, inputs: str) -> Tensor:
    """`sign_product` or `sign_sums`: ``inputs`` is one of `INPUTS`."""
    x, scale = check_tensor("x", x, FLOATS), vector("scale", scale, None)
    outputs, columns = scale.shape[0], x.shape[-1] if x.ndim else 0
    bias = None if bias is None else vector("bias", bias, outputs)
    packed = check_packed(packed, outputs, columns)
    flat = x.reshape(x.shape[:-1].numel(), columns)
    if x.dtype == torch.float64:
        y = (
            sign_sums_reference(flat, packed, scale, bias)
            if inputs == "floats"
            else sign_product_reference(flat, packed, scale, bias, inputs == "scaled signs")
        )
    else:
        flat = flat.float().contiguous()
        y = (
            _sums(flat, packed, scale, bias)
            if inputs == "floats"
            else _product(flat, packed, scale, bias, inputs == "scaled signs")
        )
    return y.view(*x.shape[:-1], outputs)


def address_of(tensor: Tensor | None) -> int:
    """Of its memory, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def vector(name: str, value: Tensor, size: int | None) -> Tensor:
    """The float32 vector, contiguous; UsageError where it is none, or has not ``size`` elements."""
    value = check_tensor(name, value, (torch.float32,), ndim=1)
    if size is not None and value.shape[0] != size:
        raise UsageError(f"{name} has {value.shape[0]} elements for {size} outputs")
    return value.contiguous()


def check_packed(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The bytes of ``[rows, columns]`` signs, contiguous; UsageError where they are not."""
    packed = check_tensor("packed", packed, (torch.uint8,), ndim=1)
    if packed.shape[0] != rows * -(-columns // 8):
        raise UsageError(f"{packed.shape[0]} bytes: the signs of {rows} x {columns} have {rows * -(-columns // 8)}")
    return packed.contiguous()


def _parts(rows: int) -> list[tuple[int, int]]:
    """(number, height) of the full blocks, and of the last one."""
    return [(rows // BLOCK, BLOCK), (1, rows % BLOCK)]


def pack_signs_reference(weight: Tensor) -> Tensor:
    """`pack_signs` in plain torch, for float32."""
    rows, columns = weight.shape
    words, line = columns // 64, -(-columns // 8)
    bits = F.pad((weight >= 0).to(torch.uint8), (0, -columns % 8)).view(rows, line, 8)
    lines = (bits << torch.arange(8, device=weight.device, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    found = []
    for (count, height), part in zip(_parts(rows), lines.tensor_split([rows // BLOCK * BLOCK]), strict=True):
        full, rest = part.view(count, height, line).split([words * WORD, line - words * WORD], 2)
        full = full.reshape(count, height, words, WORD).transpose(1, 2)
        found.append(torch.cat([full.flatten(1), rest.transpose(1, 2).flatten(1)], 1).flatten())
    return torch.cat(found)


def _lines(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The bytes of each row, ``[rows, ceil(D / 8)]``."""
    words, line = columns // 64, -(-columns // 8)
    found = []
    for (count, height), part in zip(_parts(rows), packed.tensor_split([rows // BLOCK * BLOCK * line]), strict=True):
        sizes = [height * words * WORD, height * (line - words * WORD)]
        full, rest = part.view(count, height * line).split(sizes, 1)
        full = full.reshape(count, words, height, WORD).transpose(1, 2).reshape(count * height, words * WORD)
        rest = rest.reshape(count, line - words * WORD, height).transpose(1, 2)
        found.append(torch.cat([full, rest.reshape(count * height, line - words * WORD)], 1))
    return torch.cat(found)


def sign_product_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, factored: bool) -> Tensor:
    """`sign_product` in plain torch, for x ``[R, D]``."""
    y = (signs(x) @ unpack_signs(packed, len(scale), x.shape[1], x.dtype).T).float() * scale
    if factored:
        y = y * (x.abs().sum(1, keepdim=True) / max(x.shape[1], 1)).float()
    return y if bias is None else y + bias


def sign_sums_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`sign_sums` in plain torch, for x ``[R, D]``."""
    y = (x @ unpack_signs(packed, len(scale), x.shape[1], x.dtype).T).float() * scale
    return y if bias is None else y + bias


def _pack_fake(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0] * ((weight.shape[1] + 7) // 8), dtype=torch.uint8)


def _product_fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, factored: bool) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _pack_cpu(weight: Tensor) -> Tensor:
    from weft.kernels.cpu import signs as loops

    packed = _pack_fake(weight)
    loops.pack(weight.data_ptr(), packed.data_ptr(), *weight.shape)
    return packed


def _sums_fake(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


def _cost(columns: int, inputs: str) -> int:
    """What one output of one row costs, in elements of other loops."""
    return columns // (16 if inputs == "floats" else 256) + 1


def most_rows(columns: int, outputs: int, inputs: str) -> int:
    """As many rows as are not worth a second thread."""
    return (2 * GRAIN - 1) // max(1, outputs * _cost(columns, inputs))


def _run(loop: Any, inputs: str, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *flags: bool) -> Tensor:
    """A loop over the outputs, which threads share."""
    rows, columns = x.shape
    outputs = scale.shape[0]
    out = x.new_empty(rows, outputs)
    args = x.data_ptr(), packed.data_ptr(), scale.data_ptr(), address_of(bias), out.data_ptr(), rows, columns, outputs
    if rows <= most_rows(columns, outputs, inputs):
        loop(*args, 0, outputs, *flags)
    else:
        cost = rows * _cost(columns, inputs)
        share(lambda start, stop: loop(*args, start // cost, stop // cost, *flags), outputs * cost, BLOCK * cost)
    return out


def _product_cpu(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, factored: bool) -> Tensor:
    from weft.kernels.cpu.signs import product

    return _run(product, "signs", x, packed, scale, bias, factored)


def _sums_cpu(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from weft.kernels.cpu.signs import sums

    return _run(sums, "floats", x, packed, scale, bias)


_pack = operator(
    "pack_signs(Tensor weight) -> Tensor",
    pack_signs_reference,
    fake=_pack_fake,
    cpu=_pack_cpu,
    cuda=pack_signs_reference,
)
_product = operator(
    "sign_product(Tensor x, Tensor packed, Tensor scale, Tensor? bias, bool factored) -> Tensor",
    sign_product_reference,
    fake=_product_fake,
    cpu=_product_cpu,
    cuda=sign_product_reference,
)
_sums = operator(
    "sign_sums(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor",
    sign_sums_reference,
    fake=_sums_fake,
    cpu=_sums_cpu,
    cuda=sign_sums_reference,
)
