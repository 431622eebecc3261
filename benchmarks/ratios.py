"""How many times faster one way is than another: CPU time of this thread, interleaved, with rotating inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

SHORTEST = 2e-3  # seconds of one measurement; shorter calls are repeated


def ratio(
    plain: Callable[[int], Any], mine: Callable[[int], Any], *, rounds: int = 15, shortest: float = SHORTEST
) -> dict[str, float]:
    """The median of plain's CPU time over mine's, pair by pair.

    Args:
        plain, mine: called with a running number; take another input by it, so that none stays in a cache.
        rounds: pairs, in alternating order, after one unmeasured pair.
        shortest: seconds that a measurement takes at least. What the other way leaves in the caches weighs less in a
            longer one.

    Returns:
        ``ratio`` (above 1: mine is faster), its quartiles ``low`` and ``high``, and ``plain_seconds`` and
        ``seconds`` of one call.
    """
    calls = {}
    for of in (plain, mine):
        of(0)
        once = _spent(of, 0, 1)
        calls[of] = max(1, round(shortest / max(once, 1e-7)))
    pairs: list[tuple[float, float]] = []
    for k in range(rounds):
        order = (plain, mine) if k % 2 else (mine, plain)
        found = {of: _spent(of, 1 + k * calls[of], calls[of]) / calls[of] for of in order}
        pairs.append((found[plain], found[mine]))
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
        "plain_seconds": statistics.median(a for a, _ in pairs),
        "seconds": statistics.median(b for _, b in pairs),
    }


def _spent(of: Callable[[int], Any], first: int, calls: int) -> float:
    start = time.thread_time()
    for i in range(calls):
        of(first + i)
    return time.thread_time() - start
