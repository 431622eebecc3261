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
from weft._choices import TIE, Costs, fastest
from weft._explaining import sentences
from weft._probes import Loss, Probe, rows_of, spelled
from weft.errors import DataError, UsageError
from weft.folders import write
from weft.recipe import Recipe
from weft.session import Tape
from weft.specs import apply_conversions, read_tape

STATE = {"sgd": 0, "rmsprop": 1, "adam": 2, "adamw": 2}  # numbers that an optimizer keeps for each parameter
ROUNDS = 4  # of choosing again where a verified peak does not fit
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
    file, or run once more on the way back; a step may be cut into micro-batches. Every way is measured on all blocks
    at two small parts of the batch; bytes and seconds grow linearly with the rows. Of all combinations the fastest
    that fits is found by mixed-integer linear programming, an optimum and no guess, for each number of micro-batches;
    then the step is run as chosen, and chosen again with less room where it measures more than predicted.

    The model is copied, so that memory for a second one is needed; steps of the plan itself are run in full.

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
    tell = on_event or (lambda event: None)
    probe = Probe(model, x, y, loss)
    costs = probe.costs(tell)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))
    fixed = weights + STATE[optimizer] * trained
    room, rows = limit - fixed, rows_of(x)
    plain = [0] * len(probe.blocks)
    slowest = None if max_slowdown is None else max_slowdown * costs.time(plain, rows)
    whole = any(isinstance(m, NORMS) and m.training for m in model.modules())  # its statistics are the whole batch's
    counts = [1] if whole else sorted({a for a in (1, 2, 4, 8, 16, 32, 64) if a <= rows})
    spare, best, done = 0.0, None, None
    for _ in range(ROUNDS):
        best = _best(costs, rows, room - spare, counts, max_gradient_error, slowest)
        if best is None:
            break
        tell("verifying")
        done = _verified(probe, costs, *best, fixed)
        if done[1]["memory_bytes"] <= limit:
            break
        spare += done[1]["memory_bytes"] - limit + 0.01 * limit
    fits = done is not None and best is not None and done[1]["memory_bytes"] <= limit
    if not fits:
        best = _nearest(costs, rows, counts, max_gradient_error, slowest)
        tell("verifying")
        done = _verified(probe, costs, *best, fixed)
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


def read_bytes(given: int | str) -> int:
    """``"512MiB"`` as a number of bytes.

    Raises:
        UsageError: for text of another form and what is not positive.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(given).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        found = int(float(number) * units[text[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        raise UsageError(f"memory={given!r}; give a number of bytes, or 512MiB, 2GB and the like") from None
    if found < 1:
        raise UsageError(f"memory={given!r}; it is a positive number")
    return found


def _best(
    costs: Costs, rows: int, room: float, counts: list[int], error: float | None, seconds: float | None
) -> tuple[list[int], int] | None:
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


def _nearest(
    costs: Costs, rows: int, counts: list[int], error: float | None, seconds: float | None
) -> tuple[list[int], int]:
    """The choice with nearly the smallest peak: the budget is halved between one that fits and one that does not."""
    low, high = 0.0, 4 * max(1.0, costs.peak([0] * len(costs.ways[0].kept), rows))
    best = _best(costs, rows, high, counts, error, seconds) or ([0] * len(costs.ways[0].kept), 1)
    for _ in range(12):
        middle = (low + high) / 2
        found = _best(costs, rows, middle, counts, error, seconds)
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    return best


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
    held = max(measure.kept_bytes(step, model).peak_bytes, 0)

    def fresh() -> None:
        for p in parameters:
            p.grad = None
        step()

    seconds = measure.step_ratio(fresh, lambda: None, rounds=3, warmup=0).seconds
    small = probe.sizes[0]
    wanted = probe._gradients(copy.deepcopy(probe.model), small)
    found = probe._gradients(*_swap(probe.changed(names), small))
    size = sum(float(g.double().square().sum()) for g in wanted.values()) or 1.0
    off = sum(float((found[n] - g).double().square().sum()) for n, g in wanted.items() if n in found)
    measured = {
        "memory_bytes": float(fixed + peak),
        "peak_bytes": float(peak),
        "kept_bytes": float(held),
        "step_seconds": seconds,
        "gradient_error": (off / size) ** 0.5,
    }
    return _predicted(costs, choice, parts, probe.rows, fixed), measured


def _swap(changed: tuple[nn.Module, Tape | None], rows: int) -> tuple[nn.Module, int, Tape | None]:
    return changed[0], rows, changed[1]


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
