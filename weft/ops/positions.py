"""Which layers act on each position alone: the output at a place depends on the input at that place and no other."""

from __future__ import annotations

from torch import nn

from weft.ops.step_derivative import StepActivation

__all__ = ["POINTWISE", "first_mixing"]

# fmt: off
POINTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh,
    nn.Tanhshrink, nn.Threshold,
)
# fmt: on


def first_mixing(layer: nn.Module) -> str | None:
    """Name and type of the first part, from front to back, that is not known to act on each position alone.

    Known are linear layers, pointwise layers and those with a step function for their derivative, dropout of single
    elements, norms over the last dimension, and `nn.Sequential` of these. Subclasses are not known.

    Returns:
        ``"1, a Conv1d"``, or None where there is none.
    """
    if isinstance(layer, StepActivation) or type(layer) in (*POINTWISE, nn.Linear, nn.Identity, nn.Dropout):
        return None
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and type(layer) in (nn.LayerNorm, nn.RMSNorm):
        return None if len(layer.normalized_shape) == 1 else f"a {type(layer).__name__} of several dimensions"
    if type(layer) is not nn.Sequential:
        return f"a {type(layer).__name__}"
    for name, part in layer.named_children():
        found = first_mixing(part)
        if found:
            return f"{name}, {found}" if found.startswith("a ") else f"{name}.{found}"
    return None
