"""Which way to keep less in which block: what each costs, and the fastest choice that fits (private to `weft.plan`).

A step is a walk: forward through the blocks 1..n, back through n..1. While the backward pass is in block g, memory
holds what the blocks 1..g keep, the gradients of the blocks g..n, and working memory. So a choice of one way o for each
block needs the larger of

    outside + max_g ( sum_{h <= g} kept_h(o_h) + again_g(o_g) + sum_{h >= g} gradient_h ) + max over ways used W_o
    outside + max_g ( sum_{h <= g} kept_h(o_h) + again_g(o_g) )                           + max over ways used V_o,

where again_g is what a recomputed block keeps while it is recomputed. All but gradients are linear in the batch size,
up to a constant; W_o and V_o are what the walk leaves unexplained of the measured peaks when all blocks go way o, with
gradients made in the step and with gradients that were there before. In micro-batches they are there from the first one
on: the second line then, and all gradients. Times add up, and so do squares of gradient errors. With these the fastest
choice is the optimum of a mixed-integer linear program, which SciPy's HiGHS finds exactly: blocks times ways are a few
hundred binary variables at most.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

TIE = 0.03  # of the plain step's time: differences below it are noise, and no reason for a gradient that is off


@dataclasses.dataclass(frozen=True)
class Line:
    """A quantity that is linear in the batch size: ``start + slope * rows``."""

    start: float = 0.0
    slope: float = 0.0

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]], above: bool = False) -> Line:
        """The line through the first and last (rows, value); from one number of rows, in proportion to the rows.

        ``above``: neither part may be negative, as of times, which are noisy.
        """
        (r1, v1), (r2, v2) = points[0], points[-1]
        if r1 == r2:
            return cls(0.0, v2 / r2)
        slope = (v2 - v1) / (r2 - r1)
        start = v2 - slope * r2
        if above and start < 0:
            return cls(0.0, v2 / r2)
        return cls(v2, 0.0) if above and slope < 0 else cls(start, slope)

    def at(self, rows: float) -> float:
        """The value for so many rows."""
        return self.start + self.slope * rows


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to keep less, as measured on a model; tuples have an entry for each block, in forward order.

    Attributes:
        name: as :func:`weft.plan` tells of it.
        kept: bytes between the passes.
        again: bytes that a recomputed block keeps while it is.
        seconds: CPU seconds beyond the plain step's.
        errors: squares of what the block adds to the gradient's relative error.
        work, adding: working bytes W and V.
        possible: whether the block can go this way.
    """

    name: str
    kept: tuple[Line, ...]
    again: tuple[Line, ...]
    seconds: tuple[Line, ...]
    errors: tuple[float, ...]
    work: Line
    adding: Line
    possible: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Costs:
    """All that a choice is made from.

    Attributes:
        gradients: bytes of the gradients of each block's parameters, and at the end those of parameters outside.
        outside: bytes kept outside of all blocks.
        seconds: of the plain step.
        ways: the plain one first.
        largest: bytes of each block's largest gradient, which stands beside the one that it is added to.
    """

    gradients: tuple[float, ...]
    outside: Line
    seconds: Line
    ways: tuple[Way, ...]
    largest: tuple[float, ...]

    def walk(self, choice: Sequence[int], rows: float, gradients: bool = True) -> float:
        """Most bytes of a step without working memory, for one way for each block.

        With ``gradients`` each block's are made in the step; without, they are there before and count nothing, but
        what is added to them does.
        """
        most, below, arrived = 0.0, self.outside.at(rows), sum(self.gradients)
        for g, o in enumerate(choice):
            way = self.ways[o]
            below += way.kept[g].at(rows)
            most = max(most, below + way.again[g].at(rows) + (arrived if gradients else self.largest[g]))
            arrived -= self.gradients[g]
        return most

    def peak(self, choice: Sequence[int], rows: float, parts: int = 1) -> float:
        """Most bytes of a step in so many micro-batches of ``rows``, gradients included."""
        if parts > 1:
            adding = self.walk(choice, rows, False) + max(self.ways[o].adding.at(rows) for o in choice)
            return adding + sum(self.gradients)
        return self.walk(choice, rows) + max(self.ways[o].work.at(rows) for o in choice)

    def kept(self, choice: Sequence[int], rows: float) -> float:
        """Bytes kept between the passes, at most."""
        return self.outside.at(rows) + sum(self.ways[o].kept[g].at(rows) for g, o in enumerate(choice))

    def time(self, choice: Sequence[int], rows: float) -> float:
        """CPU seconds of a step."""
        return self.seconds.at(rows) + sum(self.ways[o].seconds[g].at(rows) for g, o in enumerate(choice))

    def error(self, choice: Sequence[int]) -> float:
        """The gradient's relative error."""
        return sum(self.ways[o].errors[g] for g, o in enumerate(choice)) ** 0.5


