"""Bytes held between the passes, counted by storage: what `weft.session` accounts with (private)."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to the tensor's storage, or None where it has none (sparse, uninitialised, a vmap wrapper).

    Its ``cdata`` identifies the storage only while the reference is held: a freed address is soon given out again.
    """
    if tensor.layout != torch.strided:
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def same_storage(tensor: Tensor, ref: StorageWeakRef | None) -> bool:
    """Whether the tensor lies in that storage. (`StorageWeakRef` cannot be compared with None.)"""
    mine = storage_of(tensor)
    return mine is not None and ref is not None and mine == ref


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that make up a tensor: itself, or the indices and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:  # indices() and values() refuse uncoalesced tensors
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


@dataclass(slots=True, eq=False)
class _Cell:
    """One storage: who is charged for it and how many kept entries hold it."""

    nbytes: int
    owner: str
    count: int = 1
    ref: StorageWeakRef | None = None


class Ledger:
    """Bytes of the unique storages that are held now and were held at most, by the module that kept each first.

    Entries are released by garbage collection, at any moment and from any thread: hence the reentrant lock.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._cells: dict[int, _Cell] = {}
        self._by_owner: dict[str, int] = {}
        self._at_peak: dict[str, int] = {}
        self._lock = threading.RLock()

    def hold(self, tensors: Iterable[Tensor], owner: str, known: StorageWeakRef | None = None) -> tuple[int, ...]:
        """Counts the storages of ``tensors``, charges new ones to ``owner``; returns the keys that `release` takes.

        ``known`` is the storage of all of them, if the caller has it at hand.
        """
        keys = []
        with self._lock:
            for tensor in tensors:
                for part in plain_tensors(tensor):
                    ref = known or storage_of(part)
                    # Without a storage there is nothing to share, so the tensor itself is the unit.
                    key = -id(part) if ref is None else ref.cdata
                    cell = self._cells.get(key)
                    if cell is not None:
                        cell.count += 1
                    else:
                        nbytes = part.numel() * part.element_size() if ref is None else part.untyped_storage().nbytes()
                        self._cells[key] = _Cell(nbytes, owner, ref=ref)
                        self._by_owner[owner] = self._by_owner.get(owner, 0) + nbytes
                        self.now += nbytes
                    keys.append(key)
            self.peak = max(self.peak, self.now)
        return tuple(keys)

    def release(self, keys: Iterable[int]) -> None:
        """Undoes one `hold`."""
        with self._lock:
            for key in keys:
                cell = self._cells[key]
                cell.count -= 1
                if cell.count == 0:
                    if self.now == self.peak:  # a copy only where the level turns down, not at every new maximum
                        self._at_peak = self.by_module
                    del self._cells[key]
                    self._by_owner[cell.owner] -= cell.nbytes
                    self.now -= cell.nbytes

    def restart_peak(self) -> None:
        """The maximum starts again from what is held now."""
        with self._lock:
            self.peak = self.now
            self._at_peak = {}

    @property
    def by_module(self) -> dict[str, int]:
        """Bytes held now, by module, in the order in which the modules first kept something; zeros left out."""
        with self._lock:
            return {owner: nbytes for owner, nbytes in self._by_owner.items() if nbytes}

    @property
    def peak_by_module(self) -> dict[str, int]:
        """Bytes by module when the maximum was last reached; they add up to ``peak``."""
        with self._lock:
            return self.by_module if self.now == self.peak else dict(self._at_peak)
