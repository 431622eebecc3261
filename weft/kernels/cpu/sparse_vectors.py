"""Sums of products that stay in registers, written for LLVM itself: Numba keeps them in memory.

Vectors have 16 floats, which LLVM cuts into what the CPU has.

The machine code of the loops that call these is kept on disk for as long as their own file is the same: after a change
here, remove the caches beside the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16  # floats of a vector; pixels that are computed together

_INT, _WORD = ir.IntType(32), ir.IntType(64)
_VECTOR, _PLACES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_FUSED = ("contract",)  # product and sum in one instruction, where the CPU has it


def _word(value: int) -> Any:
    return ir.Constant(_WORD, value)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """To element ``at`` of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _load(builder: Any, pointer: Any, vector: int = 0) -> Any:
    """16 floats, ``vector`` vectors after the pointer."""
    return builder.load(builder.gep(builder.bitcast(pointer, _VECTOR.as_pointer()), [_word(vector)]), align=4)


def _store(builder: Any, value: Any, pointer: Any, vector: int = 0) -> None:
    builder.store(value, builder.gep(builder.bitcast(pointer, _VECTOR.as_pointer()), [_word(vector)]), align=4)


def _number(builder: Any, pointer: Any, at: Any) -> Any:
    """Element ``at`` of 32-bit numbers, as a word."""
    return builder.zext(builder.load(builder.gep(pointer, [at])), _WORD)


def _shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_PLACES, places))


def _spread(builder: Any, value: Any) -> Any:
    """16 times the same float."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return _shuffle(builder, one, one, [0] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)


def _exchange(builder: Any, a: Any, b: Any, step: int) -> tuple[Any, Any]:
    """Two rows of a matrix whose blocks off the diagonal, ``step`` wide, change places."""
    low = [LANES + j - step if j & step else j for j in range(LANES)]
    high = [LANES + j if j & step else j + step for j in range(LANES)]
    return _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)


def _sums(builder: Any, rows: list[Any]) -> Any:
    """The sum of each of 16 vectors, as one."""
    for step in (8, 4, 2, 1):
        half = len(rows) // 2
        pairs = [_exchange(builder, rows[i], rows[i + half], step) for i in range(half)]
        rows = [builder.fadd(low, high) for low, high in pairs]
    return rows[0]


def _sum(builder: Any, row: Any) -> Any:
    """The sum of one vector's floats."""
    for step in (8, 4, 2, 1):
        row = builder.fadd(row, _shuffle(builder, row, row, [(j + step) % LANES for j in range(LANES)]))
    return builder.extract_element(row, ir.Constant(_INT, 0))


def _total(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [
            *[builder.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)],
            *parts[len(parts) & ~1 :],
        ]
    return parts[0]