def fastest(
    costs: Costs,
    rows: float,
    memory: float,
    error: float | None = None,
    seconds: float | None = None,
    parts: int = 1,
) -> list[int] | None:
    """The way of each block that takes least time within all limits, or None where there is none.

    Args:
        costs: as measured.
        rows: of a micro-batch.
        memory: bytes that a step may need, gradients included.
        error: of the gradient, at most.
        seconds: of a micro-batch, at most.
        parts: micro-batches of a step.
    """
    from scipy.optimize import LinearConstraint, milp

    blocks, ways = len(costs.ways[0].kept), len(costs.ways)
    count, unit = blocks * ways, max(1.0, memory)  # bytes as shares of the limit: solvers like numbers near 1
    table = np.array([[[w.kept[g].at(rows), w.again[g].at(rows)] for w in costs.ways] for g in range(blocks)]) / unit
    times = np.array([[w.seconds[g].at(rows) for w in costs.ways] for g in range(blocks)])
    errors = np.array([[w.errors[g] for w in costs.ways] for g in range(blocks)])
    every = sum(costs.gradients) / unit
    arrived = every - np.append(0, np.cumsum(costs.gradients))[:blocks] / unit
    # The gradients that are there in each block, and the working memory of the ways, of which the largest counts.
    there = arrived if parts == 1 else every + np.array(costs.largest) / unit
    work = [(w.work if parts == 1 else w.adding).at(rows) / unit for w in costs.ways]
    lines, upper, lower = list[Any](), list[Any](), list[Any]()

    def add(row: np.ndarray, extra: Sequence[float], least: float, most: float) -> None:
        for column, value in ((lines, np.append(row.ravel(), extra)), (lower, least), (upper, most)):
            column.append(value)

    for g in range(blocks):
        one, held = np.zeros((blocks, ways)), np.zeros((blocks, ways))
        one[g] = 1
        add(one, [0.0], 1, 1)
        held[: g + 1] = table[: g + 1, :, 0]
        held[g] += table[g, :, 1]
        add(held, [1.0], -np.inf, memory / unit - there[g] - costs.outside.at(rows) / unit)
        for o in range(ways):
            uses = np.zeros((blocks, ways))
            uses[g, o] = work[o] - min(work)
            add(uses, [-1.0], -np.inf, -min(work))
    if error is not None:
        add(errors, [0.0], -np.inf, error**2)
    if seconds is not None:
        add(times, [0.0], -np.inf, seconds - costs.seconds.at(rows))
    possible = np.array([[w.possible[g] for w in costs.ways] for g in range(blocks)], dtype=float)
    # Of choices as fast as one can tell from measured times, the exact one wins, and then the simplest.
    cost = times + costs.seconds.at(rows) / blocks * (TIE * (errors > 0) + 1e-6 * (np.arange(ways) > 0))
    found = milp(
        np.append(cost.ravel(), 0.0),
        constraints=LinearConstraint(np.array(lines), lower, upper),
        integrality=np.append(np.ones(count), 0.0),
        bounds=(np.append(np.zeros(count), -np.inf), np.append(possible.ravel(), np.inf)),
    )
    if found.x is None:
        return None
    return [int(o) for o in found.x[:count].reshape(blocks, ways).argmax(1)]


def best_in_parts(
    costs: Costs, rows: int, room: float, counts: list[int], error: float | None, seconds: float | None
) -> tuple[list[int], int] | None:
    """The fastest choice for a step of ``rows`` over all numbers of micro-batches in ``counts``, and that number."""
    found: list[tuple[float, int, list[int]]] = []
    for parts in counts:
        share = -(-rows // parts)
        limit = None if seconds is None else seconds / parts
        choice = fastest(costs, share, room, error, limit, parts) if room > 0 else None
        if choice is not None:
            lossy = sum(costs.ways[o].errors[g] > 0 for g, o in enumerate(choice)) / len(choice)
            found.append((parts * costs.time(choice, share) + TIE * lossy * costs.seconds.at(rows), parts, choice))
    if not found:
        return None
    _, parts, choice = min(found)
    return choice, parts


def nearest(
    costs: Costs, rows: int, counts: list[int], error: float | None, seconds: float | None
) -> tuple[list[int], int]:
    """The choice with nearly the smallest peak: the budget is halved between one that fits and one that does not."""
    low, high = 0.0, 4 * max(1.0, costs.peak([0] * len(costs.ways[0].kept), rows))
    best = best_in_parts(costs, rows, high, counts, error, seconds) or ([0] * len(costs.ways[0].kept), 1)
    for _ in range(12):
        middle = (low + high) / 2
        found = best_in_parts(costs, rows, middle, counts, error, seconds)
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    return best


def enumerated(
    costs: Costs,
    rows: float,
    memory: float,
    error: float | None = None,
    seconds: float | None = None,
    parts: int = 1,
) -> list[int] | None:
    """What `fastest` finds, by trying every choice: for few blocks."""
    best: tuple[float, list[int]] | None = None
    for choice in itertools.product(range(len(costs.ways)), repeat=len(costs.ways[0].kept)):
        if not all(costs.ways[o].possible[g] for g, o in enumerate(choice)) or costs.peak(choice, rows, parts) > memory:
            continue
        if (error is not None and costs.error(choice) > error) or (
            seconds is not None and costs.time(choice, rows) > seconds
        ):
            continue
        if best is None or costs.time(choice, rows) < best[0]:
            best = costs.time(choice, rows), list(choice)
    return None if best is None else best[1]
