"""Keep what autograd saves in a file: written behind the forward pass, read ahead of the backward pass.

A saved tensor is copied into a queue of bounded size that one thread writes to disk; once it is written its memory is
free. In the backward pass, unpacking one tensor starts reading those that were saved before it, since they are wanted
next, as far as the same bound allows; a tensor that is still in the queue is taken from there. One tensor, saved by
several operations, is written once. All bytes in the queue count as kept.

What the paper leaves open: where it tells tensors apart by a time stamp on their storage, here the session does, by the
storage itself (`weft.session`); where it offloads by GPUDirect, here bytes go through the page cache.

Paper: "SSDTrain: An Activation Offloading Framework to SSDs for Faster Large Language Model Training", Kun Wu,
Jeongmin Brian Park, Xiaofan Zhang, Mert Hidayetoglu, Vikram Sharma Mailthody, Sitao Huang, Steven Sam Lumetta,
Wen-mei Hwu, 2024, arXiv:2408.10013.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from weft.claim import Check, claim
from weft.errors import UsageError, WeftError
from weft.method import method
from weft.ops.spill import Block, SpillFile, flat_memory
from weft.session import Hold, Kept, Saved, Tape
from weft.testing.example import Example
from weft.testing.savings import savings

_entering = threading.Lock()  # not on the object: a lock cannot be copied


@method("offload", contract="tape", family="tape", papers=[107], tags={"exact"})
class Offload(Tape):
    """What is kept goes to disk: ``with weft.tape.Offload(folder="/scratch").on(model): ...``.

    Gradients are those without it, bit for bit. On a full disk the forward pass ends with an error; what could not be
    written stays in memory. Nothing is left in the folder, not even by a process that is killed.

    Args:
        folder: on a disk (on a memory file system nothing is saved); None for the system's temporary folder.
        queue_bytes: most bytes in memory that wait to be written or were read ahead.
        least_bytes: tensors below this size stay in memory, unless an earlier tape left them.

    Raises:
        UsageError: for a queue without room.
        WeftError: on entry, when no file can be made in the folder, or another session uses the same object.
    """

    exact = True
    terminal = True

    def __init__(self, *, folder: str | Path | None = None, queue_bytes: int = 2**24, least_bytes: int = 2**14) -> None:
        if queue_bytes < 1 or least_bytes < 0:
            raise UsageError(f"queue_bytes={queue_bytes}, least_bytes={least_bytes}; at least 1 and 0")
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.queue_bytes, self.least_bytes = int(queue_bytes), int(least_bytes)
        self._file: SpillFile | None = None

    def enter(self, hold: Hold) -> None:
        with _entering:
            if self._file is not None:
                raise WeftError(f"{self} already serves a session; make another Offload for a second one")
            self._file = SpillFile(self.folder, self.queue_bytes, hold)

    def leave(self) -> None:
        file, self._file = self._file, None
        self.outside_bytes = 0 if file is None else file.most_held
        if file is not None:
            file.close()

    def takes(self, saved: Saved) -> bool:
        return saved.part or saved.numel * saved.dtype.itemsize >= self.least_bytes

    def pack(self, tensor: Tensor, saved: Saved) -> Kept:
        if self._file is None:
            raise WeftError(f"{self} packs inside a session only: with tape.on(model): ...")
        flat = flat_memory(tensor.numel() * tensor.element_size())
        flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)  # a copy: later changes in place cannot reach it
        block = self._file.put(flat, saved.module)
        return Kept.of(tensor, meta=_Handle(self._file, block))

    def unpack(self, kept: Kept) -> Tensor:
        flat = kept.meta.file.get(kept.meta.block)
        return flat.view(kept.dtype).view(kept.shape).to(kept.device)

    def bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 0


class _Handle:
    """What a graph holds; with it the block goes."""

    def __init__(self, file: SpillFile, block: Block) -> None:
        self.file, self.block = file, block
        weakref.finalize(self, file.discard, block).atexit = False


def example() -> Example:
    """A queue of one tensor, so that the thread has to keep up."""
    return Example(None, None, torch.empty(0), {"queue_bytes": 2**16})


@claim(
    "gradients of a transformer are those without it, bit for bit, and resident kept bytes fall by 47 % and more, the "
    "queue included",
    row=107,
    mutants={
        "not counted as freed": ("block.release()", "pass", "weft.ops.spill"),
        "wrong place in the file": (
            "self.file.fileno(), [rest], offset)",
            "self.file.fileno(), [rest], 0)",
            "weft.ops.spill",
        ),
        "places given out twice": ("self.end = max(self.end, block.offset + size)", "pass", "weft.ops.spill"),
    },
)
def identical(seed: int) -> list[Check]:
    """Seen beside the plain step, on a transformer that keeps about 7 MB, with a queue of 1 MB."""
    found = savings(Offload(queue_bytes=2**20), seed, width=64, layers=6, length=64, batch=8)
    return [
        Check(float(found["identical"]), 1.0, ">=", what="gradients are identical"),
        Check(1 / found["kept"], 0.53, what="resident kept bytes to plain"),
    ]


@claim(
    "on a disk that is slower than the forward pass no more than the queue is in memory, and gradients are the same",
    row=107,
    mutants={
        "a queue without bound": ("or self.in_memory + size <= self.most", "or True", "weft.ops.spill"),
    },
)
def slow_disk(seed: int) -> list[Check]:
    """Each write takes 5 ms longer; a chain of 24 products of 64 kB, a queue of 256 kB, 100 MB/s or less."""

    def slowly(file: int, data: memoryview, offset: int) -> int:
        time.sleep(0.005)
        return write(file, data, offset)

    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)).div(8).requires_grad_()

    def gradient() -> Tensor:
        h = x
        for _ in range(24):
            h = (h @ x).tanh()
        return torch.autograd.grad(h.sum(), x)[0]

    wanted, write = gradient(), os.pwrite
    with mock.patch.object(os, "pwrite", slowly), Offload(queue_bytes=2**18).on(torch.nn.Identity()) as session:
        found = gradient()
    return [
        Check(session.peak_bytes, 2**18, what="bytes in memory"),
        Check(float(torch.equal(found, wanted)), 1.0, "==", what="the same gradient"),
    ]


@claim(
    "where the backward pass is slower than the disk, no more than the queue is read ahead of it",
    row=107,
    mutants={
        "reading ahead without bound": ("self.in_memory + before.nbytes > self.most", "False", "weft.ops.spill"),
    },
)
def slow_backward(seed: int) -> Check:
    """A chain of 24 products of 64 kB, each 5 ms on the way back; a queue of 256 kB."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)).div(8).requires_grad_()
    with Offload(queue_bytes=2**18).on(torch.nn.Identity()) as session:
        h = x
        for _ in range(24):
            h = (h @ x).tanh()
            h.register_hook(lambda grad: time.sleep(0.005))
        torch.autograd.grad(h.sum(), x)
    return Check(session.peak_bytes, 2**18, what="bytes in memory")


