"""Networks and figures on which claims about kept bytes are measured."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.measure import peak_bytes, step_ratio
from weft.models.transformer import CharTransformer
from weft.session import Tape, kept


def transformer(
    seed: int, *, width: int = 256, layers: int = 6, length: int = 256, batch: int = 8, classes: int = 65
) -> tuple[nn.Module, Tensor, Tensor]:
    """A decoder-only transformer with 4 heads, token ids ``[B, T]`` and labels ``[B, T]``, all drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharTransformer(classes, width=width, heads=4, layers=layers, context=length)
    x, y = (torch.randint(classes, (batch, length), generator=generator) for _ in range(2))
    return model, x, y


def backward(model: nn.Module, x: Tensor, y: Tensor, tape: Tape | None = None) -> list[Tensor]:
    """The gradients of one step of cross-entropy, in the order of the parameters, perhaps under a tape."""
    for p in model.parameters():
        p.grad = None
    if tape is None:
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    else:
        with tape.on(model):
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def layer_errors(model: nn.Module, found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """The relative error of the gradient of each module's own parameters, in norm, by the module's name."""
    layers: dict[str, tuple[float, float]] = {}
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, a, b in zip(named, found, wanted, strict=True):
        off, size = layers.get(name.rpartition(".")[0], (0.0, 0.0))
        both = float((a - b).double().square().sum()), float(b.double().square().sum())
        layers[name.rpartition(".")[0]] = off + both[0], size + both[1]
    return {name: (off / size) ** 0.5 for name, (off, size) in layers.items() if size}


def savings(
    tape: Tape, seed: int, *, rounds: int = 0, clock: Callable[[], float] = time.thread_time, **size: int
) -> dict[str, Any]:
    """A transformer's step under a tape beside the plain step.

    Returns:
        ``kept``, ``peak`` (gradients allocated before; both plain to changed), ``error`` (of the gradients, the mean
        over layers), ``identical`` (gradients, bit for bit), and with ``rounds``, ``time`` (changed to plain).
    """
    model, x, y = transformer(seed, **size)
    wanted = [g.clone() for g in backward(model, x, y)]
    with kept(model) as count:
        backward(model, x, y)
        plain = count.peak_bytes
    with kept(model) as count:
        found = [g.clone() for g in backward(model, x, y, tape)]
        changed = count.peak_bytes
    parameters = list(model.parameters())
    peaks = [
        peak_bytes(functools.partial(_add, model, x, y, t), parameters=parameters, gradients=False)
        for t in (None, tape)
    ]
    peaks[1] += tape.outside_bytes
    result: dict[str, Any] = {
        "kept": plain / max(1, changed),
        "peak": peaks[0] / peaks[1],
        "error": statistics.mean(layer_errors(model, found, wanted).values()),
        "identical": all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)),
    }
    if rounds:
        ratio = step_ratio(
            lambda: backward(model, x, y, tape), lambda: backward(model, x, y), rounds=rounds, warmup=1, clock=clock
        )
        result["time"] = ratio.ratio
    return result


def _add(model: nn.Module, x: Tensor, y: Tensor, tape: Tape | None) -> None:
    """A step that adds to the gradients that are there."""
    if tape is None:
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        return
    with tape.on(model):
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
