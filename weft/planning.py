"""A memory budget in, a verified recipe out: `plan`."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import data as data_sets
from weft import measure, models
from weft._choices import Costs, best_in_parts, nearest
from weft._explaining import sentences
from weft._probes import Loss, Probe, rows_of, squared_error
from weft._ways import spelled
from weft.errors import DataError, UsageError
from weft.folders import write
from weft.recipe import Recipe
from weft.session import Tape
from weft.specs import apply_conversions, read_bytes, read_tape

STATE = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}  # numbers that an optimizer keeps for each parameter
ROUNDS = 4  # of choosing again where a verified step does not fit
EXACT = 1e-5  # gradient errors below are those of another order of sums
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train a model within a memory budget; see `plan`.

    Attributes:
        fits: whether the measured step fits.
        memory: the budget in bytes.
        batch_size, accumulate: rows of a step, and the micro-batches that it is cut into.
        blocks: the way of each block of the model, in forward order.
        tape, conversions: as recipes have them.
        predicted, measured: ``memory_bytes`` (weights, optimizer state and the step's peak together), ``peak_bytes``
            (of the step, gradients included), ``kept_bytes``, ``step_seconds`` (CPU) and ``gradient_error`` (relative,
            on a small batch) of the plan.
        plain: the same of the plain step, predicted.
        fixed_bytes: weights, buffers and optimizer state.
        options: predictions for every block going the same way: name, peak, time, gradient error, and whether it fits.
        sentences: why this choice.
    """

    fits: bool
    memory: int
    batch_size: int
    accumulate: int
    blocks: dict[str, str]
    tape: str | None
    conversions: list[dict[str, Any]]
    predicted: dict[str, float]
    measured: dict[str, float]
    plain: dict[str, float]
    fixed_bytes: int
    options: list[dict[str, Any]]
    sentences: list[str]

    def apply(self, model: nn.Module) -> Tape | None:
        """Swaps the plan's layers in ``model`` and returns its tape: ``with tape.on(model): ...``."""
        apply_conversions(model, self.conversions)
        return None if self.tape is None else read_tape(self.tape)

    def recipe(self, **more: Any) -> dict[str, Any]:
        """What the plan adds to a recipe, as plain data, with ``more``."""
        own = {"batch_size": self.batch_size, "accumulate": self.accumulate}
        return {**more, **own, "tape": self.tape, "conversions": self.conversions}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return dataclasses.asdict(self)


