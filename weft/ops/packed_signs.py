"""Linear layers that see only the signs of their weights, and in eval mode keep them as bits."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn

from weft.convert import Convertible
from weft.errors import Unsupported
from weft.kernels.signs import SignMatrix, pack_signs, sign_product, sign_sums

__all__ = ["SignLinear"]


@dataclasses.dataclass
class _Bits:
    """The bits of a layer's weights, and what they were made from."""

    matrix: SignMatrix
    state: tuple[Any, ...]
    made_from: list[Tensor]  # held, so that no other weights come to lie at their address


class SignLinear(Convertible):
    """Stands in for an ``nn.Linear``, on the same parameters; abstract: `differentiable` and `scales` say what it is.

    In eval mode, where no gradient is asked for, the layer computes with packed bits. They are no part of its state,
    and made anew when the weights have changed (at each call, for weights that were made under inference_mode, which do
    not count their changes); the layer is fastest under `torch.inference_mode`. Code made by ``torch.compile`` or
    ``torch.export`` has the float weights in it, after `pack_` the bits.

    Attributes:
        inputs: what the bits are multiplied with, as `weft.kernels.signs.SignMatrix` takes it.

    Args:
        layer: the ordinary layer.

    Raises:
        Unsupported: for other layers, subclasses and layers with a computed weight among them.
    """

    converts = (nn.Linear,)
    inputs = "floats"
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    packed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if type(layer) is not nn.Linear or not isinstance(layer.weight, nn.Parameter):
            raise Unsupported(f"{type(layer).__name__} is no nn.Linear with a weight of its own", "an nn.Linear")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self._bits: _Bits | None = None

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer with binary weights, on the same parameters."""
        return cls(layer, **options)

    def differentiable(self, x: Tensor) -> Tensor:
        """The output by torch's own operations on the float weights."""
        raise NotImplementedError

    def scales(self, weight: Tensor) -> Tensor:
        """The factor of each output, ``[O]``."""
        raise NotImplementedError

    def as_bits(self) -> bool:
        """Whether in eval mode the weights are their signs."""
        return True

    def extra_repr(self) -> str:
        """Sizes, and whether the float weights are gone."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + (", packed" if self.weight is None else "")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``."""
        bits = self._bits
        if (  # what costs least, where bits are ready and nothing else is asked for
            bits is not None
            and not self.training
            and not torch.compiler.is_compiling()
            and torch.is_inference_mode_enabled()
            and not torch.is_autocast_enabled("cpu")
            and bits.state == self._state()
            and (y := bits.matrix.at_once(x)) is not None
        ):
            return y
        differentiated = self.training or (torch.is_grad_enabled() and self._differentiated(x))
        if differentiated or torch.compiler.is_compiling() or x.dtype == torch.float64 or not self.as_bits():
            return self._by_operations(x, differentiated)
        if self._bits is None or self._bits.state != self._state():
            self._bits = self._packed()
        return self._bits.matrix(x).to(_wanted(x))

    def pack_(self) -> Self:
        """Keep the bits and the scales alone, as buffers: for use, not for training; put into eval mode.

        A thirty-second of the bytes, where 8 divides the features. The state is that of a packed layer from then on:
        whoever loads it into another packs that one first. `restore_` leaves the layer as it is.

        Raises:
            Unsupported: where the weights are not their signs in eval mode.
        """
        if self.weight is None:
            return self.eval()
        if not self.as_bits():
            raise Unsupported(f"{self} takes the float weights in eval mode", "stochastic=False")
        weight = self.weight.detach()
        self.register_buffer("packed", pack_signs(weight))
        self.register_buffer("scale", self.scales(weight).float())
        self.weight = self._bits = None
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        vars(self).pop("_weft_original", None)  # the ordinary layer that `convert_` holds would keep the float weights
        return self.eval()

    def _differentiated(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in (self.weight, self.bias) if p is not None)

    def _by_operations(self, x: Tensor, differentiated: bool) -> Tensor:
        if self.weight is not None:
            return self.differentiable(x)
        if differentiated:
            raise Unsupported(
                "pack_() has dropped the float weights, and bits have no gradient", "eval() and no_grad()"
            )
        given = x, self.packed, self.scale, None if self.bias is None else self.bias.float()
        y = sign_sums(*given) if self.inputs == "floats" else sign_product(*given, factored=self.inputs != "signs")
        return y.to(_wanted(x))

    def _state(self) -> tuple[Any, ...]:
        """What is another whenever weight or bias are."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        try:
            found = () if weight is None else (weight._version, weight.data_ptr())
            return found if bias is None else (*found, bias._version, bias.data_ptr())
        except RuntimeError:  # tensors made under inference_mode do not count their changes
            return (object(),)

    def _packed(self) -> _Bits:
        state, weight, bias = self._state(), self.weight, None if self.bias is None else self.bias.detach()
        if weight is None:
            packed, scale = self.packed, self.scale
        else:
            packed, scale = pack_signs(weight), self.scales(weight.detach()).float()
        matrix = SignMatrix(packed, scale, None if bias is None else bias.float(), self.in_features, self.inputs)
        return _Bits(matrix, state, [p.detach() for p in (weight, bias) if p is not None])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bits": None}


def _wanted(x: Tensor) -> torch.dtype:
    """The dtype of the output that an ordinary layer has."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
