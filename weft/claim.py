"""Claims: a paper's statement as a check that anyone can run, with mutants that show the check can fail."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, get_context
from typing import Any, TypeVar

from weft.cards import Card, ClaimCard
from weft.errors import UsageError, WeftError, unknown
from weft.method import card, methods
from weft.mutants import mutated

F = TypeVar("F", bound=Callable[..., Any])
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
}
TIERS = ("fast", "slow")


@dataclasses.dataclass(frozen=True)
class Check:
    """What a claim measured and what it is held against.

    Attributes:
        measured: a number; one that is not finite never holds.
        bound: the number it is compared with.
        relation: ``measured relation bound`` must be true; one of ``<= < >= > ==``.
        what: names the quantity where a claim returns several checks.
    """

    measured: float
    bound: float
    relation: str = "<="
    what: str = ""

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise UsageError(unknown("relation", self.relation, list(RELATIONS)))

    @property
    def holds(self) -> bool:
        """Whether the comparison is true and both sides are finite."""
        measured, bound = float(self.measured), float(self.bound)
        return math.isfinite(measured) and math.isfinite(bound) and RELATIONS[self.relation](measured, bound)


def claim(
    statement: str,
    *,
    row: int | list[int] | None = None,
    tier: str = "fast",
    budget: float = 5.0,
    method: str | None = None,
    mutants: Mapping[str, tuple[str, ...]] | None = None,
) -> Callable[[F], F]:
    """Declare ``f(seed) -> Check`` (or several checks, which must all hold) as a claim of the method in its file.

    Args:
        statement: what the paper says, as one sentence.
        row: the paper's row in ``papers.tsv``, several, or None for a property that no paper states.
        tier: ``"fast"`` (core dependencies, one thread, at most 5 core-seconds) or ``"slow"``.
        budget: core-seconds that it needs at most; twenty times that (at least a minute) ends it as an error.
        method: the card or variant it speaks of, where the file holds several; the first one by default.
        mutants: name -> (source text, replacement), or with a third entry that names the shared module it is in. The
            text occurs once in that file outside the claims, and with the replacement the claim must fail.
    """

    def mark(function: F) -> F:
        return function

    return mark


def select(
    names: Iterable[str] = (), *, family: str | None = None, row: int | None = None, slow: bool = False
) -> list[tuple[Card, ClaimCard]]:
    """The claims of the named methods (of all, where none is named), each once, under the card that it speaks of.

    A variant has the claims that speak of it and those that speak of no card in particular.
    """
    chosen = [c for c in ([card(name) for name in names] or methods()) if family in (None, c.family)]
    found = []
    for owner in methods():
        named = {c.name for c in chosen if c.module == owner.module and owner.name in (c.name, c.variant_of)}
        if owner.variant_of is not None or not named:
            continue
        for one in owner.claims:
            rows = one.row if isinstance(one.row, list) else [one.row]
            if (one.tier == "slow" and not slow) or (row is not None and row not in rows):
                continue
            if one.method is None or one.method in named:
                speaks_of = next((c for c in methods() if c.name == one.method and c.module == owner.module), owner)
                found.append((speaks_of, one))
    return found


def check_claims(
    names: Iterable[str] = (),
    *,
    family: str | None = None,
    row: int | None = None,
    slow: bool = False,
    mutants: bool = False,
    seed: int = 0,
    workers: int | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run claims, each in a process forked from this one, with one torch thread, and return their records.

    Args:
        names: methods or variants; all of them where none is given.
        family: only those of one family.
        row: only those of one paper.
        slow: the slow tier as well as the fast one.
        mutants: run each claim under each of its mutants too; one that is not caught makes the record fail.
        seed: passed to every claim.
        workers: processes at a time, by default as many as there are cores.
        on_record: called with each record as it is complete.

    Returns:
        Records with ``row, method, family, statement, measured, bound, relation, holds, status, seconds, error``,
        ``tier, function, mutants``. ``status`` is ``ok`` or ``error``; ``seconds`` are of CPU time.

    Raises:
        UsageError: for an unknown name.
    """
    import sklearn.datasets  # noqa: F401
    import torch  # noqa: F401

    chosen = select(names, family=family, row=row, slow=slow)
    jobs = [(index, None) for index in range(len(chosen))]
    if mutants:
        jobs += [(index, name) for index, (_, one) in enumerate(chosen) for name in one.mutants]  # type: ignore[misc]
    records: dict[int, dict[str, Any]] = {}
    left = {index: 1 + (len(one.mutants) if mutants else 0) for index, (_, one) in enumerate(chosen)}

    def finished(job: tuple[int, str | None], outcome: dict[str, Any]) -> None:
        index, mutant = job
        owner, one = chosen[index]
        record = records.setdefault(index, {"mutants": []})
        if mutant is None:
            record.update(_record(owner, one, outcome))
        else:
            caught = outcome["status"] == "ok" and not outcome["holds"]
            record["mutants"].append({"name": mutant, "caught": caught, **outcome})
        left[index] -= 1
        if left[index] == 0:
            record["mutants"].sort(key=lambda m: one.mutants.index(m["name"]))
            if on_record:
                on_record(record)

    _pool(jobs, chosen, seed, workers or os.cpu_count() or 1, finished)
    return [records[index] for index in sorted(records)]


