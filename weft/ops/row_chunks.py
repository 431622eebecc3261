"""Send a batch through a module chunk by chunk without a graph, and once more, chunk by chunk, on the way back.

No more than one chunk's activations exist at a time, in either pass; every row's output must need its own input alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.errors import DataError, Unsupported, UsageError
from weft.ops.replay import BATCH_NORMS, Replay, devices_of, version

__all__ = ["in_chunks"]

Encoder = Callable[..., Any]


def in_chunks(encoder: Encoder, inputs: Any, chunk: int, more: Sequence[Tensor] = ()) -> Any:
    """What ``encoder`` returns for the batch, with a backward pass that runs it once more; differentiable once.

    The second run of a chunk has the random numbers, the autocast state and the buffers of the first, which leaves
    torch's generators and the buffers as one run of the chunks in order does. Kept between the passes: the inputs, and
    for each chunk the state of the generators that it drew from and the buffers that it changed.

    Args:
        encoder: a module, a module's method, or a function if its parameters are named.
        inputs: a tensor ``[B, ...]``, a tuple of arguments or a dict of keyword arguments, of which every tensor has
            B rows or no dimension at all.
        chunk: rows that pass the encoder at a time.
        more: tensors that get gradients beside the inputs and the module's parameters.

    Gradients of weights are summed over the chunks in float32 where the weights are of a half type.

    Raises:
        UsageError: for an encoder whose parameters cannot be told; from the backward pass, where its parameters are
            other tensors than they were (`torch.func.functional_call`, a layer swapped in between).
        DataError: for inputs with unequal numbers of rows, or an output that is no tensor, tuple or dict of tensors
            with as many rows as the input.
        Unsupported: for BatchNorm in training mode, or an encoder that changes its input in place.
    """
    owner = encoder.__self__ if isinstance(encoder, types.MethodType) else encoder
    module = owner if isinstance(owner, nn.Module) else nn.Module()
    if module is not owner and not more:
        raise UsageError(f"the encoder {encoder!r} is no module and no method of one; name its parameters=")
    modules = list(module.modules())
    for inner in modules:
        if isinstance(inner, BATCH_NORMS) and (inner.training or not inner.track_running_stats):
            raise Unsupported(
                f"{type(inner).__name__} in training mode takes its statistics from a chunk, not from the batch",
                "GroupNorm or LayerNorm, or the BatchNorm in eval()",
            )
    names, values = _flat(inputs)
    tensors = [v for v in values if isinstance(v, Tensor)]
    rows = {len(t) for t in tensors if t.ndim}
    if len(rows) != 1:
        raise DataError(f"the inputs have {sorted(rows) or 'no'} rows; every tensor has one row for each of the batch")
    weights = dict.fromkeys(p for p in (*module.parameters(), *more) if p.requires_grad)
    plan = _Plan(encoder, modules, names, values, range(0, max(*rows, 1), chunk))
    plan.weights, plan.held = list(weights), list(module.parameters())
    out = _Embed.apply(plan, *tensors, *weights)
    return _built(plan.out_names, out)


def _flat(given: Any) -> tuple[Any, list[Any]]:
    """The values of a tensor, tuple or dict, and what `_built` needs to undo that."""
    if isinstance(given, dict):
        return list(given), list(given.values())
    return (True, list(given)) if isinstance(given, tuple | list) else (None, [given])


def _built(names: Any, values: Sequence[Any]) -> Any:
    return dict(zip(names, values, strict=True)) if isinstance(names, list) else tuple(values) if names else values[0]


class _Plan:
    """A batch's way through an encoder: all that is no tensor, and how to call it on a chunk."""

    def __init__(
        self, encoder: Encoder, modules: list[nn.Module], names: Any, values: list[Any], starts: range
    ) -> None:
        self.encoder, self.modules, self.names, self.starts = encoder, modules, names, starts
        self.places = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        self.rest = [None if isinstance(v, Tensor) else v for v in values]
        self.runs: list[Replay] = []
        self.weights: list[Tensor] = []
        self.held: list[Tensor] = []
        self.out_names: Any = None

    def cut(self, tensors: Sequence[Tensor], start: int) -> list[Tensor]:
        """The rows of a chunk."""
        return [t[start : start + self.starts.step] if t.ndim else t for t in tensors]

    def call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the encoder gives for these rows, as a list."""
        values = list(self.rest)
        for i, t in zip(self.places, tensors, strict=True):
            values[i] = t
        named = isinstance(self.names, list)
        out = self.encoder(**dict(zip(self.names, values, strict=True))) if named else self.encoder(*values)
        self.out_names, flat = _flat(out)
        if not all(isinstance(t, Tensor) and t.ndim for t in flat):
            raise DataError(f"an encoder returned {type(out).__name__}; it returns tensors with one row for each input")
        rows, found = next(len(t) for t in tensors if t.ndim), {len(t) for t in flat}
        if found - {rows}:
            raise DataError(f"an encoder returned {sorted(found)} rows for {rows}; each row of the input gives one")
        return flat

    def check_held(self) -> None:
        """UsageError where the module's parameters are no longer those of the forward pass."""
        now = list(self.modules[0].parameters())
        if len(now) != len(self.held) or any(a is not b for a, b in zip(now, self.held, strict=True)):
            raise UsageError(
                "the encoder's parameters are other tensors than in the forward pass, so that it cannot be run again; "
                "give them to the module itself, not by functional_call, and swap no layers before the backward pass"
            )