def plan(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    *,
    memory: int | str,
    loss: Loss = F.cross_entropy,
    optimizer: str = "adam",
    max_gradient_error: float | None = None,
    max_slowdown: float | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Plan:
    """The fastest way to train a model within a memory budget, found from measured steps and verified by one.

    Each block of the model may keep what autograd saves at 8, 4 or 2 bits, keep few bits of its activations, write to a
    file, or run once more on the way back; a step may be cut into micro-batches. The plain step is measured at half and
    at a quarter of the batch, every way on all blocks at a quarter; bytes and seconds grow linearly with the rows, and
    a module that is called several times counts where it is called first. Of all combinations the fastest that fits is
    found by mixed-integer linear programming, an optimum and no guess, for each number of micro-batches; then the step
    is run as chosen, and chosen again with less room where it needs more than predicted.

    Planning itself works on copies and needs memory for two more models and a plain step of half the batch.

    Args:
        model: any module; called with the batch's inputs, it returns scores as in `weft.measure.exact_gradient`.
        batch: inputs (a tensor or a tuple) and labels of one whole step.
        memory: bytes for weights, gradients, optimizer state, and all that a step allocates: a number, or text as
            ``"512MiB"`` or ``"2GB"``. What Python, libraries and the data need is not in it.
        loss: of scores and labels.
        optimizer: whose state counts: ``adam``, ``adamw``, ``rmsprop`` or ``sgd``.
        max_gradient_error: the gradient's relative error, at most; 0 for exact ways alone.
        max_slowdown: the step's time to the plain step's, at most.
        on_event: told what is being measured.

    Returns:
        A `Plan`; where nothing fits, the one that comes nearest, with ``fits`` False and what binds in ``sentences``.

    Raises:
        UsageError: for a budget, limits or an optimizer that make no sense.
        DataError: for a batch without rows.
    """
    limit = read_bytes(memory)
    if optimizer not in STATE:
        raise UsageError(f"optimizer={optimizer!r}; it is one of {', '.join(STATE)}")
    if (max_gradient_error is not None and max_gradient_error < 0) or (max_slowdown is not None and max_slowdown < 1):
        raise UsageError("max_gradient_error is at least 0 and max_slowdown at least 1")
    x, y = batch
    if rows_of(x) < 1 or len(y) != rows_of(x):
        raise DataError(f"a batch of {rows_of(x)} inputs and {len(y)} labels; it needs as many of both, one at least")
    with measure.settled():
        return _planned(
            Probe(model, x, y, loss),
            limit,
            optimizer,
            max_gradient_error,
            max_slowdown,
            on_event or (lambda event: None),
        )


def _planned(
    probe: Probe,
    limit: int,
    optimizer: str,
    max_gradient_error: float | None,
    max_slowdown: float | None,
    tell: Callable[[str], None],
) -> Plan:
    model = probe.model
    costs = probe.costs(tell)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))
    fixed = weights + STATE[optimizer] * trained
    room, rows = limit - fixed, probe.rows
    plain = [0] * len(probe.blocks)
    slowest = None if max_slowdown is None else max_slowdown * costs.time(plain, rows)
    whole = any(isinstance(m, NORMS) and m.training for m in model.modules())  # its statistics are the whole batch's
    counts = [1] if whole else sorted({a for a in (1, 2, 4, 8, 16, 32, 64) if a <= rows})
    spare, error, best, done, fits = 0.0, max_gradient_error, None, None, False

    def within(measured: dict[str, float]) -> bool:
        near = max_gradient_error is None or measured["gradient_error"] <= max(max_gradient_error, EXACT)
        return near and measured["memory_bytes"] <= limit

    for _ in range(ROUNDS):
        best = best_in_parts(costs, rows, room - spare, counts, error, slowest)
        if best is None:
            break
        tell("verifying")
        done = _verified(probe, costs, *best, fixed)
        over, off = done[1]["memory_bytes"] - limit, done[1]["gradient_error"]
        if fits := within(done[1]):
            break
        spare += over + 0.01 * limit if over > 0 else 0.0
        if error and max_gradient_error and off > max_gradient_error:
            error *= 0.9 * max_gradient_error / off
    if not fits:
        best = nearest(costs, rows, counts, error, slowest)
        tell("verifying")
        done = _verified(probe, costs, *best, fixed)
        fits = within(done[1])
    assert best is not None and done is not None
    choice, parts = best
    names = {block: costs.ways[o].name for block, o in zip(probe.blocks, choice, strict=True)}
    tape, conversions = spelled(names, probe.leaves)
    base = _predicted(costs, plain, 1, rows, fixed)
    made = Plan(
        fits, limit, rows, parts, names, tape, conversions, done[0], done[1], base, fixed,
        _uniform(costs, rows, fixed, limit), [],
    )  # fmt: skip
    return dataclasses.replace(made, sentences=sentences(made, whole, max_gradient_error, max_slowdown))


