"""MNIST networks with few weights beside the dense one: static masks, gradual pruning and RigL."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft.ops.sparse_masks import cosine_fraction, cubic_density, magnitude_mask, rigl_mask
from weft.sparsity import SparseLinear
from weft.sparsity.sparse import dense_gradients

SEEDS = tuple(int(seed) for seed in os.environ.get("WEFT_BENCH_SEEDS", "0,1,2").split(","))
ZEROS, EPOCHS, BATCH, EVERY = 0.95, 10, 128, 100  # masks change each so many steps, up to three quarters of all
WAYS = {  # learning rates of Adam, chosen on validation data among 0.001, 0.002 and 0.004
    "dense": 2e-3,
    "static, random": 4e-3,
    "gradual magnitude pruning": 1e-3,
    "RigL": 4e-3,
}


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Test accuracy of 784-500-500-10; hidden layers have 95 % zeros, at the end in the case of gradual pruning."""
    data, rows = weft.data.load("mnist"), []
    for mask, lr in WAYS.items():
        scores = [accuracy(mask, data, seed, lr) for seed in SEEDS]
        row = {"mask": mask, "zeros": 0.0 if mask == "dense" else ZEROS, "model": "784-500-500-10", "lr": lr}
        rows.append({**row, "mean": statistics.mean(scores), "worst": min(scores), "seeds": len(scores)})
        say(f"sparse_mnist: {rows[-1]}")
    return rows


def accuracy(mask: str, data: Any, seed: int, lr: float, *, part: str = "test") -> float:
    """Percent right after the last epoch."""
    model = weft.models.build("mlp:500x500", **data.form, seed=seed)
    hidden = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][:-1]
    density = 1.0 if mask == "gradual magnitude pruning" else 1 - ZEROS
    if mask != "dense":
        swap = SparseLinear.options(density=density, mask="random", rescale=True, seed=seed)
        weft.convert_(model, swap, where=hidden)
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = [index for epoch in range(EPOCHS) for index in data.batches(BATCH, seed=seed, epoch=epoch)]
    stop = 3 * len(steps) // 4
    for step, index in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / len(steps))) / 2
        optimizer.zero_grad()
        loss = F.cross_entropy
        x, y = data.x_train[index], data.y_train[index]
        changes = bool(layers) and 0 < step <= stop and step % EVERY == 0
        if mask == "RigL" and changes:
            with dense_gradients(model) as gradients:
                loss(model(x), y).backward()
            for layer, gradient in gradients.items():
                layer.set_mask_(rigl_mask(layer.weight, layer.mask, gradient, cosine_fraction(step, stop)), optimizer)
            continue  # such a step changes masks, not weights
        loss(model(x), y).backward()
        optimizer.step()
        if mask == "gradual magnitude pruning" and changes:
            left = cubic_density(step + EVERY, start=0, stop=stop, final=1 - ZEROS)
            for layer in layers:
                layer.set_mask_(magnitude_mask(layer.weight, left, layer.mask), optimizer)
    assert not layers or all(len(m.values) == round((1 - ZEROS) * m.shape.numel()) for m in layers)
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())
