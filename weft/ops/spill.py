"""A file for tensors that do not fit into memory: written behind the caller, read ahead of the reverse order.

`SpillFile.put` takes bytes into a queue of bounded size, one thread writes them, and `SpillFile.get` gives them back
and starts reading those that were put before, as a backward pass wants them.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import WeftError
from weft.session import Hold


def flat_memory(nbytes: int) -> Tensor:
    """A uint8 tensor ``[nbytes]`` in numpy's memory.

    Profilers watch torch's memory by thread: of what one thread allocates and another frees they see one half.
    """
    return torch.from_numpy(np.empty(nbytes, np.uint8))


class Block:
    """The bytes of one tensor: in memory, on disk, or both after they were read ahead."""

    __slots__ = ("__weakref__", "busy", "data", "dead", "nbytes", "offset", "place", "previous", "release", "written")

    def __init__(self, data: Tensor, offset: int, place: str, previous: Block | None) -> None:
        self.data: Tensor | None = data
        self.offset, self.nbytes, self.place = offset, data.numel(), place
        self.previous = None if previous is None else weakref.ref(previous)
        self.release: Callable[[], None] | None = None
        self.busy = True  # waiting for the thread, or with it
        self.written = self.dead = False


class SpillFile:
    """A file without a name that grows as needed, and the thread that moves blocks.

    As it has no name, nothing is left on disk however the process ends. It is closed after `close`, as soon as no block
    is needed any more.

    Args:
        folder: where the file is.
        most: bytes in memory that wait to be written or were read ahead, at most; one block may be larger.
        hold: told of each tensor in memory and for whom; what it returns is called when the memory is free.

    Raises:
        WeftError: when no file can be made there.
    """

    def __init__(self, folder: Path, most: int, hold: Hold) -> None:
        try:
            self.file: IO[bytes] | None = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise WeftError(
                f"cannot make a file in {folder}: {error.strerror}; give Offload a folder on a disk that can be written"
            ) from error
        self.folder, self.most, self.hold = folder, most, hold
        self.end, self.free = 0, dict[int, list[int]]()  # where the file ends; offsets to use again, by size
        self.blocks, self.in_memory, self.most_held, self.open = 0, 0, 0, True
        self.jobs, self.discarded = deque[Block](), deque[Block]()
        self.failed: Exception | None = None
        self.last: Callable[[], Block | None] = lambda: None
        # Taken by `with self.lock`, which Ctrl-C cannot come between, as it can into Condition's and contextlib's code.
        self.lock = threading.Lock()
        self.change = threading.Condition(self.lock)
        self.ahead: dict[Block, None] = {}  # what was read ahead, as it came
        self.thread: threading.Thread | None = threading.Thread(target=self._work, name="weft-offload", daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            self.file.close()
            raise WeftError(f"cannot start the thread that writes to {folder}: {error}") from error

    def put(self, data: Tensor, place: str) -> Block:
        """Takes a flat uint8 tensor over; waits while the queue is full."""
        size = data.numel()
        with self.lock:
            self.change.wait_for(lambda: self.failed or self._room(size))
            if self.failed is not None:
                why = getattr(self.failed, "strerror", None) or self.failed
                raise WeftError(
                    f"cannot write what is kept to {self.folder}: {why}; make space or give Offload another folder"
                )
            again = self.free.get(size)
            block = Block(data, again.pop() if again else self.end, place, self.last())
            self.end = max(self.end, block.offset + size)
            self.last = weakref.ref(block)
            self.blocks += 1
            self.in_memory += size
            self.most_held = max(self.most_held, self.in_memory)
            block.release = self.hold(data, place)
            self.jobs.append(block)
            self.change.notify_all()
        self._tidy()
        return block

    def _room(self, size: int) -> bool:
        """Whether so much may come in. What was read ahead goes: its backward pass may never come, or wait for this."""
        while self.ahead and self.in_memory + size > self.most:
            self._drop(next(reversed(self.ahead)))
        return not self.in_memory or self.in_memory + size <= self.most

    def get(self, block: Block) -> Tensor:
        """The bytes of a block, and a start of reading those that were put before it."""
        with self.lock:
            self.change.wait_for(lambda: not (block.busy and block.data is None))
            data = block.data
            if block.written and not block.busy:
                self._drop(block)  # read ahead; another backward pass reads it again
        data = self._read(block) if data is None else data
        with self.lock:
            self._read_ahead(block)
        self._tidy()
        return data

    def discard(self, block: Block) -> None:
        """No graph needs the block any more. Runs in a finalizer, inside whatever else: it may not wait for a lock."""
        block.dead = True
        self.discarded.append(block)
        self._tidy()

    def close(self) -> None:
        """Ends the thread once the queue is written; the file stays for as long as graphs need it."""
        thread = self.thread
        with self.lock:
            self.open = False
            self.change.notify_all()
        self._tidy()
        if thread is not None:
            thread.join()

    def _tidy(self) -> None:
        """Frees what was discarded, now or by whoever has the lock."""
        while self.discarded and self.lock.acquire(blocking=False):
            try:
                while self.discarded:
                    block = self.discarded.popleft()
                    if not block.busy:
                        self._forget(block)
            finally:
                self.lock.release()

    def _read_ahead(self, block: Block) -> None:
        before = None if block.previous is None else block.previous()
        while self.open and before is not None:
            if before.written and not (before.busy or before.dead) and before.data is None:
                if self.in_memory + before.nbytes > self.most:
                    return
                before.busy = True
                self.in_memory += before.nbytes  # now, so that what is read together fits together
                self.most_held = max(self.most_held, self.in_memory)
                self.jobs.append(before)
                self.change.notify_all()
            before = None if before.previous is None else before.previous()

    def _work(self) -> None:
        while True:
            with self.lock:
                self.change.wait_for(lambda: self.jobs or not self.open)
                if not self.jobs:
                    self.thread = None
                    self._close_file()
                    return
                block = self.jobs.popleft()
                data, wanted, failed = block.data, not block.dead and self.failed is None, None
            found = None
            try:
                if wanted and data is not None:
                    self._write(data, block.offset)
                elif wanted:
                    found = self._read(block)
            except Exception as error:
                failed = error
            with self.lock:
                block.busy = False
                if data is None:
                    self._arrived(block, found)  # None: whoever unpacks it reads it again, and gets the error
                elif failed is not None:
                    self.failed = failed  # what could not be written stays in memory: gradients are right
                elif wanted:
                    block.written = True
                    self._drop(block)
                if block.dead:
                    self._forget(block)
                self.change.notify_all()
            self._tidy()
            del data, found, block

    def _arrived(self, block: Block, found: Tensor | None) -> None:
        if found is None:
            self.in_memory -= block.nbytes
        else:
            block.data, block.release = found, self.hold(found, block.place)
            self.ahead[block] = None

    def _drop(self, block: Block) -> None:
        if block.data is not None:
            block.data = None
            self.ahead.pop(block, None)
            self.in_memory -= block.nbytes
            if block.release is not None:
                block.release()
            self.change.notify_all()

    def _forget(self, block: Block) -> None:
        if block.offset < 0:
            return
        self._drop(block)
        self.free.setdefault(block.nbytes, []).append(block.offset)
        block.offset = -1
        self.blocks -= 1
        if not self.blocks:
            self.end, self.free = 0, {}  # the next step may have other sizes
        self._close_file()

    def _close_file(self) -> None:
        if self.file is not None and self.thread is None and not self.blocks:
            self.file.close()
            self.file = None

    def _write(self, data: Tensor, offset: int) -> None:
        assert self.file is not None
        rest = _bytes(data)
        while rest:
            done = os.pwrite(self.file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def _read(self, block: Block) -> Tensor:
        assert self.file is not None
        data = flat_memory(block.nbytes)
        rest, offset = _bytes(data), block.offset
        while rest:
            try:
                done = os.preadv(self.file.fileno(), [rest], offset)
            except OSError as error:
                raise WeftError(f"cannot read what was kept in {self.folder}: {error.strerror}") from error
            if not done:
                raise WeftError(f"what was kept in {self.folder} is gone: the file was cut short")
            rest, offset = rest[done:], offset + done
        return data


def _bytes(data: Tensor) -> memoryview:
    view: Any = data.numpy()
    return memoryview(view)
