"""Pipelines of stages on devices of their own, simulated: when each task runs and how long devices wait."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from weft.errors import UsageError, unknown

__all__ = ["Timeline", "simulate"]

SCHEDULES = ("naive", "gpipe", "1f1b")
SPLITS = ("last", "fill")


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a pipeline did.

    Attributes:
        makespan: time from the first start to the last end.
        idle: time that devices waited, summed over devices, in the unit of the task times.
        held: for each stage, the most batches whose weight gradients waited at once.
    """

    makespan: float
    idle: float
    held: tuple[int, ...]

    @property
    def fraction(self) -> float:
        """The share of all device time that was idle."""
        return self.idle / (len(self.held) * self.makespan) if self.makespan else 0.0


def simulate(
    schedule: str,
    stages: int,
    batches: int,
    *,
    split: str | None = None,
    forward: float | Sequence[float] = 1.0,
    inputs: float | Sequence[float] = 1.0,
    weights: float | Sequence[float] = 1.0,
) -> Timeline:
    """One training step of a pipeline, without the time of messages.

    A stage's forward needs the one before it, its backward the one after it. Before its first backward a stage runs one
    forward (``"naive"``), all of them (``"gpipe"``), or as many as there are stages from it to the end (``"1f1b"``);
    then backward and forward take turns.

    Args:
        schedule: the order of a stage's tasks, one of the three.
        stages: number of devices.
        batches: micro-batches of the step.
        split: None: weight gradients are part of a stage's backward, which the stage before waits for. ``"last"``: they
            follow after all else. ``"fill"``: as ``"last"``, and whenever the device would wait.
        forward, inputs, weights: times of a stage's forward pass, input gradients and weight gradients for one batch;
            a number, or one for each stage.

    Raises:
        UsageError: for another schedule or split, and times or counts that do not fit.
    """
    if schedule not in SCHEDULES:
        raise UsageError(unknown("schedule", schedule, list(SCHEDULES)))
    if split is not None and split not in SPLITS:
        raise UsageError(unknown("split", split, list(SPLITS)))
    if stages < 1 or batches < 1:
        raise UsageError(f"stages={stages}, batches={batches}; there is at least one of each")
    times = [_each(given, stages) for given in (forward, inputs, weights)]
    first = {"naive": lambda s: 1, "gpipe": lambda s: batches, "1f1b": lambda s: min(batches, stages - s)}[schedule]
    queues = [_order(first(s), batches) for s in range(stages)]
    waiting, held = [0] * stages, [0] * stages
    clock, ended = [0.0] * stages, dict[tuple[str, int, int], float]()

    def ready(s: int) -> float:
        """When the next task of a stage's queue may start; infinity while that is not known."""
        if not queues[s]:
            return math.inf
        kind, batch = queues[s][0]
        if kind == "F":
            return ended.get(("F", s - 1, batch), math.inf) if s else 0.0
        return ended.get(("B", s + 1, batch) if s + 1 < stages else ("F", s, batch), math.inf)

    while any(queues) or any(waiting):
        starts = []
        for s in range(stages):
            at = max(clock[s], ready(s))
            late = waiting[s] and (not queues[s] or (split == "fill" and at > clock[s]))
            starts.append((clock[s] if late else at, s, late))
        at, s, late = min(starts)  # the earliest of all, so that whatever ends before it is known
        if late:
            waiting[s] -= 1
            clock[s] = at + times[2][s]
            continue
        kind, batch = queues[s].pop(0)
        length = times[0][s] if kind == "F" else times[1][s] + (0 if split else times[2][s])
        clock[s] = ended[kind, s, batch] = at + length
        if split and kind == "B":
            waiting[s] += 1
            held[s] = max(held[s], waiting[s])
    busy = batches * sum(map(sum, times))
    return Timeline(max(clock), stages * max(clock) - busy, tuple(held))


def _order(first: int, batches: int) -> list[tuple[str, int]]:
    """Forward (F) and backward (B) tasks of a stage."""
    order = [("F", batch) for batch in range(first)]
    for batch in range(batches):
        order.append(("B", batch))
        if first + batch < batches:
            order.append(("F", first + batch))
    return order


def _each(given: float | Sequence[float], stages: int) -> list[float]:
    times = [float(t) for t in given] if isinstance(given, Sequence) else [float(given)] * stages
    if len(times) != stages or not all(0 <= t < math.inf for t in times):
        raise UsageError(f"times {given!r}; a number from 0 on, or one for each of {stages} stages")
    return times
