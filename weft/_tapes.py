"""The contract `Tape`, what it is told and what it returns, and composition (public through `weft.session`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from weft.session import Session

# Counts a tensor that a tape holds beside its `Kept`, for a module; what is returned ends that, once.
Hold = Callable[[Tensor, str], Callable[[], None]]

OUTSIDE = "(outside)"  # where a tensor is saved while no module of the model runs: the loss, the caller's own code


@dataclass(frozen=True, slots=True)
class Saved:
    """What a tape is told about a tensor that is about to be kept.

    Attributes:
        module: qualified name of the innermost running module, "" for the model itself, `OUTSIDE` for none.
        module_class: its class, or None outside.
        shape: the tensor's shape.
        dtype: the tensor's dtype.
        producer: name of the node that computed it (``"ReluBackward0"``), or None for an input of the graph.
        numel: number of elements.
        statistic: True for numbers that sum up the rows of a tensor saved just before: a normalisation's mean and
            deviation, attention's log-sum-exp. Few bytes, on which the whole backward pass of that operation rests.
        inside: names of the modules that are running, from the outermost to `module`.
        part: True for a tensor that an earlier tape of a composition left, not one of the model's own.
    """

    module: str
    module_class: type[nn.Module] | None
    shape: torch.Size
    dtype: torch.dtype
    producer: str | None
    numel: int
    statistic: bool = False
    inside: tuple[str, ...] = ()
    part: bool = False


@dataclass(slots=True, eq=False, weakref_slot=True)
class Kept:
    """What a tape keeps in a tensor's place; it lives exactly as long as the graph needs it.

    Attributes:
        tensors: every tensor that is held in memory: these are counted, and the next tape packs them.
        meta: whatever else `Tape.unpack` needs; give files and handles a finalizer on this object or on the `Kept`.
        shape, dtype, device: those of the original, which `Tape.unpack` must return.
    """

    tensors: tuple[Tensor, ...]
    meta: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, original: Tensor, *tensors: Tensor, meta: Any = None) -> Self:
        """A `Kept` with the shape, dtype and device of ``original``."""
        return cls(tensors, meta, original.shape, original.dtype, original.device)


class Tape(ABC):
    """A way to keep tensors between the passes. Implement `pack`, `unpack` and `bytes`; set ``exact``.

    Both calls run without gradients and autocast, on detached tensors that must not be changed in place.

    Attributes:
        exact: True if `unpack` returns every bit of what was packed.
        terminal: True if its `Kept` holds no tensors, so that no tape may follow in a composition.
        error: the largest relative error, in norm over all parameters, of the gradient of an ordinary network that
            the tape answers for; 0 where it is exact. The contract's checks hold it to that.
        clock: a number that a training loop sets to its step, so that what a tape draws at random depends on the
            step and not on what ran before; else it counts the sessions.
        outside_bytes: the most that the last session held at once outside of torch's memory, where
            `weft.measure.peak_bytes` does not see it; `weft.measure.take_apart` and `weft.plan` add it to their peaks.
        patterns: globs of modules that the tape chooses by; each must match a module of the session's model.
    """

    exact: bool = False
    terminal: bool = False
    error: float = 0.0
    clock: int = 0
    patterns: tuple[str, ...] = ()
    outside_bytes: int = 0

    def __str__(self) -> str:
        return type(self).__name__

    def enter(self, hold: Hold) -> None:  # noqa: B027
        """A session begins: open files, start threads. What `hold` is told of counts as kept.

        Raises:
            WeftError: when the tape cannot serve this session (it serves another one, a folder is gone).
        """

    def leave(self) -> None:  # noqa: B027
        """The session ends, by an error too: end threads. Graphs that it leaves may still be unpacked."""

    def takes(self, saved: Saved) -> bool:
        """Whether to pack this tensor; what is not taken is kept as a reference.

        Default: floating, at least 4,096 elements, neither a statistic nor log-probabilities (whose exponential is the
        gradient). Of the parts that an earlier tape left: all if this tape is exact, else the floating ones.
        """
        if saved.part:
            return self.exact or saved.dtype.is_floating_point
        precise = saved.statistic or saved.producer == "LogSoftmaxBackward0"
        return saved.dtype.is_floating_point and saved.numel >= 4096 and not precise

    @abstractmethod
    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        """What to keep instead of ``tensor``."""

    @abstractmethod
    def unpack(self, kept: Kept) -> Tensor:
        """A tensor of ``kept.shape``, ``kept.dtype`` and ``kept.device``; called once for each use, in any order."""

    @abstractmethod
    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes of memory that a taken tensor of this shape and dtype occupies while it is kept."""

    def __or__(self, other: Tape) -> Tape:
        """``a | b`` packs with ``a``, then with ``b`` what ``a`` left.

        Raises:
            WeftError: ``a`` leaves no tensors; known here if it is ``terminal``, else found at its first pack.
        """
        if not isinstance(other, Tape):
            return NotImplemented
        from weft._composed import Composition  # it is built on this contract

        return Composition(self, other)

    def on(self, model: nn.Module, where: str | Iterable[str] | None = None) -> Session:
        """A context in which this tape packs what ``model`` saves for backward.

        Args:
            model: whose parameters and buffers are never packed and whose modules are named.
            where: glob or globs on qualified module names (``"layers.*"``); a tensor is packed if a matching module
                is running, itself or around the one that saves. None: everywhere, also outside the model.

        Raises:
            UsageError: on entry, for a pattern that matches no module.
            WeftError: on entry, inside another session or another pair of saved-tensor hooks.
        """
        from weft.session import Session  # it is built on this contract

        return Session(model, self, where)


class Reference(Tape):
    """Keeps every tensor as it is: plain PyTorch, accounted for."""

    exact = True

    def takes(self, saved: Saved) -> bool:
        return True

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        return Kept.of(tensor, tensor)

    def unpack(self, kept: Kept) -> Tensor:
        return kept.tensors[0]

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize
