"""``weft methods``: the catalogue, and one card of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from weft.cards import trained_with
from weft.cli.output import WIDE, AsJson, Family, family_name, print_json, stdout, table
from weft.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from weft.cards import Card


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show the card of this method.", show_default=False)
    ] = None,
    family: Family = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue of methods, or one card: paper, equation, options, tags, claims, BibTeX."""
    from weft.method import card
    from weft.method import methods as public

    family = family_name(family)
    if name is None:
        found = public(family)
    else:
        found = [card(name)]
        if family not in (None, found[0].family):
            raise UsageError(f"{name!r} is of the family {found[0].family}, not {family}")
    if as_json:
        print_json({"methods": [one.to_dict() for one in found]})
    elif name is None:
        _catalogue(found)
    else:
        _card(found[0], stdout())


def _catalogue(found: list[Card]) -> None:
    console = stdout()
    wide = console.width >= WIDE
    columns = ["method", "contract", "rows", "claims", "default", *(["what it does"] if wide else [])]
    made = table(*columns, numbers=("claims",), expand=True)
    made.columns[-1 if wide else 0].ratio = 1
    made.columns[-1 if wide else 0].min_width = 36
    for one in found:
        rows = ", ".join(str(row) for row in one.papers) or "-"
        cells: list[str | Text] = [
            one.name,
            one.contract,
            rows,
            str(len(one.claims)),
            trained_with(one.defaults) or "-",
        ]
        if wide:
            cells.append(one.summary)
        else:
            cells[0] = Text.assemble((one.name, "bold"), "\n", one.summary)
        made.add_row(*cells)
    console.print(made)
    families = len({c.family for c in found})
    console.print(f"\n{len(found)} methods, families: {families}; weft methods NAME shows one")


def _card(one: Card, console: Console) -> None:
    console.print(Text(one.name, style="bold"), Text(f"{one.contract} of weft.{one.family}", style="dim"), sep="  ")
    console.print(one.summary + "\n" if one.variant_of else "", end="")
    console.print("\n" + _reflowed(one.doc) + "\n")
    facts = table("", "", show_header=False)
    facts.columns[0].no_wrap = True
    facts.columns[0].style = "dim"
    facts.add_row("papers", _titles(one))
    facts.add_row("use", f"weft.{one.family}.{one.export}, or weft.create({one.name!r}, ...)")
    facts.add_row("tags", ", ".join(sorted(one.tags)) or "-")
    facts.add_row("defaults", ", ".join(f"{key} {value}" for key, value in one.defaults.items()) or "-")
    if one.variant_of:
        preset = ", ".join(f"{key}={value!r}" for key, value in one.preset.items())
        facts.add_row("variant of", f"{one.variant_of}, with {preset}")
    if one.variants:
        facts.add_row("variants", ", ".join(one.variants))
    facts.add_row("file", str(one.path))
    console.print(facts)
    if one.options:
        options = table("option", "type", "default")
        for option in one.options:
            default = repr(one.preset[option.name]) if option.name in one.preset else option.default
            options.add_row(option.name, option.annotation, default)
        console.print()
        console.print(options)
    claims = table("claim", "row", "tier", "mutants")
    for claim in one.claims:
        rows = claim.row if isinstance(claim.row, list) else [] if claim.row is None else [claim.row]
        listed = ", ".join(str(row) for row in rows) or "-"
        claims.add_row(claim.statement, listed, claim.tier, ", ".join(claim.mutants) or "-")
    console.print()
    console.print(claims if one.claims else "no claims yet")
    if one.bibtex:
        console.print("\n" + one.bibtex, soft_wrap=True)


def _reflowed(doc: str) -> str:
    """A docstring with each paragraph on one line, to be wrapped by the console; indented blocks stay as they are."""
    blocks = [block.strip("\n") for block in doc.strip().split("\n\n")]
    return "\n\n".join(block if "\n " in "\n" + block else block.replace("\n", " ") for block in blocks)


def _titles(one: Card) -> str:
    """The rows that the card names, with their titles."""
    from weft.literature import papers

    titles = {paper["row"]: paper["title"] for paper in papers()}
    return "\n".join(f"{row}  {titles.get(row, 'no such row')}" for row in one.papers) or "-"
