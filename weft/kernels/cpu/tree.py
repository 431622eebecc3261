"""Trees of linear decisions on CPUs: each row descends to its leaf, a two-layer network that is computed for it alone.

A row reads few weights, and these are cold: time goes by in waiting for memory. So eight rows of a weight are read at
once, each a stream that the CPU fetches ahead; what comes next is asked for meanwhile; and rows with the same leaf
share what is read.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from weft.kernels.compiled import kernel
from weft.kernels.cpu.simd import add, fma, load, one_at, prefetch, put_one, splat, store, total

U, f32 = np.uint64, np.float32

FLOAT, LINE, ONE, EIGHT, LANES = U(4), U(64), U(1), U(8), U(16)
CHUNK = U(64)  # rows that descend together: they stay in the second cache
SAME = U(16)  # rows of a leaf that are computed together
IDENTITY, RELU, GELU, GELU_TANH, SILU = U(0), U(1), U(2), U(3), U(4)


@numba.njit(error_model="numpy")
def dot(a: Any, x: Any, size: Any, ahead: Any, step: Any, stride: Any) -> Any:
    """The product of two vectors; the order of its sums depends on ``size`` alone.

    For each four lines of ``a`` eight are asked for, ``stride`` apart, from ``ahead`` on, ``step`` further each time.
    """
    end, last = size & ~U(63), size & ~U(15)
    s0 = s1 = s2 = s3 = splat(f32(0.0))
    for i in range(U(0), end, U(64)):
        p, q, near = a + FLOAT * i, x + FLOAT * i, ahead + step * (i >> U(6))
        far = near + U(4) * stride
        prefetch(near)
        prefetch(near + stride)
        prefetch(near + U(2) * stride)
        prefetch(far - stride)
        prefetch(far)
        prefetch(far + stride)
        prefetch(far + U(2) * stride)
        prefetch(far + U(3) * stride)
        s0 = fma(load(p), load(q), s0)
        s1 = fma(load(p + LINE), load(q + LINE), s1)
        s2 = fma(load(p + U(128)), load(q + U(128)), s2)
        s3 = fma(load(p + U(192)), load(q + U(192)), s3)
    for i in range(end, last, LANES):
        s0 = fma(load(a + FLOAT * i), load(x + FLOAT * i), s0)
    s = total(add(add(s0, s1), add(s2, s3)))
    for i in range(last, size):
        s += one_at(a + FLOAT * i) * one_at(x + FLOAT * i)
    return s


@numba.njit(error_model="numpy")
def leaf_of(plan: Any, x: Any) -> Any:
    """The leaf of one row: while a node is read, both that may follow are asked for."""
    nodes, node_bias, features, depth = plan[0], plan[1], plan[6], plan[8]
    into, node = FLOAT * features, U(0)
    for level in range(ONE, depth + ONE):
        ahead, step, stride = nodes + into * (U(2) * node + ONE), U(512), LINE
        if level == depth:
            ahead, step, stride = plan[2] + into * plan[9] * (U(2) * node + U(2) - (ONE << depth)), LINE, U(2) * into
        z = dot(nodes + into * node, x, features, ahead, step, stride) + one_at(node_bias + FLOAT * node)
        node = U(2) * node + (U(2) if z >= f32(0.0) else ONE)
    return node + ONE - (ONE << depth)


@numba.njit(error_model="numpy")
def following(a: Any, stride: Any) -> Any:
    """The addresses of the seven vectors after the one at ``a``."""
    a4 = a + U(4) * stride
    return a + stride, a + U(2) * stride, a4 - stride, a4, a4 + stride, a4 + U(2) * stride, a4 + U(3) * stride


@numba.njit(error_model="numpy")
def ask(ahead: Any, step: Any, j: Any) -> None:
    """Asks for line ``j`` of eight vectors, ``step`` apart."""
    a = ahead + LINE * j
    a4 = a + U(4) * step
    prefetch(a)
    prefetch(a + step)
    prefetch(a + U(2) * step)
    prefetch(a4 - step)
    prefetch(a4)
    prefetch(a4 + step)
    prefetch(a4 + U(2) * step)
    prefetch(a4 + U(3) * step)


@numba.njit(error_model="numpy")
def dots(a: Any, x: Any, size: Any, out: Any, ahead: Any, step: Any) -> None:
    """Products of eight vectors, ``size`` apart, with ``x``; as many lines of eight at ``ahead`` are asked for."""
    stride, last = FLOAT * size, size & ~U(15)
    a1, a2, a3, a4, a5, a6, a7 = following(a, stride)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = splat(f32(0.0))
    for i in range(U(0), last, LANES):
        ask(ahead, step, i >> U(4))
        o = FLOAT * i
        v = load(x + o)
        s0 = fma(load(a + o), v, s0)
        s1 = fma(load(a1 + o), v, s1)
        s2 = fma(load(a2 + o), v, s2)
        s3 = fma(load(a3 + o), v, s3)
        s4 = fma(load(a4 + o), v, s4)
        s5 = fma(load(a5 + o), v, s5)
        s6 = fma(load(a6 + o), v, s6)
        s7 = fma(load(a7 + o), v, s7)
    put_one(out, total(s0))
    put_one(out + U(4), total(s1))
    put_one(out + U(8), total(s2))
    put_one(out + U(12), total(s3))
    put_one(out + U(16), total(s4))
    put_one(out + U(20), total(s5))
    put_one(out + U(24), total(s6))
    put_one(out + U(28), total(s7))
    for i in range(last, size):
        v = one_at(x + FLOAT * i)
        for r in range(U(8)):
            at = out + FLOAT * r
            put_one(at, one_at(at) + one_at(a + stride * r + FLOAT * i) * v)


@numba.njit(error_model="numpy")
def accumulate(a: Any, size: Any, factors: Any, out: Any, ahead: Any, step: Any) -> None:
    """Adds eight vectors, ``size`` apart, times eight factors to ``out``; lines at ``ahead`` as in `dots`."""
    stride, last = FLOAT * size, size & ~U(15)
    a1, a2, a3, a4, a5, a6, a7 = following(a, stride)
    c0, c1, c2, c3 = one_at(factors), one_at(factors + U(4)), one_at(factors + U(8)), one_at(factors + U(12))
    c4, c5, c6, c7 = one_at(factors + U(16)), one_at(factors + U(20)), one_at(factors + U(24)), one_at(factors + U(28))
    v0, v1, v2, v3, v4, v5, v6, v7 = (
        splat(c0),
        splat(c1),
        splat(c2),
        splat(c3),
        splat(c4),
        splat(c5),
        splat(c6),
        splat(c7),
    )
    for i in range(U(0), last, LANES):
        ask(ahead, step, i >> U(4))
        o = FLOAT * i
        s, t = fma(load(a + o), v0, load(out + o)), splat(f32(0.0))
        s, t = fma(load(a1 + o), v1, s), fma(load(a2 + o), v2, t)
        s, t = fma(load(a3 + o), v3, s), fma(load(a4 + o), v4, t)
        s, t = fma(load(a5 + o), v5, s), fma(load(a6 + o), v6, t)
        store(out + o, add(fma(load(a7 + o), v7, s), t))
    for i in range(last, size):
        at, p = out + FLOAT * i, a + FLOAT * i
        s = one_at(at) + c0 * one_at(p)
        for r in range(ONE, EIGHT):
            s += one_at(factors + FLOAT * r) * one_at(p + stride * r)
        put_one(at, s)


@numba.njit(error_model="numpy")
def act(z: Any, kind: Any) -> Any:
    """An activation of one number."""
    if kind == GELU:
        return f32(0.5) * z * (f32(1.0) + f32(math.erf(z * f32(0.7071067811865476))))
    if kind == RELU:
        return f32(0.0) if z < f32(0.0) else z
    if kind == SILU:
        return z / (f32(1.0) + f32(math.exp(-z)))
    if kind == GELU_TANH:
        t = f32(0.7978845608028654) * (z + f32(0.044715) * z * z * z)
        return f32(0.5) * z * (f32(1.0) + f32(math.tanh(t)))
    return z


@numba.njit(error_model="numpy")
def leaf_rows(plan: Any, leaf: Any, following: Any, x: Any, out: Any, rows: Any, count: Any, hidden: Any) -> None:
    """Outputs of up to 16 rows with one leaf; ``following`` is the leaf that comes next."""
    up, up_bias, down, down_bias = plan[2], plan[3], plan[4], plan[5]
    features, outputs, width, kind = plan[6], plan[7], plan[9], plan[10]
    into, onto = FLOAT * features, FLOAT * outputs
    first, second, blocks = up + into * width * leaf, down + onto * width * leaf, width & ~U(7)
    coming = up + into * width * following
    for k in range(U(0), blocks, EIGHT):
        ahead, step = first + into * (k + EIGHT), into
        if k + EIGHT >= blocks:
            ahead, step = second, onto
        for r in range(count):
            dots(first + into * k, x + into * rows[r], features, hidden + FLOAT * (width * r + k), ahead, step)
    for r in range(count):
        for k in range(blocks, width):
            w = first + into * k
            put_one(hidden + FLOAT * (width * r + k), dot(w, x + into * rows[r], features, w + into, U(256), LINE))
        for k in range(width):
            at = hidden + FLOAT * (width * r + k)
            z = one_at(at)
            if up_bias:
                z += one_at(up_bias + FLOAT * (width * leaf + k))
            put_one(at, act(z, kind))
        here = out + onto * rows[r]
        for i in range(U(0), outputs & ~U(15), LANES):
            store(here + FLOAT * i, load(down_bias + onto * leaf + FLOAT * i) if down_bias else splat(f32(0.0)))
        for i in range(outputs & ~U(15), outputs):
            put_one(here + FLOAT * i, one_at(down_bias + onto * leaf + FLOAT * i) if down_bias else f32(0.0))
    for k in range(U(0), blocks, EIGHT):
        ahead, step = second + onto * (k + EIGHT), onto
        if k + EIGHT >= blocks:
            ahead, step = coming, into
        for r in range(count):
            factors = hidden + FLOAT * (width * r + k)
            accumulate(second + onto * k, outputs, factors, out + onto * rows[r], ahead, step)
    for r in range(count):
        here = out + onto * rows[r]
        for k in range(blocks, width):
            c = one_at(hidden + FLOAT * (width * r + k))
            for i in range(outputs):
                at = here + FLOAT * i
                put_one(at, one_at(at) + c * one_at(second + onto * k + FLOAT * i))


@numba.njit(error_model="numpy")
def sort(keys: Any) -> None:
    """Sorts unsigned numbers in place."""
    gap = U(1)
    while gap < U(keys.size):
        gap = U(3) * gap + ONE
    while gap > ONE:
        gap //= U(3)
        for i in range(gap, U(keys.size)):
            key, j = keys[i], U(i)
            while j >= gap and keys[j - gap] > key:
                keys[j] = keys[j - gap]
                j -= gap
            keys[j] = key


@kernel("void(uint64[::1], uint64, uint64, uint64, uint64)")
def descend(plan: Any, x: Any, out: Any, start: Any, stop: Any) -> None:
    """Outputs of the rows ``start .. stop`` of ``x``, fewer than 2^32.

    The plan: addresses of the nodes' weights and biases, of the leaves' first and second weights and biases (0: none),
    then features, outputs, depth, width of a leaf, and the activation's number.
    """
    nodes, node_bias, features, depth, width = plan[0], plan[1], plan[6], plan[8], plan[9]
    into, size = FLOAT * features, stop - start
    scratch = np.empty(SAME + size + (min(size, SAME) * width >> ONE) + ONE, np.uint64)
    rows, keys = scratch[:SAME], scratch[SAME : SAME + size]
    hidden = U(scratch.ctypes.data) + EIGHT * (SAME + size)
    for r in range(size):
        keys[r] = U(0)
    if size == ONE:
        keys[0] = leaf_of(plan, x + into * start) << U(32)
    for begin in range(U(0), size if size != ONE else U(0), CHUNK):
        end = min(begin + CHUNK, size)
        for _ in range(depth):
            for r in range(begin, end):
                node, ahead = keys[r], nodes + into * keys[min(r + ONE, end - ONE)]
                z = dot(nodes + into * node, x + into * (start + r), features, ahead, U(256), LINE)
                z += one_at(node_bias + FLOAT * node)
                keys[r] = U(2) * node + (U(2) if z >= f32(0.0) else ONE)
        for r in range(begin, end):
            keys[r] = (keys[r] + ONE - (ONE << depth)) << U(32) | r
    sort(keys)
    at = U(0)
    while at < size:
        leaf, count = keys[at] >> U(32), U(0)
        while at < size and count < SAME and keys[at] >> U(32) == leaf:
            rows[count] = start + (keys[at] & U(0xFFFFFFFF))
            count += ONE
            at += ONE
        leaf_rows(plan, leaf, keys[at] >> U(32) if at < size else leaf, x, out, rows, count, hidden)
    scratch[0] = U(0)  # it lives to here
