"""Linear maps and convolutions whose input gradient goes through another matrix than the weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import Unsupported

Replacement = Callable[..., Tensor]


class FeedbackFunction(torch.autograd.Function):
    """A linear map or convolution whose input gradient goes through ``feedback`` in place of ``weight``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, conv: Any) -> Tensor:
        if conv is None:
            return F.linear(x, weight, bias)
        return torch.ops.aten.convolution(x, weight, bias, *conv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, bias, feedback, ctx.conv = inputs
        ctx.save_for_backward(x, feedback)
        ctx.save_for_forward(x, feedback)
        ctx.bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, feedback = ctx.saved_tensors
        grad = grads[0].to(x.dtype)  # under autocast what comes back is narrower
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        if ctx.conv is None:
            rows, cols = grad.flatten(0, -2), x.flatten(0, -2)
            dx = grad @ feedback if to_x else None
            return dx, rows.t() @ cols if to_weight else None, rows.sum(0) if to_bias else None, None, None
        sizes = [feedback.shape[0]] if ctx.bias else None
        backward = torch.ops.aten.convolution_backward
        dx = backward(grad, x, feedback, sizes, *ctx.conv, (True, False, False))[0] if to_x else None
        # The weight's gradient does not depend on the weight: any tensor of its shape will do.
        _, dw, db = backward(grad, x, feedback, sizes, *ctx.conv, (False, to_weight, to_bias))
        return dx, dw, db, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The linear map that :meth:`backward` transposes: the input's tangent goes through ``feedback``."""
        dx, dw, db = tangents[:3]
        x, feedback = ctx.saved_tensors
        apply = F.linear if ctx.conv is None else lambda a, w: torch.ops.aten.convolution(a, w, None, *ctx.conv)
        parts = [apply(dx, feedback)] if dx is not None else []
        parts += [apply(x, dw)] if dw is not None else []
        if db is not None:
            parts.append(db if ctx.conv is None else db.view(-1, *[1] * (x.ndim - 2)))
        return functools.reduce(torch.add, parts)


def handlers(replaced: Replacement) -> dict[Any, Any]:
    """Handlers for :class:`weft.calls.Calls` of linear maps and conv1d to conv3d.

    Args:
        replaced: called as ``replaced(x, weight, bias, conv)``; ``conv`` is None for a linear map, and otherwise what
            ``aten.convolution`` takes after the bias.
    """

    def handler(dims: int) -> Any:
        def conv(
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            dilation: Any = 1,
            groups: int = 1,
        ) -> Tensor:
            if isinstance(padding, str):
                raise Unsupported(f"a convolution with padding={padding!r}", "padding as a number")
            sizes = [list(v) if isinstance(v, tuple | list) else [v] * dims for v in (stride, padding, dilation)]
            return replaced(x, weight, bias, (*sizes, False, [0] * dims, groups))

        return conv

    return {F.linear: replaced, F.conv1d: handler(1), F.conv2d: handler(2), F.conv3d: handler(3)}
