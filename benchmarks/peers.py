"""Direct feedback alignment beside biotorch's, on MNIST: ``pip install --no-deps biotorch==0.0.16`` first."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from benchmarks.steps import net
from weft import data, measure

EPOCHS, BATCH, LR = 10, 128, 1e-3


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Test error and CPU seconds an epoch, both trained by the same loop: Adam 1e-3, cosine, batch 128, 10 epochs."""
    warnings.filterwarnings("ignore", category=UserWarning)  # biotorch registers hooks in a deprecated way
    from biotorch.module.biomodule import BioModule

    def weft_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Any]]:
        rule = weft.create("direct-feedback-alignment", net())
        return rule.model, rule.step

    def biotorch_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Any]]:
        model = BioModule(net(), mode="dfa", output_dim=10)

        def step(x: Tensor, y: Tensor) -> None:
            F.cross_entropy(model(x, targets=y, loss_function=F.cross_entropy), y).backward()

        return model, step

    def plain_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Any]]:
        model = net()
        return model, lambda x, y: F.cross_entropy(model(x), y).backward()

    made = {"weft DFA": weft_step, "biotorch DFA": biotorch_step, "plain backprop": plain_step}
    mnist = data.load("mnist")
    rows = []
    for name, make in made.items():
        error, seconds = train(*make(), mnist)
        row: dict[str, Any] = {"method": name, "test_error": error, "seconds_per_epoch": seconds}
        for size in (64, 512):
            batches = itertools.cycle([(torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,))) for _ in range(8)])
            steps = []
            for maker in (make, plain_step):
                model, step = maker()

                def once(x: Tensor, y: Tensor, model: nn.Module = model, step: Any = step) -> None:
                    model.zero_grad()
                    step(x, y)

                steps.append(once)
            row[f"step_ratio_batch_{size}"] = measure.step_ratio(steps[0], steps[1], rounds=60, inputs=batches).ratio
        say(f"peers: {row}")
        rows.append(row)
    return rows


def train(model: nn.Module, step: Callable[[Tensor, Tensor], Any], mnist: Any) -> tuple[float, float]:
    """Test error after the last epoch, and CPU seconds an epoch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
    total, done = EPOCHS * math.ceil(len(mnist.y_train) / BATCH), 0
    start = time.process_time()
    for epoch in range(EPOCHS):
        for index in data.batches(len(mnist.y_train), BATCH, seed=0, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * done / total))
            optimizer.zero_grad()
            step(mnist.x_train[index], mnist.y_train[index])
            optimizer.step()
            done += 1
    seconds = (time.process_time() - start) / EPOCHS
    model.eval()
    with torch.no_grad():
        wrong = model(mnist.x_test).argmax(1) != mnist.y_test
    return float(wrong.double().mean()), seconds
