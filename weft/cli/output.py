"""What the commands share: where they write, one JSON document, tables, and errors as exit statuses."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn, Self, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from weft.errors import UsageError, WeftError, unknown

F = TypeVar("F", bound=Callable[..., Any])

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
WIDE = 120  # columns from which a table has room for a column of statements

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.")]
Family = Annotated[
    str | None, typer.Option("--family", metavar="F", help="Only this family, e.g. rules.", show_default=False)
]


class _Console(Console):
    """A console whose reader may go away (``weft papers | head``)."""

    def on_broken_pipe(self) -> NoReturn:
        """Called by rich when a write fails because the reader is gone."""
        self.quiet = True
        raise BrokenPipeError


def stdout() -> Console:
    """The console for results: what is printed is taken literally, without markup."""
    return _Console(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """The console for progress, logs and errors."""
    return _Console(stderr=True, markup=False, highlight=False, emoji=False)


def table(*columns: str, numbers: tuple[str, ...] = (), **options: Any) -> Table:
    """A table in the style of all commands.

    Args:
        columns: their headers.
        numbers: those of them that are aligned to the right and never wrapped.
        options: of :class:`rich.table.Table`.
    """
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", **options)
    for name in columns:
        if name in numbers:
            made.add_column(name, justify="right", no_wrap=True)
        else:
            made.add_column(name, overflow="fold")
    return made


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout; numbers that are not finite become null.

    To be used with ``--json`` only, and then once and alone.
    """
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(_plain(document), indent=2, allow_nan=False, ensure_ascii=not utf8) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """The same data in what JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Inside, whatever this process or its children print to stdout goes to stderr: for work under ``--json``."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = None
    with contextlib.suppress(OSError):
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


class Steps:
    """Progress on stderr, drawn by :meth:`advance` alone: no thread runs, so that processes can be forked meanwhile.

    A line a step where stderr is no terminal.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.done = total, 0
        self._console = stderr()
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # a forked child must not draw
            redirect_stderr=False,
            disable=not self._live,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Steps:
        self._progress.start()
        self._progress.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, line: str) -> None:
        """One more is done; ``line`` says what."""
        self.done += 1
        if self._live:
            self._progress.update(self._task, advance=1, description=line[:40])
            self._progress.refresh()
        else:
            self._console.print(f"[{self.done}/{self.total}] {line}", soft_wrap=True)


class Live:
    """Progress on stderr: a bar in a terminal; elsewhere its ``show`` prints lines."""

    def __init__(self) -> None:
        self.console = stderr()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.progress.add_task("importing torch", total=None, note="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


def family_name(given: str | None) -> str | None:
    """A family as the cards spell it; with or without the plural, as the table of papers has it.

    Raises:
        UsageError: for a family of which there is no method.
    """
    if given is None:
        return None
    from weft.method import methods

    known = sorted({card.family for card in methods()})
    for name in known:
        if name.rstrip("s") == given.lower().rstrip("s"):
            return name
    raise UsageError(unknown("family", given, known, "of methods"))


def fail(message: str, status: int) -> NoReturn:
    """Say on stderr what is wrong and end with this exit status."""
    with contextlib.suppress(BrokenPipeError):
        stderr().print(f"weft: {message}", soft_wrap=True)
    raise typer.Exit(status)


def command(function: F) -> F:
    """Wrap a command: the int that it returns is the exit status, and errors are said in one line on stderr.

    UsageError gives 2, any other WeftError 1, Ctrl-C 130; a reader that is gone ends it quietly.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        try:
            status = function(*args, **options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush does not complain
            raise typer.Exit(0) from None
        except UsageError as error:
            fail(str(error), WRONG_USAGE)
        except WeftError as error:
            fail(str(error), FAILED)
        if status:
            raise typer.Exit(status)

    return run  # type: ignore[return-value]
