"""How gradients reach ``.grad``: added all at once, or each handed over as soon as it is final."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def gathered(module: nn.Module) -> list[nn.Parameter]:
    """``list(module.parameters())`` in less than half of the time, since no names are made: a step asks for it."""
    found: dict[int, nn.Parameter] = {}
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        seen.add(id(module))
        for p in module._parameters.values():
            if p is not None:
                found[id(p)] = p
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                visit(child)

    visit(module)
    return list(found.values())


def add_gradients(leaves: Sequence[Tensor], found: Sequence[Tensor | None], taken: Iterable[Tensor]) -> None:
    """Add to ``.grad``; autograd may give several leaves one tensor, or one of ``taken``, and each gets its own."""
    given = {t.data_ptr() for t in taken if t.layout == torch.strided}
    for leaf, gradient in zip(leaves, found, strict=True):
        if gradient is None:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        elif leaf.grad is not None:
            leaf.grad += gradient
        elif gradient.layout != torch.strided:
            leaf.grad = gradient
        else:
            shared = gradient.data_ptr() in given or gradient.stride() != leaf.stride()
            leaf.grad = torch.empty_like(leaf).copy_(gradient) if shared else gradient
            given.add(gradient.data_ptr())


def hand_over(
    tensors: Sequence[Tensor], arriving: Sequence[Tensor | None], leaves: Sequence[Tensor], ready: Callable[[Any], None]
) -> None:
    """Send ``arriving`` back from ``tensors`` and call ``ready`` once with every leaf when its ``.grad`` is final.

    Leaves that no tensor depends on come last, with the gradient that they had, or zeros.
    """
    handed: set[int] = set()

    def final(leaf: Tensor) -> None:
        handed.add(id(leaf))
        ready(leaf)

    handles = [leaf.register_post_accumulate_grad_hook(final) for leaf in leaves]
    try:
        if tensors:
            torch.autograd.backward(tensors, arriving, inputs=leaves)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in leaves:
        if id(leaf) not in handed:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            ready(leaf)
