"""Vectors as values in Numba's loops: sixteen float32 or eight uint64, in registers from one statement to the next.

Numba has no such type, and its automatic vector code breaks off at selections, bit counts and stores past the caches.
LLVM takes a vector apart where the CPU's are shorter. Addresses are plain numbers: whoever calls a loop sees to it that
the memory is there, lives on, and ends behind the last element that the loop reads.

The machine code of a loop is kept on disk for as long as its own file is the same: after a change here, remove the
caches beside the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic, models, register_model

LANES, WORDS = 16, 8  # of float32, of uint64
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS, LONGS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I64, WORDS)


class Vector(types.Type):
    """``lanes`` numbers of one type."""

    def __init__(self, scalar: Any, lanes: int) -> None:
        self.scalar, self.lanes = scalar, lanes
        super().__init__(name=f"Vector({scalar} x {lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is one value of LLVM."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.scalar).get_value_type(), kind.lanes))


floats, words = Vector(types.float32, LANES), Vector(types.uint64, WORDS)
f32, i32, u64 = types.float32, types.int32, types.uint64


def operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes an intrinsic of ``emit(builder, *values)``, which returns LLVM's value of the type ``result``."""

    def made(emit: Callable[..., Any]) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            # LLVM halves vectors on some CPUs unless the function asks for more.
            set.update(builder.function.attributes, {'"prefer-vector-width"="512"', '"min-legal-vector-width"="512"'})
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        answer = result(*arguments), code
        forms: list[Callable[..., Any]] = [
            lambda typing: answer,
            lambda typing, a: answer,
            lambda typing, a, b: answer,
            lambda typing, a, b, c: answer,
            lambda typing, a, b, c, d: answer,
        ]
        form = forms[len(arguments)]
        form.__name__, form.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(form)

    return made


def pointer(builder: Any, at: Any, kind: Any) -> Any:
    """LLVM's pointer to ``kind`` at an address."""
    return builder.inttoptr(at, kind.as_pointer())


def spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of ``kind`` with the value in every lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    mask = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """What the function of LLVM gives for these values."""
    kind = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def asked(builder: Any, at: Any) -> None:
    """Asks for the cache line of an address, which need not exist, as far as into the second cache."""
    place, number = pointer(builder, at, ir.IntType(8)), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
    ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
    builder.call(ask, [place, number(0), number(2), number(1)])


def has(feature: str) -> bool:
    """Whether the machine code is for this CPU, and it has the feature."""
    return not (config.CPU_NAME or config.CPU_FEATURES) and bool(llvm.get_host_cpu_features().get(feature))


@operation(u64)
def room(builder: Any) -> Any:
    """The address of 64 floats of the function's own, whose contents are not set, for as long as it runs.

    The address of an array does not keep it: Numba frees an array after the last line that names it.
    """
    return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(F32, 64)), I64)


@operation(floats, u64)
def load(builder: Any, at: Any) -> Any:
    """Sixteen floats from an address on."""
    return builder.load(pointer(builder, at, FLOATS), align=4)


@operation(types.void, u64, floats)
def store(builder: Any, at: Any, value: Any) -> Any:
    """Sixteen floats to an address."""
    builder.store(value, pointer(builder, at, FLOATS), align=4)


@operation(types.void, u64, floats)
def stream(builder: Any, at: Any, value: Any) -> Any:
    """Sixteen floats to an address that is a multiple of 64, past the caches; `fence` when all is written."""
    made = builder.store(value, pointer(builder, at, FLOATS), align=64)
    made.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


@operation(types.void)
def fence(builder: Any) -> Any:
    """What was streamed is in place for every thread."""
    builder.fence("seq_cst")


@operation(floats, f32)
def splat(builder: Any, value: Any) -> Any:
    """The float in all lanes."""
    return spread(builder, value, FLOATS)


@operation(floats, floats, floats)
def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return builder.fadd(a, b)


@operation(floats, floats, floats)
def sub(builder: Any, a: Any, b: Any) -> Any:
    """a - b."""
    return builder.fsub(a, b)


