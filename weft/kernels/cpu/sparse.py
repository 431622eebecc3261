"""Products with a sparse matrix or filter on CPUs, on tiles of a few samples that stay in cache.

A tile holds ``width`` samples: its features lie one after another, each with those samples side by side, so that one
stored weight multiplies whole vectors, and a row of the result, or 16 of its pixels, is summed up in registers
(``sparse_vectors.py``). Where a filter's taps lie on the border, they multiply zeros that surround a tile's images.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from weft.kernels.compiled import kernel
from weft.kernels.cpu import sparse_vectors
from weft.kernels.cpu.sparse_vectors import (
    gradient1,
    gradient2,
    gradient4,
    gradient_of_pixels,
    product1,
    product2,
    product4,
    product_of_pixels,
    scatter1,
    scatter16,
    sum_of,
    transpose,
)
from weft.kernels.cpu.vectors import wide

u32, u64, f32 = np.uint32, np.uint64, np.float32

LANES = sparse_vectors.LANES
WIDEST = 64  # samples of a tile of vectors; tiles of images have 16
ZERO, ONE, SIXTEEN, THIRTY_TWO, SIXTY_FOUR = u64(0), u64(1), u64(16), u64(32), u64(64)


@numba.njit(error_model="numpy")
def fill(
    x: Any, features: Any, at: Any, size: Any, first: Any, count: Any, counting: Any, places: Any, tile: Any,
    width: Any,
) -> None:  # fmt: skip
    """Columns ``at .. at + size`` of samples ``first .. first + count`` of ``x [B, features]`` into a tile.

    Column ``at + j`` goes to ``places[j]``; what the tile has room for besides is 0. ``counting[i]`` is i.
    """
    wide()
    whole, rows = size // SIXTEEN * SIXTEEN, count // SIXTEEN * SIXTEEN
    for i in range(ZERO, rows, SIXTEEN):
        for j in range(ZERO, whole, SIXTEEN):
            transpose(x, counting, first + i, features, at + j, tile, places, j, width, i)
    for j in range(size):
        here = u64(places[j]) * width
        for i in range(ZERO if j >= whole else rows, count):
            tile[here + i] = x[(first + i) * features + at + j]
        for i in range(count, width):
            tile[here + i] = f32(0)


@numba.njit(error_model="numpy")
def drain(
    tile: Any, places: Any, begin: Any, size: Any, width: Any, y: Any, features: Any, at: Any, first: Any, count: Any,
    counting: Any,
) -> None:  # fmt: skip
    """Up to 16 features of a tile, from ``places[begin]`` on, to columns ``at .. at + size`` of ``y [B, features]``."""
    wide()
    rows = count // SIXTEEN * SIXTEEN if size == SIXTEEN else ZERO
    for i in range(ZERO, rows, SIXTEEN):
        transpose(tile, places, begin, width, i, y, counting, first + i, features, at)
    for i in range(rows, count):
        for j in range(size):
            y[(first + i) * features + at + j] = tile[u64(places[begin + j]) * width + i]


@numba.njit(error_model="numpy")
def width_for(left: Any) -> Any:
    """Of a tile for as many samples, at most."""
    return SIXTY_FOUR if left > THIRTY_TWO else THIRTY_TWO if left > SIXTEEN else SIXTEEN


@numba.njit(error_model="numpy")
def multiply(
    tile: Any, width: Any, values: Any, starts: Any, columns: Any, bias: Any, block: Any, y: Any, first: Any,
    count: Any, counting: Any,
) -> None:  # fmt: skip
    """Every row of a tile's product, 16 at a time, to where they belong in ``y``."""
    wide()
    rows = u64(starts.size - 1)
    for at in range(ZERO, rows, SIXTEEN):
        size = min(SIXTEEN, rows - at)
        for j in range(size):
            begin, end = u64(starts[at + j]), u64(starts[at + j + ONE])
            start = bias[at + j] if bias.size else f32(0)
            if width == SIXTY_FOUR:
                product4(values, columns, begin, end, tile, ZERO, start, block, j)
            elif width == THIRTY_TWO:
                product2(values, columns, begin, end, tile, ZERO, start, block, j)
            else:
                product1(values, columns, begin, end, tile, ZERO, start, block, j)
        drain(block, counting, ZERO, size, width, y, rows, at, first, count, counting)


