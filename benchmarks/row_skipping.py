"""Products that skip rows against dense ones: down projection, up projection, and whole gated layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ratios import ratio
from weft.kernels.row_skipping import skip_rows, wanted_rows
from weft.ops.thresholded import ThresholdedGate, quantile_threshold
from weft.testing.gated import Gated

Say = Callable[[str], None]
INPUTS = 16  # that take turns, each with zeros in other places
CASES = [(width, zeros, 1) for width in (1024, 2048) for zeros in (0.5, 0.7, 0.8, 0.9)]
LOSING = [(256, 0.5, 1), (1024, 0.0, 1), (1024, 0.5, 8), (1024, 0.5, 64), (1024, 0.8, 64)]


def run(say: Say, rounds: int = 15) -> list[dict[str, Any]]:
    """A row for each product, width, share of zeros and number of tokens; hidden units are four times the width.

    ``ratio`` is to ``F.linear`` in float32, above 1 where skipping is faster, and ``of_ideal`` its part of
    ``1 / (1 - s)``; ``dense_bf16`` the same ratio of ``F.linear`` in bfloat16, ``bf16`` of skipping in bfloat16 to
    that, and ``gather`` of what torch itself can do: the product of the rows that are not zero, taken out by an index
    (one token).
    """
    rows = []
    with torch.no_grad():
        for width, zeros, tokens in [*CASES, *LOSING]:
            for case, measured in (("down", _down), ("up", _up), ("gated layer", _layer)):
                found = measured(width, zeros, tokens, rounds)
                row = {"case": case, "width": width, "zeros": zeros, "tokens": tokens, **found}
                say(f"row_skipping: {row}")
                rows.append(row)
    return rows


def _hidden(width: int, zeros: float, tokens: int) -> list[Tensor]:
    shape = tokens, 4 * width
    return [torch.randn(shape).masked_fill(torch.rand(shape) < zeros, 0) for _ in range(INPUTS)]


def _figures(plain: Any, half: Any, mine: Any, mine_half: Any, zeros: float, rounds: int) -> dict[str, Any]:
    found, other = ratio(plain, mine, rounds=rounds), ratio(half, mine_half, rounds=rounds)
    return {
        "ratio": found["ratio"],
        "of_ideal": found["ratio"] * (1 - zeros),
        "low": found["low"],
        "high": found["high"],
        "microseconds": 1e6 * found["seconds"],
        "dense_microseconds": 1e6 * found["plain_seconds"],
        "dense_bf16": ratio(plain, half, rounds=rounds)["ratio"],
        "bf16": other["ratio"],
        "bf16_of_ideal": other["ratio"] * (1 - zeros),
    }


def _down(width: int, zeros: float, tokens: int, rounds: int) -> dict[str, Any]:
    weight = torch.randn(width, 4 * width)
    rows, half = weight.t().contiguous(), weight.bfloat16()
    half_rows = half.t().contiguous()
    x = _hidden(width, zeros, tokens)
    y = [h.bfloat16() for h in x]

    def gather(i: int) -> Tensor:
        h = x[i % INPUTS][0]
        kept = h.nonzero().squeeze(1)
        return h[kept] @ rows[kept]

    def dense(i: int) -> Tensor:
        return F.linear(x[i % INPUTS], weight)

    found = _figures(
        dense,
        lambda i: F.linear(y[i % INPUTS], half),
        lambda i: skip_rows(x[i % INPUTS], rows),
        lambda i: skip_rows(y[i % INPUTS], half_rows),
        zeros,
        rounds,
    )
    return found | {"gather": ratio(dense, gather, rounds=rounds)["ratio"] if tokens == 1 else None}


def _up(width: int, zeros: float, tokens: int, rounds: int) -> dict[str, Any]:
    weight, gates = torch.randn(4 * width, width), _hidden(width, zeros, tokens)
    half, half_gates = weight.bfloat16(), [g.bfloat16() for g in gates]
    x = [torch.randn(tokens, width) for _ in range(INPUTS)]
    y = [t.bfloat16() for t in x]
    found = _figures(
        lambda i: gates[i % INPUTS] * F.linear(x[i % INPUTS], weight),
        lambda i: half_gates[i % INPUTS] * F.linear(y[i % INPUTS], half),
        lambda i: wanted_rows(x[i % INPUTS], gates[i % INPUTS], weight),
        lambda i: wanted_rows(y[i % INPUTS], half_gates[i % INPUTS], half),
        zeros,
        rounds,
    )
    return found | {"gather": None}


def _layer(width: int, zeros: float, tokens: int, rounds: int) -> dict[str, Any]:
    """A layer as it is swapped: the gate's product is dense, so that the ideal is ``3 / (1 + 2 (1 - s))``."""
    dense, x = Gated(width, 4 * width), [torch.randn(tokens, width) for _ in range(INPUTS)]
    gates = torch.cat([dense.act_fn(dense.gate_proj(t)) for t in (x if tokens == 1 else x[:2])])
    threshold = quantile_threshold(gates.abs(), zeros)[None]
    mine = ThresholdedGate(copy.deepcopy(dense), threshold=threshold, zeros=zeros)
    half = copy.deepcopy(dense).bfloat16()
    mine_half = ThresholdedGate(copy.deepcopy(half), threshold=threshold, zeros=zeros)
    y = [t.bfloat16() for t in x]

    def of(layer: nn.Module, inputs: list[Tensor]) -> Callable[[int], Tensor]:
        return lambda i: layer(inputs[i % INPUTS])

    found = _figures(of(dense, x), of(half, y), of(mine, x), of(mine_half, y), zeros, rounds)
    ideal = 3 / (1 + 2 * (1 - zeros))
    return found | {
        "of_ideal": found["ratio"] / ideal,
        "bf16_of_ideal": found["bf16"] / ideal,
        "gather": None,
    }
