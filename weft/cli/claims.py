"""``weft claims``: check what the papers say, and that the checks can fail."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from weft.cli.output import (
    FAILED,
    WIDE,
    AsJson,
    Family,
    Steps,
    family_name,
    number,
    print_json,
    quiet_stdout,
    stderr,
    stdout,
    table,
)
from weft.errors import UsageError


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Methods or variants.", show_default=False)
    ] = None,
    family: Family = None,
    row: Annotated[
        int | None, typer.Option("--row", metavar="N", help="Only claims of this paper.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All methods.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="The slow tier too: training comparisons and timings.")] = False,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Break the source in the ways that each claim lists; it must then fail.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**60, help="Passed to every claim.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes at a time.", show_default="one a core")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check the papers' claims on this machine; exit status 1 when one does not hold."""
    if not (names or every or family is not None or row is not None):
        raise UsageError("say which claims to check: names of methods, --family F, --row N, or --all")
    from weft.claim import check_claims, passed, select

    family = family_name(family)
    chosen = select(names or (), family=family, row=row, slow=slow)
    if not chosen:
        skipped = 0 if slow else len(select(names or (), family=family, row=row, slow=True))
        raise UsageError(
            "no claim is selected" + (f"; {skipped} of the slow tier would be, with --slow" * bool(skipped))
        )
    with quiet_stdout(), Steps(len(chosen), "importing torch") as steps:
        records = check_claims(
            names or (),
            family=family,
            row=row,
            slow=slow,
            mutants=mutants,
            seed=seed,
            workers=workers,
            on_record=lambda record: steps.advance(_line(record)),
        )
    if as_json:
        asked = {"names": names or [], "family": family, "row": row, "all": every, "slow": slow}
        settings = {**asked, "mutants": mutants, "seed": seed, "workers": workers}
        print_json({"claims": records, "settings": settings, "environment": _environment()})
    else:
        _show(records)
    return 0 if all(passed(record) for record in records) else FAILED


def _environment() -> dict[str, Any]:
    from weft.measure import environment

    return environment()


def _line(record: dict[str, Any]) -> str:
    """What progress says of one record."""
    from weft.claim import passed

    return f"{'ok' if passed(record) else 'FAILED'} {record['method']}: {record['function']}"


def _show(records: list[dict[str, Any]]) -> None:
    from weft.claim import passed

    console = stdout()
    wide = console.width >= WIDE
    columns = ["method", "statement", "measured", "holds", "mutants", "seconds"]
    made = table(*(columns if wide else ["claim", *columns[2:]]), numbers=("holds", "mutants", "seconds"), expand=True)
    made.columns[1 if wide else 0].ratio = 1
    for record in records:
        head: list[str | Text] = [record["method"], record["statement"]]
        if not wide:
            head = [Text.assemble((record["method"], "bold"), "\n", record["statement"])]
        relation = "-"
        if record["relation"]:
            relation = f"{number(record['measured'])} {record['relation']} {number(record['bound'])}"
        holds = "yes" if record["holds"] else "NO" if record["status"] == "ok" else "ERROR"
        made.add_row(*head, relation, holds, _caught(record), number(record["seconds"], 2), style=_style(record))
    console.print(made)
    errors = stderr()
    for record in records:
        if not passed(record):
            for line in _failures(record):
                errors.print(line, soft_wrap=True)
    held = sum(record["holds"] for record in records)
    tried = [mutant for record in records for mutant in record["mutants"]]
    line = f"\n{held} of {len(records)} claims hold"
    if tried:
        line += f", {sum(m['caught'] for m in tried)} of {len(tried)} mutants caught"
    console.print(f"{line}, {sum(r['seconds'] or 0 for r in records):.1f} core-seconds")


def _style(record: dict[str, Any]) -> str:
    from weft.claim import passed

    return "" if passed(record) else "red"


def _caught(record: dict[str, Any]) -> str:
    tried = record["mutants"]
    return f"{sum(m['caught'] for m in tried)}/{len(tried)}" if tried else "-"


def _failures(record: dict[str, Any]) -> list[str]:
    """Everything that is wrong with one record, in full."""
    found = []
    title = f"{record['method']}: {record['function']}"
    if record["error"]:
        found.append(f"\n{title}: {record['traceback'] or record['error']}".rstrip())
    elif not record["holds"]:
        what = f" ({record['what']})" if record["what"] else ""
        found.append(f"\n{title}: {record['measured']} is not {record['relation']} {record['bound']}{what}")
    for mutant in record["mutants"]:
        if not mutant["caught"]:
            why = mutant["traceback"] or mutant["error"] or "the claim still holds"
            found.append(f"\n{title}: mutant {mutant['name']!r} is not caught: {why}".rstrip())
    return found
