"""A stream of few-bit codes: element i is in bits ``i * bits`` to ``(i + 1) * bits`` of the bytes, lowest bit first."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import check_tensor, check_whole, operator, share


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``ceil(N * bits / 8)`` bytes that hold the lowest ``bits`` of each code; unused bits of the last byte are 0.

    Args:
        codes: uint8, N elements in any shape.
        bits: 1 to 8.

    Raises:
        UsageError: for other codes or bits.
    """
    codes = check_tensor("codes", codes, (torch.uint8,))
    check_whole("bits", bits, 1, 8)
    return _pack(codes.reshape(-1).contiguous(), bits)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first ``n`` codes ``[n]`` of what `pack_bits` returned, uint8.

    Args:
        packed: uint8 ``[ceil(n * bits / 8)]``.
        bits: 1 to 8, as given to `pack_bits`.
        n: elements.

    Raises:
        UsageError: for other bits, or another number of bytes.
    """
    check_whole("bits", bits, 1, 8)
    check_whole("n", n, 0, sys.maxsize)
    packed = check_packed(packed, n, bits)
    return _unpack(packed, bits, n)


def check_packed(packed: Tensor, n: int, bits: int) -> Tensor:
    """The bytes ``[ceil(n * bits / 8)]``, detached and contiguous; UsageError for anything else."""
    packed = check_tensor("packed", packed, (torch.uint8,), ndim=1)
    if packed.shape[0] != packed_bytes(n, bits):
        raise UsageError(f"{packed.shape[0]} bytes: {n} elements of {bits} bits have {packed_bytes(n, bits)}")
    return packed.contiguous()


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n elements."""
    return (n * bits + 7) // 8


def pack_bits_reference(codes: Tensor, bits: int) -> Tensor:
    """`pack_bits` in plain torch, for codes ``[N]``."""
    words = F.pad(codes, (0, -len(codes) % 8)).view(-1, 8).long() & (1 << bits) - 1
    word = (words << _places(bits, 8, codes)).sum(1, keepdim=True)
    return (word >> _places(8, bits, codes) & 255).to(torch.uint8).flatten()[: packed_bytes(len(codes), bits)].clone()


def unpack_bits_reference(packed: Tensor, bits: int, n: int) -> Tensor:
    """`unpack_bits` in plain torch."""
    words = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    word = (words << _places(8, bits, packed)).sum(1, keepdim=True)
    return (word >> _places(bits, 8, packed) & (1 << bits) - 1).to(torch.uint8).flatten()[:n].clone()


def _places(bits: int, count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device) * bits


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(packed_bytes(codes.shape[0], bits))


def _unpack_fake(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed.new_empty(n)


def _pack_cpu(codes: Tensor, bits: int) -> Tensor:
    from weft.kernels.cpu import packing as loops

    packed = codes.new_empty(packed_bytes(len(codes), bits))
    source, out = codes.numpy(), packed.numpy()
    share(lambda start, stop: loops.pack(source, out, loops.scratch()[0], start, stop, bits), len(codes), loops.BLOCK)
    return packed


def _unpack_cpu(packed: Tensor, bits: int, n: int) -> Tensor:
    from weft.kernels.cpu import packing as loops

    codes = packed.new_empty(n)
    source, out = packed.numpy(), codes.numpy()
    share(lambda start, stop: loops.unpack(source, out, loops.scratch()[0], start, stop, bits), n, loops.BLOCK)
    return codes


def _pack_cuda(codes: Tensor, bits: int) -> Tensor:
    from weft.kernels.cuda import packing as loops

    packed = codes.new_empty(packed_bytes(len(codes), bits))
    loops.launch(loops.pack, len(codes), codes, packed, bits=bits)
    return packed


def _unpack_cuda(packed: Tensor, bits: int, n: int) -> Tensor:
    from weft.kernels.cuda import packing as loops

    codes = packed.new_empty(n)
    loops.launch(loops.unpack, n, packed, codes, bits=bits)
    return codes


_pack = operator(
    "pack_bits(Tensor codes, int bits) -> Tensor", pack_bits_reference, fake=_pack_fake, cpu=_pack_cpu, cuda=_pack_cuda
)
_unpack = operator(
    "unpack_bits(Tensor packed, int bits, SymInt n) -> Tensor",
    unpack_bits_reference,
    fake=_unpack_fake,
    cpu=_unpack_cpu,
    cuda=_unpack_cuda,
)
