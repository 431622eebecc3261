"""Linear layers that read only the rows of their weight that few tokens need: of inputs, or outputs, that are not zero.

    skip_rows:    y = [x]_t W + b,           W [H, D]: a row for each input, left out where its input is zero
    wanted_rows:  h = [g]_t * (x W^T + b),   W [H, D]: a row for each output, left out where its gate is zero

``[x]_t`` is x with zeros where ``|x| < t``. Both read ``1 - s`` of a weight for one token with a share s of zeros,
which takes as much less time where reading the weight is what takes it; several tokens need more of the rows, and a
dense product does many at once: `worth_skipping` says where it pays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual as _moved

from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, NATIVE, operator, share

LANES = 16  # columns that a part of the work begins at


def thresholded(x: Tensor, threshold: Tensor | None) -> Tensor:
    """x with zeros where ``|x| < threshold`` (``[H]`` or ``[1]``); x itself without one."""
    return x if threshold is None else x.masked_fill(x.abs() < threshold, 0)


def skip_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """``[..., H] -> [..., D]``: ``thresholded(x, threshold) @ weight + bias``, from the rows that are not skipped.

    Args:
        x: float32, bfloat16, float16 or float64 ``[..., H]``; in the last two, and elsewhere than on CPUs, the product
            is a dense one.
        weight: ``[H, D]`` of the same dtype, the transpose of what ``nn.Linear`` has, read in place where contiguous.
        bias: ``[D]``.
        threshold: ``[H]`` or ``[1]``, not negative; none: zeros alone are skipped. It has no derivative.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
    """
    flat = _checked(x, weight, threshold)
    if bias is not None and bias.shape != weight.shape[1:]:
        raise UsageError(f"bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}: give [D]")
    made: Any = _Skip.apply if differentiated(flat, weight, bias) else _skip
    out: Tensor = made(flat, weight, bias, threshold)
    return out if flat is x else out.view(*x.shape[:-1], weight.shape[1])


def wanted_rows(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None
) -> Tensor:
    """``[..., D], [..., H] -> [..., H]``: ``thresholded(gate, threshold) * (x @ weight.T + bias)``, rows as needed.

    Args:
        x: ``[..., D]``, dtypes as in `skip_rows`.
        gate: ``[..., H]``, what the product is multiplied by.
        weight: ``[H, D]``, as ``nn.Linear`` has it.
        bias: ``[H]``.
        threshold: of the gate, ``[H]`` or ``[1]``, not negative. It has no derivative.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
    """
    flat = _checked(gate, weight, threshold)
    if x.shape != (*gate.shape[:-1], weight.shape[-1]) or x.dtype != gate.dtype:
        raise UsageError(
            f"x {tuple(x.shape)} {x.dtype} with a gate {tuple(gate.shape)} {gate.dtype} and a weight "
            f"{tuple(weight.shape)}: give [..., D], [..., H] and [H, D] of one dtype"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}: give [H]")
    rows = x if flat is gate else x.reshape(len(flat), weight.shape[1])
    made: Any = _Want.apply if differentiated(rows, flat, weight, bias) else _want
    out: Tensor = made(rows, flat, weight, bias, threshold)
    return out if flat is gate else out.view(gate.shape)


def worth_skipping(tokens: int, zeros: float, elements: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether skipping is expected to be faster than a dense product.

    Measured on one thread of a server CPU. A call costs as much as reading a quarter of a million elements. For one to
    eight tokens reading the weight takes the time, and skipping pays from a fifth or half zeros on. Of many tokens
    together almost every row is needed by one, but its products with the others are not: in float32 three quarters of
    zeros pay for any number of tokens. Dense products of bfloat16 are much faster for several tokens: there skipping
    pays while they need no more rows in all than the weight has.

    Args:
        tokens: rows of the input.
        zeros: the share of zeros in each.
        elements: of the weight.
        dtype: of both.
    """
    if min(tokens, 8) * zeros * elements < 1 << 18:
        return False
    if dtype != torch.float32:
        return zeros >= 0.2 and tokens * (1 - zeros) <= 1
    few = 0 if zeros < 0.2 else 2 if zeros < 0.5 else 8
    return tokens <= few or zeros >= 0.75


def _checked(x: Tensor, weight: Tensor, threshold: Tensor | None) -> Tensor:
    """x as ``[N, H]``."""
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise UsageError(f"{tuple(x.shape)} and a weight {tuple(weight.shape)}: give [..., H] and [H, D]")
    if x.dtype is not weight.dtype or x.dtype not in FLOATS:
        given = ", ".join(map(str, FLOATS))
        raise UsageError(f"{x.dtype} and a weight of {weight.dtype}: give both in one of {given}")
    if threshold is not None and (threshold.ndim != 1 or threshold.shape[0] not in (1, weight.shape[0])):
        raise UsageError(f"threshold {tuple(threshold.shape)} for a weight {tuple(weight.shape)}: give [H] or [1]")
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd follows one of them, backwards or forwards."""
    followed = torch.is_grad_enabled()
    seen = not torch.compiler.is_compiling()
    for t in tensors:
        if t is not None and ((followed and t.requires_grad) or (seen and _moved(t).tangent is not None)):
            return True
    return False


class _Skip(torch.autograd.Function):
    """`skip_rows` with its derivatives; those of a skipped input are zero."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
        return _skip(x, weight, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, threshold = inputs
        ctx.save_for_backward(x, weight, threshold)
        ctx.save_for_forward(x, weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, threshold), needs = ctx.saved_tensors, ctx.needs_input_grad
        of_x = grad @ weight.T if needs[0] else None
        if of_x is not None and threshold is not None:
            of_x = of_x.masked_fill(x.abs() < threshold, 0)
        of_weight = thresholded(x, threshold).T @ grad if needs[1] else None
        return of_x, of_weight, grad.sum(0) if needs[2] else None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: None) -> Tensor:
        x, weight, threshold = ctx.saved_tensors
        kept = thresholded(x, threshold)
        parts = [] if dbias is None else [dbias.expand(len(x), -1)]
        if dx is not None:
            parts.append((dx if threshold is None else dx.masked_fill(x.abs() < threshold, 0)) @ weight)
        parts += [] if dweight is None else [kept @ dweight]
        return torch.stack(parts).sum(0)


