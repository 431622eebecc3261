"""The one pair of saved-tensor hooks: what is kept between the passes, and the contract `Tape` for changing it.

`torch.autograd.graph.saved_tensors_hooks` does not compose: of nested pairs only the innermost fires. So every
method that changes what is kept implements `Tape`, tapes compose by ``|``, and the `Session` owns the only pair.
It knows the model (its weights are never packed), names the module that saves, keeps a shared storage once, detaches,
notices in-place changes, checks what comes back, releases with the graph, and accounts.

Not seen by any saved-tensor hook, hence neither packed nor counted: tensors that a custom Function stores as an
attribute of ``ctx``, numpy arrays, forwards in other threads, and what `torch.utils.checkpoint` computes again.
"""

from __future__ import annotations

import difflib
import fnmatch
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Self
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from weft._composed import Routed
from weft._keeping import Entry, Slot, Weights, dense_stride, geometry, plain_math, unpack
from weft._ledger import Ledger, storage_of
from weft._tapes import OUTSIDE, Hold, Kept, Reference, Saved, Tape
from weft.errors import UsageError, WeftError

__all__ = ["OUTSIDE", "Hold", "Kept", "Reference", "Routed", "Saved", "Session", "Tape", "kept"]


_local = threading.local()  # saved-tensor hooks are per thread, and so are the sessions that are active