@operation(floats, floats, floats)
def mul(builder: Any, a: Any, b: Any) -> Any:
    """a * b."""
    return builder.fmul(a, b)


@operation(floats, floats, floats, floats)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


@operation(floats, floats, floats)
def maximum(builder: Any, a: Any, b: Any) -> Any:
    """a where a > b, else b: b where either is nan."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(floats, floats)
def magnitude(builder: Any, a: Any) -> Any:
    """|a|."""
    return call(builder, "llvm.fabs.v16f32", FLOATS, a)


@operation(floats, floats)
def rounded(builder: Any, a: Any) -> Any:
    """The nearest whole numbers, half to even."""
    return call(builder, "llvm.roundeven.v16f32", FLOATS, a)


@operation(types.boolean, floats, floats)
def any_above(builder: Any, a: Any, b: Any) -> Any:
    """Whether a > b in any lane, or either is nan there."""
    mask = builder.bitcast(builder.fcmp_unordered(">", a, b), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))


@operation(floats, floats, floats)
def scaled(builder: Any, a: Any, n: Any) -> Any:
    """a * 2^n for whole n up to 127 and normal a below 2; 0 where n is at most -126, nan where a is nan."""
    if has("avx512f"):
        kinds = FLOATS, FLOATS, FLOATS, ir.IntType(16), I32
        values = a, n, ir.Constant(FLOATS, None), ir.Constant(kinds[3], -1), ir.Constant(I32, 4)
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, *values)
    low = builder.fcmp_ordered("<=", n, ir.Constant(FLOATS, [-126.0] * LANES))
    near = builder.select(
        builder.fcmp_unordered(">=", n, ir.Constant(FLOATS, [-126.0] * LANES)), n, ir.Constant(FLOATS, [0.0] * LANES)
    )
    power = builder.shl(
        builder.add(builder.fptosi(near, INTS), ir.Constant(INTS, [127] * LANES)), ir.Constant(INTS, [23] * LANES)
    )
    product = builder.fmul(a, builder.bitcast(power, FLOATS))
    return builder.select(low, ir.Constant(FLOATS, [0.0] * LANES), product)


@operation(f32, floats)
def total(builder: Any, a: Any) -> Any:
    """The sum of all lanes, in a fixed order."""
    size = LANES
    while size > 1:
        size //= 2
        kind = ir.VectorType(I32, size)
        low, high = (builder.shuffle_vector(a, a, ir.Constant(kind, [*range(k, k + size)])) for k in (0, size))
        a = builder.fadd(low, high)
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(f32, floats)
def largest(builder: Any, a: Any) -> Any:
    """The largest of all lanes."""
    size = LANES
    while size > 1:
        size //= 2
        kind = ir.VectorType(I32, size)
        low, high = (builder.shuffle_vector(a, a, ir.Constant(kind, [*range(k, k + size)])) for k in (0, size))
        a = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(f32, floats)
def first(builder: Any, a: Any) -> Any:
    """The first lane."""
    return builder.extract_element(a, ir.Constant(I32, 0))


@operation(f32, u64)
def one_at(builder: Any, at: Any) -> Any:
    """The float at an address."""
    return builder.load(pointer(builder, at, F32), align=4)


@operation(types.void, u64, f32)
def put_one(builder: Any, at: Any, value: Any) -> Any:
    """A float to an address."""
    builder.store(value, pointer(builder, at, F32), align=4)


@operation(types.void, u64)
def put_byte(builder: Any, at: Any) -> Any:
    """1 to the byte at an address."""
    builder.store(ir.Constant(ir.IntType(8), 1), pointer(builder, at, ir.IntType(8)), align=1)


@operation(u64, u64)
def word_at(builder: Any, at: Any) -> Any:
    """The word at an address."""
    return builder.load(pointer(builder, at, I64), align=1)


@operation(types.void, u64, u64)
def put_word(builder: Any, at: Any, value: Any) -> Any:
    """A word to an address."""
    builder.store(value, pointer(builder, at, I64), align=1)


@operation(types.void, u64)
def prefetch(builder: Any, at: Any) -> Any:
    """`asked`, of an address in a loop."""
    asked(builder, at)
