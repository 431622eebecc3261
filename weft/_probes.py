"""What the blocks of a model cost in each way to keep less, measured at small batches (private to `weft.plan`)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft import measure
from weft._choices import Costs, Line, Way
from weft._ways import QUEUE, WAYS, spelled
from weft.convert import restore_
from weft.errors import Unsupported, UsageError, WeftError
from weft.session import Tape, kept
from weft.specs import apply_conversions, read_tape

MOST = 20  # blocks
LARGE = 0.2  # of the kept bytes: a block that keeps more is divided, if its parts keep nearly all of it
Loss = Callable[[Tensor, Tensor], Tensor]


def rows_of(x: Any) -> int:
    """The number of rows of a batch."""
    return len(x[0] if isinstance(x, tuple) else x)


def head(x: Any, rows: int) -> Any:
    """The first rows of a batch, in memory of their own: a view would keep the whole batch."""
    if isinstance(x, tuple):
        return tuple(t[:rows].clone() if isinstance(t, Tensor) and t.ndim and len(t) == rows_of(x) else t for t in x)
    return x[:rows].clone()


class Probe:
    """A model on small parts of a batch."""

    def __init__(self, model: nn.Module, x: Any, y: Tensor, loss: Loss) -> None:
        self.x, self.y, self.loss = x, y, loss
        try:
            self.model = copy.deepcopy(model)
        except (RuntimeError, TypeError) as error:
            raise WeftError(f"a plan works on copies of {type(model).__name__}, which fails: {error}") from error
        rows = rows_of(x)
        self.rows = rows
        self.sizes = [rows, rows] if rows < 8 else [rows // 4, rows // 2]  # of the plain step; the ways at the first
        self.empty = set[str]()  # blocks that keep nothing of their own
        self.blocks = self._divide()
        self.leaves = {b for b in self.blocks if not any(True for _ in self.model.get_submodule(b).children())}

    def step(self, model: nn.Module, rows: int, tape: Tape | None = None, parts: int = 1) -> Callable[[], None]:
        """One training step on the first rows, from no gradients, in equal parts."""
        x, y = head(self.x, rows), self.y[:rows]
        pieces = [(_part(x, i, parts), y.tensor_split(parts)[i]) for i in range(parts)]

        def run() -> None:
            for a, b in pieces:
                with contextlib.nullcontext() if tape is None else tape.on(model):
                    (measure.scored_loss(model, a, b, self.loss) / parts).backward()

        return run

    def changed(self, choice: Mapping[str, str], queue: int = QUEUE) -> tuple[nn.Module, Tape | None]:
        """A copy of the model and a tape, with a way for each block."""
        model = copy.deepcopy(self.model)
        tape, conversions = spelled(choice, self.leaves, queue)
        apply_conversions(model, conversions)
        return model, None if tape is None else read_tape(tape)

    def _divide(self) -> list[str]:
        """Blocks in forward order: large modules are divided as long as their parts keep what they do."""
        model, rows = self.model, self.sizes[0]
        order: dict[str, int] = {}
        with contextlib.ExitStack() as undo:
            for name, module in model.named_modules():

                def note(m: nn.Module, a: Any, name: str = name) -> None:
                    order.setdefault(name, len(order))

                undo.callback(module.register_forward_pre_hook(note).remove)
            held = self.kept_by(model, rows)
        total = max(1, sum(held.values()))

        def keeps(name: str) -> int:
            return sum(v for k, v in held.items() if k == name or k.startswith(f"{name}."))

        blocks = [name for name, _ in model.named_children()]
        while True:
            parts: dict[str, list[str]] = {}
            for name in blocks:
                inner = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
                called = name in order
                whole, within = keeps(name), sum(keeps(child) for child in inner)
                if inner and (not called or (whole > LARGE * total and within > 0.95 * whole)):
                    parts[name] = inner
            fits = {n: p for n, p in parts.items() if n not in order or len(blocks) + len(p) - 1 <= MOST}
            if not fits:
                break
            chosen = max(fits, key=keeps)
            at = blocks.index(chosen)
            blocks[at : at + 1] = fits[chosen]
        owners = {name for name in blocks if next(model.get_submodule(name).parameters(), None) is not None}
        found = [name for name in blocks if name in order and (keeps(name) > 0 or name in owners)]
        self.empty = {name for name in found if not keeps(name)}
        return sorted(found, key=lambda name: order[name])

    def kept_by(self, model: nn.Module, rows: int, tape: Tape | None = None) -> dict[str, int]:
        """Bytes kept at most, by module."""
        for p in model.parameters():
            p.grad = None
        with kept(model) as count:
            self.step(model, rows, tape)()
        return count.peak_by_module

    def by_block(self, held: Mapping[str, int]) -> list[float]:
        """Bytes by block, and at the end those outside."""
        found = dict.fromkeys(self.blocks, 0.0)
        outside = 0.0
        for name, value in held.items():
            block = next((b for b in self.blocks if name == b or name.startswith(f"{b}.")), None)
            if block is None:
                outside += value
            else:
                found[block] += value
        return [*found.values(), outside]

    def costs(self, tell: Callable[[str], None]) -> Costs:
        """The plain step measured at two batch sizes, every way on all blocks that can go it at the smaller one."""
        sizes, plain = self.sizes, self.model
        parameters = {id(p): p for p in plain.parameters() if p.requires_grad}
        gradients, largest = [], []
        for block in self.blocks:
            own = [parameters.pop(id(p)) for p in plain.get_submodule(block).parameters() if id(p) in parameters]
            gradients.append(float(sum(p.numel() * p.element_size() for p in own)))
            largest.append(float(max((p.numel() * p.element_size() for p in own), default=0)))
        gradients.append(float(sum(p.numel() * p.element_size() for p in parameters.values())))
        forward = self._forward_shares()
        tell("plain")
        base_kept = [self.by_block(self.kept_by(plain, rows)) for rows in sizes]
        lines = [Line.through([(r, k[g]) for r, k in zip(sizes, base_kept, strict=True)])
                 for g in range(len(self.blocks) + 1)]  # fmt: skip
        seconds = Line.through([(rows, self._seconds(plain, rows)) for rows in sizes], above=True)
        none = tuple(Line() for _ in self.blocks)
        costs = Costs(tuple(gradients), lines[-1], seconds, (), tuple(largest))
        first = Way("plain", tuple(lines[:-1]), none, none, (0.0,) * len(none), Line(), Line(), (True,) * len(none))
        work, adding = zip(*(self._working(costs, first, plain, None, rows) for rows in sizes), strict=True)
        lines_of = [Line.through(list(zip(sizes, found, strict=True))) for found in (work, adding)]
        ways = [dataclasses.replace(first, work=lines_of[0], adding=lines_of[1])]
        share = [k / max(1.0, sum(base_kept[-1][:-1])) for k in base_kept[-1][:-1]]
        wanted = self.gradients(plain, sizes[0])
        for name, spec in WAYS.items():
            if name == "plain" or not (found := self._possible(name)):
                continue
            tell(name)
            part = forward if spec.block else share
            ways.append(self._way(costs, name, found, ways[0], part, wanted))
        return dataclasses.replace(costs, ways=tuple(ways))

    def _possible(self, name: str) -> list[str]:
        """The blocks that can go a way."""
        found = []
        for block in (b for b in self.blocks if b not in self.empty):
            try:
                self.changed({block: name})
                found.append(block)
            except (Unsupported, UsageError):
                continue
        return found

    def _way(
        self, costs: Costs, name: str, blocks: list[str], plain: Way, share: Sequence[float], wanted: dict[str, Tensor]
    ) -> Way:
        rows, chosen = self.sizes[0], dict.fromkeys(blocks, name)
        model, tape = self.changed(chosen, max(2**16, QUEUE * rows // self.rows))
        held = self.by_block(self.kept_by(model, rows, tape))
        ratio = measure.step_ratio(self._fresh(model, rows, tape), self._fresh(self.model, rows), rounds=3, warmup=1)
        extra = max(0.0, ratio.seconds - ratio.baseline_seconds)
        possible = tuple(block in blocks for block in self.blocks)
        whole = sum(s for s, p in zip(share, possible, strict=True) if p) or 1.0
        parts = [s / whole if p else 0.0 for s, p in zip(share, possible, strict=True)]
        found = self.gradients(self.changed(chosen)[0], rows, tape) if not WAYS[name].exact else wanted
        off = squared_error(found, wanted)
        again = tuple(plain.kept) if WAYS[name].block else tuple(Line() for _ in parts)
        way = Way(
            name,
            tuple(Line(0.0, k / rows) for k in held[:-1]),
            again,
            tuple(Line(0.0, extra * s / rows) for s in parts),
            tuple(off * s for s in parts),
            Line(),
            Line(),
            possible,
        )
        # What the way adds to the plain step's working memory grows with the rows; the rest is as in the plain step.
        work, adding = self._working(costs, way, model, tape, rows)
        more = [(w - line.at(rows)) / rows for w, line in ((work, plain.work), (adding, plain.adding))]
        lines = [Line(line.start, line.slope + m) for line, m in zip((plain.work, plain.adding), more, strict=True)]
        return dataclasses.replace(way, work=lines[0], adding=lines[1])

    def _working(self, costs: Costs, way: Way, model: nn.Module, tape: Tape | None, rows: int) -> tuple[float, float]:
        """The working memory that explains a way's measured peaks, with gradients made in the step and there before."""
        alone, every = dataclasses.replace(costs, ways=(way,)), [0] * len(self.blocks)
        step, parameters = self.step(model, rows, tape), list(model.parameters())
        made = measure.peak_bytes(step, parameters=parameters) - alone.walk(every, rows)
        there = measure.peak_bytes(step, parameters=parameters, gradients=False) - alone.walk(every, rows, False)
        beside = 0 if tape is None else tape.outside_bytes
        return made + beside, there + beside

    def _fresh(self, model: nn.Module, rows: int, tape: Tape | None = None) -> Callable[[], None]:
        step = self.step(model, rows, tape)

        def run() -> None:
            for p in model.parameters():
                p.grad = None
            step()

        return run

    def _seconds(self, model: nn.Module, rows: int) -> float:
        step = self._fresh(model, rows)
        return measure.step_ratio(step, step, rounds=3, warmup=1).seconds

    def gradients(self, model: nn.Module, rows: int, tape: Tape | None = None) -> dict[str, Tensor]:
        """Of a step, by the plain model's names."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._fresh(model, rows, tape)()
        held = {id(p): p.grad for p in model.parameters() if p.grad is not None}
        restore_(model)
        return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}

    def _forward_shares(self) -> list[float]:
        """How much of the forward pass's time each block takes."""
        spent, started = dict.fromkeys(self.blocks, 0.0), dict[str, float]()
        with contextlib.ExitStack() as undo:
            for name in self.blocks:
                module = self.model.get_submodule(name)

                def begin(m: nn.Module, a: Any, name: str = name) -> None:
                    started[name] = time.thread_time()

                def end(m: nn.Module, a: Any, out: Any, name: str = name) -> None:
                    spent[name] += time.thread_time() - started[name]

                undo.callback(module.register_forward_pre_hook(begin).remove)
                undo.callback(module.register_forward_hook(end).remove)
            for _ in range(2):
                self._fresh(self.model, self.sizes[0])()
        whole = sum(spent.values()) or 1.0
        return [s / whole for s in spent.values()]


def squared_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The square of the relative error, in norm, of gradients by name; one that is missing counts as zero."""
    size = sum(float(g.double().square().sum()) for g in wanted.values()) or 1.0
    off = sum(float((g - found.get(n, torch.zeros_like(g))).double().square().sum()) for n, g in wanted.items())
    return off / size


def _part(x: Any, i: int, parts: int) -> Any:
    if isinstance(x, tuple):
        rows = rows_of(x)
        return tuple(
            t.tensor_split(parts)[i].clone() if isinstance(t, Tensor) and t.ndim and len(t) == rows else t for t in x
        )
    return x.tensor_split(parts)[i].clone()