class Session(AbstractContextManager["Session"]):
    """The context in which one pair of hooks keeps what ``model`` saves for backward, and counts it.

    Made by `Tape.on` and `kept`. Entering it adds hooks to the model's modules that only say which one runs; leaving
    it removes them, after success or an exception. It can be entered again afterwards, not while it is active. Graphs
    built inside may run backward inside or after it; what they keep is released when they are. Inside a counting
    session (`kept`) one session with a tape may be entered, and both count together; any other nesting is an error.

    All bytes are resident bytes of unique storages: a view counts its whole storage, shared storages count once, for
    the module that kept them first. Parameters and buffers of the model count nothing, copies of parameters in another
    dtype (autocast) are counted apart and never packed.
    """

    def __init__(self, model: nn.Module, tape: Tape | None = None, where: str | Iterable[str] | None = None) -> None:
        self.model, self.tape = model, tape
        self.where: Sequence[str] | None = [where] if isinstance(where, str) else None if where is None else list(where)
        self._ledger, self._copies = Ledger(), Ledger()
        self._own = self._ledger, self._copies
        self._running: list[tuple[str, type[nn.Module]]] = []
        self._recent: deque[tuple[str, torch.Size]] = deque(maxlen=6)  # what was saved last, where
        self._seen: WeakValueDictionary[tuple[object, ...], Entry] = WeakValueDictionary()
        self._weights: Weights | None = None
        self._matched: set[str] | None = None
        self._undo: ExitStack | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes kept now."""
        return self._ledger.now

    @property
    def by_module(self) -> dict[str, int]:
        """Bytes kept now by module, in the order of first keeping; the sum is `total_bytes`."""
        return self._ledger.by_module

    @property
    def peak_bytes(self) -> int:
        """Most bytes kept at once since the session was last entered."""
        return self._ledger.peak

    @property
    def peak_by_module(self) -> dict[str, int]:
        """Bytes by module when `peak_bytes` was last reached; the sum is `peak_bytes`."""
        return self._ledger.peak_by_module

    @property
    def weight_copy_bytes(self) -> int:
        """Most bytes at once of weight copies (autocast) that were saved; not part of the other figures."""
        return self._copies.peak

    def __enter__(self) -> Self:
        active: list[Session] = _local.__dict__.setdefault("sessions", [])
        outer = active[-1] if active else None
        if self._undo is not None or (outer is not None and (outer.tape is not None or self.tape is None)):
            outer = outer or self
            raise WeftError(
                f"a session ({outer.tape or 'counting'} on {type(outer.model).__name__}) is already "
                "active, and saved-tensor hooks do not nest. Tapes compose by |: (a | b).on(model)"
            )
        if outer is None and _foreign_hooks():
            raise WeftError(
                "other saved-tensor hooks (torch.autograd.graph.save_on_cpu, torch.utils.checkpoint, ...) are active "
                "here and would be switched off inside the session; enter the session outside of them"
            )
        self._matched = self._match()
        self._ledger, self._copies = (outer._ledger, outer._copies) if outer is not None else self._own
        if outer is None:
            self._ledger.restart_peak()
            self._copies.restart_peak()
        self._weights = Weights(self.model, outer._weights if outer is not None else None)
        with ExitStack() as undo:
            undo.callback(self._forget)
            for name, module in self.model.named_modules():
                self._announce(module, name, undo)
            if self.tape is not None:
                self.tape.enter(self._hold)
                undo.callback(self.tape.leave)
            undo.enter_context(saved_tensors_hooks(_weak(self), unpack))
            active.append(self)
            undo.callback(active.remove, self)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _forget(self) -> None:
        self._running.clear()
        self._recent.clear()
        self._seen.clear()
        self._weights = None

    def _hold(self, tensor: Tensor, place: str) -> Callable[[], None]:
        ledger = self._ledger
        keys = [ledger.hold([tensor], place)]
        return lambda: ledger.release(keys.pop()) if keys else None

    def _match(self) -> set[str] | None:
        known = {name: self._known(name) for name, _ in self.model.named_modules()}
        matched: set[str] = set()
        for pattern in (*(self.where or ()), *(self.tape.patterns if self.tape is not None else ())):
            found = [name for name in known if fnmatch.fnmatchcase(known[name], pattern)]
            if not found:
                names = [name for name in known.values() if name]
                near, of = difflib.get_close_matches(pattern, names, 5, 0.3) or names[:5], type(self.model).__name__
                raise UsageError(f"where={pattern!r} matches no module of {of}; nearest: {near}")
            matched.update(found if self.where is not None and pattern in self.where else ())
        return None if self.where is None else matched

    def _known(self, name: str) -> str:
        """A module's name as users know it: for a rule, that in the model which it trains."""
        inner = getattr(self.model, "trains", None)
        if not isinstance(inner, str):  # a model of one's own may call anything so
            return name
        return "" if name == inner else name.removeprefix(f"{inner}.")

    def _announce(self, module: nn.Module, name: str, undo: ExitStack) -> None:
        """Makes the module say when it runs. The hooks do nothing else: `checkpoint` inside must stay in charge."""
        running, thread = self._running, threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if self._undo is not None and threading.get_ident() == thread:
                running.append((name, type(module)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                for i in range(len(running) - 1, -1, -1):  # above it there may be names whose modules were interrupted
                    if running[i][0] == name:
                        del running[i:]
                        break

        undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _pack(self, tensor: Tensor) -> Slot:
        """The pack hook; torch calls it without gradients."""
        assert self._weights is not None
        plain, storage = tensor.detach(), storage_of(tensor)
        module, cls = self._running[-1] if self._running else (OUTSIDE, None)
        slot = self._kept(tensor, plain, storage, module, cls)
        self._recent.append((module, tensor.shape))
        return slot

    def _kept(
        self, tensor: Tensor, plain: Tensor, storage: StorageWeakRef | None, module: str, cls: type[nn.Module] | None
    ) -> Slot:
        assert self._weights is not None
        weight = self._weights.kind(tensor, storage)
        if weight is not None:
            ledger = self._copies if weight == "copy" else None
            return Slot(Entry(Kept.of(plain, plain), None, ledger, storage, module), tensor.shape, None)
        saved = self._offer(tensor, module, cls) if storage is not None else None
        key = geometry(tensor, storage, saved is not None)
        entry = self._seen.get(key) if key is not None else None
        if entry is None:
            if saved is None or self.tape is None:
                entry = Entry(Kept.of(plain, plain), None, self._ledger, storage, module)
            else:
                with plain_math(tensor.device):
                    packed = self.tape.pack(plain, saved)
                if not isinstance(packed, Kept):
                    raise WeftError(f"{self.tape}.pack returned a {type(packed).__name__}; it must return a Kept")
                entry = Entry(packed, self.tape, self._ledger, storage, module)
            if key is not None:
                self._seen[key] = entry
        return Slot(entry, tensor.shape, dense_stride(tensor))

    def _offer(self, tensor: Tensor, module: str, cls: type[nn.Module] | None) -> Saved | None:
        """What the tape is told about the tensor, or None where it does not pack it."""
        if self.tape is None or not 0 < tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes():
            return None  # empty, or expanded: packing would keep more than the reference does
        if self._matched is not None and not any(name in self._matched for name, _ in self._running):
            return None
        producer = None if tensor.grad_fn is None else tensor.grad_fn.name()
        made = producer is not None or tensor.requires_grad or not tensor.is_floating_point()
        summed = not made and self._sums_up(module, tensor.shape)
        saved = Saved(module, cls, tensor.shape, tensor.dtype, producer, tensor.numel(), statistic=summed)
        if self.tape.patterns:
            saved = replace(saved, inside=tuple(self._known(name) for name, _ in self._running))
        return saved if self.tape.takes(saved) else None

    def _sums_up(self, module: str, shape: torch.Size) -> bool:
        """Whether a shape is that of one number for each row (or channel) of a tensor that the module saved before."""
        for where, before in self._recent:
            rows, channels = before[:-1], before[1:2]
            if where == module and len(before) > 1 and shape in (rows, (*rows, 1), channels):
                return True
        return False


def kept(model: nn.Module) -> Session:
    """A session that changes nothing and counts what ``model`` keeps between the passes.

    >>> with kept(model) as count:  # doctest: +SKIP
    ...     loss = F.cross_entropy(model(x), y)
    >>> count.total_bytes, count.by_module  # doctest: +SKIP

    Every tensor that reaches the saved-tensor hooks is counted, also small and integer ones; parameters and buffers of
    ``model`` are not, nor is a batch that nothing saves.
    """
    return Session(model)


def _weak(session: Session) -> Callable[[Tensor], Slot]:
    """The pack hook. Autograd nodes hold both hooks: they must not keep the session, and with it the model, alive."""
    me = ref(session)

    def pack(tensor: Tensor) -> Slot:
        session = me()
        assert session is not None  # it is referenced for as long as it is active
        return session._pack(tensor)

    return pack


def _foreign_hooks() -> bool:
    """Whether other saved-tensor hooks are active: torch refuses to disable them then, and this is public."""
    try:
        with disable_saved_tensors_hooks("weft looks whether saved-tensor hooks are active"):
            return False
    except RuntimeError:
        return True
