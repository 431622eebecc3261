"""Products with one matrix of signs for few rows on CPUs, past torch's dispatcher, which costs more than they do."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from weft.errors import UsageError, unknown
from weft.kernels import compiled
from weft.kernels.signs import INPUTS, address_of, check_packed, most_rows, product_by, vector


class SignMatrix:
    """Signs of weights with all that a product needs but x, which saves most of what a call on a small one costs.

    Args:
        packed, scale, bias: as `sign_product` takes them; their memory is read at each call.
        columns: D.
        inputs: ``"floats"`` for `sign_sums`, ``"signs"`` or ``"scaled signs"`` for `sign_product`, the latter with a
            factor for each row.

    Raises:
        UsageError: for other dtypes or numbers of elements.
    """

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, columns: int, inputs: str) -> None:
        if inputs not in INPUTS:
            raise UsageError(unknown("inputs", inputs, list(INPUTS)))
        self.scale = vector("scale", scale, None)
        self.outputs, self.columns, self.inputs = len(scale), columns, inputs
        self.bias = None if bias is None else vector("bias", bias, self.outputs)
        self.packed = check_packed(packed, self.outputs, columns)
        self.at_once = self._direct()

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., D]`` to float32 ``[..., O]``; not to be traced: there, call `sign_product` or `sign_sums`."""
        found = self.at_once(x)
        return self.dispatched(x) if found is None else found

    def dispatched(self, x: Tensor) -> Tensor:
        """The same by the operator."""
        if isinstance(x, Tensor) and x.shape[-1:] != (self.columns,):
            raise UsageError(f"x has the shape {tuple(x.shape)}: give [..., {self.columns}]")
        return product_by(x, self.packed, self.scale, self.bias, self.inputs)

    def _direct(self) -> Callable[[Tensor], Tensor | None]:
        """The same for a plain, small x, under `torch.inference_mode` and past torch's dispatcher; else None.

        There is nothing to differentiate, and neither compiled nor exported code may call it.
        """
        if not self.packed.is_cpu or sys.byteorder != "little":
            return lambda x: None
        from weft.kernels.cpu import signs as loops

        features, outputs, single = self.columns, self.outputs, torch.float32
        packed, scale, bias = self.packed.data_ptr(), self.scale.data_ptr(), address_of(self.bias)
        run = (loops.sums if self.inputs == "floats" else loops.product).compile()
        flags = () if self.inputs == "floats" else (self.inputs == "scaled signs",)
        most, address, tracing = most_rows(features, outputs, self.inputs), Tensor.data_ptr, torch.jit.is_tracing
        inference, empty, empty_like = torch.is_inference_mode_enabled, torch.empty, torch.empty_like

        def at_once(x: Tensor) -> Tensor | None:
            plain = inference() and type(x) is Tensor and x.dtype is single and x.is_cpu and x.is_contiguous()
            if not plain or x.ndim != 2 or x.is_neg() or compiled.counting or tracing():
                return None
            rows, columns = x.shape
            if columns != features or rows > most:
                return None
            try:
                at = address(x)
            except RuntimeError:  # what is inside of torch.func.vmap has none
                return None
            if not at:  # empty, or inside of torch.func.functionalize
                return None
            # new_empty takes twice as long, but knows what x is: modes may make another tensor of these
            out = empty_like(x) if outputs == columns else empty(rows, outputs)
            if type(out) is not Tensor or out.dtype is not single or not out.is_cpu:
                return None
            run(at, packed, scale, bias, address(out), rows, columns, outputs, 0, outputs, *flags)
            return out

        return at_once


def frozen_product(matrix: SignMatrix) -> Callable[[Tensor], Tensor]:
    """The matrix's call as a plain function, which costs less."""
    at_once, dispatched = matrix.at_once, matrix.dispatched

    def run(x: Tensor) -> Tensor:
        found = at_once(x)
        return dispatched(x) if found is None else found

    return run
