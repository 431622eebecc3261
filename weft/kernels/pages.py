"""Memory in huge pages: for large results, which the system hands out page by page, and weights read here and there."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

LEAST = 1 << 25  # bytes; what is smaller comes from memory that the process has kept
HUGE = 1 << 21  # bytes of a huge page on x86-64 and most ARM
ADVICE, COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE


def prefer_huge(fresh: Tensor) -> Tensor:
    """The same tensor; the system is asked to back it by huge pages, where it takes such advice and it is still empty.

    The first write to a page of 4 KiB costs as much as several others: a result of 100 MB pays for 25,000 of them, or
    for 50 huge ones.
    """
    if fresh.nbytes >= LEAST:
        _say(fresh, ADVICE)
    return fresh


def make_huge(filled: Tensor) -> Tensor:
    """The same tensor, moved to huge pages where the system (Linux from 6.1 on) does so when asked.

    What is read here and there waits for the address of each page of 4 KiB as well as for its memory.
    """
    _say(filled, COLLAPSE)
    return filled


def _say(tensor: Tensor, advice: int) -> None:
    if tensor.is_cpu and (advise := _advise()) is not None:
        start = tensor.data_ptr()
        first, last = -(-start // HUGE) * HUGE, (start + tensor.nbytes) // HUGE * HUGE
        if last > first:
            advise(first, last - first, advice)  # what it answers is of no account: the memory is right either way


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
