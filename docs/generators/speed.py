"""Tables and charts of the layers that skip work: when each pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from generators.charts import SCRIPT, lines
from generators.text import escape, table

Row = dict[str, Any]
LOAD = f'<script src="{SCRIPT}"></script>\n\n'  # before a chart; a page that has it twice loads it once


def sparse(rows: list[Row]) -> str:
    """A training step by the part of zeros."""
    drawn = [row for row in rows if row["case"].startswith("linear")]
    said = (
        "A training step (forward, the gradients of input, weights and bias, every transposition) of random masks: how "
        "many times faster than the dense layer in float32, than the same in bfloat16, and than `torch.sparse`'s CSR."
    )
    header = ["case", "zeros", "to float32", "to bfloat16", "to torch CSR", "step"]
    made = [
        [row["case"], f"{100 * row['zeros']:g} %", *_ratios(row, "ratio", "to_bfloat16", "to_torch_csr"),
         f"{row['milliseconds']:.2f} ms"]
        for row in rows
    ]  # fmt: skip
    charts = [
        lines(_series(drawn, "case", lambda row: 100 * (1 - row["zeros"]), key), title, "weights that are left, %", y)
        for key, title, y in (
            ("ratio", "Sparse linear layer against dense float32", "times faster"),
            ("to_bfloat16", "Sparse linear layer against dense bfloat16", "times faster"),
        )
    ]
    return "\n".join([said, "", LOAD, *charts, table(header, made, header[1:])])


def fast_feed_forward(rows: list[Row]) -> str:
    """Inference by the width of the dense layer."""
    said = (
        "Inference, input and output 768: how many times faster one leaf is than the dense layer of all leaves' width, "
        "and than the same tree in plain PyTorch. Inputs rotate, so that a row's leaf is not in the cache. *Frozen* is "
        "the function that `FastFeedForward.frozen()` gives, in float32, and *into* the same with `out=`: for rows "
        "that come one by one, a module's call and a new tensor cost as much as the tree."
    )
    header = ["depth", "leaf", "width", "batch", "to float32", "frozen", "into", "to bfloat16", "to plain PyTorch"]
    header.append("call")
    made = [
        [*(str(row[key]) for key in ("depth", "leaf_width", "width", "batch")),
         *_ratios(row, "fp32_ratio", "frozen_ratio", "frozen_out_ratio", "bf16_ratio", "torch_ratio"),
         f"{row['seconds'] * 1e6:.1f} µs"]
        for row in rows
    ]  # fmt: skip
    ordered = sorted(rows, key=lambda row: row["width"])
    series = {
        f"batch {batch}, to {kind}": [(row["width"], row[key]) for row in ordered if row["batch"] == batch]
        for batch in (1, 64)
        for kind, key in (("float32", "fp32_ratio"), ("bfloat16", "bf16_ratio"))
    }
    chart = lines(series, "Fast feed-forward inference against dense layers", "width of all leaves", "times faster")
    return "\n".join([said, "", LOAD, chart, table(header, made, header)])


def fast_feed_forward_mnist(rows: list[Row]) -> str:
    """Accuracy of trees of MNIST networks."""
    header = ["depth", "leaf", "training", "dense", "one leaf", "mixture", "leaves in use"]
    made = [
        [str(row["depth"]), str(row["leaf_width"]), escape(row["recipe"]),
         *(f"{row[key]:.2f} %" for key in ("dense", "hard", "mixture")), f"{row['leaves']:.1f}"]
        for row in rows
    ]  # fmt: skip
    said = (
        "MNIST, 784-W-10, test accuracy after ten epochs, mean of "
        f"{rows[0]['seeds']} seeds: a dense hidden layer, and a tree of the same training width."
    )
    return said + "\n\n" + table(header, made, [*header[:2], *header[3:]])


def sparse_mnist(rows: list[Row]) -> str:
    """Accuracy of sparse networks."""
    header = ["mask", "zeros", "test accuracy, mean", "worst", "to dense"]
    made = [
        [escape(row["mask"]), f"{100 * row['zeros']:g} %", f"{row['mean']:.2f} %", f"{row['worst']:.2f} %",
         f"{row['mean'] - rows[0]['mean']:+.2f}"]
        for row in rows
    ]  # fmt: skip
    said = f"MNIST, {rows[0]['model']}, test accuracy after the last epoch, {rows[0]['seeds']} seeds."
    return said + "\n\n" + table(header, made, header[1:])


def binary(rows: list[Row]) -> str:
    """Products of bits by size and batch."""
    said = (
        "Square layers n × n in eval mode, weights packed before, inputs packed in each call: how many times faster "
        "than `F.linear` in float32, and than an ordinary layer in bfloat16. *In turn* takes eight layers one after "
        "another, so that weights come from memory. *Convolution* takes images of as many channels as it gives, and "
        "counts bits of windows, to `nn.Conv2d`."
    )
    header = ["case", "way", "to float32", "to bfloat16", "call"]
    made = [
        [row["case"], row["way"], *_ratios(row, "ratio", "bfloat16"), f"{row['microseconds']:.1f} µs"] for row in rows
    ]
    drawn = [
        {**row, **_square(row["case"])} for row in rows if row["way"] == "xnor, layer" and "turn" not in row["case"]
    ]
    series = {f"batch {b}": [(r["n"], r["ratio"]) for r in drawn if r["batch"] == b] for b in (1, 8, 64, 512)}
    chart = lines(series, "Products of bits against dense float32", "n", "times faster")
    return "\n".join([said, "", LOAD, chart, table(header, made, header[2:])])


def softmax(rows: list[Row]) -> str:
    """Long rows and short."""
    said = (
        "How many times faster than `torch.softmax`; all allocate what they return. *Fastest* is what "
        "`weft.ops.softmax` takes by default: torch's where the loops would lose."
    )
    header = ["rows × length", "way", "to torch", "call"]
    made = [[row["case"], row["way"], *_ratios(row, "ratio"), f"{row['milliseconds']:.3g} ms"] for row in rows]
    single = [row for row in rows if row["case"].startswith("1 x ")]
    ways = ("two-pass", "online", "fastest", "fastest, and back")
    series = {w: sorted((float(r["case"][4:]), r["ratio"]) for r in single if r["way"] == w) for w in ways}
    chart = lines(series, "One row, against torch.softmax", "elements", "times faster")
    return "\n".join([said, "", LOAD, chart, table(header, made, header[2:])])


def row_skipping(rows: list[Row]) -> str:
    """Products that leave out what is multiplied by zero."""
    said = (
        "Decoding: *down* leaves out the rows of a down projection that zeros would multiply, *up* computes the "
        "wanted hidden units alone, *gated layer* is the whole layer with a dense gate. Hidden units are four times "
        "the width. Ratios to the dense product in float32, as a part of the ideal, and for bfloat16 to the dense "
        "one in bfloat16."
    )
    header = ["case", "width", "zeros", "tokens", "to float32", "of the ideal", "bfloat16", "torch gather", "call"]
    made = [
        [row["case"], str(row["width"]), f"{100 * row['zeros']:g} %", str(row["tokens"]),
         *_ratios(row, "ratio", "of_ideal", "bf16", "gather"), f"{row['microseconds']:.0f} µs"]
        for row in rows
    ]  # fmt: skip
    drawn = [row for row in rows if row["tokens"] == 1 and row["width"] >= 1024]
    named = [{**row, "name": f"{row['case']}, width {row['width']}"} for row in drawn]
    series = {
        name: sorted(points)
        for name, points in _series(named, "name", lambda row: 100 * (1 - row["zeros"]), "ratio").items()
    }
    chart = lines(series, "Skipping against dense float32, one token", "activations that are left, %", "times faster")
    return "\n".join([said, "", LOAD, chart, table(header, made, header[1:])])


def experts(rows: list[Row]) -> str:
    """Mixtures of experts against loops and dense layers."""
    said = (
        "A training step (forward and backward). *To the loop*: how many times faster than a loop over the experts "
        "with a weight of its own for each; *dense* has the hidden units that are active for a token. In float32 the "
        "products are loops of this library's where the CPU has AVX-512, else torch's, one for each expert."
    )
    header = ["case", "way", "times faster", "step"]
    made = [
        [escape(row["case"]), escape(row["way"]), *_ratios(row, "ratio"), f"{row['seconds'] * 1e3:.1f} ms"]
        for row in rows
    ]
    drawn = [row for row in rows if (row.get("experts"), row.get("hidden")) == (64, 256)]
    at = {(row["dtype"], row["way"], row["tokens"]): row for row in drawn}
    tokens = sorted({row["tokens"] for row in drawn})
    series = {f"to the loop, {d}": [(t, at[d, "ours", t]["ratio"]) for t in tokens] for d in ("float32", "bfloat16")}
    for name, way in (("to dense, float32", "dense"), ("to dense, bfloat16", "dense bf16")):
        dtype = name.split()[-1]
        series[name] = [(t, at[dtype, way, t]["seconds"] / at[dtype, "ours", t]["seconds"]) for t in tokens]
    chart = lines(series, "64 experts of 256 units, top 2: a training step", "tokens", "times faster")
    return "\n".join([said, "", LOAD, chart, table(header, made, header[2:])])


def _square(case: str) -> dict[str, int]:
    size, _, batch = case.partition(", batch ")
    return {"n": int(size.partition("x")[0]), "batch": int(batch)}


def _series(rows: Sequence[Row], name: str, x: Callable[[Row], float], y: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row[name], []).append((x(row), row[y]))
    return found


def _ratios(row: Row, *keys: str) -> list[str]:
    return ["–" if row.get(key) is None else f"{row[key]:.3g}" for key in keys]
