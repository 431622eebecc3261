"""``weft papers``: the map of papers, and what there is for each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from weft.cli.output import AsJson, Family, print_json, stdout, table

NEAREST = 15  # rows of a ranked table


def papers(
    query: Annotated[
        str | None,
        typer.Argument(metavar="QUERY", help="Rank titles and mechanisms by similarity.", show_default=False),
    ] = None,
    family: Family = None,
    missing: Annotated[bool, typer.Option("--missing", help="Only papers without a method.")] = False,
    as_json: AsJson = False,
) -> None:
    """The map of all papers: which methods and claims there are for each."""
    from weft.literature import papers as public

    found = public(query, family=family, missing=missing)
    if as_json:
        print_json({"papers": found})
        return
    columns = ["row", "title", "family", "methods", "claims", *(["score"] if query else [])]
    made = table(*columns, numbers=("row", "claims", "score"), expand=True)
    made.columns[1].ratio, made.columns[1].min_width = 1, 30
    shown = found[:NEAREST] if query else found
    for paper in shown:
        made.add_row(*_cells(paper, query is not None))
    console = stdout()
    console.print(made)
    covered = sum(bool(paper["methods"]) for paper in found)
    line = f"{len(found)} papers, {covered} with a method"
    if len(shown) < len(found):
        line += f"; the nearest {len(shown)} are shown, --json has all"
    console.print(f"\n{line}")


def _cells(paper: dict[str, Any], ranked: bool) -> list[str | Text]:
    title = Text(paper["title"])
    if ranked:
        title.append("\n" + paper["mechanism"], style="dim")
    cells = [str(paper["row"]), title, paper["family"], "\n".join(paper["methods"]) or "-", str(paper["claims"])]
    return [*cells, f"{paper['score']:.2f}"] if ranked else cells
