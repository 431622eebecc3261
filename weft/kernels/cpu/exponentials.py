"""Softmax on CPUs, with each exponential as a pair of a mantissa in [0.7, 1.5] and an exponent of 2.

    e^x = p 2^n,   n = round(x log2 e),   p = e^(x - n ln 2) by a polynomial of degree 5, to 2e-7

x - n ln 2 is found by two fused products with ln 2 in two parts, exact enough while |n| < 2^17. Sums are kept as
m 2^E for an E that is raised, and m rescaled, when an exponent is 24 above it, so that no maximum has to be known: a
term 126 below E vanishes. What lies below -87000, -inf too, counts as -87000, which vanishes beside anything else;
nan, what lies above 87000, and a row that has nothing else, are left to others.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from weft.kernels.compiled import kernel
from weft.kernels.cpu import simd

u64, f32 = np.uint64, np.float32
ZERO, ONE, TWO, THREE, FOUR, LANES, STRIDE = (u64(n) for n in (0, 1, 2, 3, 4, 16, 64))  # of 16 floats, 64 bytes
UNROLLED, STEP = u64(4), u64(256)  # vectors between two looks at the exponents, and their bytes
BLOCK, PER_BLOCK = u64(4096), u64(64)  # floats whose stored terms share an exponent, and looks at them
PART, MARKS = (
    u64(1 << 18),
    u64((1 << 18) // 4096 + 1),
)  # floats of a long row that one thread takes, and their exponents
LOG2E, LN2, LN2_REST = f32(1.4426950216293335), f32(0.6931471824645996), f32(-1.904654323148236e-09)
ROUNDER = f32(12582912.0)  # 1.5 * 2^23: a sum with it has no fraction
LOWEST, HIGHEST, SLACK = f32(-87000.0), f32(125000.0), f32(24.0)
# (e^t - 1) / t for |t| <= ln 2 / 2, by the least largest error of e^t, 9.3e-8 of it as rounded
C1, C2, C3, C4, C5 = (
    f32(c)
    for c in (0.9999997019767761, 0.4999914765357971, 0.1666763871908188, 0.04189816117286682, 0.008290272206068039)
)


@numba.njit(error_model="numpy")
def exponent(x: Any) -> Any:
    """n."""
    magic = simd.splat(ROUNDER)
    return simd.sub(simd.fma(x, simd.splat(LOG2E), magic), magic)


@numba.njit(error_model="numpy")
def mantissa(x: Any, n: Any) -> Any:
    """p."""
    t = simd.fma(n, simd.splat(-LN2), x)
    t = simd.fma(n, simd.splat(-LN2_REST), t)
    p = simd.fma(simd.splat(C5), t, simd.splat(C4))
    p = simd.fma(p, t, simd.splat(C3))
    p = simd.fma(p, t, simd.splat(C2))
    p = simd.fma(p, t, simd.splat(C1))
    return simd.fma(p, t, simd.splat(f32(1)))


@numba.njit(error_model="numpy")
def vector(at: Any) -> Any:
    """Sixteen floats, none below the lowest; nan stays."""
    return simd.maximum(simd.splat(LOWEST), simd.load(at))


@numba.njit(error_model="numpy")
def term(x: Any, n: Any, e: Any) -> Any:
    """e^x / 2^e."""
    return simd.scaled(mantissa(x, n), simd.sub(n, e))


@numba.njit(error_model="numpy")
def copy(source: Any, to: Any, size: Any) -> None:
    """A few floats from one address to another."""
    for j in range(size):
        simd.put_one(to + FOUR * j, simd.one_at(source + FOUR * j))


@numba.njit(error_model="numpy")
def scan(x: Any, out: Any, size: Any, marks: Any, keep: Any) -> Any:
    """m and E of the sum, and whether they are right; with ``keep``, terms, and the exponents of their blocks."""
    zero = simd.splat(f32(0))
    a, b, c, d = zero, zero, zero, zero
    e, regular, last = f32(-200000.0), True, simd.room()
    whole, left = size // (UNROLLED * LANES), size % (UNROLLED * LANES)
    for begin in range(ZERO, whole, PER_BLOCK):
        for k in range(begin, min(begin + PER_BLOCK, whole)):
            at = x + k * STEP
            p, q, r, s = vector(at), vector(at + STRIDE), vector(at + TWO * STRIDE), vector(at + THREE * STRIDE)
            i, j, u, v = exponent(p), exponent(q), exponent(r), exponent(s)
            top = simd.maximum(simd.maximum(i, j), simd.maximum(u, v))
            if simd.any_above(top, simd.splat(e + SLACK)):
                raised = simd.largest(top)
                regular = regular and raised <= HIGHEST
                down = simd.splat(e - raised)
                a, b, c, d = simd.scaled(a, down), simd.scaled(b, down), simd.scaled(c, down), simd.scaled(d, down)
                if keep:
                    for done in range(begin * UNROLLED, k * UNROLLED):
                        there = out + done * STRIDE
                        simd.store(there, simd.scaled(simd.load(there), down))
                e = raised
            low = simd.splat(e)
            p, q, r, s = term(p, i, low), term(q, j, low), term(r, u, low), term(s, v, low)
            a, b, c, d = simd.add(a, p), simd.add(b, q), simd.add(c, r), simd.add(d, s)
            if keep:
                to = out + k * STEP
                simd.store(to, p)
                simd.store(to + STRIDE, q)
                simd.store(to + TWO * STRIDE, r)
                simd.store(to + THREE * STRIDE, s)
        if keep:
            simd.put_one(marks + FOUR * (begin // PER_BLOCK), e)
    a = simd.add(simd.add(a, b), simd.add(c, d))
    blocks = (whole + PER_BLOCK - ONE) // PER_BLOCK
    for k in range(ZERO, left, LANES):
        at, count = x + whole * STEP + FOUR * k, min(LANES, left - k)
        simd.store(last, simd.splat(LOWEST))
        copy(at, last, count)
        p = vector(last)
        i = exponent(p)
        if simd.any_above(i, simd.splat(e + SLACK)):
            raised = simd.largest(i)
            regular = regular and raised <= HIGHEST
            a = simd.scaled(a, simd.splat(e - raised))
            if keep:
                for j in range(k):
                    there = out + whole * STEP + FOUR * j
                    simd.put_one(there, f32(simd.one_at(there) * power(e - raised)))
            e = raised
        p = term(p, i, simd.splat(e))
        a = simd.add(a, p)
        if keep:
            simd.store(last, p)
            copy(last, out + whole * STEP + FOUR * k, count)
    if keep:
        simd.put_one(marks + FOUR * blocks, e)
    m = simd.total(a)
    return m, e, regular and e > -HIGHEST + f32(4000) and m > f32(0) and m < f32(math.inf)


@numba.njit(error_model="numpy")
def power(n: Any) -> Any:
    """2^n for whole n; 0 from -126 on."""
    return simd.first(simd.scaled(simd.splat(f32(1)), simd.splat(n)))


@numba.njit(error_model="numpy")
def few(x: Any, out: Any, count: Any, e: Any, r: Any, last: Any) -> None:
    """Up to sixteen outputs, by way of the scratch memory at ``last``."""
    copy(x, last, count)
    p = vector(last)
    simd.store(last, simd.mul(term(p, exponent(p), simd.splat(e)), simd.splat(r)))
    copy(last, out, count)


@numba.njit(error_model="numpy")
def write(x: Any, out: Any, size: Any, e: Any, r: Any, past: Any) -> None:
    """r e^x / 2^e; with ``past``, past the caches."""
    last = simd.room()
    simd.store(last, simd.splat(f32(0)))
    low, times = simd.splat(e), simd.splat(r)
    if past:
        head = min(size, (STRIDE - out % STRIDE) % STRIDE // FOUR)
        few(x, out, head, e, r, last)
        x, out, size = x + FOUR * head, out + FOUR * head, size - head
    whole, left = size // (TWO * LANES), size % (TWO * LANES)
    if past:
        for k in range(whole):
            at, to = x + k * TWO * STRIDE, out + k * TWO * STRIDE
            p, q = vector(at), vector(at + STRIDE)
            simd.stream(to, simd.mul(term(p, exponent(p), low), times))
            simd.stream(to + STRIDE, simd.mul(term(q, exponent(q), low), times))
        simd.fence()
    else:
        for k in range(whole):
            at, to = x + k * TWO * STRIDE, out + k * TWO * STRIDE
            p, q = vector(at), vector(at + STRIDE)
            simd.store(to, simd.mul(term(p, exponent(p), low), times))
            simd.store(to + STRIDE, simd.mul(term(q, exponent(q), low), times))
    for k in range(ZERO, left, LANES):
        there = FOUR * (whole * TWO * LANES + k)
        few(x + there, out + there, min(LANES, left - k), e, r, last)


@numba.njit(error_model="numpy")
def finish(out: Any, size: Any, marks: Any, e: Any, r: Any) -> None:
    """Stored terms to outputs."""
    for block in range((size + BLOCK - ONE) // BLOCK):
        begin = block * BLOCK
        count = min(BLOCK, size - begin)
        full = count // (UNROLLED * LANES) * UNROLLED
        factor = f32(r * power(simd.one_at(marks + FOUR * block) - e))
        times, here = simd.splat(factor), out + FOUR * begin
        for k in range(full):
            simd.store(here + k * STRIDE, simd.mul(simd.load(here + k * STRIDE), times))
        if full * LANES < count:  # by the exponent of what fills no four vectors
            factor = f32(
                r * power(simd.one_at(marks + FOUR * ((size // (UNROLLED * LANES) + PER_BLOCK - ONE) // PER_BLOCK)) - e)
            )
            for j in range(full * LANES, count):
                simd.put_one(here + FOUR * j, f32(simd.one_at(here + FOUR * j) * factor))


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, boolean)")
def rows(x: Any, out: Any, columns: Any, start: Any, stop: Any, odd: Any, past: Any) -> None:
    """Rows ``start .. stop`` in two passes; a byte at ``odd + row`` is set for each that is left to others."""
    for row in range(start, stop):
        at, to = x + row * columns * FOUR, out + row * columns * FOUR
        m, e, regular = scan(at, to, columns, ZERO, False)
        if regular:
            write(at, to, columns, e, f32(f32(1) / m), past)
        else:
            simd.put_byte(odd + row)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64)")
def rows_stored(x: Any, out: Any, columns: Any, start: Any, stop: Any, odd: Any) -> None:
    """The same with one exponential an element, which is stored and read again."""
    marks = np.empty(columns // BLOCK + TWO, f32)
    there = u64(marks.ctypes.data)
    for row in range(start, stop):
        at, to = x + row * columns * FOUR, out + row * columns * FOUR
        m, e, regular = scan(at, to, columns, there, True)
        if regular:
            finish(to, columns, there, e, f32(f32(1) / m))
        else:
            simd.put_byte(odd + row)
    marks[0] = f32(0)  # Numba frees an array after the last line that names it


@numba.njit(error_model="numpy")
def scan_parts(x: Any, out: Any, columns: Any, start: Any, stop: Any, found: Any, marks: Any, keep: Any) -> None:
    """m, E and 1 where they are right, three floats for each part of a row that begins in ``start .. stop``."""
    for begin in range(start, stop, PART):
        size, to, own = min(PART, columns - begin), found + begin // PART * (THREE * FOUR), ZERO
        if keep:
            own = marks + begin // PART * MARKS * FOUR
        m, e, regular = scan(x + FOUR * begin, out + FOUR * begin, size, own, keep)
        simd.put_one(to, m)
        simd.put_one(to + FOUR, e)
        simd.put_one(to + TWO * FOUR, f32(1) if regular else f32(0))


@numba.njit(error_model="numpy")
def finish_parts(out: Any, columns: Any, start: Any, stop: Any, marks: Any, e: Any, r: Any) -> None:
    """Outputs of the parts that begin in ``start .. stop``, from stored terms."""
    for begin in range(start, stop, PART):
        finish(out + FOUR * begin, min(PART, columns - begin), marks + begin // PART * MARKS * FOUR, e, r)


@numba.njit(error_model="numpy")
def combined(found: Any, columns: Any) -> Any:
    """The highest E, 1 / m by it, and whether they are right, of what `scan_parts` has found."""
    count, top, m, regular = (columns + PART - ONE) // PART, -HIGHEST * f32(2), 0.0, True
    for k in range(count):
        e = simd.one_at(found + (THREE * k + ONE) * FOUR)
        top = e if e > top else top
        regular = regular and simd.one_at(found + (THREE * k + TWO) * FOUR) > f32(0)
    for k in range(count):
        e = simd.one_at(found + (THREE * k + ONE) * FOUR)
        m += np.float64(simd.one_at(found + THREE * k * FOUR)) * np.float64(power(e - top))
    return top, f32(1 / m), regular


@kernel("void(uint64, uint64, uint64, uint64, uint64, boolean)")
def long_row(x: Any, out: Any, columns: Any, found: Any, odd: Any, past: Any) -> None:
    """A row by its parts, in two passes; the byte at ``odd`` is set where it is left to others."""
    scan_parts(x, out, columns, ZERO, columns, found, ZERO, False)
    e, r, regular = combined(found, columns)
    if regular:
        write(x, out, columns, e, r, past)
    else:
        simd.put_byte(odd)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64)")
def long_row_stored(x: Any, out: Any, columns: Any, found: Any, marks: Any, odd: Any) -> None:
    """The same with stored exponentials."""
    scan_parts(x, out, columns, ZERO, columns, found, marks, True)
    e, r, regular = combined(found, columns)
    if regular:
        finish_parts(out, columns, ZERO, columns, marks, e, r)
    else:
        simd.put_byte(odd)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64)")
def first_pass(x: Any, out: Any, columns: Any, start: Any, stop: Any, found: Any) -> None:
    """Some parts of a row."""
    scan_parts(x, out, columns, start, stop, found, ZERO, False)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, boolean)")
def second_pass(x: Any, out: Any, columns: Any, start: Any, stop: Any, found: Any, past: Any) -> None:
    """Outputs ``start .. stop``, once all parts are found and right."""
    e, r, _ = combined(found, columns)
    write(x + FOUR * start, out + FOUR * start, stop - start, e, r, past)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64, uint64)")
def first_pass_stored(x: Any, out: Any, columns: Any, start: Any, stop: Any, found: Any, marks: Any) -> None:
    """Some parts of a row, whose terms are stored."""
    scan_parts(x, out, columns, start, stop, found, marks, True)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64)")
def second_pass_stored(out: Any, columns: Any, start: Any, stop: Any, found: Any, marks: Any) -> None:
    """Outputs ``start .. stop``, once all parts are found and right."""
    e, r, _ = combined(found, columns)
    finish_parts(out, columns, start, stop, marks, e, r)


@kernel("void(uint64, uint64, uint64, uint64, uint64, uint64)")
def back(y: Any, grad: Any, out: Any, columns: Any, start: Any, stop: Any) -> None:
    """y (g - sum of g y), rows ``start .. stop``."""
    full = columns // LANES
    for row in range(start, stop):
        here = row * columns * FOUR
        a, b = simd.splat(f32(0)), simd.splat(f32(0))
        for k in range(full // TWO):
            at, to = y + here + k * TWO * STRIDE, grad + here + k * TWO * STRIDE
            a = simd.fma(simd.load(at), simd.load(to), a)
            b = simd.fma(simd.load(at + STRIDE), simd.load(to + STRIDE), b)
        s = simd.total(simd.add(a, b))
        for j in range(full // TWO * TWO * LANES, columns):
            s = f32(s + f32(simd.one_at(y + here + FOUR * j) * simd.one_at(grad + here + FOUR * j)))
        less = simd.splat(s)
        for k in range(full):
            at = here + k * STRIDE
            simd.store(out + at, simd.mul(simd.load(y + at), simd.sub(simd.load(grad + at), less)))
        for j in range(full * LANES, columns):
            at = here + FOUR * j
            simd.put_one(out + at, f32(simd.one_at(y + at) * f32(simd.one_at(grad + at) - s)))
