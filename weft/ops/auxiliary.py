"""Auxiliary losses that reach the weights in any training loop: their gradient joins the backward pass.

    add_loss(output, loss) = output,   whose backward pass hands on dL/doutput and sends s to the loss

so that the training loop's ``L.backward()`` leaves the gradients of L + loss. s is 1, or what `loss_scale` says: the
gradient that arrives at ``output`` does not tell by what factor the loop has multiplied its loss (a ``GradScaler``,
the share of a micro-batch, a rule's ``scale=``), and an auxiliary gradient without that factor would lose its weight
against the others. So a loop that multiplies its loss says so around the backward pass:

    with loss_scale(share): (share * loss).backward()

Without it the auxiliary loss is as large as its own weight says, for each backward pass: under a ``GradScaler`` with a
factor of 65536 it all but vanishes; for k micro-batches, each with a k-th of the loss, it counts k times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError

__all__ = ["add_loss", "loss_scale"]

_scale: float | Tensor = 1.0  # one for all threads: autograd runs backward passes of CUDA devices in threads of its own


class loss_scale:
    """Auxiliary gradients of backward passes inside are multiplied by ``scale``, as the loop multiplies its own loss.

    A compiled model reads it in the forward pass, which has to be inside too.

    Args:
        scale: a number, or a tensor with one element (``scaler.scale(torch.ones(()))``).
    """

    def __init__(self, scale: float | Tensor) -> None:
        self.scale = scale

    def __enter__(self) -> None:
        global _scale
        self._before, _scale = _scale, self.scale

    def __exit__(self, *_: object) -> None:
        global _scale
        _scale = self._before


class _AddLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.like = inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        dtype, device = ctx.like
        return grad, torch.as_tensor(_scale, dtype=dtype, device=device).reshape(())


class _AddLossWithTangent(_AddLoss):  # torch.compile takes no function with a jvp
    @staticmethod
    def jvp(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)


def add_loss(output: Tensor, loss: Tensor) -> Tensor:
    """``output`` as it is, through which the backward pass also adds the gradient of ``loss``.

    Nothing is added where no gradient flows back to the output. The result shares the output's memory and cannot be
    changed in place: a layer gives it a tensor that it uses inside (its gates, say).

    Args:
        output: of any shape, on the way to the loop's loss.
        loss: one number (shape ``()``), in whatever unit its own weight gives it.

    Raises:
        UsageError: for a loss that is not one number.
    """
    if loss.shape != ():
        raise UsageError(f"an auxiliary loss of shape {tuple(loss.shape)}; it is one number: take its mean or sum")
    if not (torch.is_grad_enabled() and loss.requires_grad):
        return output
    function = _AddLoss if torch.compiler.is_compiling() else _AddLossWithTangent
    result: Tensor = function.apply(output, loss)
    return result
