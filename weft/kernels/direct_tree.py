"""A tree's inference for few rows on CPUs, past torch's dispatcher, which costs more than a row's whole tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import increment_version

from weft.errors import Unsupported, UsageError
from weft.kernels import compiled
from weft.kernels.compiled import FLOATS, check_tensor
from weft.kernels.pages import make_huge
from weft.kernels.row_skipping import differentiated
from weft.kernels.tree import ACTIVATIONS, most_rows, native, plan_of, tree_feed_forward


def direct_tree(
    parameters: Mapping[str, Tensor | None], names: Sequence[str], activation: str
) -> Callable[[Tensor], Tensor | None]:
    """`tree_feed_forward` of few rows on CPUs, without the dispatcher, which costs more than a row's whole tree.

    Where a derivative, another dtype, a compiler or `weft.kernels.compiled.dispatched` is in play, or there is work for
    several threads, it returns None, and the operator has to do it; other dispatch modes do not see the call. It
    remembers where the weights are and looks whether they still are; other strides at the same place it does not see.

    Args:
        parameters: a module's; looked at in each call.
        names: of nodes, node_bias, up, up_bias, down, down_bias among them.
        activation: a key of `ACTIVATIONS`.
    """
    state: tuple[Any, ...] = ((), None, None, 0, 0, 0, [])  # replaced as a whole: several threads may call
    values: Any = parameters.values()  # a missing bias is a TypeError
    address = Tensor.data_ptr
    compiling, derivatives, autocast = torch.compiler.is_compiling, torch.is_grad_enabled, torch.is_autocast_enabled
    overridden, empty_like, single = torch.overrides.has_torch_function_unary, torch.empty_like, torch.float32
    tracing, inference = torch.jit.is_tracing, torch.is_inference_mode_enabled

    def look(addresses: tuple[int, ...]) -> tuple[Any, ...] | None:
        nonlocal state
        parts = [parameters.get(name) for name in names]
        up, down = parts[2], parts[4]
        if up is None or down is None or not _readable(parts) or not up.shape[2]:
            return None
        from weft.kernels.cpu import tree as loops

        code, most = loops.descend.compile(), most_rows(up, down)
        # Their memory is held: no other weights, perhaps smaller ones, come to lie there meanwhile.
        held = [p if p is None else p.detach() for p in parts]
        state = (addresses, code, plan_of(parts, activation), up.shape[2], down.shape[2], most, held)
        return state

    def run(x: Tensor) -> Tensor | None:
        if (
            compiling()
            or derivatives()
            or type(x) is not Tensor
            or x.dtype is not single
            or not x.is_cpu
            or not x.is_contiguous()
            or x.is_neg()
            or autocast("cpu")
            or overridden(x)
            or compiled.counting
            or tracing()
            or not (inference() or _still(x, *parameters.values()))
        ):
            return None
        try:
            source, addresses = address(x), tuple(map(address, values))
        except (RuntimeError, TypeError):  # inside torch.func's transforms; without a bias
            return None
        found = state if addresses == state[0] else look(addresses)
        if found is None:
            return None
        _, loop, plan, features, outputs, most, _ = found
        shape = x.shape
        if not shape or shape[-1] != features or (rows := x.numel() // features) > most:
            return None
        if not source:  # empty, or inside of torch.func.functionalize
            return None
        out = empty_like(x) if outputs == features else x.new_empty((*shape[:-1], outputs))
        if type(out) is not Tensor:  # a mode has put a stand-in there
            return None
        loop(plan, source, address(out), 0, rows)
        return out

    return run


def frozen_tree(parts: Sequence[Tensor | None], activation: str | None) -> Callable[..., Tensor]:
    """A function ``f(x, out=None)``, ``[..., D] -> [..., O]``, of a copy of these weights.

    For rows that come one by one: a call is the loop's time, that of a new tensor (or none: ``out`` is overwritten and
    returned) and little more. Nothing is asked of a module or of its weights, whose copy nobody else can move or free;
    the system is asked to put it on huge pages. There is no derivative, and autocast is not followed.

    Args:
        parts: nodes, node_bias, up, up_bias, down, down_bias, as for `tree_feed_forward`.
        activation: a key of `ACTIVATIONS`.

    Raises:
        Unsupported: for None, an activation that the loops do not have.
        UsageError: from the function, for inputs that require a gradient where gradients are on, an ``out`` of another
            shape, dtype or device, and as `tree_feed_forward`.
    """
    if activation is None:
        raise Unsupported("the loops do not have this activation", ", ".join(ACTIVATIONS))
    parts = [p if p is None else p.detach().clone(memory_format=torch.contiguous_format) for p in parts]
    nodes, node_bias, up, up_bias, down, down_bias = parts
    assert nodes is not None and node_bias is not None and up is not None and down is not None
    features, outputs, loop, plan, most = up.shape[2], down.shape[2], None, None, -1
    if _readable(parts) and features:
        from weft.kernels.cpu import tree as loops

        for p in parts:
            if p is not None:
                make_huge(p)
        loop, plan, most = loops.descend.compile(), plan_of(parts, activation), most_rows(up, down)
    address, compiling, single = Tensor.data_ptr, torch.compiler.is_compiling, torch.float32
    overridden, empty_like, tracing = torch.overrides.has_torch_function_unary, torch.empty_like, torch.jit.is_tracing
    inference = torch.is_inference_mode_enabled

    def run(x: Tensor, out: Tensor | None = None) -> Tensor:
        if (
            loop is not None
            and type(x) is Tensor
            and x.dtype is single
            and x.is_cpu
            and x.is_contiguous()
            and not (compiling() or x.is_neg() or x.requires_grad or compiled.counting or overridden(x) or tracing())
            and (inference() or _still(x))
        ):
            shape = x.shape
            if shape and shape[-1] == features and (rows := x.numel() // features) <= most:
                to = out
                if to is None:
                    to = empty_like(x) if outputs == features else x.new_empty((*shape[:-1], outputs))
                elif not _fits(to, x, outputs, rows):
                    to = None
                if type(to) is Tensor:  # a mode may have put a stand-in there
                    try:
                        source, target = address(x), address(to)
                    except RuntimeError:  # inside torch.func's transforms there are none
                        source = target = 0
                    if source and target:  # functionalize has 0, as what is empty
                        loop(plan, source, target, 0, rows)
                        if out is not None:
                            increment_version(out)  # autograd refuses what it has kept of it before
                        return to
        for name, t in (("x", x),) if out is None else (("x", x), ("out", out)):
            check_tensor(name, t, FLOATS)
        if differentiated(x, out):
            raise UsageError("a frozen tree has no derivative: call the layer, or detach x and out")
        if not x.ndim or x.shape[-1] != features:
            raise UsageError(f"x {list(x.shape)}: give [..., {features}]")
        flat = x.reshape(x.shape[:-1].numel(), features)
        found = tree_feed_forward(flat, nodes, node_bias, up, up_bias, down, down_bias, activation)
        found = found.view(*x.shape[:-1], outputs)
        if out is None:
            return found
        if out.shape != found.shape or out.dtype != found.dtype or out.device != found.device:
            raise UsageError(f"out {list(out.shape)} {out.dtype} on {out.device}: give {list(found.shape)} {x.dtype}")
        return out.copy_(found)

    return run


def _still(*tensors: Tensor | None) -> bool:
    """Whether none has a tangent: `torch.no_grad` keeps them, `torch.inference_mode` does not."""
    return all(t is None or unpack_dual(t).tangent is None for t in tensors)


def _readable(parts: Sequence[Tensor | None]) -> bool:
    """Whether the loop may read them: other classes' tensors may have no memory of their own."""
    return native(parts) and all(p is None or type(p) in (Tensor, nn.Parameter) for p in parts)


def _fits(out: Tensor, x: Tensor, outputs: int, rows: int) -> bool:
    """Whether the loop may write there: rows are written while others are still to be read."""
    return (
        type(out) is Tensor
        and out.dtype is x.dtype
        and out.is_cpu
        and out.is_contiguous()
        and not out.requires_grad
        and out.shape == (*x.shape[:-1], outputs)
        and (rows < 2 or (at := out.data_ptr()) >= (of := x.data_ptr()) + x.nbytes or of >= at + out.nbytes)
    )