class _Embed(torch.autograd.Function):
    """Embeddings of a batch, without a graph; the backward pass builds and uses up the graph of a chunk at a time."""

    @staticmethod
    def forward(plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, inputs = [], tensors[: len(plan.places)]
        versions = [version(t) for t in inputs]
        for start in plan.starts:
            run = Replay(plan.modules, devices_of(tensors))
            with run.recorded():
                parts.append(plan.call(plan.cut(inputs, start)))
            plan.runs.append(run)
        if versions != [version(t) for t in inputs]:
            raise Unsupported("the encoder changes its input in place", "a first layer without inplace=True, or a copy")
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *tensors = inputs
        ctx.mark_non_differentiable(*(t for t in output if not (t.is_floating_point() or t.is_complex())))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(t for run in ctx.plan.runs for t in run.tensors))
        for run in ctx.plan.runs:
            run.tensors = []

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, saved, needed = ctx.plan, list(ctx.saved_tensors), ctx.needs_input_grad[1:]
        plan.check_held()
        split, chunk = len(plan.places), plan.starts.step
        inputs, weights = saved[:split], plan.weights  # saved for the check of versions alone: hooks return copies
        states: Iterator[Tensor] = iter(saved[len(needed) :])
        found: list[Any] = [[] for _ in inputs] + [None] * len(weights)  # an input's chunks, a weight's sum
        for start, run in zip(plan.starts, plan.runs, strict=True):
            with torch.enable_grad(), run.again([next(states) for _ in range(run.count)]):
                cut = [t.detach().requires_grad_(n) for t, n in zip(plan.cut(inputs, start), needed, strict=False)]
                outs = plan.call(cut)
            into = [None if g is None else g[start : start + chunk] for g in grads]
            pairs = [(o, g) for o, g in zip(outs, into, strict=True) if g is not None and o.requires_grad]
            leaves = [(i, t) for i, t in enumerate((*cut, *weights)) if needed[i]]
            if pairs and leaves:
                ends, slopes = zip(*pairs, strict=True)
                parts = torch.autograd.grad(ends, [t for _, t in leaves], slopes, allow_unused=True)
                for (i, t), g in zip(leaves, parts, strict=True):
                    if i < split:
                        found[i].append(torch.zeros_like(t) if g is None else g)
                    elif g is not None:
                        wide = torch.promote_types(g.dtype, torch.float32)
                        found[i] = g.to(wide, copy=True) if found[i] is None else found[i].add_(g)
                del ends
            del outs, pairs  # what no gradient needed of this graph goes before the next one is built
        for i, t in enumerate(inputs):
            found[i] = None if not found[i] else torch.cat(found[i]) if t.ndim else torch.stack(found[i]).sum(0)
        for i, t in enumerate(weights, split):
            found[i] = None if found[i] is None else found[i].to(t.dtype)
        return (None, *found)
