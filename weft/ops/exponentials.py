"""Softmax without a pass for the maximum, as torch's function: any dimension and dtype, derivatives, `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from weft.errors import UsageError, unknown
from weft.kernels.compiled import FLOATS, check_tensor
from weft.kernels.exponentials import softmax_rows, softmax_rows_backward

__all__ = ["softmax"]

METHODS = "two-pass", "online"
FEW = 1 << 17  # elements


def softmax(x: Tensor, dim: int = -1, method: str = "fastest") -> Tensor:
    """``exp(x) / sum of exp(x)`` along a dimension, as `torch.softmax` gives it to 1e-6, nan and inf included.

    Args:
        x: float32 takes its own way on CPUs, bfloat16 and float16 by float32; what is float64, under autocast or in
            compiled code is torch's.
        dim: a row is what lies along it; rows that are not contiguous are copied.
        method: ``"online"`` stores each exponential, and scales it; ``"two-pass"`` finds each twice and stores none: on
            the CPU that was measured slower for rows of one to four million, and about as fast elsewhere.
            ``"fastest"`` is online where that is expected to pay, else torch's: for half types, fewer elements than a
            call's cost is worth, rows that are not contiguous, and rows of 16 to 63, which torch takes many at a time.

    Returns:
        x's shape and dtype; under autocast the dtype that `torch.softmax` gives.

    Raises:
        UsageError: for a dimension that x does not have, another dtype or an unknown method.
    """
    plain = method == "fastest" and type(x) is Tensor and type(dim) is int and x.layout == torch.strided
    if plain and x.dtype in FLOATS and x.numel() < FEW and -x.ndim <= dim < x.ndim:
        return torch.softmax(x, dim)  # before checks that cost as much
    check_tensor("x", x, FLOATS)
    if method not in (*METHODS, "fastest"):
        raise UsageError(unknown("method", str(method), [*METHODS, "fastest"], "of softmax"))
    most = max(x.ndim, 1)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -most <= dim < most:
        raise UsageError(f"dim={dim!r} of a tensor with {x.ndim} dimension(s): give {-most} to {most - 1}")
    kind = x.device.type
    plain = x.dtype == torch.float64 or x.ndim == 0 or kind != "cpu"
    if plain or torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
        return torch.softmax(x, dim)
    stored, along_last = method != "two-pass", dim in (-1, x.ndim - 1)
    undifferentiated = _undifferentiated(x)
    if method == "fastest" and not _pays(x, dim, FEW if undifferentiated else 4 * FEW):
        return torch.softmax(x, dim)
    if x.dtype == torch.float32 and along_last and undifferentiated:
        return softmax_rows(x, stored=stored)
    last = x.float() if along_last else x.float().movedim(dim, -1)
    y: Tensor = _Softmax.apply(last, stored)
    return (y if along_last else y.movedim(-1, dim)).to(x.dtype)


def _pays(x: Tensor, dim: int, least: int) -> bool:
    """Whether loops are expected to be faster than torch, as measured on one thread of a server CPU."""
    long = x.numel() >= least and not 16 <= x.shape[dim] < 64
    return long and x.dtype == torch.float32 and x.movedim(dim, -1).is_contiguous()


def _undifferentiated(x: Tensor) -> bool:
    """Whether x is a plain tensor of which no derivative of any kind is asked: an autograd function costs 30 us."""
    if x.requires_grad and torch.is_grad_enabled():
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # inside of torch.func's transformations
        return False
    return unpack_dual(x).tangent is None


class _Softmax(torch.autograd.Function):
    """Over the last dimension of float32."""

    @staticmethod
    def forward(x: Tensor, stored: bool) -> Tensor:
        return softmax_rows(x, stored=stored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return _along(y, grad), None
        return softmax_rows_backward(y, grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        (y,) = ctx.saved_tensors
        return _along(y, tangent)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, None], x: Tensor, stored: bool) -> tuple[Tensor, int]:
        assert dims[0] is not None
        return _Softmax.apply(x.movedim(dims[0], 0), stored), 0


def _along(y: Tensor, direction: Tensor) -> Tensor:
    """The derivative of softmax at the output y in a direction."""
    return y * (direction - (direction * y).sum(-1, keepdim=True))
