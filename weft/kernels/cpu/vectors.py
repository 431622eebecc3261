"""What loops for CPUs ask of LLVM itself: vectors of full width, and the bits of a float.

The machine code of a loop is kept on disk for as long as its own file is the same: after a change here, remove the
caches beside the loops.
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic


@intrinsic
def wide(typing: Any) -> Any:
    """Vectors as wide as the CPU has: LLVM halves them on some CPUs unless the function asks for more."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def as_float(typing: Any, value: Any) -> Any:
    """The float32 of the same bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), code


@intrinsic
def as_int(typing: Any, value: Any) -> Any:
    """The int32 of the same bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), code
