"""``weft measure``: one training step taken apart."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli.output import AsJson, number, print_json, quiet_stdout, stdout, table
from weft.cli.shared import At, Batch, Convert, DataDir, DataName, ModelName, Seed, Tape, Threads, names, size

FIGURES = (("cosine", 6), ("relative_error", 3))


def measure(
    model: ModelName = "mlp",
    data: DataName = "digits",
    data_dir: DataDir = None,
    at: At = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", metavar="R", help="A rule.", show_default="plain backprop"),
    ] = None,
    tape: Tape = None,
    convert: Convert = None,
    batch_size: Batch = 128,
    seed: Seed = 0,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> int:
    """Take one training step apart: time, bytes kept by module, peak bytes, operations."""
    with quiet_stdout():
        import weft

        how: dict[str, Any] = {
            "data_dir": data_dir,
            "at": names(at),
            "batch_size": batch_size,
            "seed": seed,
            "threads": threads,
        }
        document = weft.measure_step(model, data, rule, tape=tape, convert=convert or (), **how)
    if as_json:
        print_json(document)
    else:
        _show(document)
    return 0


def _compare(document: dict[str, Any]) -> None:
    """The step with its tape or swapped layers beside the plain one."""
    plain, change, console = document["plain"], document["change"], stdout()
    made = table("", "plain", "changed", "less", numbers=("plain", "changed", "less"))
    for label, key in (
        ("kept for the way back, at most", "kept_bytes"),
        ("peak, gradients included", "peak_bytes"),
        ("peak, gradients allocated before", "peak_bytes_without_gradients"),
    ):
        before, after = plain[key], document[key]
        made.add_row(label, size(before), size(after), _times(before, after))
    time = change["time"]
    cells = [f"{number(1000 * time[key], 3)} ms" for key in ("baseline_seconds", "seconds")]
    made.add_row("step, CPU time", *cells, "-" if time["ratio"] is None else f"takes {time['ratio']:.2f} times")
    made.add_row(
        "operations of a step", *(f"{of['operations']['total']:,}" for of in (plain, document)),
        _times(plain["operations"]["total"], document["operations"]["total"]),
    )  # fmt: skip
    for rows, found in change["inference"].items():
        what, spent, time = f"inference of {rows} row{'s' * (rows != '1')}", found["operations"], found["time"]
        cells = [f"{number(1e6 * time[key], 3)} us" for key in ("baseline_seconds", "seconds")]
        less = "-" if time["ratio"] is None else f"takes {time['ratio']:.2g} times"
        made.add_row(f"{what}, CPU time", *cells, less)
        made.add_row(f"{what}, operations", *(f"{n:,}" for n in spent.values()), _times(*spent.values()))
    made.add_row("loss", *(number(change["loss"][key], 6) for key in ("plain", "changed")), "")
    console.print(made)
    console.print()
    errors = table("gradient against the plain one", "cosine", "relative error", numbers=("cosine", "relative error"))
    for name, found in (("(all)", change["gradient"]["whole"]), *change["gradient"]["layers"].items()):
        cells = ["-" if found[key] is None else f"{found[key]:.{digits}g}" for key, digits in FIGURES]
        errors.add_row(name or "(the model itself)", *cells)
    console.print(errors)
    for key, text in (("swapped", "swapped"), ("untrained", "without a gradient of their own")):
        if change[key]:
            console.print(f"{text}: {', '.join(change[key])}", soft_wrap=True)


def _times(before: float, after: float) -> str:
    return f"{before / after:.3g} times" if after else "all"


def _show(document: dict[str, Any]) -> None:
    console, counts = stdout(), document["operations"]
    if "change" in document:
        _compare(document)
        console.print()
    made = table("one step", "", numbers=("",))
    for label, key in (("forward", "forward_seconds"), ("backward", "backward_seconds"), ("step", "step_seconds")):
        seconds = document[key]
        made.add_row(f"{label}, CPU time", "-" if seconds is None else f"{number(1000 * seconds, 3)} ms")
    made.add_row("kept for the way back, at most", size(document["kept_bytes"]))
    made.add_row("peak, gradients included", size(document["peak_bytes"]))
    made.add_row("peak, gradients allocated before", size(document["peak_bytes_without_gradients"]))
    made.add_row("floating-point operations", f"{counts['total']:,}")
    made.add_row("  of these in the model's forward", f"{counts['forward']:,}")
    passes = document["passes"]
    made.add_row("passes forward, backward", f"{passes['forward']:.3g}, {passes['backward']:.3g}")
    made.add_row("products with a transposed weight", f"{passes['transposed']:,}")
    made.add_row("trained parameters", f"{document['parameters']:,}")
    console.print(made)
    if document["kept_by_module"]:
        kept = table("kept by", "bytes", "", numbers=("bytes", ""))
        total = max(1, document["kept_bytes"])
        for name, value in sorted(document["kept_by_module"].items(), key=lambda item: -item[1]):
            kept.add_row(name or "(the model itself)", size(value), f"{100 * value / total:.0f} %")
        console.print()
        console.print(kept)
    for key, why in document["why"].items():
        console.print(f"{key}: {why}")
    how = document["settings"]
    console.print(
        f"\n{how['model']} on {how['data']}, batch {how['batch_size']}, rule {how['rule'] or 'none (plain backprop)'}, "
        + f"tape {how['tape']}, " * (how["tape"] is not None)
        + f"{how['threads']} thread{'s' * (how['threads'] > 1)}; optimizer excluded"
    )
