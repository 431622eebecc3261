"""What the source of a method says of itself: cards, options and claims, read with ``ast``."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.errors import UsageError, WeftError, unknown

CONTRACTS = ("rule", "solver", "tape", "layer", "function", "compress", "optimizer", "explainer", "bound")
VARIANT_KEYS = {"options", "papers", "tags", "defaults", "summary"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One keyword argument of a method: its name, annotation and default as source text."""

    name: str
    annotation: str
    default: str


@dataclasses.dataclass(frozen=True)
class ClaimCard:
    """What the source says of one claim, without running it."""

    function: str
    statement: str
    row: int | list[int] | None
    tier: str
    budget: float
    method: str | None
    mutants: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Card:
    """All that is known of a method without importing it."""

    name: str
    contract: str
    family: str
    papers: tuple[int, ...]
    tags: frozenset[str]
    defaults: dict[str, Any]
    preset: dict[str, Any]
    variant_of: str | None
    variants: tuple[str, ...]
    module: str
    object: str
    path: Path
    doc: str
    summary: str
    options: tuple[Option, ...]
    claims: tuple[ClaimCard, ...]
    has_example: bool

    @property
    def export(self) -> str:
        """The name under which the family's package exports it, e.g. ``DirectFeedbackAlignment``."""
        if self.variant_of is None:
            return self.object
        return "".join(part.capitalize() for part in self.name.split("-"))

    def load(self) -> Any:
        """Import the method's file and return the class or function."""
        return getattr(importlib.import_module(self.module), self.object)

    def build(self, *args: Any, **options: Any) -> Any:
        """Call the method with the variant's options, those given taking precedence.

        Raises:
            UsageError: for an option that the method does not have; the message lists the nearest.
        """
        known = {option.name for option in self.options}
        common = {"rule": {"loss", "at", "seed"}, "solver": {"seed"}}.get(self.contract)
        for given in options:
            if common is not None and given not in known | common:
                raise UsageError(unknown("option", given, sorted(known), f"of {self.name!r}"))
        made = self.load()(*args, **{**self.preset, **options})
        if self.variant_of is not None and self.contract in ("rule", "solver"):
            made.method_name = self.name
        return made

    def example(self) -> Any:
        """The smallest instance, by the file's ``example()``; a variant's options are added to it."""
        made = importlib.import_module(self.module).example()
        if self.preset and dataclasses.is_dataclass(made) and hasattr(made, "options"):
            return dataclasses.replace(made, options={**made.options, **self.preset})  # type: ignore[type-var]
        return made

    @property
    def citations(self) -> list[dict[str, str]]:
        """Papers as the docstring gives them: title, authors, year and where, as far as they are there."""
        found = []
        for match in re.finditer(r'Paper: "([^"]+)", (.+?), (\d{4})(?:, (\S+?))?\.?(?=\n|$)', _joined(self.doc)):
            title, authors, year, where = match.groups()
            found.append({"title": title, "authors": authors, "year": year, "where": where or ""})
        return found

    @property
    def bibtex(self) -> str:
        """BibTeX entries of the papers that the docstring names."""
        entries = []
        for cite in self.citations:
            people = [p.strip() for p in re.split(r", | and ", cite["authors"]) if p.strip()]
            key = _plain(people[0].split()[-1]) + cite["year"] + _plain(cite["title"].split()[-1])
            lines = [f"  title = {{{cite['title']}}},", f"  author = {{{' and '.join(people)}}},"]
            lines.append(f"  year = {{{cite['year']}}},")
            if cite["where"]:
                lines.append(f"  note = {{{cite['where']}}},")
            entries.append("@misc{" + key + ",\n" + "\n".join(lines) + "\n}")
        return "\n".join(entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``weft methods --json``."""
        return {
            "name": self.name,
            "family": self.family,
            "contract": self.contract,
            "summary": self.summary,
            "papers": list(self.papers),
            "tags": sorted(self.tags),
            "variant_of": self.variant_of,
            "variants": list(self.variants),
            "defaults": self.defaults,
            "preset": self.preset,
            "options": [dataclasses.asdict(option) for option in self.options],
            "claims": [{**dataclasses.asdict(c), "mutants": list(c.mutants)} for c in self.claims],
            "export": f"weft.{self.family}.{self.export}",
            "description": self.doc,
            "bibtex": self.bibtex,
        }


def read_cards(module: str, path: Path) -> list[Card]:
    """The cards of one source file, its variants included; an empty list where there are none.

    Raises:
        WeftError: when an argument of a card is not a literal, or is not of the right kind.
    """
    source = path.read_text(encoding="utf-8")
    if "@method(" not in source:
        return []
    tree = ast.parse(source, str(path))
    doc = ast.get_docstring(tree) or ""
    claims = tuple(_claims(tree, path))
    has_example = any(isinstance(node, ast.FunctionDef) and node.name == "example" for node in tree.body)
    cards: list[Card] = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        fields = _decorator(node, "method", path)
        if fields is None:
            continue
        cards += _expand(fields, node, module, path, doc, claims, has_example)
    return cards


def _expand(
    fields: dict[str, Any],
    node: ast.ClassDef | ast.FunctionDef,
    module: str,
    path: Path,
    doc: str,
    claims: tuple[ClaimCard, ...],
    has_example: bool,
) -> list[Card]:
    """A card, and one for each of its variants."""
    missing = {"name", "contract", "family", "papers"} - set(fields)
    if missing or fields["contract"] not in CONTRACTS:
        what = f"lacks {sorted(missing)}" if missing else f"has contract {fields['contract']!r}, not one of {CONTRACTS}"
        raise WeftError(f"the card of {node.name} in {path} {what}")
    variants = dict(fields.get("variants") or {})
    for name, data in variants.items():
        if set(data) - VARIANT_KEYS:
            raise WeftError(f"variant {name!r} in {path}: unknown keys {sorted(set(data) - VARIANT_KEYS)}")
    main = Card(
        name=fields["name"],
        contract=fields["contract"],
        family=fields["family"],
        papers=tuple(fields["papers"]),
        tags=frozenset(fields.get("tags") or ()),
        defaults=dict(fields.get("defaults") or {}),
        preset={},
        variant_of=None,
        variants=tuple(variants),
        module=module,
        object=node.name,
        path=path,
        doc=doc,
        summary=doc.split("\n", 1)[0],
        options=tuple(_options(node)),
        claims=claims,
        has_example=has_example,
    )
    cards = [main]
    for name, data in variants.items():
        changed: dict[str, Any] = {"name": name, "variant_of": main.name, "variants": ()}
        changed["preset"] = dict(data.get("options", {}))
        changed["papers"] = tuple(data.get("papers", main.papers))
        changed["tags"] = frozenset(data.get("tags", main.tags))
        changed["defaults"] = dict(data.get("defaults", main.defaults))
        changed["summary"] = data.get("summary", main.summary)
        cards.append(dataclasses.replace(main, **changed))
    return cards


def _decorator(node: ast.ClassDef | ast.FunctionDef, name: str, path: Path) -> dict[str, Any] | None:
    """The literal arguments of ``@name(...)`` on a definition, None where it has no such decorator."""
    for call in node.decorator_list:
        if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] != name:
            continue
        first = {"method": "name", "claim": "statement"}[name]
        pairs = [(first, call.args[0])] if call.args else []
        pairs += [(keyword.arg or "", keyword.value) for keyword in call.keywords]
        try:
            return {key: ast.literal_eval(value) for key, value in pairs}
        except ValueError as error:
            raise WeftError(f"{path}:{call.lineno}: the arguments of @{name} must be literals ({error})") from error
    return None


def _claims(tree: ast.Module, path: Path) -> Iterator[ClaimCard]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (fields := _decorator(node, "claim", path)) is not None:
            yield ClaimCard(
                function=node.name,
                statement=fields["statement"],
                row=fields.get("row"),
                tier=fields.get("tier", "fast"),
                budget=float(fields.get("budget", 5.0)),
                method=fields.get("method"),
                mutants=tuple(fields.get("mutants") or ()),
            )


def _options(node: ast.ClassDef | ast.FunctionDef) -> Iterator[Option]:
    """Keyword arguments with defaults, those of every rule (loss, at, seed) left out."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return
        node = inits[0]
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.arg in ("loss", "at", "seed") or default is None:
            continue
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        yield Option(argument.arg, annotation, ast.unparse(default))


def _plain(word: str) -> str:
    """The Latin letters of a word, in lower case and without accents."""
    bare = unicodedata.normalize("NFKD", word.lower().replace("ø", "o").replace("ß", "ss"))
    return re.sub(r"[^a-z]", "", bare)


def _joined(doc: str) -> str:
    """A docstring with each wrapped ``Paper:`` paragraph on one line."""
    lines = [re.sub(r"\s*\n\s*", " ", block.strip()) for block in re.split(r"\n\s*\n|\n(?=Paper: )", doc)]
    return "\n".join(lines)


def trained_with(settings: Mapping[str, Any]) -> str:
    """Optimizer, learning rate, schedule and clip on one line; empty where none of them is used."""
    if not settings.get("optimizer"):
        return ""
    clip = f" clip {settings['clip']:g}" if settings.get("clip") else ""
    return f"{settings['optimizer']} {settings['lr']:g} {settings['schedule']}{clip}"
