"""``weft compare``: rules side by side on the same model and data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cards import trained_with
from weft.cli.output import FAILED, WIDE, AsJson, Live, number, print_json, quiet_stdout, stderr, stdout, table
from weft.cli.shared import At, Batch, DataDir, DataName, ModelName, Seed, Threads, names, size


def compare(
    model: ModelName = "mlp",
    data: DataName = "digits",
    data_dir: DataDir = None,
    at: At = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", metavar="a,b,c|all", help="Which rules.", show_default="eight of them"),
    ] = None,
    tape: Annotated[
        list[str] | None,
        typer.Option(
            "--tape", metavar="T", help="Run each rule under this tape too; several times.", show_default=False
        ),
    ] = None,
    convert: Annotated[
        list[str] | None,
        typer.Option(
            "--convert", metavar="L", help="Run each with these layers too; several times.", show_default=False
        ),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training part.")] = 10,
    batch_size: Batch = 128,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, counted up from --seed.")] = 1,
    threads: Threads = 1,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="O", help="In place of each rule's own.", show_default=False),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="X", help="Learning rate, in place of each rule's own.", show_default=False),
    ] = None,
    same_optimizer: Annotated[
        bool, typer.Option("--same-optimizer", help="Backprop's optimizer, learning rate and schedule for all.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Write compare.json, recipes and report.html there.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Train the same model under several rules; show what each reaches and costs."""
    with quiet_stdout(), _Live() as live:
        import weft

        document = weft.compare(
            model,
            data,
            rules,
            tape=tape or (),
            convert=convert or (),
            data_dir=data_dir,
            at=names(at),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            seeds=seeds,
            threads=threads,
            optimizer=optimizer,
            lr=lr,
            same_optimizer=same_optimizer,
            out=out,
            on_event=live.show,
        )
    if as_json:
        print_json(document)
    else:
        _table(document)
        _say_where(live.report, out)
    if live.report["error"]:
        stderr().print(f"{out} has the figures, but no page: {live.report['error']}", soft_wrap=True)
        return FAILED
    return FAILED if any(run["status"] == "error" for run in document["runs"]) else 0


class _Live(Live):
    """Progress on stderr: a bar in a terminal, a line for each run elsewhere.

    Attributes:
        report: where the page is, or why there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: dict[str, str | None] = {"path": None, "error": None}

    def show(self, event: dict[str, Any]) -> None:
        """One event of :func:`weft.compare`."""
        kind = event["event"]
        if kind == "run":
            name = f"{event['rule']}, seed {event['seed']}"
            self.progress.reset(self.task, description=name, total=None, note="measuring a step")
        elif kind == "step":
            self.progress.update(self.task, completed=event["done"], total=event["total"])
        elif kind == "epoch":
            note = f"epoch {event['epoch']}  loss {event['loss']:.3f}"
            if event["validation_accuracy"] is not None:
                note += f"  validation {event['validation_accuracy']:.4f}"
            self.progress.update(self.task, note=note)
        elif kind == "done":
            record = event["record"]
            figure = f"validation {number(record['validation_accuracy'])}"
            line = figure if record["status"] == "ok" else f"{record['status']}: {record['error']}"
            if not self.console.is_terminal:
                self.console.print(f"{event['rule']}, seed {event['seed']}: {line}", soft_wrap=True)
        elif kind == "report":
            self.report = {key: event[key] for key in ("path", "error")}


def _say_where(report: dict[str, str | None], out: str | None) -> None:
    """The last line: where the page is, or how to get one."""
    if out is None:
        stdout().print("--out DIR keeps these figures and writes a page with charts.", soft_wrap=True)
    elif report["path"]:
        stdout().print(f"Figures in {out}; the page with charts:\n{report['path']}", soft_wrap=True)


def _table(document: dict[str, Any]) -> None:
    console, how = stdout(), document["settings"]
    wide, many = console.width >= WIDE, how["seeds"] > 1
    test = "test" if how["rows"]["test"] else "valid."
    columns = ["rule", f"{test} acc.", *["worst"] * many, "step x", "kept", "peak"]
    columns += ["cosine"] * (wide or not many) + ["own", "trained with"] * wide
    made = table(*columns, numbers=tuple(columns[1:]))
    made.columns[0].no_wrap = wide or max(map(len, how["rules"])) <= 25  # a long name gives way to the figures
    trained: dict[str, list[str]] = {}
    for name in how["rules"]:
        runs = [run for run in document["runs"] if run["rule"] == name]
        good = [run for run in runs if run["status"] == "ok"]
        if not good:
            made.add_row(name, runs[0]["status"], *["-"] * (len(columns) - 2), style="red")
            continue
        cells = _cells(good, "accuracy" if how["rows"]["test"] else "validation_accuracy")
        made.add_row(name, *(cells[column.removeprefix(f"{test} ")] for column in columns[1:]))
        trained.setdefault(cells["trained with"], []).append(name)
    console.print(made)
    plural = {key: "s" * (how[key] > 1) for key in ("epochs", "seeds", "threads")}
    console.print(
        f"\n{how['model']} on {how['data']}: {how['rows']['train']} training rows, "
        f"{how['epochs']} epoch{plural['epochs']}, batch {how['batch_size']}, {how['seeds']} seed{plural['seeds']}, "
        f"{how['threads']} thread{plural['threads']}, accuracy after the last epoch.\n"
        "step x: a step's time, to backprop's, without the optimizer. kept: bytes kept for the way back, at most. "
        "peak: bytes allocated in a step, gradients included, at most."
        + " cosine: with the exact gradient, after the first and the last epoch." * ("cosine" in columns)
        + " own: numbers that the rule holds beside the model." * wide
    )
    if not wide:
        console.print("".join(f"Trained with {key}: {', '.join(names)}.\n" for key, names in trained.items()).rstrip())
    own = sorted({run["rule"] for run in document["runs"] if run["initial_weights"] == "own"})
    if own:
        console.print(f"Initial weights: own for {', '.join(own)}; the same for all others.")
    for run in document["runs"]:
        for concern in run["concerns"]:
            stderr().print(f"{run['rule']}, seed {run['seed']}: {concern}", soft_wrap=True)
        if run["status"] != "ok":
            stderr().print(f"{run['rule']}, seed {run['seed']}: {run['status']}: {run['error']}", soft_wrap=True)


def _cells(runs: list[dict[str, Any]], key: str) -> dict[str, str]:
    """What a row shows of the runs of one rule, by column."""
    reached, first = [run[key] for run in runs], runs[0]
    return {
        "acc.": _percent(sum(reached) / len(reached)),
        "worst": _percent(min(reached)),
        "step x": number(first["step_ratio"], 3),
        "kept": size(first["kept_bytes"]),
        "peak": size(first["peak_bytes"]),
        "cosine": _cosine(runs),
        "own": _count(first["extra_parameters"]),
        "trained with": trained_with(first["defaults"]) or "itself",
    }


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return str(value) if value < 10_000 else f"{value / 1000:.0f}k" if value < 1_000_000 else f"{value / 1e6:.1f}M"


def _cosine(runs: list[dict[str, Any]]) -> str:
    found = [run["cosine_to_exact"] for run in runs if run["cosine_to_exact"]]
    if not found:
        return "-"
    first, last = (sum(f[key] for f in found) / len(found) for key in ("first", "last"))
    return f"{first:.2f} {last:.2f}"