def passed(record: Mapping[str, Any]) -> bool:
    """Whether a claim holds and every mutant that was run on it was caught."""
    return bool(record["holds"]) and all(mutant["caught"] for mutant in record["mutants"])


def _record(owner: Card, one: ClaimCard, outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        "row": one.row,
        "method": owner.name,
        "family": owner.family,
        "statement": one.statement,
        "function": one.function,
        "tier": one.tier,
        "budget": one.budget,
        **outcome,
    }


def _pool(
    jobs: Sequence[tuple[int, str | None]],
    chosen: Sequence[tuple[Card, ClaimCard]],
    seed: int,
    workers: int,
    finished: Callable[[tuple[int, str | None], dict[str, Any]], None],
) -> None:
    """One forked process a job, ``workers`` at a time; a job that dies or hangs is an error, not the end of the run."""
    fork = get_context("fork")
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[tuple[int, str | None], Any, float]] = {}
    with _interrupts_held() as interrupts:
        try:
            while waiting or running:
                while waiting and len(running) < workers and not interrupts:
                    job = waiting.pop()
                    owner, one = chosen[job[0]]
                    reader, writer = fork.Pipe(duplex=False)
                    process = fork.Process(target=_child, args=(writer, owner, one, job[1], seed), daemon=True)
                    sys.stdout.flush()
                    sys.stderr.flush()
                    with warnings.catch_warnings():
                        # Python 3.12 warns of a fork beside threads; the child uses none of them.
                        warnings.simplefilter("ignore", DeprecationWarning)
                        process.start()
                    running[reader] = (job, process, time.monotonic() + max(60.0, 20 * one.budget))
                    writer.close()
                ready = connection.wait(list(running), timeout=0.2)
                if interrupts:
                    raise KeyboardInterrupt
                for reader in [r for r in running if r in ready or time.monotonic() > running[r][2]]:
                    job, process, _ = running.pop(reader)
                    outcome = _outcome(error="ran past twenty times its budget and was ended")
                    if reader in ready:
                        try:
                            outcome = reader.recv()
                        except EOFError:
                            process.join()
                            outcome = _outcome(error=f"the process ended with exit code {process.exitcode}")
                    else:
                        process.kill()
                    process.join()
                    reader.close()
                    finished(job, outcome)
        finally:
            for _, process, _ in running.values():
                process.kill()
                process.join()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[list[Any]]:
    """Inside, Ctrl-C adds to the list: raised just anywhere, Python would lose it in the callbacks around a fork."""
    held: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = signal.signal(signal.SIGINT, lambda *given: held.append(given))
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(
    checks: Sequence[Check] = (), seconds: float | None = None, error: str | None = None, trace: str | None = None
) -> dict[str, Any]:
    failed = [check for check in checks if not check.holds]
    shown = (failed or list(checks)[-1:] or [None])[0]  # type: ignore[list-item]
    if shown is None:
        return {
            **dict.fromkeys(("measured", "bound", "relation", "what")),
            "holds": False,
            "status": "error",
            "seconds": seconds,
            "error": error,
            "traceback": trace,
        }
    measured = float(shown.measured)
    finite = math.isfinite(measured)
    return {
        "measured": measured if finite else None,
        "bound": float(shown.bound) if math.isfinite(shown.bound) else None,
        "relation": shown.relation,
        "what": shown.what or None,
        "holds": not failed,
        "status": "ok",
        "seconds": seconds,
        "error": None if finite else f"measured {measured}",
        "traceback": None,
    }


def _child(writer: Any, owner: Card, one: ClaimCard, mutant: str | None, seed: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    torch.set_num_threads(1)
    gc.freeze()  # what the parent made is not looked at by this process's collections, nor copied for them
    start = time.process_time()
    try:
        module = importlib.import_module(owner.module) if mutant is None else mutated(owner, one, mutant)
        result = getattr(module, one.function)(seed)
        checks = [result] if isinstance(result, Check) else list(result) if isinstance(result, Iterable) else []
        if not checks or not all(isinstance(check, Check) for check in checks):
            raise WeftError(f"{one.function} in {owner.module} returned {result!r}; a claim returns Check, or several")
        outcome = _outcome(checks, time.process_time() - start)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        outcome = _outcome((), time.process_time() - start, text, traceback.format_exc())
    writer.send(outcome)
    writer.close()
