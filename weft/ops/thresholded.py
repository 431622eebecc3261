"""Linear and gated feed-forward layers that take activations below thresholds as zero, and skip what these need.

The layers stand in for ordinary ones, whose parameters they share. The weight that a sparse input is multiplied by is
stored column by column meanwhile (the same parameter, with other strides), so that the part of one input is in one
place and no second copy is needed; `weft.restore_` lays it out as before.
"""

from __future__ import annotations

import abc
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.kernels.compiled import NATIVE
from weft.kernels.row_skipping import differentiated, skip_rows, thresholded, wanted_rows, worth_skipping
from weft.ops.token_layers import own_weights

__all__ = ["ThresholdedGate", "ThresholdedLinear", "centres", "gated", "quantile_threshold"]


def quantile_threshold(scores: Tensor, sparsity: float) -> Tensor:
    """A number with ``k = floor(sparsity * N)`` of N scores below it, halfway to the next one; 0 where k is 0.

    Of scores that are equal to each other it has all or none below.
    """
    k = int(sparsity * scores.numel())
    if k == 0:
        return scores.new_zeros(())
    flat = scores.flatten()
    return (flat.kthvalue(k).values + flat.kthvalue(min(k + 1, len(flat))).values) / 2


def centres(a: Tensor, sizes: Tensor, sparsity: float, rounds: int = 6) -> Tensor:
    """c ``[H]``, by turns: drop the smallest deviations from c, set c to the mean of what is dropped.

    Each turn makes the sum of squares of what is dropped smaller, for ``sizes`` of 1; c begins at the medians.
    """
    c = a.median(0).values
    for _ in range(rounds):
        deviations = (a - c).abs() * sizes
        dropped = deviations < quantile_threshold(deviations, sparsity)
        count = dropped.sum(0)
        c = torch.where(count > 0, (a * dropped).sum(0) / count.clamp(min=1), c)
    return c


def gated(layer: nn.Module) -> bool:
    """Whether a layer has the parts of ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, under these names.

    One of Weft's, which has them from such a layer, is not meant.
    """
    parts = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    ordinary = not isinstance(layer, Convertible) and callable(getattr(layer, "act_fn", None))
    return ordinary and all(type(part) is nn.Linear for part in parts)


class _Thresholded(Convertible, abc.ABC):
    """What the two layers share.

    Attributes:
        threshold: ``[H]`` or ``[1]``, a buffer.
        zeros: the share of zeros that is expected, by which `worth_skipping` decides.
        always: whether rows are skipped wherever they can be, also where a dense product is expected to be faster.
    """

    threshold: Tensor
    always = False

    def __init__(self, threshold: Tensor, zeros: float, width: int) -> None:
        super().__init__()
        if threshold.ndim != 1 or threshold.shape[0] not in (1, width) or not 0 <= zeros <= 1:
            raise UsageError(
                f"threshold {tuple(threshold.shape)}, zeros={zeros!r}: give [{width}] or [1], and a share from 0 to 1"
            )
        self.register_buffer("threshold", threshold.detach().clone())
        self.zeros = float(zeros)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Any:
        """The layer with thresholds."""
        made: Any = cls
        return made(layer, **options)

    @abc.abstractmethod
    def sparse(self) -> Tensor:
        """The weight that is multiplied by what is mostly zero."""

    def lay_out(self) -> None:
        """Stores that weight by columns."""
        weight = self.sparse()
        self._moved = weight.is_contiguous() and not weight.t().is_contiguous()
        if self._moved:
            weight.data = weight.data.t().contiguous().t()

    def to_dense(self) -> None:
        """Lays out the weight as it was; the ordinary layer has it too."""
        if self._moved:
            self.sparse().data = self.sparse().data.contiguous()

    def skips(self, x: Tensor) -> bool:
        """Whether rows are skipped for this input; the product is a dense one with zeros otherwise."""
        weight = self.sparse()
        return (
            x.dtype == weight.dtype
            and x.dtype in NATIVE
            and x.device.type == "cpu"
            and weight.t().is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and (self.always or worth_skipping(math.prod(x.shape[:-1]), self.zeros, weight.numel(), x.dtype))
        )


