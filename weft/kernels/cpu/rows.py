"""Products with rows of a table that are anywhere in memory, and sums: while some are read, others are asked for.

Addresses and distances are bytes; ``numbers`` are words that say which row.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from weft.kernels.compiled import kernel
from weft.kernels.cpu.simd import (
    add,
    fence,
    fma,
    load,
    mul,
    one_at,
    prefetch,
    put_one,
    splat,
    store,
    stream,
    total,
    word_at,
)

U, f32 = np.uint64, np.float32
FLOAT, WORD, LINE, ONE, FOUR, SIXTEEN, BLOCK = U(4), U(8), U(64), U(1), U(4), U(16), U(64)  # the last: floats
EIGHT = U(8)  # rows ahead


@numba.njit(error_model="numpy")
def row(table: Any, stride: Any, numbers: Any, i: Any, count: Any) -> Any:
    """The address of the i-th row, of the last one after it."""
    return table + stride * word_at(numbers + WORD * min(i, count - ONE))


@kernel("void(" + ", ".join(["uint64"] * 9) + ")")
def products(x: Any, table: Any, stride: Any, numbers: Any, out: Any, first: Any, last: Any, j: Any, d: Any) -> None:
    """``out[t, i] = x[t] . table[numbers[t, i]]`` for tokens ``first .. last``."""
    end, whole, count = d & ~U(63), d & ~U(15), last * j
    for t in range(first, last):
        own = x + FLOAT * d * t
        for i in range(t * j, t * j + j):
            a, ahead = row(table, stride, numbers, i, count), row(table, stride, numbers, i + ONE, count)
            s0 = s1 = s2 = s3 = splat(f32(0))
            for k in range(U(0), end, BLOCK):
                p, q, near = a + FLOAT * k, own + FLOAT * k, ahead + FLOAT * k
                prefetch(near)
                prefetch(near + LINE)
                prefetch(near + U(128))
                prefetch(near + U(192))
                s0 = fma(load(p), load(q), s0)
                s1 = fma(load(p + LINE), load(q + LINE), s1)
                s2 = fma(load(p + U(128)), load(q + U(128)), s2)
                s3 = fma(load(p + U(192)), load(q + U(192)), s3)
            for k in range(end, whole, SIXTEEN):
                s0 = fma(load(a + FLOAT * k), load(own + FLOAT * k), s0)
            s = total(add(add(s0, s1), add(s2, s3)))
            for k in range(whole, d):
                s += one_at(a + FLOAT * k) * one_at(own + FLOAT * k)
            put_one(out + FLOAT * i, s)


@kernel("void(" + ", ".join(["uint64"] * 9) + ")")
def sums(weights: Any, table: Any, stride: Any, numbers: Any, out: Any, first: Any, last: Any, j: Any, d: Any) -> None:
    """``out[t] = sum_i weights[t, i] table[numbers[t, i]]`` for tokens ``first .. last``; four rows at a time."""
    whole, count = d & ~U(15), last * j
    for t in range(first, last):
        own, here = out + FLOAT * d * t, t * j
        for k in range(U(0), whole, SIXTEEN):
            store(own + FLOAT * k, splat(f32(0)))
        for k in range(whole, d):
            put_one(own + FLOAT * k, f32(0))
        for i in range(here, here + (j & ~U(3)), FOUR):
            a, b = row(table, stride, numbers, i, count), row(table, stride, numbers, i + ONE, count)
            c, e = row(table, stride, numbers, i + U(2), count), row(table, stride, numbers, i + U(3), count)
            a2, b2 = row(table, stride, numbers, i + FOUR, count), row(table, stride, numbers, i + U(5), count)
            c2, e2 = row(table, stride, numbers, i + U(6), count), row(table, stride, numbers, i + U(7), count)
            w, v = one_at(weights + FLOAT * i), one_at(weights + FLOAT * (i + ONE))
            y, z = one_at(weights + FLOAT * (i + U(2))), one_at(weights + FLOAT * (i + U(3)))
            for k in range(U(0), FLOAT * whole, LINE):
                prefetch(a2 + k)
                prefetch(b2 + k)
                prefetch(c2 + k)
                prefetch(e2 + k)
                s, r = fma(splat(w), load(a + k), load(own + k)), mul(splat(v), load(b + k))
                store(own + k, add(fma(splat(y), load(c + k), s), fma(splat(z), load(e + k), r)))
            for k in range(FLOAT * whole, FLOAT * d, FLOAT):
                s = one_at(own + k) + w * one_at(a + k) + v * one_at(b + k)
                put_one(own + k, s + y * one_at(c + k) + z * one_at(e + k))
        for i in range(here + (j & ~U(3)), here + j):
            add_to(own, row(table, stride, numbers, i, count), one_at(weights + FLOAT * i), d)


@numba.njit(error_model="numpy")
def add_to(out: Any, x: Any, weight: Any, d: Any) -> None:
    """``out += weight x``."""
    whole = d & ~U(15)
    for k in range(U(0), whole, SIXTEEN):
        store(out + FLOAT * k, fma(splat(weight), load(x + FLOAT * k), load(out + FLOAT * k)))
    for k in range(whole, d):
        put_one(out + FLOAT * k, one_at(out + FLOAT * k) + weight * one_at(x + FLOAT * k))


@kernel("void(" + ", ".join(["uint64"] * 9) + ")")
def scatter(weights: Any, x: Any, numbers: Any, out: Any, tokens: Any, j: Any, d: Any, first: Any, last: Any) -> None:
    """``out[numbers[t, i]] += weights[t, i] x[t]`` in columns ``first .. last`` of d."""
    size, count = last - first, tokens * j
    for t in range(tokens):
        own = x + FLOAT * (d * t + first)
        for i in range(t * j, t * j + j):
            ahead = row(out, FLOAT * d, numbers, i + EIGHT, count) + FLOAT * first
            for k in range(U(0), FLOAT * size, LINE):
                prefetch(ahead + k)
            add_to(row(out, FLOAT * d, numbers, i, count) + FLOAT * first, own, one_at(weights + FLOAT * i), size)


@kernel("void(" + ", ".join(["uint64"] * 7) + ")")
def outer(weights: Any, x: Any, out: Any, first: Any, last: Any, j: Any, d: Any) -> None:
    """``out[t j + i] = weights[t, i] x[t]`` for tokens ``first .. last``, past the caches."""
    whole, straight = d & ~U(15), out % LINE == U(0) and d % SIXTEEN == U(0)
    for t in range(first, last):
        own = x + FLOAT * d * t
        for i in range(t * j, t * j + j):
            to, w = out + FLOAT * d * i, one_at(weights + FLOAT * i)
            for k in range(U(0), FLOAT * whole, LINE):
                if straight:
                    stream(to + k, mul(splat(w), load(own + k)))
                else:
                    store(to + k, mul(splat(w), load(own + k)))
            for k in range(FLOAT * whole, FLOAT * d, FLOAT):
                put_one(to + k, w * one_at(own + k))
    fence()
