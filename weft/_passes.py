"""How often a step goes through a network: forwards, backwards, products with a weight turned round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def passes(step: Callable[[], object], forward: Callable[[], object], model: nn.Module, rows: int) -> dict[str, float]:
    """How often a step goes through a model, counted once.

    Args:
        step: one training step on a batch of ``rows`` rows.
        forward: one prediction on the same batch; it shows which way round each weight enters.
        model: whose layers (modules that own parameters) are watched.
        rows: B.

    Returns:
        ``forward``: how often a layer ran, in whole batches, in the mean over layers; ``backward``: how often a
        gradient arrived at a layer's output, likewise; ``transposed``: products with a weight that enters the other
        way round than in ``forward``, as backpropagation's do.
    """
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    counts = {"forward": 0.0, "backward": 0.0}

    def arrived(gradient: Tensor) -> None:
        counts["backward"] += gradient.shape[0] / rows

    def behind(module: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor) and out.ndim:
            counts["forward"] += out.shape[0] / rows
            if out.requires_grad:
                out.register_hook(arrived)

    usual = _products(forward, model)
    with contextlib.ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.register_forward_hook(behind).remove)
        seen = _products(step, model)
    per = max(1, len(layers))
    turned = sum(count for product, count in seen.items() if product not in usual)
    return {"forward": counts["forward"] / per, "backward": counts["backward"] / per, "transposed": turned}


def _products(call: Callable[[], object], model: nn.Module) -> dict[tuple[int, bool], int]:
    """How many products a call takes with each parameter: by (its storage, whether it enters turned round)."""
    stored = {p.untyped_storage().data_ptr(): p for p in model.parameters() if p.ndim > 1}
    found: dict[tuple[int, bool], int] = {}

    def note(operand: Any, turned: bool | None = None) -> None:
        key = operand.untyped_storage().data_ptr() if isinstance(operand, Tensor) else 0
        if key in stored and operand.ndim > 1:
            weight = stored[key]
            round_ = operand.stride()[-2:] != weight.stride()[-2:] if turned is None else turned
            found[key, round_] = found.get((key, round_), 0) + 1

    def product(*args: Any, **kwargs: Any) -> int:
        for operand in args:
            note(operand)
        return 0

    def convolution(x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> int:
        note(weight, False)
        return 0

    def backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> int:
        if rest[-1][0]:
            note(weight, True)
        return 0

    formulas: dict[Any, Any] = dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), product)
    formulas |= {aten.convolution: convolution, aten.convolution_backward: backward}
    for formula in (product, convolution, backward):
        setattr(formula, "_get_raw", True)  # noqa: B010  # so that it is given tensors, not shapes
    with FlopCounterMode(display=False, custom_mapping=formulas):
        call()
    return found
