"""The page of commands, from the application itself."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from generators.text import block, code, escape, table
from weft.cli import app

INTRO = "# Commands\n\n<!-- readme: Commands -->\n"


def page() -> str:
    """Every command with its arguments, options and help."""
    group: Any = typer.main.get_command(app())
    parts = [INTRO]
    for name, command in group.commands.items():
        if command.hidden:
            continue
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        arguments = [p for p in shown if p.param_type_name == "argument"]
        usage = " ".join(["weft", name, *(_argument(p) for p in arguments), "[OPTIONS]"])
        rows = [[code(_names(p)), escape(p.help or ""), _default(p)] for p in shown]
        parts += [f"## weft {name}\n", escape(inspect.cleandoc(command.help or "")) + "\n", block(usage, "sh")]
        parts += [table(["option", "meaning", "default"], rows)]
    return "\n".join(parts)


def _argument(param: Any) -> str:
    name = (param.metavar or param.name.upper()) + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper()
    names = ", ".join([*param.opts, *param.secondary_opts])
    if getattr(param, "is_flag", False):
        return names
    kind = {int: "N", float: "X"}.get(type(param.default), "TEXT")
    if param.default is None and getattr(param, "min", None) is not None:
        kind = "N"
    return f"{names} {param.metavar or kind}"


def _default(param: Any) -> str:
    """What the help shows as default."""
    if isinstance(param.show_default, str):
        return escape(param.show_default)
    if getattr(param, "is_flag", False) or param.default is None or param.show_default is False:
        return ""
    return code(param.default)