class ThresholdedLinear(_Thresholded):
    """``y = W (c + [x - c]_t) + b``, where ``[v]_t`` is v with zeros where ``|v| < t``.

    Rows are skipped by ``W [x - c]_t + (W c + b)``. With a centre, the sum in brackets is computed once for the weights
    as they are, and anew when they have changed; a change in place by ``weight.data``, which torch does not count, is
    seen after ``train()`` or ``eval()``. While autograd follows the weights, and in compiled code, the product is a
    dense one.

    Args:
        layer: an ``nn.Linear``; its weight and bias are shared.
        threshold: ``[H]``, one for each input, or ``[1]``.
        zeros: the share of inputs expected below it.
        centre: c ``[H]``; by default zero.

    Raises:
        Unsupported: for other layers.
        UsageError: for thresholds that do not fit.
    """

    converts = (nn.Linear,)
    centre: Tensor | None

    def __init__(
        self, layer: nn.Module, *, threshold: Tensor, zeros: float = 0.5, centre: Tensor | None = None
    ) -> None:
        if type(layer) is not nn.Linear:
            raise Unsupported(f"{type(layer).__name__} is no linear layer whose inputs have thresholds", "nn.Linear")
        own_weights(layer)
        super().__init__(threshold, zeros, layer.in_features)
        if centre is not None and centre.shape != (layer.in_features,):
            raise UsageError(f"centre {tuple(centre.shape)}: give [{layer.in_features}]")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("centre", None if centre is None else centre.detach().to(layer.weight, copy=True))
        self._made: tuple[Tensor, list[Any], list[Tensor]] | None = None
        self.lay_out()

    def sparse(self) -> Tensor:
        """Its weight."""
        return self.weight

    def extra_repr(self) -> str:
        """Sizes and the share of zeros."""
        centred = "" if self.centre is None else ", centred"
        return f"in_features={self.in_features}, out_features={self.out_features}, zeros={self.zeros:.3g}{centred}"

    def skips(self, x: Tensor) -> bool:
        """As of the base; with a centre, where weights are not followed by autograd and can be looked at."""
        if self.centre is not None and (torch.compiler.is_compiling() or differentiated(self.weight, self.bias)):
            self._made = None  # a fused optimizer's step, which is not counted either, may come next
            return False
        return super().skips(x)

    def train(self, mode: bool = True) -> Self:
        """As of every module; ``W c + b`` is computed anew."""
        self._made = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def _offset(self) -> Tensor:
        """``W c + b``."""
        parts = [t.detach() for t in (self.weight, self.centre, self.bias) if t is not None]
        try:
            state: list[Any] = [(t._version, t.data_ptr()) for t in parts]
        except RuntimeError:  # tensors made under inference_mode do not count their changes
            state = [object()]
        made = self._made
        if made is None or state != made[1]:  # the tensors are held, so that no others get their addresses
            made = self._made = F.linear(parts[1], parts[0], self.bias), state, parts
        return made[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H] -> [..., D]``."""
        skips = self.skips(x)
        if self.centre is None:
            if skips:
                return skip_rows(x, self.weight.t(), self.bias, self.threshold)
            return F.linear(thresholded(x, self.threshold), self.weight, self.bias)
        moved = x - self.centre
        if skips:
            return skip_rows(moved, self.weight.t(), self._offset(), self.threshold)
        kept = torch.where(moved.abs() < self.threshold, self.centre.to(x.dtype), x)
        return F.linear(kept, self.weight, self.bias)

    @torch.no_grad()
    def kept(self, x: Tensor) -> int:
        """How many values of an input are not zero after the centre and the thresholds."""
        return int(thresholded(x if self.centre is None else x - self.centre, self.threshold).count_nonzero())

    def elements(self, share: float) -> float:
        """Elements of the weight that are used for one token, of whose inputs this share is not zero."""
        return share * self.weight.numel()


class ThresholdedGate(_Thresholded):
    """``y = W_down ([g]_t * (W_up x + b_up)) + b_down``, ``g = act(W_gate x + b_gate)``: a gated feed-forward layer.

    The products with W_gate are dense; of W_up and W_down the rows and columns of hidden units are used whose gate
    reaches its threshold.

    Args:
        layer: has ``gate_proj``, ``up_proj``, ``down_proj`` (``nn.Linear``) and ``act_fn``, which are shared.
        threshold: ``[H]``, one for each hidden unit, or ``[1]``.
        zeros: the share of gates expected below it.

    Raises:
        Unsupported: for other layers.
        UsageError: for thresholds that do not fit.
    """

    converts = (nn.Module,)

    def __init__(self, layer: nn.Module, *, threshold: Tensor, zeros: float = 0.5) -> None:
        if not gated(layer):
            reason = f"{type(layer).__name__} is no gated feed-forward layer"
            raise Unsupported(reason, "one with linear gate_proj, up_proj, down_proj, and act_fn")
        parts: Any = layer
        own_weights(parts.gate_proj, parts.up_proj, parts.down_proj)
        super().__init__(threshold, zeros, parts.gate_proj.out_features)
        self.gate_proj, self.up_proj, self.down_proj = parts.gate_proj, parts.up_proj, parts.down_proj
        self.act_fn = parts.act_fn
        self.lay_out()

    def sparse(self) -> Tensor:
        """The weight of the down projection."""
        return self.down_proj.weight

    def extra_repr(self) -> str:
        """The share of zeros."""
        return f"zeros={self.zeros:.3g}"

    def gate(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., H]``: the gate before its thresholds."""
        out: Tensor = self.act_fn(self.gate_proj(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        gate = self.gate(x)
        if self.skips(x):
            hidden = wanted_rows(x, gate, self.up_proj.weight, self.up_proj.bias, self.threshold)
            return skip_rows(hidden, self.down_proj.weight.t(), self.down_proj.bias)
        out: Tensor = self.down_proj(thresholded(gate, self.threshold) * self.up_proj(x))
        return out

    @torch.no_grad()
    def kept(self, x: Tensor) -> int:
        """How many gates of an input are not zero after the thresholds."""
        return int(thresholded(self.gate(x), self.threshold).count_nonzero())

    def elements(self, share: float) -> float:
        """Elements of the weights that are used for one token, of whose gates this share is not zero."""
        sparse = self.up_proj.weight.numel() + self.down_proj.weight.numel()
        return self.gate_proj.weight.numel() + share * sparse
