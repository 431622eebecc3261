"""What `weft.session` hangs on autograd nodes, and how it recognises weights (private)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from weft._ledger import Ledger, same_storage, storage_of
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft._tapes import Kept, Tape

# Nodes that show the same weights again (views) or in other numbers (casts, clones): the walk from a saved tensor
# back to its parameter passes through these and no others.
_SAME_WEIGHTS = re.compile(
    r"^(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|AsStrided|Expand|Squeeze|Unsqueeze|Slice|Select|Alias|Detach"
    r"|ToCopy|Clone|Unbind|Split|SplitWithSizes|Diagonal|Unfold)Backward\d*$"
)


class Entry:
    """One kept tensor, shared by all the nodes that save it; its death, with the graph's, is what is accounted."""

    __slots__ = ("__weakref__", "kept", "keys", "ledger", "place", "tape", "watched")

    def __init__(
        self, kept: Kept, tape: Tape | None, ledger: Ledger | None, original: StorageWeakRef | None, place: str
    ) -> None:
        self.keys: tuple[int, ...] = ()
        self.kept, self.tape, self.ledger, self.place = kept, tape, ledger, place
        # Hooks switch off torch's own check for in-place changes; only what still is the original needs it.
        watched = kept.tensors if tape is None else [t for t in kept.tensors if same_storage(t, original)]
        self.watched = [(t, t._version) for t in watched]
        if ledger is not None:
            self.keys = ledger.hold(kept.tensors, place, original if tape is None else None)

    def __del__(self) -> None:
        if self.ledger is not None:
            self.ledger.release(self.keys)


@dataclass(slots=True, eq=False)
class Slot:
    """What one autograd node holds: the shared entry, and the geometry in which this node saved it."""

    entry: Entry
    shape: torch.Size
    stride: tuple[int, ...] | None  # to restore; None where it was contiguous or is not a dense permutation


class Weights:
    """The parameters and buffers of a model, found again in what its graph saves.

    A weight reaches the hooks as itself, as a view (same storage), or as a cast copy. Copies of trainable parameters
    are found through the graph; a copy of a frozen one has no graph and is found by shape and value.
    """

    def __init__(self, model: nn.Module, more: Weights | None = None) -> None:
        # Held weak references: without them a freed storage's address could come back as an activation's.
        self._own: set[StorageWeakRef] = set(more._own) if more is not None else set()
        self._copies: set[StorageWeakRef] = set()
        self._frozen: dict[torch.Size, list[Tensor]] = dict(more._frozen) if more is not None else {}
        for weight in chain(model.parameters(), model.buffers()):
            ref = storage_of(weight)
            if ref is not None:
                self._own.add(ref)
            if not weight.requires_grad and weight.is_floating_point():
                for shape in {weight.shape, weight.shape[::-1]}:
                    self._frozen[shape] = [*self._frozen.get(shape, []), weight]

    def kind(self, tensor: Tensor, ref: StorageWeakRef | None) -> Literal["own", "copy"] | None:
        """ "own" for a weight or a view of one, "copy" for one in other numbers, None for anything else."""
        if ref is None:
            return None
        if ref in self._own or isinstance(tensor, nn.Parameter):
            return "own"
        if ref in self._copies:
            return "copy"
        source = _leaf(tensor)
        if source is not None:
            if not (isinstance(source, nn.Parameter) or storage_of(source) in self._own):
                return None
            if same_storage(source, ref):
                return "own"
            # A larger one is repeated over the batch (a learned first state, say): an activation like any other.
            return "copy" if tensor.numel() <= source.numel() else None
        # Whether autocast is on cannot be asked here: inside an autocast operation it reads as off.
        if tensor.grad_fn is None and not tensor.requires_grad:
            for weight in self._frozen.get(tensor.shape, ()):
                if weight.dtype != tensor.dtype and _is_cast(tensor, weight.detach()):
                    self._copies.add(ref)
                    return "copy"
        return None


def _is_cast(tensor: Tensor, weight: Tensor) -> bool:
    cast = weight.to(tensor.dtype)
    return any(
        c.shape == tensor.shape and torch.equal(c, tensor) for c in ([cast, cast.mT] if cast.ndim > 1 else [cast])
    )


def _leaf(tensor: Tensor) -> Tensor | None:
    """The leaf that a tensor is a view or a cast of, or None."""
    node: Any = tensor.grad_fn
    while node is not None and _SAME_WEIGHTS.match(node.name()):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)  # only AccumulateGrad, at the leaf, has one


def geometry(tensor: Tensor, ref: StorageWeakRef | None, taken: bool) -> tuple[object, ...] | None:
    """What two saved tensors must have in common to be kept once, or None where that cannot be told.

    The key holds the weak reference. All contiguous views of one range count as the same: one is unpacked as the other.
    """
    if ref is None or tensor.is_conj() or tensor.is_neg():
        return None
    layout: object = tensor.numel() if tensor.is_contiguous() else (tensor.shape, tensor.stride())
    return ref, tensor.storage_offset(), layout, tensor.dtype, tensor._version, taken


def dense_stride(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a permuted dense tensor (a transpose, channels last); None if it is contiguous or has gaps."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return None
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tensor.stride()


def plain_math(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off: a tape's own arithmetic must not depend on the caller's."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def unpack(slot: Slot) -> Tensor:
    """The unpack hook; not a method, so that a graph which outlives its session does not keep the session alive."""
    entry, kept = slot.entry, slot.entry.kept
    place = entry.place or "the model"
    for tensor, version in entry.watched:
        if tensor._version != version:
            raise WeftError(
                f"a tensor of shape {list(slot.shape)} that {place} saved for backward was changed in place afterwards "
                f"(version {tensor._version}, saved at {version}); use the out-of-place operation or change a clone"
            )
    if entry.tape is None:
        out = kept.tensors[0]
    else:
        with torch.no_grad(), plain_math(kept.device):
            out = entry.tape.unpack(kept)
        _check(out, kept, f"{entry.tape}.unpack", place)
    if out.shape != slot.shape:
        out = out.reshape(slot.shape)
    if slot.stride is not None and out.stride() != slot.stride:
        # Other strides can choose another kernel, whose last bits differ.
        out = torch.empty_strided(slot.shape, slot.stride, dtype=out.dtype, device=out.device).copy_(out)
    return out.detach()


def _check(out: Tensor, kept: Kept, who: str, place: str) -> None:
    pairs: Iterable[tuple[str, object, object]] = (
        ("shape", out.shape, kept.shape),
        ("dtype", out.dtype, kept.dtype),
        ("device", out.device, kept.device),
    )
    wrong = [f"{what} {got} instead of {want}" for what, got, want in pairs if got != want]
    if wrong:
        raise WeftError(
            f"{who} returned {', '.join(wrong)} for a tensor that {place} saved; it must return the original's"
        )
