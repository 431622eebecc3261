"""The errors that Weft raises: each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib


class WeftError(Exception):
    """Base of every error that Weft raises on purpose."""


class Unsupported(WeftError):
    """A combination that cannot work; ``reason`` says why and ``instead`` what to use.

    Attributes:
        reason: why it cannot work, as a sentence.
        instead: what to use, or None where there is nothing to offer.
    """

    def __init__(self, reason: str, instead: str | None = None) -> None:
        self.reason = reason
        self.instead = instead
        super().__init__(reason if instead is None else f"{reason.rstrip('.')}. Use instead: {instead}")

    def __reduce__(self) -> tuple[type[Unsupported], tuple[str, str | None]]:
        return type(self), (self.reason, self.instead)


class StageError(WeftError):
    """A model could not be cut into stages as asked."""


class DataError(WeftError):
    """A data set or a batch is not what the method needs: shape, dtype, labels, checksum, a missing file."""


class UsageError(WeftError):
    """An option or a name that Weft does not know; the message lists the nearest valid ones."""


class RecipeError(UsageError):
    """A recipe with an unknown key or a bad value; the message names its path and the nearest valid one."""


class NonFinite(WeftError):
    """A loss or a gradient became infinite or not a number; nothing was added to any gradient."""


def unknown(kind: str, given: str, valid: list[str], where: str = "") -> str:
    """The message for a name that is not known: what was given, the nearest valid ones."""
    near = difflib.get_close_matches(given, valid, n=3, cutoff=0.4)
    listed = ", ".join(near or valid)
    hint = f"did you mean {listed}?" if near else f"valid: {listed or 'none'}"
    return f"unknown {kind} {given!r} {where}".rstrip() + f"; {hint}"
