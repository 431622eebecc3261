"""``weft plan``: a memory budget in, a verified recipe out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli.output import FAILED, AsJson, number, print_json, quiet_stdout, stderr, stdout, table
from weft.cli.shared import Batch, DataDir, DataName, ModelName, Seed, Threads, size


def plan(
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="M", help="For weights, gradients, optimizer state and a step: 512MiB."),
    ],
    model: ModelName = "mlp",
    data: DataName = "digits",
    data_dir: DataDir = None,
    batch_size: Batch = 128,
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="O", help="Whose state counts.")] = "adam",
    max_gradient_error: Annotated[
        float | None,
        typer.Option("--max-gradient-error", metavar="E", min=0, help="Relative; 0: exact.", show_default=False),
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option("--max-slowdown", metavar="R", min=1, help="Of the step, at most.", show_default=False),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Write the recipe there.", show_default=False)
    ] = None,
    seed: Seed = 0,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> int:
    """Find the fastest way to train within a memory budget, and verify it by a step."""
    with quiet_stdout():
        import weft

        found = weft.plan_step(
            model,
            data,
            memory=memory,
            data_dir=data_dir,
            batch_size=batch_size,
            optimizer=optimizer,
            max_gradient_error=max_gradient_error,
            max_slowdown=max_slowdown,
            out=out,
            seed=seed,
            threads=threads,
            on_event=lambda event: stderr().print(f"measuring: {event}" if event != "verifying" else event),
        )
    if as_json:
        print_json(found)
    else:
        _show(found, out)
    return 0 if found["fits"] else FAILED


def _show(found: dict[str, Any], out: str | None) -> None:
    console = stdout()
    made = table("every block alike", "memory", "step", "gradient error", "fits", numbers=("memory", "step"))
    for row in found["options"]:
        made.add_row(*_cells(row["way"], row), "yes" if row["fits"] else "no")
    for label, figures in (("this plan, predicted", found["predicted"]), ("this plan, measured", found["measured"])):
        made.add_row(
            *_cells(label, figures), "yes" if figures["memory_bytes"] <= found["memory"] else "no", style="bold"
        )
    console.print(made)
    console.print()
    for sentence in found["sentences"]:
        console.print(sentence, soft_wrap=True)
    ways: dict[str, list[str]] = {}
    for block, way in found["blocks"].items():
        ways.setdefault(way, []).append(block)
    for way, blocks in ways.items():
        console.print(f"  {way}: {', '.join(blocks)}", soft_wrap=True)
    if out is not None:
        console.print(f"\nThe recipe is in {out}: weft fit {out}", soft_wrap=True)


def _cells(label: str, row: dict[str, Any]) -> list[str]:
    error = row["gradient_error"]
    told = "exact" if error < 1e-5 else f"{100 * error:.2g} %"
    return [label, size(int(row["memory_bytes"])), f"{number(1000 * row['step_seconds'], 3)} ms", told]