@intrinsic
def transpose(
    typing: Any, source: Any, rows: Any, row: Any, high: Any, left: Any, target: Any, places: Any, place: Any,
    step: Any, offset: Any,
) -> Any:  # fmt: skip
    """``target[places[place + j] * step + offset + i] = source[rows[row + i] * high + left + j]``, 16 by 16."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, block = signature.args, []
        begin = _pointer(context, builder, kinds[0], args[0], args[4])
        numbers = _pointer(context, builder, kinds[1], args[1], args[2])
        for i in range(LANES):
            at = builder.mul(_number(builder, numbers, _word(i)), args[3])
            block.append(_load(builder, builder.gep(begin, [at])))
        for size in (8, 4, 2, 1):
            for i in range(LANES):
                if not i & size:
                    block[i], block[i + size] = _exchange(builder, block[i], block[i + size], size)
        begin = _pointer(context, builder, kinds[5], args[5], args[9])
        numbers = _pointer(context, builder, kinds[6], args[6], args[7])
        for j in range(LANES):
            at = builder.mul(_number(builder, numbers, _word(j)), args[8])
            _store(builder, block[j], builder.gep(begin, [at]))
        return context.get_dummy_value()

    word = types.uint64
    return types.void(source, rows, word, word, word, target, places, word, word, word), code


@intrinsic
def sum_of(typing: Any, array: Any, at: Any, vectors: Any) -> Any:
    """The sum of so many vectors from ``array[at]`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        begin = _pointer(context, builder, signature.args[0], args[0], args[1])
        total = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))
        with cgutils.for_range(builder, args[2]) as loop:
            here = builder.gep(begin, [builder.mul(loop.index, _word(LANES))])
            builder.store(builder.fadd(builder.load(total), _load(builder, here)), total)
        return _sum(builder, builder.load(total))

    return types.float32(array, types.uint64, types.uint64), code


def _product(vectors: int, unroll: int) -> Callable[..., None]:
    @intrinsic
    def product(
        typing: Any, values: Any, columns: Any, begin: Any, end: Any, tile: Any, shift: Any, start: Any, out: Any,
        at: Any,
    ) -> Any:  # fmt: skip
        """``out[at] = start + sum of values[k] * tile[columns[k] + shift]`` for ``begin <= k < end``, in vectors."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, step = signature.args, _word(LANES * vectors)
            weights = _pointer(context, builder, kinds[0], args[0], _word(0))
            numbers = _pointer(context, builder, kinds[1], args[1], _word(0))
            source = _pointer(context, builder, kinds[4], args[4], builder.mul(args[5], step))
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)] for _ in range(unroll)]
            for row in sums:
                for place in row:
                    first = _spread(builder, args[6]) if row is sums[0] else ir.Constant(_VECTOR, [0.0] * LANES)
                    builder.store(first, place)

            def tap(k: Any, row: list[Any]) -> None:
                weight = _spread(builder, builder.load(builder.gep(weights, [k])))
                here = builder.gep(source, [builder.mul(_number(builder, numbers, k), step)])
                for j, place in enumerate(row):
                    builder.store(_fma(builder, weight, _load(builder, here, j), builder.load(place)), place)

            count = builder.udiv(builder.sub(args[3], args[2]), _word(unroll))
            middle = builder.add(args[2], builder.mul(count, _word(unroll)))
            with cgutils.for_range_slice(builder, args[2], middle, _word(unroll)) as (k, _):
                for u, row in enumerate(sums):
                    tap(builder.add(k, _word(u)), row)
            with cgutils.for_range_slice(builder, middle, args[3], _word(1)) as (k, _):
                tap(k, sums[0])
            target = _pointer(context, builder, kinds[7], args[7], builder.mul(args[8], step))
            for j in range(vectors):
                _store(builder, _total(builder, [builder.load(row[j]) for row in sums]), target, j)
            return context.get_dummy_value()

        word = types.uint64
        return types.void(values, columns, word, word, tile, word, types.float32, out, word), code

    return product


def _gradient(vectors: int) -> Callable[..., None]:
    @intrinsic
    def gradient(
        typing: Any, errors: Any, row: Any, columns: Any, begin: Any, end: Any, tile: Any, shift: Any, out: Any
    ) -> Any:
        """``out[k] += <errors[row], tile[columns[k] + shift]>`` for ``begin <= k < end``, 16 of them at a time."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, step = signature.args, _word(LANES * vectors)
            above = _pointer(context, builder, kinds[0], args[0], builder.mul(args[1], step))
            numbers = _pointer(context, builder, kinds[2], args[2], _word(0))
            source = _pointer(context, builder, kinds[5], args[5], builder.mul(args[6], step))
            target = _pointer(context, builder, kinds[7], args[7], _word(0))
            error = [_load(builder, above, j) for j in range(vectors)]

            def tap(k: Any) -> Any:
                here = builder.gep(source, [builder.mul(_number(builder, numbers, k), step)])
                total = builder.fmul(error[0], _load(builder, here), flags=_FUSED)
                for j in range(1, vectors):
                    total = _fma(builder, error[j], _load(builder, here, j), total)
                return total

            count = builder.udiv(builder.sub(args[4], args[3]), _word(LANES))
            middle = builder.add(args[3], builder.mul(count, _word(LANES)))
            with cgutils.for_range_slice(builder, args[3], middle, _word(LANES)) as (k, _):
                found = _sums(builder, [tap(builder.add(k, _word(u))) for u in range(LANES)])
                here = builder.gep(target, [k])
                _store(builder, builder.fadd(found, _load(builder, here)), here)
            with cgutils.for_range_slice(builder, middle, args[4], _word(1)) as (k, _):
                here = builder.gep(target, [k])
                builder.store(builder.fadd(_sum(builder, tap(k)), builder.load(here)), here)
            return context.get_dummy_value()

        word = types.uint64
        return types.void(errors, word, columns, word, word, tile, word, out), code

    return gradient


def _shifted(builder: Any, shifts: Any, pixels: int) -> list[Any]:
    """How far the pixels' patches are from the first of all, in floats."""
    return [builder.mul(_number(builder, shifts, _word(j)), _word(LANES)) for j in range(pixels)]


@intrinsic
def product_of_pixels(
    typing: Any, values: Any, columns: Any, begin: Any, end: Any, tile: Any, shifts: Any, first: Any, start: Any,
    out: Any,
) -> Any:  # fmt: skip
    """``out[j] = start + sum of values[k] * tile[columns[k] + shifts[first + j]]`` for 16 pixels j, in vectors."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        weights = _pointer(context, builder, kinds[0], args[0], _word(0))
        numbers = _pointer(context, builder, kinds[1], args[1], _word(0))
        source = _pointer(context, builder, kinds[4], args[4], _word(0))
        offsets = _shifted(builder, _pointer(context, builder, kinds[5], args[5], args[6]), LANES)
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(LANES)]
        for place in sums:
            builder.store(_spread(builder, args[7]), place)
        with cgutils.for_range_slice(builder, args[2], args[3], _word(1)) as (k, _):
            weight = _spread(builder, builder.load(builder.gep(weights, [k])))
            here = builder.gep(source, [builder.mul(_number(builder, numbers, k), _word(LANES))])
            for offset, place in zip(offsets, sums, strict=True):
                patch = _load(builder, builder.gep(here, [offset]))
                builder.store(_fma(builder, weight, patch, builder.load(place)), place)
        target = _pointer(context, builder, kinds[8], args[8], _word(0))
        for j, place in enumerate(sums):
            _store(builder, builder.load(place), target, j)
        return context.get_dummy_value()

    word = types.uint64
    return types.void(values, columns, word, word, tile, shifts, word, types.float32, out), code


@intrinsic
def gradient_of_pixels(
    typing: Any, errors: Any, columns: Any, begin: Any, end: Any, tile: Any, shifts: Any, first: Any, out: Any
) -> Any:
    """``out[k] += sum over 16 pixels j of <errors[j], tile[columns[k] + shifts[first + j]]>``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        above = _pointer(context, builder, kinds[0], args[0], _word(0))
        numbers = _pointer(context, builder, kinds[1], args[1], _word(0))
        source = _pointer(context, builder, kinds[4], args[4], _word(0))
        offsets = _shifted(builder, _pointer(context, builder, kinds[5], args[5], args[6]), LANES)
        target = _pointer(context, builder, kinds[7], args[7], _word(0))
        error = [_load(builder, above, j) for j in range(LANES)]
        with cgutils.for_range_slice(builder, args[2], args[3], _word(1)) as (k, _):
            here = builder.gep(source, [builder.mul(_number(builder, numbers, k), _word(LANES))])
            patches = [_load(builder, builder.gep(here, [offset])) for offset in offsets]
            parts = [builder.fmul(error[j], patches[j], flags=_FUSED) for j in range(4)]
            for j in range(4, LANES):
                parts[j % 4] = _fma(builder, error[j], patches[j], parts[j % 4])
            at = builder.gep(target, [k])
            builder.store(builder.fadd(_sum(builder, _total(builder, parts)), builder.load(at)), at)
        return context.get_dummy_value()

    word = types.uint64
    return types.void(errors, columns, word, word, tile, shifts, word, out), code


def _scatter(pixels: int) -> Callable[..., None]:
    @intrinsic
    def scatter(
        typing: Any, values: Any, columns: Any, begin: Any, end: Any, errors: Any, row: Any, shifts: Any, first: Any,
        tile: Any,
    ) -> Any:  # fmt: skip
        """``tile[columns[k] + shifts[first + j]] += values[k] * errors[row + j]`` for the pixels j, in vectors."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            weights = _pointer(context, builder, kinds[0], args[0], _word(0))
            numbers = _pointer(context, builder, kinds[1], args[1], _word(0))
            above = _pointer(context, builder, kinds[4], args[4], builder.mul(args[5], _word(LANES)))
            offsets = _shifted(builder, _pointer(context, builder, kinds[6], args[6], args[7]), pixels)
            target = _pointer(context, builder, kinds[8], args[8], _word(0))
            error = [_load(builder, above, j) for j in range(pixels)]
            with cgutils.for_range_slice(builder, args[2], args[3], _word(1)) as (k, _):
                weight = _spread(builder, builder.load(builder.gep(weights, [k])))
                here = builder.gep(target, [builder.mul(_number(builder, numbers, k), _word(LANES))])
                for j, offset in enumerate(offsets):
                    at = builder.gep(here, [offset])
                    _store(builder, _fma(builder, weight, error[j], _load(builder, at)), at)
            return context.get_dummy_value()

        word = types.uint64
        return types.void(values, columns, word, word, errors, word, shifts, word, tile), code

    return scatter


product1, product2, product4 = _product(1, 4), _product(2, 2), _product(4, 2)
gradient1, gradient2, gradient4 = _gradient(1), _gradient(2), _gradient(4)
scatter1, scatter16 = _scatter(1), _scatter(LANES)
