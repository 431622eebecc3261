"""Chains of layers that compute each token from itself alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.errors import Unsupported

__all__ = ["POINTWISE", "call", "own_weights", "token_layers", "weights"]

NORMS = (nn.LayerNorm, nn.RMSNorm)
POINTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign, nn.Tanhshrink),
)


def own_weights(*layers: nn.Module) -> None:
    """Nothing, where the layers' weights and biases are their parameters.

    Raises:
        Unsupported: where a hook makes a weight or bias anew for each call of the layer (pruning, weight norm).
    """
    for layer in layers:
        for name in ("weight", "bias"):
            if isinstance(given := getattr(layer, name, None), Tensor) and not isinstance(given, nn.Parameter):
                reason = f"{type(layer).__name__}.{name} is made by a hook from parameters of other names"
                raise Unsupported(reason, "prune.remove or remove_weight_norm first")


def token_layers(chain: nn.Module) -> list[nn.Module]:
    """The layers of an ``nn.Sequential``, those of inner ones among them, in order, without ``nn.Identity``.

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
    return [] if type(chain) is nn.Identity else [chain]


def weights(layer: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a token-wise layer, where it has them."""
    named = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    return {name: p for name, p in named.items() if p is not None}


def call(layer: nn.Module, x: Tensor, given: list[Tensor]) -> Tensor:
    """A token-wise layer with other tensors in the place of its `weights`."""
    out: Tensor = torch.func.functional_call(layer, dict(zip(weights(layer), given, strict=True)), (x,))
    return out
