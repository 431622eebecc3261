"""Memory for large results, which the system takes back with each free and hands out again page by page."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

LEAST = 1 << 25  # bytes; what is smaller comes from memory that the process has kept
HUGE, ADVICE = 1 << 21, 14  # bytes of a huge page on x86-64 and most ARM; MADV_HUGEPAGE


def prefer_huge(fresh: Tensor) -> Tensor:
    """The same tensor; the system is asked to back it by huge pages, where it takes such advice and it is still empty.

    The first write to a page of 4 KiB costs as much as several others: a result of 100 MB pays for 25,000 of them, or
    for 50 huge ones.
    """
    if fresh.nbytes >= LEAST and fresh.is_cpu and (advise := _advise()) is not None:
        start = fresh.data_ptr()
        first, last = -(-start // HUGE) * HUGE, (start + fresh.nbytes) // HUGE * HUGE
        if last > first:
            advise(first, last - first, ADVICE)  # what it answers is of no account: the memory is right either way
    return fresh


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
