"""One step of a 6-layer transformer under each way to keep less, torch's own and PEFT's among them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft import measure
from weft.measuring import conversions_of
from weft.session import Tape
from weft.specs import apply_conversions, read_tape
from weft.testing.savings import layer_errors, transformer

WAYS: dict[str, tuple[str | None, str]] = {  # a tape and conversions of ours
    "plain": (None, ""),
    "quantise, 8 bits": ("quantise:bits=8", ""),
    "quantise, 4 bits": ("quantise:bits=4", ""),
    "quantise, 2 bits": ("quantise:bits=2", ""),
    "offload": ("offload", ""),
    "quantise, 4 bits, and offload": ("quantise:bits=4 | offload", ""),
    "few-bit activations, 3 bits": (None, "few-bit-activation:bits=3"),
    "VeLoRA, down projections": (None, "velora:where=blocks.*.mlp.2"),
    "mini-sequence": (None, "mini-sequence:where=blocks.*.mlp"),
}


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Kept and peak bytes (gradients allocated before), time to plain, gradient error (mean of the layers')."""
    base, x, y = transformer(0)
    wanted = [g.clone() for g in _gradients(_step(base), base, x, y)]
    tapes: dict[str, Tape | None] = {}
    steps: dict[str, tuple[Callable[[Tensor, Tensor], None], nn.Module]] = {}
    for name, (tape, convert) in WAYS.items():
        model, _, _ = transformer(0)
        apply_conversions(model, conversions_of(convert))
        packs = None if tape is None else read_tape(tape)
        steps[name] = _step(model, None if packs is None else packs.on), model
        tapes[name] = packs
    model, _, _ = transformer(0)
    for block in model.get_submodule("blocks").children():
        _recomputed(block)
    steps["torch.utils.checkpoint, every block"] = _step(model), model
    model, _, _ = transformer(0)
    steps["torch save_on_cpu (copies, on a CPU)"] = _step(model, lambda m: torch.autograd.graph.save_on_cpu()), model
    steps |= _peft()
    rows: list[dict[str, Any]] = []
    for name, (step, model) in steps.items():
        found = _gradients(step, model, x, y)
        row: dict[str, Any] = {"way": name, "error": None}
        if len(found) == len(wanted) and [g.shape for g in found] == [g.shape for g in wanted]:
            row["error"] = statistics.mean(layer_errors(base, found, wanted).values())
        held = measure.kept_bytes(lambda s=step: s(x, y), model).peak_bytes  # type: ignore[misc]
        row["kept_bytes"] = held or None  # what other saved-tensor hooks keep is not seen
        parameters = [p for p in model.parameters() if p.requires_grad]
        peak = measure.peak_bytes(lambda s=step: s(x, y), parameters=parameters, gradients=False)  # type: ignore[misc]
        row["peak_bytes"] = peak + getattr(tapes.get(name), "outside_bytes", 0)
        row["time"] = measure.step_ratio(step, steps["plain"][0], rounds=5, warmup=1, inputs=[(x, y)]).ratio
        say(f"keeping: {row}")
        rows.append(row)
    return rows


def _step(
    model: nn.Module, around: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] | None = None
) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, y: Tensor) -> None:
        with contextlib.nullcontext() if around is None else around(model):
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()

    return step


def _gradients(step: Callable[[Tensor, Tensor], None], model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    step(x, y)
    return [p.grad for p in model.parameters() if p.grad is not None]


def _recomputed(block: nn.Module) -> None:
    plain = block.forward
    block.forward = lambda *args: checkpoint(plain, *args, use_reentrant=False)  # type: ignore[method-assign]


def _peft() -> dict[str, tuple[Callable[[Tensor, Tensor], None], nn.Module]]:
    """LoRA of rank 8 on the down projections, plainly and with VeLoRA, where PEFT is installed."""
    try:
        from peft import LoraConfig, VeloraConfig, get_peft_model
    except ImportError:
        return {}
    made: dict[str, tuple[Callable[[Tensor, Tensor], None], nn.Module]] = {}
    for name, more in (("PEFT LoRA", {}), ("PEFT LoRA with VeLoRA", {"velora_config": VeloraConfig()})):
        model, _, _ = transformer(0)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=r"blocks\.\d\.mlp\.2", **more))
        made[name] = _step(model), model
    return made
