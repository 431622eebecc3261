"""Piecewise constant functions, kept as the few-bit index of each element's interval.

For a backward that multiplies by a step function of the input, such as a few-bit derivative of an activation: what is
kept is the packed index, and the way back is a table and a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.bits import (
    check_packed,
    pack_bits_reference,
    packed_bytes,
    unpack_bits_reference,
)
from weft.kernels.compiled import FLOATS, NATIVE, check_tensor, check_whole, operator, share

TABLE = 16


def bucketize_pack(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    """The number of boundaries below each element, packed as in `weft.kernels.bits`: uint8 ``[ceil(N * bits / 8)]``.

    An element equal to a boundary belongs to the interval below it, nan to the last interval, as with
    `torch.bucketize`. Elements are compared in float32.

    Args:
        x: N elements in any shape, float32, float64, float16 or bfloat16.
        boundaries: float32 ``[L - 1]``, sorted, without nan; at most ``2^bits - 1``.
        bits: 1 to 4.

    Raises:
        UsageError: for other dtypes, bits, or too many boundaries.
    """
    x = check_tensor("x", x, FLOATS)
    check_whole("bits", bits, 1, 4)
    boundaries = _table("boundaries", boundaries, x, 0, (1 << bits) - 1)
    if x.dtype not in NATIVE:
        x = x.float()
    return _bucketize(x.reshape(-1).contiguous(), boundaries, bits)


def gather_unpack(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    """``grad * levels[index]`` in grad's shape and dtype, with the indices that `bucketize_pack` packed.

    The product is rounded once from float32, or to float64 for a float64 ``grad``. An index beyond the levels gives
    nan.

    Args:
        packed: uint8 ``[ceil(N * bits / 8)]``.
        levels: float32 ``[L]``, at most ``2^bits``.
        grad: N elements, float32, float64, float16 or bfloat16.
        bits: 1 to 4.

    Raises:
        UsageError: for other dtypes, bits, numbers of bytes or of levels.
    """
    grad = check_tensor("grad", grad, FLOATS)
    check_whole("bits", bits, 1, 4)
    levels = _table("levels", levels, grad, 1, 1 << bits)
    packed = check_packed(packed, grad.numel(), bits)
    return _gather(packed, levels, grad.reshape(-1).contiguous(), bits).view(grad.shape)


def _table(name: str, table: Tensor, like: Tensor, least: int, most: int) -> Tensor:
    table = check_tensor(name, table, (torch.float32,), ndim=1)
    if not least <= table.shape[0] <= most:
        raise UsageError(f"{table.shape[0]} {name}: with these bits, give {least} to {most}")
    if table.device != like.device:
        raise UsageError(f"{name} on {table.device}: put them on {like.device}, with the elements")
    return table.contiguous()


def _filled(table: Tensor, value: float) -> Tensor:
    return torch.cat([table, table.new_full((TABLE - len(table),), value)])


def bucketize_pack_reference(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    """`bucketize_pack` in plain torch, for x ``[N]``."""
    return pack_bits_reference(torch.bucketize(x.float(), boundaries).to(torch.uint8), bits)


def gather_unpack_reference(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    """`gather_unpack` in plain torch, for grad ``[N]``."""
    level = _filled(levels, torch.nan)[unpack_bits_reference(packed, bits, len(grad)).long()]
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * level).to(grad.dtype)


def _empty_codes(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    return x.new_empty(packed_bytes(x.shape[0], bits), dtype=torch.uint8)


def _empty_product(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    return torch.empty_like(grad)


def _bucketize_cpu(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    from weft.kernels.cpu import packing as loops

    packed = _empty_codes(x, boundaries, bits)
    arrays = (*loops.bits_of(x), _filled(boundaries, torch.inf).numpy(), len(boundaries), packed.numpy())
    share(lambda start, stop: loops.bucketize(*arrays, *loops.scratch(), start, stop, bits), len(x), loops.BLOCK)
    return packed


def _gather_cpu(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    if grad.dtype == torch.float64:
        return gather_unpack_reference(packed, levels, grad, bits)
    from weft.kernels.cpu import packing as loops

    given = grad if grad.dtype in NATIVE else grad.float()
    out = torch.empty_like(given)
    arrays = packed.numpy(), _filled(levels, torch.nan).numpy(), *loops.bits_of(given), *loops.bits_of(out)
    share(lambda start, stop: loops.gather(*arrays, *loops.lookup_scratch(), start, stop, bits), len(grad), loops.BLOCK)
    return out.to(grad.dtype)


def _bucketize_cuda(x: Tensor, boundaries: Tensor, bits: int) -> Tensor:
    from weft.kernels.cuda import packing as loops

    packed = _empty_codes(x, boundaries, bits)
    loops.launch(loops.bucketize, len(x), x, boundaries, packed, count=len(boundaries), bits=bits)
    return packed


def _gather_cuda(packed: Tensor, levels: Tensor, grad: Tensor, bits: int) -> Tensor:
    from weft.kernels.cuda import packing as loops

    out = torch.empty_like(grad)
    loops.launch(loops.gather, len(grad), packed, _filled(levels, torch.nan), grad, out, bits=bits)
    return out


_bucketize = operator(
    "bucketize_pack(Tensor x, Tensor boundaries, int bits) -> Tensor",
    bucketize_pack_reference,
    fake=_empty_codes,
    cpu=_bucketize_cpu,
    cuda=_bucketize_cuda,
)
_gather = operator(
    "gather_unpack(Tensor packed, Tensor levels, Tensor grad, int bits) -> Tensor",
    gather_unpack_reference,
    fake=_empty_product,
    cpu=_gather_cpu,
    cuda=_gather_cuda,
)
