"""A training step of sparse layers against dense ones: forward, every gradient, and all that turns tensors round."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import weft
from benchmarks.ratios import ratio
from weft.sparsity.sparse import SparseLayer

ROUNDS = int(os.environ.get("WEFT_BENCH_ROUNDS", "15"))
INPUTS = 4
ZEROS = (0.8, 0.9, 0.95, 0.99)
LINEAR = ((1024, 1024, 128), (4096, 1024, 512), (1024, 1024, 8), (1024, 1024, 32), (1024, 1024, 512), (128, 128, 128))
CONV = ((64, 64, 3, 28, 32), (256, 256, 3, 14, 32), (256, 256, 1, 14, 32), (512, 512, 3, 7, 32))
TARGETS = {
    (1024, 1024, 128): {0.9: (1.9, 3.0), 0.95: (3.3, 5.0), 0.99: (6.5, 12.0)},
    (4096, 1024, 512): {0.9: (1.3, 2.0), 0.95: (2.3, 4.0), 0.99: (5.5, 9.0)},
}  # at least, aim


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each shape and part of zeros: how many times faster than dense float32, bfloat16, and torch's own CSR."""
    rows = []
    for outputs, inputs, batch in LINEAR:
        dense = nn.Linear(inputs, outputs)
        shape = f"linear {outputs}x{inputs}, batch {batch}"
        for zeros in ZEROS:
            layer = weft.sparsity.SparseLinear.from_dense(dense, density=1 - zeros, mask="random")
            targets = TARGETS.get((outputs, inputs, batch), {}).get(zeros, (None, None))
            rows.append(_row(shape, zeros, dense, layer, (batch, inputs), (batch, outputs), targets))
            say(f"sparse: {rows[-1]}")
    for outputs, inputs, kernel, size, batch in CONV:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        shape = f"conv {kernel}x{kernel}, {inputs} to {outputs} channels, {size}x{size}, batch {batch}"
        for zeros in ZEROS:
            sparse = weft.sparsity.SparseConv2d.from_dense(conv, density=1 - zeros, mask="random")
            shapes = (batch, inputs, size, size), (batch, outputs, size, size)
            rows.append(_row(shape, zeros, conv, sparse, *shapes, (None, None)))
            say(f"sparse: {rows[-1]}")
    return rows


def _row(
    case: str, zeros: float, dense: nn.Module, layer: SparseLayer, x: tuple[int, ...], y: tuple[int, ...],
    targets: tuple[float | None, float | None],
) -> dict[str, Any]:  # fmt: skip
    """Float32 throughout, but for the step of the dense layer in bfloat16, with inputs and weights in bfloat16."""
    mine, plain = _step(layer, x, y, torch.float32), _step(dense, x, y, torch.float32)
    half = _step(copy.deepcopy(dense).to(torch.bfloat16), x, y, torch.bfloat16)
    found = ratio(plain, mine, rounds=ROUNDS)
    row: dict[str, Any] = {"case": case, "zeros": zeros, "ratio": found["ratio"], "low": found["low"]}
    row |= {"high": found["high"], "at_least": targets[0], "aim": targets[1]}
    row |= {"milliseconds": found["seconds"] * 1e3, "dense_milliseconds": found["plain_seconds"] * 1e3}
    row["to_bfloat16"] = ratio(half, mine, rounds=ROUNDS)["ratio"]
    torch_csr = ratio(_csr_step(layer, x, y), mine, rounds=ROUNDS)["ratio"] if isinstance(dense, nn.Linear) else None
    return {**row, "to_torch_csr": torch_csr}


def _step(layer: nn.Module, x: tuple[int, ...], y: tuple[int, ...], dtype: torch.dtype) -> Callable[[int], object]:
    """Forward, and the gradients of the input and of every parameter."""
    xs = [torch.randn(x, dtype=dtype).requires_grad_() for _ in range(INPUTS)]
    gs = [torch.randn(y, dtype=dtype) for _ in range(INPUTS)]
    weights = list(layer.parameters())

    def step(i: int) -> object:
        return torch.autograd.grad(layer(xs[i % INPUTS]), (xs[i % INPUTS], *weights), gs[i % INPUTS])

    return step


class _Csr(torch.autograd.Function):
    """The same three products and the bias by `torch.sparse`, with both indices made beforehand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor, index: list[Tensor], shape: torch.Size) -> Tensor:
        starts, columns, *_ = index
        weight = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
        ctx.save_for_backward(x, values, weight)
        ctx.index = index
        return (weight @ x.T).T + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), (x, values, weight) = grads, ctx.saved_tensors
        _, _, starts, rows, order = ctx.index
        size = weight.shape[1], weight.shape[0]
        turned = torch.sparse_csr_tensor(starts, rows, values[order], size, check_invariants=False)
        of_x = (turned @ grad.T).T
        of_values = torch.sparse.sampled_addmm(weight, grad.T, x, beta=0.0).values()
        return of_x, of_values, grad.sum(0), None, None


def _csr_step(layer: SparseLayer, x: tuple[int, ...], y: tuple[int, ...]) -> Callable[[int], object]:
    index = [getattr(layer, name) for name in layer.index_names]
    xs, gs = [torch.randn(x).requires_grad_() for _ in range(INPUTS)], [torch.randn(y) for _ in range(INPUTS)]
    values, bias = layer.values, layer.bias

    def step(i: int) -> object:
        out = _Csr.apply(xs[i % INPUTS], values, bias, index, layer.shape)
        return torch.autograd.grad(out, (xs[i % INPUTS], values, bias), gs[i % INPUTS])

    return step
