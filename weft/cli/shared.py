"""Options that several commands take, and how sizes are shown."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Option(
        "--model", metavar="M", help="mlp, mlp:500x500, convnet, resnet, char-transformer, gcn, or file.py:function."
    ),
]
DataName = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="D",
        help="digits, mnist, fashion-mnist, kmnist, cifar10-small, tinyshakespeare, cora, citeseer, or file.npz.",
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", metavar="DIR", help="Where data sets are.", show_default="$WEFT_DATA"),
]
Tape = Annotated[
    str | None,
    typer.Option("--tape", metavar="T", help="What packs kept tensors: quantise:bits=2, 'a | b'.", show_default=False),
]
Convert = Annotated[
    str | None,
    typer.Option(
        "--convert", metavar="L", help="Layers to swap: few-bit-activation:bits=3, 'a + b'.", show_default=False
    ),
]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="a,b", help="Modules to cut behind, for rules with stages.", show_default=False),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a step.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**60, help="Of weights, batches and whatever is drawn.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of torch.")]


def names(given: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def size(value: int | None) -> str:
    """Bytes for a table: 1.2 MB."""
    if value is None:
        return "-"
    amount = float(value)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"
