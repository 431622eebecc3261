"""Pages of the Python API: ``weft`` itself, and each module that it names in ``__all__``."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from mkdocs.exceptions import PluginError

import weft
from generators.methods import cards
from generators.text import escape


def pages() -> dict[str, str]:
    """Markdown by path."""
    made = {"api/index.md": _top()}
    for name in sorted(modules()):
        made[f"api/{name}.md"] = _module(name, modules()[name])
    return made


def modules() -> dict[str, ModuleType]:
    """The documented modules by the name under which ``weft`` has them."""
    return {name: found for name in weft.__all__ if isinstance(found := getattr(weft, name), ModuleType)}


def public(module: ModuleType) -> dict[str, Any]:
    """The public classes and functions of a module: what ``__all__`` lists, else what is defined there."""
    listed = getattr(module, "__all__", None) or getattr(module, "_WHERE", None)
    if listed:
        return {name: getattr(module, name) for name in listed}
    found = {name: obj for name, obj in vars(module).items() if inspect.isclass(obj) or inspect.isroutine(obj)}
    return {name: obj for name, obj in found.items() if not name.startswith("_") and obj.__module__ == module.__name__}


def _top() -> str:
    parts = ["# weft\n", "What `import weft` gives; nothing heavy is imported before it is used.\n"]
    objects = {name: getattr(weft, name) for name in weft.__all__ if name not in modules()}
    errors = {name: obj for name, obj in objects.items() if inspect.isclass(obj) and issubclass(obj, Exception)}
    parts += [entry("weft", name, obj) for name, obj in objects.items() if name not in errors]
    parts += [entry("weft", name, obj) for name, obj in errors.items()]
    return "\n".join(parts)


def _module(name: str, module: ModuleType) -> str:
    parts = [f"# weft.{name} {{ #weft.{name} }}\n", escape(inspect.getdoc(module) or "") + "\n"]
    listed = [f"[{card.export}](../methods/{card.name}.md)" for card in cards() if card.family == name]
    if listed:
        parts.append(f"Every method has its own page: {', '.join(listed)}.\n")
    found = {key: getattr(module, key) for key in getattr(module, "BASES", ())} if listed else public(module)
    return "\n".join(parts + [entry(f"weft.{name}", key, obj) for key, obj in found.items()])


def entry(package: str, name: str, obj: Any) -> str:
    """One object under the name that users import, wherever it is defined."""
    if not (inspect.isclass(obj) or inspect.isroutine(obj)):
        return f"## {package}.{name} {{ #{package}.{name} }}\n\nA constant: `{obj!r}`.\n"
    if not (vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__):
        raise PluginError(f"{package}.{name} is public and has no docstring")
    home = f"{obj.__module__}.{obj.__qualname__}"
    anchor = "" if home == f"{package}.{name}" else f"[](){{ #{package}.{name} }}\n\n"
    options = f"    options:\n      heading: {package}.{name}\n      toc_label: {name}\n"
    return f"{anchor}::: {home}\n{options}"
