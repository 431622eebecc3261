"""Cards and discovery: what methods exist, read from their source without importing them or torch.

A method is a class or function under ``@method(...)`` in a file of its own. The arguments of the card are literals,
so that :func:`methods` can read them with ``ast``; the file is imported when the method is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from weft.cards import CONTRACTS, Card, read_cards
from weft.errors import UsageError, WeftError, unknown

ENTRY_POINT = "weft.methods"
ROOT = Path(__file__).parent

T = TypeVar("T")


def method(
    name: str,
    *,
    contract: str,
    family: str,
    papers: list[int],
    tags: set[str] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[T], T]:
    """Declare a class or function as a method of the catalogue. Every argument must be a literal.

    Args:
        name: the name in lower case with hyphens, as ``weft methods`` lists it.
        contract: what it implements, one of ``weft.cards.CONTRACTS``.
        family: the folder it belongs to, e.g. ``"rules"``.
        papers: rows of ``papers.tsv``.
        tags: what theory says of it, each measured by one generic test.
        variants: further names for the same code: name -> ``{"options": {...}}``, and where they differ from the
            card, ``papers``, ``tags``, ``defaults`` and ``summary``.
        defaults: optimizer, learning rate, schedule and perhaps clip (the largest norm of all gradients together),
            chosen on validation data.
    """

    def mark(obj: T) -> T:
        obj.method_name = name  # type: ignore[attr-defined]
        return obj

    return mark


def methods(family: str | None = None, contract: str | None = None) -> list[Card]:
    """Every card that the package and the entry points ``weft.methods`` hold, variants included, by family and name.

    Raises:
        UsageError: for a family or a contract that no method has; the message lists the nearest.
    """
    cards = _catalogue()
    for kind, given, valid in (
        ("family", family, {c.family for c in cards}),
        ("contract", contract, {*CONTRACTS}),
    ):
        if given is not None and given not in valid:
            raise UsageError(unknown(kind, given, sorted(valid), "of methods"))
    return [c for c in cards if family in (None, c.family) and contract in (None, c.contract)]


def card(name: str) -> Card:
    """The card of one method or variant.

    Raises:
        UsageError: when there is none of that name; the message lists the nearest.
    """
    for found in _catalogue():
        if found.name == name or (found.export == name and found.contract != "function"):
            return found
    raise UsageError(unknown("method", name, [c.name for c in _catalogue()], "(weft methods lists all)"))


def create(name: str, *args: Any, **options: Any) -> Any:
    """Build a method by name: ``weft.create("direct-feedback-alignment", model, seed=1)``."""
    return card(name).build(*args, **options)


def refresh() -> None:
    """Forget what was discovered, so that files added since are found."""
    _catalogue.cache_clear()


def exports(
    package: str, bases: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a family's package: every method under its own name, imported on use.

    Args:
        package: its ``__name__``.
        bases: what else it gives, by the module that has it; a literal called BASES, which the type stubs read.
    """
    family = package.rpartition(".")[2]

    def lookup(name: str) -> Any:
        if bases is not None and name in bases:
            return getattr(importlib.import_module(bases[name]), name)
        for found in _catalogue():
            if found.family == family and found.export == name:
                return found.build if found.variant_of else found.load()
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listing() -> list[str]:
        return sorted(
            {*vars(sys.modules[package]), *(bases or ()), *(c.export for c in _catalogue() if c.family == family)}
        )

    return lookup, listing


@functools.lru_cache(maxsize=1)
def _catalogue() -> tuple[Card, ...]:
    cards: dict[str, Card] = {}
    for module, path in _files():
        for found in read_cards(module, path):
            if found.name in cards:
                raise WeftError(f"two methods are called {found.name!r}: {cards[found.name].path} and {path}")
            cards[found.name] = found
    return tuple(sorted(cards.values(), key=lambda c: (c.family, c.name)))


def _files() -> Iterator[tuple[str, Path]]:
    yield from _walk("weft", ROOT)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT):
        try:
            spec = importlib.util.find_spec(entry.value)
        except (ImportError, ValueError) as error:
            warnings.warn(f"entry point {entry.name!r} of {ENTRY_POINT} cannot be read: {error}", stacklevel=2)
            continue
        if spec is None or spec.origin is None:
            warnings.warn(f"entry point {entry.name!r} of {ENTRY_POINT} names no module: {entry.value}", stacklevel=2)
        elif spec.submodule_search_locations:
            yield from _walk(entry.value, Path(spec.origin).parent)
        else:
            yield entry.value, Path(spec.origin)


def _walk(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join([package, *path.relative_to(folder).with_suffix("").parts]), path