@claim(
    "a tensor that two operations save is written once",
    row=107,
    mutants={
        "each time": (
            "block = self._file.put(flat, saved.module)",
            "block = [self._file.put(flat.clone(), '') for _ in '12'][1]",
        )
    },
)
def once(seed: int) -> Check:
    """Bytes of the file after the sine, the cosine and a view of one tensor, and one more tensor."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    tape = Offload()
    with tape.on(torch.nn.Identity()):
        h = x * 1
        loss = h.sin().sum() + h.cos().sum() + h.view(128, 256).exp().sum()
        file = tape._file
        assert file is not None and file.file is not None
        with file.lock:
            file.change.wait_for(lambda: not file.in_memory)
        written = os.fstat(file.file.fileno()).st_size
        loss.backward()
    return Check(written, 2 * 256 * 128 * 4, "==", what="bytes written for h and exp(h)")


@claim(
    "a step of a 6-layer transformer with 90 % of its kept bytes on disk, the queue included, takes at most 1.3 of "
    "plain",
    row=107,
    tier="slow",
    budget=120.0,
    mutants={
        "written in the step": (
            "        return Kept.of(tensor, meta",
            "        os.fsync(self._file.file.fileno())\n        return Kept.of(tensor, meta",
        )
    },
)
def behind(seed: int) -> list[Check]:
    """Width 256, length 256, batch 8, one thread, wall time (a step may wait), medians of interleaved steps."""
    found = savings(Offload(), seed, rounds=5, clock=time.perf_counter)
    return [
        Check(1 / found["kept"], 0.1, what="resident kept bytes to plain"),
        Check(found["time"], 1.3, what="step to plain"),
    ]
