"""Type stubs of the families' packages, so that editors and type checkers see the methods that are found by discovery.

    python -m weft.stubs

writes ``__init__.pyi`` beside each family's ``__init__.py``; installing the package does it too.
"""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from weft.cards import Card, read_cards

MARK = "exports(__name__"
HEAD = "# Written by weft.stubs from the cards of this folder; not to be edited, not in version control.\n"


def write_stubs(root: Path | str | None = None) -> list[Path]:
    """Write the stub of every family's package.

    Args:
        root: the folder of the package ``weft``, by default the one that is imported.

    Returns:
        The stubs that were written because they were missing or had changed.
    """
    folder = Path(root) if root is not None else Path(__file__).parent
    written = []
    for init in sorted(folder.glob("*/__init__.py")):
        source = init.read_text(encoding="utf-8")
        if MARK not in source:
            continue
        package = f"{folder.name}.{init.parent.name}"
        text = stub(_cards(package, init.parent), _bases(source))
        path = init.with_suffix(".pyi")
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            _replace(path, text)
            written.append(path)
    return written


def stub(cards: Iterable[Card], bases: Mapping[str, str]) -> str:
    """The source of one package's stub: every method under the name that the package exports, and its bases."""
    names = {card.export: (card.module, card.object) for card in cards}
    names |= {name: (module, name) for name, module in bases.items()}
    lines = []
    for export, (module, name) in sorted(names.items(), key=lambda item: (item[1][0], item[0])):
        lines.append(f"from {module} import {name} as {export}\n")
    listed = "".join(f'    "{export}",\n' for export in sorted(names))
    return HEAD + "\n" + "".join(lines) + "\n__all__ = [\n" + listed + "]\n"


def _bases(source: str) -> dict[str, str]:
    """The literal BASES of a package."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BASES":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    return {}


def _cards(package: str, folder: Path) -> list[Card]:
    """The cards that the package exports: those of its own files, in the order in which discovery finds them."""
    family = package.rpartition(".")[2]
    found = []
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            module = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            found += [card for card in read_cards(module, path) if card.family == family]
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that a reader never sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    for stub_path in write_stubs():
        print(stub_path)  # noqa: T201
