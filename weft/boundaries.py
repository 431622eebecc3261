"""Where a model is cut by default, how wide it is there and what lies behind it; stages without a derivative."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import StageError

# Lists of blocks in models of the Hugging Face kind (BERT, GPT-2, Llama) and in hand-written ones.
BLOCK_LISTS = ("encoder.layer", "transformer.layer", "transformer.h", "model.layers", "h", "layers", "blocks")


class BlackBox(nn.Module):
    """A stage that autograd cannot enter: ``fn`` runs on a detached tensor, and a cut has a boundary on both sides.

    Attributes:
        derivative_calls: how often a backward pass asked for its derivative, which raises StageError.

    Args:
        fn: from a tensor to a tensor; it may leave torch (``lambda h: torch.from_numpy(f(h.numpy()))``).
    """

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.derivative_calls = 0

    def forward(self, h: Tensor) -> Tensor:
        """``fn(h)``; asking for a gradient through it raises StageError."""
        with torch.no_grad():
            out = self.fn(h.detach())
        return _NoDerivative.apply(h, out, self) if h.requires_grad else out


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, out: Tensor, box: BlackBox) -> Tensor:
        ctx.box = box
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.box.derivative_calls += 1
        raise StageError(
            "a black-box stage has no derivative; use a rule that sends none through it, e.g. mono-forward"
        )


def default_cuts(model: nn.Module) -> list[str]:
    if isinstance(model, nn.Sequential):
        return _sequential(model)
    for path, blocks in model.named_modules():
        listed = isinstance(blocks, nn.ModuleList) and len(blocks)
        if listed and any(path == known or path.endswith(f".{known}") for known in BLOCK_LISTS):
            return [f"{path}.{i}" for i in range(len(blocks))]
    children = [name for name, _ in model.named_children()]
    if layers := [name for name in children if re.fullmatch(r"layer\d+", name)]:
        return layers
    raise StageError(
        f"{type(model).__name__} is no nn.Sequential and has no list of blocks; "
        f"say where to cut, e.g. at={children[:2]}"
    )


def _sequential(model: nn.Sequential) -> list[str]:
    """Cuts before every layer: a module that holds a weight of two or more dimensions.

    Normalisations and activations belong to the layer before them, a Flatten to what follows; a black box stands alone.
    """
    ends: list[str] = []
    children = list(model.named_children())
    trained = [isinstance(child, BlackBox) or any(p.ndim > 1 for p in child.parameters()) for _, child in children]
    for i in range(1, len(children)):
        begins = trained[i]
        if i + 1 < len(children) and isinstance(children[i][1], nn.Flatten | nn.Unflatten):
            begins = trained[i + 1]
        elif isinstance(children[i - 1][1], nn.Flatten | nn.Unflatten):
            begins = False
        start = 0 if not ends else [name for name, _ in children].index(ends[-1]) + 1
        if begins and any(trained[start:i]):
            ends.append(children[i - 1][0])
    return ends


def channels(module: nn.Module) -> tuple[int, bool] | None:
    """How many channels a module's output has, and whether they are its last dimension; None where it does not tell."""
    first = hasattr(module, "kernel_size") or hasattr(module, "num_features")
    for attribute in ("out_features", "out_channels", "embedding_dim", "num_features", "embed_dim", "hidden_size"):
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value, not first
    shape = getattr(module, "normalized_shape", None)
    return (int(shape[-1]), True) if shape else None


def reached(h: Tensor, names: dict[int, str]) -> list[str]:
    """Names of the parameters in the graph behind ``h``; ``names`` maps ``id(parameter)`` to a name."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [h.grad_fn]
    if h.grad_fn is None and id(h) in names:
        found.add(id(h))
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.add(id(variable))
        todo += [parent for parent, _ in node.next_functions]
    return [name for key, name in names.items() if key in found]
