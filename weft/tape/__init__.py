"""What is kept between the passes: tapes pack what autograd saves, layers keep less from the start."""

from typing import Any

from weft.method import exports

_lookup, __dir__ = exports(__name__)


def __getattr__(name: str) -> Any:
    if name in ("Kept", "Reference", "Saved", "Tape"):
        from weft import session

        return getattr(session, name)
    return _lookup(name)
