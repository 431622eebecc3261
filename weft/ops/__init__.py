"""What families share, under names from the field."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.ops.exponentials import softmax

__all__ = ["softmax"]


def __getattr__(name: str) -> Any:
    if name == "softmax":
        from weft.ops.exponentials import softmax

        return softmax
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
