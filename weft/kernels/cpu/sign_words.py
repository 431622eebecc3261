"""Products of signs whose words are there already: those of an image's pixels, which its windows share.

The loops call those of ``signs.py``: after a change there, remove the caches beside the loops.
"""

from __future__ import annotations

from typing import Any

from weft.kernels.compiled import kernel
from weft.kernels.cpu.signs import CHUNK, EIGHT, FOUR, WORD, ZERO, eight, few, read


@kernel("void(uint64, uint64, uint64, uint64)")
def words(x: Any, bits: Any, rows: Any, columns: Any) -> None:
    """Words of the signs of floats ``[rows, columns]``, the last of a row filled up with zeros."""
    read(x, bits, ZERO, rows, columns)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64, uint64)")
def product(
    bits: Any, packed: Any, alpha: Any, factors: Any, bias: Any, out: Any, rows: Any, length: Any, whole: Any,
    outputs: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Outputs ``start .. stop`` of every row of ``length`` words; ``start`` is a multiple of 8."""
    step, columns = outputs * FOUR, length * WORD
    for r in range(ZERO, rows, CHUNK):
        size, here = min(CHUNK, rows - r), bits + r * length * EIGHT
        means = factors + r * FOUR if factors != ZERO else ZERO
        for first in range(start, stop, EIGHT):
            own, block = first * FOUR, packed + first * length * EIGHT
            shift, place = bias + own if bias != ZERO else ZERO, out + r * step + own
            if outputs - first >= EIGHT:
                eight(here, means, block, alpha + own, shift, place, size, columns, step, whole)
            else:
                few(here, means, block, alpha + own, shift, place, size, columns, step, outputs - first, whole)