class _Want(torch.autograd.Function):
    """`wanted_rows` with its derivatives; those of a skipped gate are zero."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
        return _want(x, gate, weight, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, gate, weight, bias, threshold), needs = ctx.saved_tensors, ctx.needs_input_grad
        inner = grad * thresholded(gate, threshold)
        of_gate = None
        if needs[1]:
            of_gate = grad * F.linear(x, weight, bias)
            of_gate = of_gate if threshold is None else of_gate.masked_fill(gate.abs() < threshold, 0)
        return (
            inner @ weight if needs[0] else None, of_gate, inner.T @ x if needs[2] else None,
            inner.sum(0) if needs[3] else None, None,
        )  # fmt: skip

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dgate: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: None
    ) -> Tensor:
        x, gate, weight, bias, threshold = ctx.saved_tensors
        kept, parts = thresholded(gate, threshold), list[Tensor]()
        if dgate is not None:
            moved = dgate if threshold is None else dgate.masked_fill(gate.abs() < threshold, 0)
            parts.append(moved * F.linear(x, weight, bias))
        parts += [] if dx is None else [kept * (dx @ weight.T)]
        parts += [] if dweight is None else [kept * (x @ dweight.T)]
        parts += [] if dbias is None else [kept * dbias]
        return torch.stack(parts).sum(0)


def skip_rows_reference(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    """`skip_rows` in plain torch, for x ``[N, H]``."""
    return F.linear(thresholded(x, threshold), weight.T, bias)


def wanted_rows_reference(
    x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None
) -> Tensor:
    """`wanted_rows` in plain torch, for x ``[N, D]`` and a gate ``[N, H]``."""
    return thresholded(gate, threshold) * F.linear(x, weight, bias)


def _skip_fake(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _want_fake(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape)


def _skip_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    if x.dtype not in NATIVE:
        return skip_rows_reference(x, weight, bias, threshold)
    from weft.kernels.cpu import row_skipping as loops

    (tokens, inputs), width = x.shape, weight.shape[1]
    given, whole, *others = _in_memory(x, weight, bias, threshold)
    out = torch.empty(tokens, width, dtype=torch.float32)
    if tokens and width:
        block = max(1, inputs) if tokens == 1 else _block(loops.CACHED, width, weight)
        limits = 0 if threshold is None else len(threshold)
        bias_at, threshold_at = (0 if t is None else t.data_ptr() for t in others)
        given_at, weight_at, out_at, half = given.data_ptr(), whole.data_ptr(), out.data_ptr(), x.dtype != torch.float32

        def run(start: int, stop: int) -> None:
            loops.skip_rows(
                given_at, threshold_at, limits, weight_at, half, bias_at, out_at, tokens, inputs, width, start // unit,
                stop // unit, block,
            )  # fmt: skip

        unit = max(1, inputs)
        share(run, unit * width, unit * LANES)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _want_cpu(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> Tensor:
    if x.dtype not in NATIVE:
        return wanted_rows_reference(x, gate, weight, bias, threshold)
    from weft.kernels.cpu import row_skipping as loops

    (outputs, width), tokens = weight.shape, len(x)
    given, whole, *others = _in_memory(x, weight, gate, bias, threshold)
    out = torch.empty(tokens, outputs, dtype=torch.float32)
    if tokens and outputs:
        block = outputs if tokens == 1 else _block(loops.CACHED, width, weight)
        limits = 0 if threshold is None else len(threshold)
        gate_at, bias_at, threshold_at = (0 if t is None else t.data_ptr() for t in others)
        given_at, weight_at, out_at, half = given.data_ptr(), whole.data_ptr(), out.data_ptr(), x.dtype != torch.float32

        def run(start: int, stop: int) -> None:
            loops.wanted_rows(
                given_at, gate_at, threshold_at, limits, weight_at, half, bias_at, out_at, tokens, outputs, width,
                start // unit, stop // unit, block,
            )  # fmt: skip

        unit = max(1, width)
        share(run, outputs * unit, unit)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _in_memory(x: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """As the loops read them: the weight as it is, everything else in float32, all without gaps."""
    return (
        x.float().contiguous(),
        weight.contiguous(),
        *(t if t is None else t.float().contiguous() for t in others),
    )


def _block(cached: int, width: int, weight: Tensor) -> int:
    return max(8, cached // (max(1, width) * weight.element_size()) // 8 * 8)


def _on_cuda(*args: Any) -> Tensor:
    raise ImportError("plain torch is used there")


_skip = operator(
    "skip_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? threshold) -> Tensor",
    skip_rows_reference,
    fake=_skip_fake,
    cpu=_skip_cpu,
    cuda=_on_cuda,
)
_want = operator(
    "wanted_rows(Tensor x, Tensor gate, Tensor weight, Tensor? bias, Tensor? threshold) -> Tensor",
    wanted_rows_reference,
    fake=_want_fake,
    cpu=_want_cpu,
    cuda=_on_cuda,
)
