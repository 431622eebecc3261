"""Softmax of rows with each exponential as a pair of mantissa and exponent, so that no maximum has to be found first.

In two passes the input is read twice, and each exponential found twice; stored, the first pass writes what the second
scales. Rows of which this would be wrong (with nan or inf, without anything above -83000, with something above 86000)
are torch's own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weft.kernels.compiled import check_tensor, operator, share
from weft.kernels.pages import LEAST, prefer_huge


def softmax_rows(x: Tensor, *, stored: bool = False) -> Tensor:
    """Softmax over the last dimension of float32 ``[..., N]``, contiguous, without derivative.

    Args:
        x: float32, at least one dimension.
        stored: find each exponential once and keep it in the output.

    Raises:
        UsageError: for another dtype or no dimension.
    """
    x = check_tensor("x", x, (torch.float32,))
    if x.ndim == 2 and x.is_contiguous():
        return _softmax(x, stored)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return _softmax(flat, stored).view(x.shape)


def softmax_rows_backward(y: Tensor, grad: Tensor) -> Tensor:
    """``y (g - sum of g y)`` over the last dimension of float32 ``[..., N]``, contiguous.

    Raises:
        UsageError: for another dtype.
    """
    y, grad = check_tensor("y", y, (torch.float32,)), check_tensor("grad", grad, (torch.float32,))
    shape = y.shape[:-1].numel(), y.shape[-1]
    return _back(y.reshape(shape).contiguous(), grad.reshape(shape).contiguous()).view(y.shape)


def softmax_rows_reference(x: Tensor, stored: bool) -> Tensor:
    """`softmax_rows` in plain torch."""
    return torch.softmax(x, -1)


def softmax_rows_backward_reference(y: Tensor, grad: Tensor) -> Tensor:
    """`softmax_rows_backward` in plain torch."""
    return y * (grad - (grad * y).sum(-1, keepdim=True))


def _softmax_cpu(x: Tensor, stored: bool) -> Tensor:
    from weft.kernels.cpu import exponentials as loops

    out = prefer_huge(torch.empty_like(x))
    rows, columns = x.shape
    if x.numel() == 0:
        return out
    past = out.nbytes >= LEAST
    odd = np.zeros(rows, np.uint8)
    if columns >= 2 * int(loops.PART):
        for row in range(rows):
            _long_row(x[row], out[row], odd[row:], stored, past)
    else:
        given = x.data_ptr(), out.data_ptr(), columns
        there = odd.ctypes.data

        def run(start: int, stop: int) -> None:
            if stored:
                loops.rows_stored(*given, start // columns, stop // columns, there)
            else:
                loops.rows(*given, start // columns, stop // columns, there, past)

        share(run, x.numel(), columns)
    if odd.any():
        others = torch.from_numpy(odd).nonzero().squeeze(1)
        out[others] = torch.softmax(x[others], -1)
    return out


def _long_row(x: Tensor, out: Tensor, odd: np.ndarray, stored: bool, past: bool) -> None:
    """One row, by parts that do not depend on the number of threads; sets ``odd[0]`` where it is left to others."""
    from weft.kernels.cpu import exponentials as loops

    columns, part = x.shape[0], int(loops.PART)
    parts = -(-columns // part)
    found = np.empty((parts, 3), np.float32)
    marks = np.empty(parts * int(loops.MARKS) if stored else 0, np.float32)
    given, there, own = (x.data_ptr(), out.data_ptr(), columns), found.ctypes.data, marks.ctypes.data
    if torch.get_num_threads() == 1:
        if stored:
            loops.long_row_stored(*given, there, own, odd.ctypes.data)
        else:
            loops.long_row(*given, there, odd.ctypes.data, past)
    elif stored:
        share(lambda start, stop: loops.first_pass_stored(*given, start, stop, there, own), columns, part)
        odd[0] = not found[:, 2].all()
        if not odd[0]:
            share(lambda a, b: loops.second_pass_stored(*given[1:], a, b, there, own), columns, part)
    else:
        share(lambda start, stop: loops.first_pass(*given, start, stop, there), columns, part)
        odd[0] = not found[:, 2].all()
        if not odd[0]:
            share(lambda start, stop: loops.second_pass(*given, start, stop, there, past), columns, part)


def _back_cpu(y: Tensor, grad: Tensor) -> Tensor:
    from weft.kernels.cpu.exponentials import back

    out = prefer_huge(torch.empty_like(y))
    columns = y.shape[1]
    if y.numel():
        given = y.data_ptr(), grad.data_ptr(), out.data_ptr(), columns
        share(lambda start, stop: back(*given, start // columns, stop // columns), y.numel(), columns)
    return out


_softmax = operator(
    "softmax_rows(Tensor x, bool stored) -> Tensor",
    softmax_rows_reference,
    fake=lambda x, stored: torch.empty_like(x),
    cpu=_softmax_cpu,
    cuda=softmax_rows_reference,
)
_back = operator(
    "softmax_rows_backward(Tensor y, Tensor grad) -> Tensor",
    softmax_rows_backward_reference,
    fake=lambda y, grad: torch.empty_like(y),
    cpu=_back_cpu,
    cuda=softmax_rows_backward_reference,
)