@kernel(
    "void(float32[::1], uint64, float32[::1], float32[::1], uint32[::1], uint32[::1], uint32[::1], float32[::1],"
    "float32[::1], float32[::1], uint64, uint64)"
)
def linear(
    x: Any, features: Any, values: Any, bias: Any, starts: Any, columns: Any, counting: Any, tile: Any, block: Any,
    y: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Samples ``start .. stop`` of a product; ``start`` is a multiple of the widest tile's."""
    wide()
    first = start
    while first < stop:
        width = width_for(stop - first)
        count = min(width, stop - first)
        fill(x, features, ZERO, features, first, count, counting, counting, tile, width)
        multiply(tile, width, values, starts, columns, bias, block, y, first, count, counting)
        first += width


@kernel(
    "void(float32[::1], float32[::1], float32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1],"
    "uint32[::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], uint64, uint64)"
)
def linear_backward(
    grad: Any, x: Any, values: Any, starts: Any, columns: Any, other_starts: Any, other_rows: Any, order: Any,
    counting: Any, tile: Any, above: Any, block: Any, of_x: Any, of_values: Any, of_bias: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """What samples ``start .. stop`` give: to the input's gradient, and added to the others; none that has no size."""
    wide()
    rows, features = u64(starts.size - 1), u64(other_starts.size - 1)
    none, turned = np.empty(0, f32), np.empty(order.size if of_x.size else 0, f32)
    for k in range(turned.size):
        turned[k] = values[order[k]]
    first = start
    while first < stop:
        width = width_for(stop - first)
        count = min(width, stop - first)
        fill(grad, rows, ZERO, rows, first, count, counting, counting, above, width)
        if of_x.size:
            multiply(above, width, turned, other_starts, other_rows, none, block, of_x, first, count, counting)
        if of_bias.size:
            for row in range(rows):
                of_bias[row] += sum_of(above, row * width, width // SIXTEEN)
        if of_values.size:
            fill(x, features, ZERO, features, first, count, counting, counting, tile, width)
            for row in range(rows):
                begin, end = u64(starts[row]), u64(starts[row + ONE])
                if width == SIXTY_FOUR:
                    gradient4(above, row, columns, begin, end, tile, ZERO, of_values)
                elif width == THIRTY_TWO:
                    gradient2(above, row, columns, begin, end, tile, ZERO, of_values)
                else:
                    gradient1(above, row, columns, begin, end, tile, ZERO, of_values)
        first += width


@kernel(
    "void(float32[::1], float32[::1], float32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1],"
    "float32[::1], float32[::1], float32[::1], uint64, uint64)"
)
def conv(
    x: Any, values: Any, bias: Any, starts: Any, columns: Any, shifts: Any, places: Any, counting: Any, tile: Any,
    block: Any, y: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """Samples ``start .. stop`` convolved, 16 pixels of a channel at a time; outside ``places`` the tile is 0."""
    wide()
    rows, pixels, features = u64(starts.size - 1), u64(shifts.size), u64(places.size)
    for first in range(start, stop, SIXTEEN):
        count = min(SIXTEEN, stop - first)
        fill(x, features, ZERO, features, first, count, counting, places, tile, SIXTEEN)
        for pixel in range(ZERO, pixels, SIXTEEN):
            size = min(SIXTEEN, pixels - pixel)
            for row in range(rows):
                begin, end, initial = u64(starts[row]), u64(starts[row + ONE]), bias[row] if bias.size else f32(0)
                if size == SIXTEEN:
                    product_of_pixels(values, columns, begin, end, tile, shifts, pixel, initial, block)
                else:
                    for j in range(size):
                        shift = u64(shifts[pixel + j])
                        product1(values, columns, begin, end, tile, shift, initial, block, j)
                at = row * pixels + pixel
                drain(block, counting, ZERO, size, SIXTEEN, y, rows * pixels, at, first, count, counting)


@kernel(
    "void(float32[::1], float32[::1], float32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1], uint32[::1],"
    "float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], uint64, uint64)"
)
def conv_backward(
    grad: Any, x: Any, values: Any, starts: Any, columns: Any, shifts: Any, places: Any, counting: Any, tile: Any,
    below: Any, block: Any, of_x: Any, of_values: Any, of_bias: Any, start: Any, stop: Any,
) -> None:  # fmt: skip
    """As `linear_backward`; the input's gradient is gathered in the tile ``below``."""
    wide()
    rows, pixels, features = u64(starts.size - 1), u64(shifts.size), u64(places.size)
    for first in range(start, stop, SIXTEEN):
        count = min(SIXTEEN, stop - first)
        if of_values.size:
            fill(x, features, ZERO, features, first, count, counting, places, tile, SIXTEEN)
        for i in range(below.size):
            below[i] = f32(0)
        for pixel in range(ZERO, pixels, SIXTEEN):
            size = min(SIXTEEN, pixels - pixel)
            for row in range(rows):
                begin, end, at = u64(starts[row]), u64(starts[row + ONE]), row * pixels + pixel
                fill(grad, rows * pixels, at, size, first, count, counting, counting, block, SIXTEEN)
                if of_bias.size:
                    of_bias[row] += sum_of(block, ZERO, size)
                if size == SIXTEEN:
                    if of_values.size:
                        gradient_of_pixels(block, columns, begin, end, tile, shifts, pixel, of_values)
                    if of_x.size:
                        scatter16(values, columns, begin, end, block, ZERO, shifts, pixel, below)
                else:
                    for j in range(size):
                        if of_values.size:
                            shift = u64(shifts[pixel + j])
                            gradient1(block, j, columns, begin, end, tile, shift, of_values)
                        if of_x.size:
                            scatter1(values, columns, begin, end, block, j, shifts, pixel + j, below)
        if of_x.size:
            for column in range(ZERO, features, SIXTEEN):
                size = min(SIXTEEN, features - column)
                drain(below, places, column, size, SIXTEEN, of_x, features, column, first, count, counting)
