"""``weft compress``: a finished run made smaller or faster, measured before and after."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli.output import AsJson, number, print_json, quiet_stdout, stdout, table
from weft.cli.shared import DataDir, Threads, size


def compress(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run (weft fit --out).")],
    method: Annotated[
        str, typer.Option("--method", metavar="M", help="What compresses it, with options: chess:sparsity=0.5.")
    ] = "chess",
    calibration: Annotated[
        int, typer.Option("--calibration", metavar="N", min=1, help="Rows of the training data, at most.")
    ] = 1024,
    data_dir: DataDir = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> int:
    """Compress the trained model of a run; accuracy, operations, bytes and time before and after."""
    with quiet_stdout():
        import weft

        found = weft.compress_run(run, method, calibration=calibration, data_dir=data_dir, threads=threads)
    if as_json:
        print_json(found)
    else:
        _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    console = stdout()
    made = table("", "before", "after", "", numbers=("before", "after"))
    accuracy = found["accuracy"]
    if accuracy["before"] is not None:
        made.add_row("test accuracy", *(f"{100 * accuracy[key]:.2f} %" for key in ("before", "after")), "")
    counts, bytes_ = found["operations"], found["bytes"]
    made.add_row("operations of a row", *(f"{counts[key]:,.0f}" for key in ("before", "after")), _less(counts))
    made.add_row("weights read for a token", *(size(int(bytes_[key])) for key in ("before", "after")), _less(bytes_))
    for rows, time in found["time"].items():
        cells = [f"{number(1e6 * time[key], 3)} us" for key in ("before", "after")]
        ratio = "-" if time["ratio"] is None else f"{time['ratio']:.2f} times as fast"
        made.add_row(f"inference of {rows} row{'s' * (rows != '1')}, CPU time", *cells, ratio)
    console.print(made)
    console.print()
    layers = table("layer", "zeros", "operations", "of", numbers=("zeros", "operations", "of"))
    for layer in found["report"]["layers"]:
        layers.add_row(
            layer["name"], f"{100 * layer['zeros']:.1f} %", f"{layer['operations_after']:,.0f}",
            f"{layer['operations_before']:,.0f}",
        )  # fmt: skip
    console.print(layers)
    how = found["settings"]
    console.print(
        f"\n{how['method']} on {how['folder']}, calibrated on {how['calibration']:,} rows of the training data; "
        "operations of a layer are the mean for a token",
        soft_wrap=True,
    )


def _less(pair: dict[str, float]) -> str:
    return f"{pair['before'] / pair['after']:.3g} times less" if pair["after"] else "all"
