"""Products with weights of one bit against ordinary linear layers: inputs packed in each call, weights before."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ratios import ratio
from weft.kernels.signs import pack_signs, sign_product
from weft.precision.binary_conv2d import BinaryConv2d
from weft.precision.binary_linear import BinaryLinear

ROUNDS = int(os.environ.get("WEFT_BENCH_ROUNDS", "15"))
INPUTS = 16
SIZES, BATCHES = (256, 1024, 2048, 4096), (1, 8, 64, 512)
IMAGES = [  # channels, side, filter, batch
    *((64, 56, 3, 1), (128, 28, 3, 1), (256, 14, 3, 1), (512, 7, 3, 1), (256, 14, 3, 32), (256, 14, 1, 1)),
    (16, 32, 3, 32),  # where channels do not fill a word
]
TARGETS = {1024: (18.0, 25.0), 2048: (40.0, 50.0), 4096: (55.0, 80.0)}  # at batch 1: at least, aim


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Square layers n x n, in eval mode under `torch.inference_mode`, each called as a user calls it.

    Ways: binary inputs by the layer's call, by what its ``frozen()`` gives and by the operator alone; float inputs by
    the layer; a stack of layers in turn, whose weights come from memory each time as in a deep model, where one layer's
    alone stay in the caches; and convolutions, of as many channels as they give.
    """
    rows = []
    for n in SIZES:
        for batch in BATCHES:
            rows += _cases(n, batch, say)
        rows.append(_stack(n, say))
    return rows + [_convolution(*case, say) for case in IMAGES]


def _cases(n: int, batch: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    dense = nn.Linear(n, n).eval()
    half = copy.deepcopy(dense).bfloat16()
    binary, weights = (BinaryLinear.from_dense(dense, binary_inputs=b).eval() for b in (True, False))
    x = [torch.randn(batch, n) for _ in range(INPUTS)]
    few = [t.bfloat16() for t in x]
    packed, scale, w, b = (
        pack_signs(dense.weight),
        dense.weight.abs().mean(1),
        dense.weight.detach(),
        dense.bias.detach(),
    )
    with torch.inference_mode():
        binary(x[0])
        matrix = binary.frozen()

    def plain(i: int) -> Tensor:
        return F.linear(x[i % INPUTS], w, b)

    ways: dict[str, Callable[[int], Tensor]] = {
        "xnor, layer": lambda i: binary(x[i % INPUTS]),
        "xnor, frozen": lambda i: matrix(x[i % INPUTS]),
        "xnor, operator": lambda i: torch.ops.weft.sign_product(x[i % INPUTS], packed, scale, b, True),
        "xnor, function": lambda i: sign_product(x[i % INPUTS], packed, scale, b, factored=True),
        "binary weights, layer": lambda i: weights(x[i % INPUTS]),
    }
    bfloat16 = _ratio(plain, lambda i: half(few[i % INPUTS]))
    rows = []
    for way, call in ways.items():
        wanted = TARGETS.get(n, (None, None)) if batch == 1 and way.startswith("xnor") else (None, None)
        rows.append(_row(f"{n}x{n}, batch {batch}", way, _ratio(plain, call), bfloat16, wanted))
        say(f"binary: {rows[-1]}")
    return rows


def _stack(n: int, say: Callable[[str], None], layers: int = 8) -> dict[str, Any]:
    dense = [nn.Linear(n, n).eval() for _ in range(layers)]
    half = [copy.deepcopy(layer).bfloat16() for layer in dense]
    binary = [BinaryLinear.from_dense(layer, binary_inputs=True).eval() for layer in dense]
    x = [torch.randn(1, n) for _ in range(INPUTS)]
    few = [t.bfloat16() for t in x]

    def plain(i: int) -> Tensor:
        layer = dense[i % layers]
        return F.linear(x[i % INPUTS], layer.weight, layer.bias)

    bfloat16 = _ratio(plain, lambda i: half[i % layers](few[i % INPUTS]))
    found = _ratio(plain, lambda i: binary[i % layers](x[i % INPUTS]))
    row = _row(f"{layers} layers {n}x{n} in turn, batch 1", "xnor, layer", found, bfloat16, (None, None))
    say(f"binary: {row}")
    return row


def _convolution(channels: int, side: int, kernel: int, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    dense = nn.Conv2d(channels, channels, kernel, padding=kernel // 2).eval()
    half, binary = copy.deepcopy(dense).bfloat16(), BinaryConv2d.from_dense(dense, binary_inputs=True).eval()
    x = [torch.randn(batch, channels, side, side) for _ in range(INPUTS)]
    few = [t.bfloat16() for t in x]
    bfloat16 = _ratio(lambda i: dense(x[i % INPUTS]), lambda i: half(few[i % INPUTS]))
    found = _ratio(lambda i: dense(x[i % INPUTS]), lambda i: binary(x[i % INPUTS]))
    case = f"{kernel}x{kernel}, {channels} channels, {side}x{side} pixels, batch {batch}"
    row = _row(case, "xnor, convolution", found, bfloat16, (None, None))
    say(f"binary: {row}")
    return row


def _ratio(plain: Callable[[int], Tensor], mine: Callable[[int], Tensor]) -> dict[str, float]:
    with torch.inference_mode():  # around the calls alone: weights made inside would not count their changes
        return ratio(plain, mine, rounds=ROUNDS, shortest=0.01)


def _row(
    case: str, way: str, found: dict[str, float], half: dict[str, float], wanted: tuple[float | None, float | None]
) -> dict[str, Any]:
    """``bfloat16`` is how many times faster it is than an ordinary layer in bfloat16."""
    row: dict[str, Any] = {
        "case": case,
        "way": way,
        "ratio": found["ratio"],
        "low": found["low"],
        "high": found["high"],
    }
    row |= {"at_least": wanted[0], "aim": wanted[1], "bfloat16": half["seconds"] / found["seconds"]}
    return row | {"microseconds": found["seconds"] * 1e6, "dense_microseconds": found["plain_seconds"] * 1e6}
