"""The instruments of `weft.measure`: memory events of a trace, operation counts, clocks (public through it)."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weft._reports import Ratio
from weft.errors import WeftError
from weft.kernels.compiled import dispatched

# Lines that the profiler's C++ side prints at every start and stop, and for every block that is older than the trace.
_NOISE = re.compile(rb"^(USDT:|STAGE:|INFO:.*(Profiler|profiler)|\[W.*(CPUAllocator|profiler_kineto)\.cpp)")

_profiling = threading.Lock()


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """No cyclic garbage collection inside: it would free, or take time, at arbitrary moments."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What there is now is left out of garbage collection inside, so that one before each measurement takes no time."""
    gc.collect()
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Takes the profiler's own lines out of what is written to file descriptor 2; the rest follows at the end."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with tempfile.TemporaryFile() as log:
        _flush()
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            for line in log:
                if not _NOISE.match(line):
                    os.write(2, line)


def _flush() -> None:
    with contextlib.suppress(AttributeError, ValueError):  # None or closed
        sys.stderr.flush()


def cpu_peak(step: Callable[[], object]) -> int:
    """Most bytes allocated by ``step`` on the CPU at once; frees of older blocks are not part of it.

    From the exported trace: `profile.events()` lacks most memory events, and the event tree is private.

    Raises:
        WeftError: inside another call of this function: profilers do not nest, the inner one silently ends the outer.
    """
    if not _profiling.acquire(blocking=False):
        raise WeftError("peak bytes are being measured already: profilers do not nest. Measure one step at a time")
    try:
        with tempfile.TemporaryDirectory(prefix="weft-") as folder, _quiet():
            path = Path(folder) / "trace.json"
            cpu = [torch.profiler.ProfilerActivity.CPU]
            with steady(), torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
                step()
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())["traceEvents"]
    finally:
        _profiling.release()
    return peak_of_events([event for event in trace if event.get("name") == "[memory]"])


def peak_of_events(events: list[dict[str, Any]]) -> int:
    """The highest level that allocations and frees of a chrome trace reach, starting from 0.

    A free counts only if its block was allocated in the trace: the level cannot sink below the start.
    """
    level = peak = 0
    live: dict[int, int] = {}
    for event in sorted(events, key=lambda event: event["ts"]):  # stable: equal times stay in the trace's order
        block = event["args"]
        if block["Device Type"] != 0:
            continue
        nbytes, address = block["Bytes"], block["Addr"]
        if nbytes > 0:
            live[address] = nbytes
            level += nbytes
            peak = max(peak, level)
        else:
            level -= live.pop(address, 0)
    return peak


def cuda_peak(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``step`` has allocated on ``device`` at once, above the level at its start."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    with steady():
        step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def count_operations(step: Callable[[], object], model: nn.Module | None) -> dict[str, Any]:
    """See `weft.measure.operations`."""
    counter = FlopCounterMode(display=False)
    own: dict[str, int] = {}
    running: list[list[Any]] = []  # name, operations when it began, operations of what it called

    def watch(module: nn.Module, name: str, undo: contextlib.ExitStack) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            running.append([name, counter.get_total_flops(), 0])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while running:
                last, begin, called = running.pop()
                spent = counter.get_total_flops() - begin
                own[last] = own.get(last, 0) + spent - called
                if running:
                    running[-1][2] += spent
                if last == name:
                    break

        undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    with contextlib.ExitStack() as undo:
        for name, module in () if model is None else model.named_modules():
            watch(module, name, undo)
        with dispatched(), counter:
            step()
    total = counter.get_total_flops()
    counts = counter.get_flop_counts().get("Global", {})
    forward = None if model is None else sum(own.values())
    return {
        "total": total,
        "by_operator": {str(operator): int(count) for operator, count in counts.items()},
        "forward": forward,
        "rest": None if forward is None else total - forward,
        "forward_by_module": {name: count for name, count in own.items() if count},
    }


def step_ratio(
    step: Callable[..., object],
    baseline: Callable[..., object],
    *,
    rounds: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.thread_time,
    inputs: Iterable[tuple[Any, ...]] = ((),),
) -> Ratio:
    """How long ``step`` takes in units of ``baseline``: interleaved rounds, medians, CPU time of this thread.

    Each round runs both on the same input, the second of the last round first, so that neither always finds the input
    in the cache. `time.thread_time` sees one thread: call `torch.set_num_threads(1)` before, or give another clock.

    Args:
        step, baseline: called with each round's input.
        rounds: rounds that are timed, at least 1.
        warmup: rounds before them that are not.
        clock: seconds.
        inputs: argument tuples, used in turn; a single cached input flatters methods that touch few weights.
    """
    turn: Iterator[tuple[Any, ...]] = itertools.cycle(inputs)
    first: list[float] = []
    second: list[float] = []
    with steady():
        for k in range(warmup + rounds):
            arguments = next(turn, None)
            if arguments is None or rounds < 1:
                raise WeftError(f"step_ratio needs rounds >= 1 and at least one input, got rounds={rounds}")
            pair = ((step, first), (baseline, second))
            for run, times in pair if k % 2 == 0 else reversed(pair):
                start = clock()
                run(*arguments)
                if k >= warmup:
                    times.append(clock() - start)
    a, b = statistics.median(first), statistics.median(second)
    each = [p / q for p, q in zip(first, second, strict=True) if q > 0]
    low = high = None
    if each:
        low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Ratio(a / b if b > 0 else None, a, b, low, high, rounds)