def _predicted(costs: Costs, choice: list[int], parts: int, rows: int, fixed: int) -> dict[str, float]:
    share = -(-rows // parts)
    peak = costs.peak(choice, share, parts)
    return {
        "memory_bytes": fixed + peak,
        "peak_bytes": peak,
        "kept_bytes": costs.kept(choice, share),
        "step_seconds": parts * costs.time(choice, share),
        "gradient_error": costs.error(choice),
    }


def _verified(
    probe: Probe, costs: Costs, choice: list[int], parts: int, fixed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Predicted and measured figures of one step."""
    names = {block: costs.ways[o].name for block, o in zip(probe.blocks, choice, strict=True)}
    model, tape = probe.changed(names)
    step = probe.step(model, probe.rows, tape, parts)
    parameters = list(model.parameters())
    peak = measure.peak_bytes(step, parameters=parameters) + (0 if tape is None else tape.outside_bytes)
    held = measure.kept_bytes(step, model).peak_bytes

    def fresh() -> None:
        for p in parameters:
            p.grad = None
        step()

    seconds = measure.step_ratio(fresh, lambda: None, rounds=3, warmup=0).seconds
    small = probe.sizes[0]
    changed, packs = probe.changed(names)
    off = squared_error(probe.gradients(changed, small, packs), probe.gradients(copy.deepcopy(probe.model), small))
    measured = {
        "memory_bytes": float(fixed + peak),
        "peak_bytes": float(peak),
        "kept_bytes": float(held),
        "step_seconds": seconds,
        "gradient_error": off**0.5,
    }
    return _predicted(costs, choice, parts, probe.rows, fixed), measured


def _uniform(costs: Costs, rows: int, fixed: int, limit: int) -> list[dict[str, Any]]:
    """Every way for all blocks that can go it, without micro-batches."""
    found = []
    for o, way in enumerate(costs.ways):
        choice = [o if possible else 0 for possible in way.possible]
        figures = _predicted(costs, choice, 1, rows, fixed)
        found.append({"way": way.name, **figures, "fits": figures["memory_bytes"] <= limit})
    return found


def plan_step(
    model: str = "mlp",
    data: str = "digits",
    *,
    memory: int | str,
    data_dir: str | Path | None = None,
    batch_size: int = 128,
    optimizer: str = "adam",
    max_gradient_error: float | None = None,
    max_slowdown: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    threads: int = 1,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A `plan` for a named model on named data, as plain data, and its recipe as a file.

    Args:
        model, data, data_dir: as in :func:`weft.compare`.
        memory, optimizer, max_gradient_error, max_slowdown, on_event: as in `plan`.
        batch_size: rows of a step.
        out: a file for the recipe, which ``weft fit`` carries out.
        seed: of weights and batch.
        threads: of torch, while this function runs.

    Returns:
        The fields of `Plan` with ``settings``, ``recipe`` and ``environment``.

    Raises:
        UsageError, DataError: for names that do not exist and values that make no sense.
        WeftError: when the file cannot be written.
    """
    if batch_size < 1 or threads < 1:
        raise UsageError("batch_size and threads are at least 1")
    read_bytes(memory)
    loaded = data_sets.load(data, data_dir=data_dir)
    net = models.build(model, **loaded.form, seed=seed)
    index = next(loaded.batches(batch_size, seed=seed, epoch=0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = plan(
            net,
            (loaded.x_train[index], loaded.y_train[index]),
            memory=memory,
            optimizer=optimizer,
            max_gradient_error=max_gradient_error,
            max_slowdown=max_slowdown,
            on_event=on_event,
        )
        environment = measure.environment()
    finally:
        torch.set_num_threads(before)
    named = {"model": model, "data": data, "data_dir": None if data_dir is None else str(data_dir)}
    made = Recipe.of(found.recipe(**named, rule="backprop", optimizer=optimizer, seed=seed, threads=threads))
    if out is not None:
        write(Path(out), made.text().encode())
    settings: dict[str, Any] = {**named, "optimizer": optimizer, "seed": seed, "threads": threads}
    settings |= {"max_gradient_error": max_gradient_error, "max_slowdown": max_slowdown}
    plain = {"settings": settings, "recipe": made.model_dump(mode="json"), "environment": environment}
    return {**found.to_dict(), **plain}
