"""The command line: each command is a thin call of one public function.

Nothing here imports torch or numpy before a command needs it. A command is a module of this package with a function of
the same name; at its top it imports typer, rich, ``weft.errors`` and ``weft.cli.output`` alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from weft import __version__
from weft.cli.output import command

COMMANDS = ("plan", "measure", "compare", "fit", "compress", "report", "methods", "papers", "claims")


def app() -> typer.Typer:
    """The application, with every command whose module exists."""
    made = typer.Typer(
        name="weft",
        help="Both passes of a neural network, yours to choose; each method with its paper's claim as a check.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    made.callback()(_options)
    for name in COMMANDS:
        if Path(__file__).with_name(f"{name}.py").exists():
            module = importlib.import_module(f"weft.cli.{name}")
            made.command(name)(command(getattr(module, name)))
    return made


def _print_version(asked: bool) -> None:
    """Called by typer before any command."""
    if asked:
        sys.stdout.write(f"weft {__version__}\n")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 fine, 1 a claim does not hold or a run failed, 2 wrong usage.

    Args:
        arguments: in place of those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # names of authors on a terminal that has no Unicode
    app()(arguments, prog_name="weft")
