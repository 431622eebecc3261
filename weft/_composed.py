"""Tapes made of tapes: one after another on each tensor, or another one for other modules (see `weft.session`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from weft._ledger import Ledger
from weft._tapes import OUTSIDE, Hold, Kept, Saved, Tape
from weft.errors import UsageError, WeftError


class Composition(Tape):
    """First ``left``, then ``right`` on each tensor that ``left`` keeps and ``right`` takes."""

    def __init__(self, left: Tape, right: Tape) -> None:
        self.left, self.right = left, right
        self.exact = left.exact and right.exact
        self.terminal = right.terminal
        self.error = left.error + right.error
        if left.terminal:
            raise self._nothing_left()

    def __str__(self) -> str:
        return f"{self.left} | {self.right}"

    @property
    def clock(self) -> int:
        return self.left.clock

    @clock.setter
    def clock(self, step: int) -> None:
        self.left.clock = self.right.clock = step

    @property
    def outside_bytes(self) -> int:  # type: ignore[override]
        return self.left.outside_bytes + self.right.outside_bytes

    def enter(self, hold: Hold) -> None:
        self.left.enter(hold)
        try:
            self.right.enter(hold)
        except BaseException:
            self.left.leave()
            raise

    def leave(self) -> None:
        try:
            self.right.leave()
        finally:
            self.left.leave()

    def _nothing_left(self) -> WeftError:
        left, right = self.left, self.right
        return WeftError(
            f"{left} | {right}: {left} keeps no tensors, so {right} would pack nothing. Tapes pack from left to right: "
            f"put the one that keeps no tensors last, {right} | {left}"
        )

    def takes(self, saved: Saved) -> bool:
        return self.left.takes(saved) or self.right.takes(saved)

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        inner = self.left.pack(tensor, saved) if self.left.takes(saved) else None
        parts = (tensor,) if inner is None else inner.tensors
        if inner is not None:
            # The parts belong to the outer Kept now; `inner` itself must live on for its finalizers.
            inner.tensors = ()
            if not parts:
                raise self._nothing_left()
        tensors: list[Tensor] = []
        pieces: list[tuple[Kept | None, int]] = []
        for part in parts:
            about = saved
            if inner is not None:
                about = replace(saved, shape=part.shape, dtype=part.dtype, numel=part.numel(), part=True)
            piece = self.right.pack(part, about) if self.right.takes(about) else None
            held = (part,) if piece is None else piece.tensors
            if piece is not None:
                piece.tensors = ()
            tensors += held
            pieces.append((piece, len(held)))
        return Kept.of(tensor, *tensors, meta=(inner, pieces))

    def unpack(self, kept: Kept) -> Tensor:
        inner, pieces = kept.meta
        tensors = iter(kept.tensors)
        parts = []
        for piece, count in pieces:
            held = tuple(next(tensors) for _ in range(count))
            parts.append(held[0] if piece is None else self.right.unpack(replace(piece, tensors=held)))
        return parts[0] if inner is None else self.left.unpack(replace(inner, tensors=tuple(parts)))

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Measured on a standard normal sample, since what the left tape leaves is known only from packing."""
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        saved = Saved(OUTSIDE, None, sample.shape, dtype, None, sample.numel())
        if not self.takes(saved):
            return sample.numel() * dtype.itemsize
        kept, ledger = self.pack(sample, saved), Ledger()
        ledger.hold(kept.tensors, OUTSIDE)
        return ledger.now


class Routed(Tape):
    """Another tape for other modules: each tensor goes to the first whose glob matches a module that is running.

    Args:
        routes: globs and the tape for what runs inside a module that one of them matches.

    Raises:
        UsageError: without routes.
    """

    def __init__(self, routes: Sequence[tuple[Sequence[str], Tape]]) -> None:
        if not routes:
            raise UsageError("give at least one pair of globs and a tape")
        self.routes = [(tuple(globs), tape) for globs, tape in routes]
        self.patterns = tuple(glob for globs, _ in self.routes for glob in globs)
        self.exact = all(tape.exact for _, tape in self.routes)
        self.error = sum(tape.error for _, tape in self.routes)

    def __str__(self) -> str:
        return "; ".join(f"{tape} in {' '.join(globs)}" for globs, tape in self.routes)

    @property
    def clock(self) -> int:
        return self.routes[0][1].clock

    @clock.setter
    def clock(self, step: int) -> None:
        for _, tape in self.routes:
            tape.clock = step

    @property
    def outside_bytes(self) -> int:  # type: ignore[override]
        return sum(tape.outside_bytes for _, tape in self.routes)

    def enter(self, hold: Hold) -> None:
        with ExitStack() as undo:
            for _, tape in self.routes:
                tape.enter(hold)
                undo.callback(tape.leave)
            undo.pop_all()

    def leave(self) -> None:
        with ExitStack() as undo:
            for _, tape in self.routes:
                undo.callback(tape.leave)

    def _route(self, saved: Saved) -> int | None:
        for i, (globs, _) in enumerate(self.routes):
            if any(fnmatch.fnmatchcase(name, glob) for name in saved.inside for glob in globs):
                return i
        return None

    def takes(self, saved: Saved) -> bool:
        i = self._route(saved)
        return i is not None and self.routes[i][1].takes(saved)

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        i = self._route(saved)
        assert i is not None
        inner = self.routes[i][1].pack(tensor, saved)
        held, inner.tensors = inner.tensors, ()
        return Kept.of(tensor, *held, meta=(i, inner))

    def unpack(self, kept: Kept) -> Tensor:
        i, inner = kept.meta
        return self.routes[i][1].unpack(replace(inner, tensors=kept.tensors))

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Of the tape that keeps most."""
        return max(tape.bytes(shape, dtype) for _, tape in self.routes)
