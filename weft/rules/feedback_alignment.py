"""Carry the error back through fixed random matrices in place of the transposed weights.

    feedback="chain":   dh_{k-1} = B_k^T dz_k          (B_k fixed, of the shape of W_k)
    feedback="direct":  dh_k     = e B_k,  e = dL/dscores  [B, K],  B_k [K, D_k]
    dz_k = f'(z_k) * dh_k,   dW_k = dz_k^T h_{k-1}

The last layer gets its exact gradient. Entries of B_k are normal: in the chain with the standard deviation of torch's
own initialisation of W_k, 1 / sqrt(3 fan_in); direct with ``gain`` / sqrt(D_k).

Paper: "Random synaptic feedback weights support error backpropagation for deep learning", Timothy P. Lillicrap,
Daniel Cownden, Douglas B. Tweed, Colin J. Akerman, 2016, doi:10.1038/ncomms13276.

Paper: "Direct Feedback Alignment Provides Learning in Deep Neural Networks", Arild Nøkland, 2016, arXiv:1609.01596.

Paper: "Principled Training of Neural Networks with Direct Feedback Alignment", Julien Launay, Iacopo Poli,
Florent Krzakala, 2019, arXiv:1906.04554.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.calls import Calls
from weft.errors import Unsupported, UsageError, unknown
from weft.method import method
from weft.rules.base import Ready, Rule, Scale, inputs
from weft.testing.example import Example, classification

FEEDBACKS = ("chain", "direct")


def direct_feedback(error: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
    """The teaching signal of one stage: ``error @ matrix``, in the shape of the stage's output.

    Args:
        error: dL/dscores, ``[B, K]`` or ``[B, T, K]``.
        matrix: ``[K, D]``, D the features of a row of ``like``, or of a token where ``error`` has tokens.
        like: the stage's output, ``[B, ...]`` or ``[B, T, D]``.
    """
    return (error @ matrix).view(like.shape)


class FeedbackFunction(torch.autograd.Function):
    """A linear map or convolution whose input gradient goes through ``feedback`` in place of ``weight``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, conv: Any) -> Tensor:
        if conv is None:
            return F.linear(x, weight, bias)
        return torch.ops.aten.convolution(x, weight, bias, *conv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, feedback, ctx.conv = inputs
        ctx.save_for_backward(x, weight, feedback)
        ctx.save_for_forward(x, feedback)
        ctx.bias = bias is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, weight, feedback = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        if ctx.conv is None:
            rows, cols = grad.flatten(0, -2), x.flatten(0, -2)
            dx = grad @ feedback if to_x else None
            return dx, rows.t() @ cols if to_weight else None, rows.sum(0) if to_bias else None, None, None
        sizes = [weight.shape[0]] if ctx.bias else None
        backward = torch.ops.aten.convolution_backward
        dx = backward(grad, x, feedback, sizes, *ctx.conv, (True, False, False))[0] if to_x else None
        _, dw, db = backward(grad, x, weight, sizes, *ctx.conv, (False, to_weight, to_bias))
        return dx, dw, db, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """The linear map that :meth:`backward` transposes: the input's tangent goes through ``feedback``."""
        dx, dw, db = tangents[:3]
        x, feedback = ctx.saved_tensors
        apply = F.linear if ctx.conv is None else lambda a, w: torch.ops.aten.convolution(a, w, None, *ctx.conv)
        parts = [apply(dx, feedback)] if dx is not None else []
        parts += [apply(x, dw)] if dw is not None else []
        total = torch.stack(parts).sum(0) if parts else 0
        if db is not None:
            total = total + (db if ctx.conv is None else db.view(-1, *[1] * (x.ndim - 2)))
        return total


@method(
    "feedback-alignment",
    contract="rule",
    family="rules",
    papers=[],
    tags={"deterministic"},
    defaults={"optimizer": "adam", "lr": 1e-3, "schedule": "cosine"},
    variants={
        "direct-feedback-alignment": {
            "options": {"feedback": "direct"},
            "papers": [139],
            "summary": "Send the output error straight to every stage through fixed random matrices.",
        }
    },
)
class FeedbackAlignment(Rule):
    """Feedback alignment, along the chain of layers or directly from the output to each stage.

    Args:
        model: any model. The chain replaces the input gradient of every linear and convolution layer; direct feedback
            needs stages (``at``), inside of which autograd is used.
        feedback: ``"chain"`` or ``"direct"``.
        gain: of the direct feedback matrices.
        backward: ``"joint"``: one backward pass; ``"stage"``: one for each stage, so that each stage's graph is freed
            before the next (direct only).
    """

    stages = "cut"

    def __init__(
        self,
        model: nn.Module,
        *,
        feedback: str = "chain",
        gain: float = 1.0,
        backward: str = "joint",
        **common: Any,
    ) -> None:
        if feedback not in FEEDBACKS:
            raise UsageError(unknown("feedback", feedback, list(FEEDBACKS)))
        if backward not in ("joint", "stage") or (feedback == "chain" and backward == "stage"):
            raise UsageError(f"backward={backward!r} with feedback={feedback!r}: use 'joint', or 'stage' with 'direct'")
        if feedback == "chain":
            self.stages = "none"
        super().__init__(model, **common)
        self.feedback, self.gain, self.backward = feedback, gain, backward

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward and one backward pass; see :meth:`weft.rules.base.Rule.step`."""
        return self._direct(x, y, scale, ready) if self.cut else self._chain(x, y, scale, ready)

    def _chain(self, x: Any, y: Tensor, scale: Scale, ready: Ready | None) -> Tensor:
        names = {id(p): name for name, p in self.model.named_parameters()}

        def replaced(x: Tensor, weight: Tensor, bias: Tensor | None = None, conv: Any = None) -> Tensor:
            name = names.get(id(weight))
            if name is None:
                raise Unsupported("a linear map or convolution whose weight is no parameter of the model")
            matrix = self.fixed_normal(weight.shape, weight, name) / math.sqrt(3 * weight[0].numel())
            return FeedbackFunction.apply(x, weight, bias, matrix, conv)

        with Calls({F.linear: replaced, **_convolutions(replaced)}, strict=True):
            scores = self.model(*inputs(x))
        loss = self.criterion(scores, y)
        self.descend([loss], self.trainable(), scale=scale, ready=ready)
        return loss

    def _direct(self, x: Any, y: Tensor, scale: Scale, ready: Ready | None) -> Tensor:
        assert self.cut is not None
        outputs: list[Tensor] = []
        scores = self.cut.run(x, lambda k, h: outputs.append(h))
        last = scores.detach().requires_grad_()
        loss = self.criterion(last, y)
        (error,) = torch.autograd.grad(loss, last)
        signals = [self._signal(k, h, error) for k, h in enumerate(outputs[:-1])] + [error]
        if self.backward == "joint":
            self.descend(
                [loss.detach(), *outputs], self.trainable(), gradients=[None, *signals], scale=scale, ready=ready
            )
            return loss
        return self._by_stage(outputs, signals, loss, scale, ready)

    def _by_stage(
        self, outputs: list[Tensor], signals: list[Tensor], loss: Tensor, scale: Scale, ready: Ready | None
    ) -> Tensor:
        assert self.cut is not None
        self.cut.require_unshared("direct feedback with backward='stage'")
        left = {id(p): p for p in self.trainable()}
        while outputs:
            k = len(outputs) - 1
            own = [p for p in self.cut.parameters(k) if left.pop(id(p), None) is not None]
            self.descend([outputs.pop()], own, gradients=[signals.pop()], scale=scale, ready=ready)
        self.descend([], left.values(), scale=scale, ready=ready)
        return loss

    def _signal(self, k: int, h: Tensor, error: Tensor) -> Tensor:
        tokens = error.ndim == 3
        if tokens and h.shape[:2] != error.shape[:2]:
            raise Unsupported(
                f"stage {k} gives {tuple(h.shape)}, without the tokens of the scores {tuple(error.shape)}"
            )
        features = h[0, 0].numel() if tokens else h[0].numel()
        matrix = self.fixed_normal((error.shape[-1], features), h, "direct", k)
        return direct_feedback(error, matrix, h) * (self.gain / math.sqrt(features))


def _convolutions(replaced: Any) -> dict[Any, Any]:
    """Handlers of conv1d to conv3d that bring their arguments into the form of ``aten.convolution``."""

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
                raise Unsupported(f"padding={padding!r} under feedback alignment", "padding as a number")
            sizes = [list(v) if isinstance(v, tuple | list) else [v] * dims for v in (stride, padding, dilation)]
            return replaced(x, weight, bias, (*sizes, False, [0] * dims, groups))

        return conv

    return {F.conv1d: handler(1), F.conv2d: handler(2), F.conv3d: handler(3)}


def example() -> Example:
    """A small MLP and a batch for it."""
    return classification()
