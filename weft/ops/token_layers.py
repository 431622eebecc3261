"""Chains of layers that compute each token from itself alone."""

from __future__ import annotations

from torch import nn

from weft.errors import Unsupported

__all__ = ["token_layers"]

NORMS = (nn.LayerNorm, nn.RMSNorm)
POINTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.Tanhshrink),
)


def token_layers(chain: nn.Module) -> list[nn.Module]:
    """The layers of an ``nn.Sequential``, those of inner ones among them, in order.

    Raises:
        Unsupported: for anything but linear layers, elementwise activations and norms over the last dimension; for
            layers that work in place; for dropout, whose mask for some tokens alone cannot be drawn again.
    """
    if type(chain) is nn.Sequential:
        return [layer for part in chain for layer in token_layers(part)]
    norm = type(chain) in NORMS and len(chain.normalized_shape) == 1  # type: ignore[arg-type]
    if not (norm or type(chain) in (nn.Linear, *POINTWISE)) or getattr(chain, "inplace", False):
        raise Unsupported(
            f"{chain} is not known to compute each token alone, from a tensor that it leaves as it is",
            "an nn.Sequential of linear layers, activations with inplace=False and norms over the last dimension",
        )
    return [chain]
