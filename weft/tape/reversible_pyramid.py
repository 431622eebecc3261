"""Compute a pyramid of feature maps back from the output, level by level, in place of keeping what its layers saved.

A silo couples n levels, 0 the finest, by transforms F_ij down (i < j) and G_ij up (i > j) that may be any modules:

    y_j = x_j + sum over i < j of F_ij(x_i),        z_j = y_j + sum over i > j of G_ij(y_i);
    y_j = z_j - sum over i > j of G_ij(y_i), j from n - 1 to 0;   x_j = y_j - sum over i < j of F_ij(x_i), j from 0 on

Every F reads the x, not the y (and G the y), as in the authors' code. A stack of silos is one node of the graph that
keeps its last z alone, whatever its depth. The backward pass undoes half a silo at a time: with x_i complete, it
computes F_ij(x_i) once more with a graph, which gives dx_i += J_ij^T dy_j and the parameters' gradients, and takes it
from y_j. Beside z there is a generator's state for each transform that drew random numbers. A silo may add a level: the
new one is the sum of its F alone. What comes back is off by rounding, which grows with depth: use float32 or more.

The authors' code adds to ``.grad`` on the way; here gradients are returned, and BatchNorm counts a batch once.

Paper: "RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network", Vitaliy Chiley, Vithursan Thangarasa,
Abhay Gupta, Anshul Samar, Joel Hestness, Dennis DeCoste, 2022, arXiv:2206.14098.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.ops.replay import Replay, devices_of
from weft.ops.silo import Silo, Transform
from weft.session import kept
from weft.testing.example import Example


@method("reversible-pyramid", contract="function", family="tape", papers=[331], tags={"exact"})
def reversible_pyramid(silos: Sequence[Silo] | nn.ModuleList, *levels: Tensor) -> tuple[Tensor, ...]:
    """The output of a stack of silos, of which nothing but this output is kept for the way back.

    >>> silos = nn.ModuleList([Silo((48, 64), inputs=1), Silo((48, 64, 80), inputs=2)])  # doctest: +SKIP
    >>> fine, middle, coarse = reversible_pyramid(silos, x)  # doctest: +SKIP

    Args:
        silos: each takes what the one before gives.
        levels: maps ``[B, C_i, H / 2^i, W / 2^i]``, the finest first; floating.

    Returns:
        The levels of the last silo. They can be differentiated once.

    Raises:
        UsageError: without silos, or for something else.
        DataError: for maps whose shapes or number do not fit.
    """
    stack = list(silos)
    if not stack or not all(isinstance(silo, Silo) for silo in stack):
        raise UsageError(
            f"{len(stack)} silos of {sorted({type(silo).__name__ for silo in stack})}; give Silo, at least 1"
        )
    weights = list(dict.fromkeys(p for silo in stack for p in silo.parameters() if p.requires_grad))
    return _Stack.apply(stack, weights, [], *levels, *weights)


class _Stack(torch.autograd.Function):
    """Silos in a row; backward goes through their halves from the last one, with one transform's graph at a time."""

    @staticmethod
    def forward(stack: list[Silo], weights: list[Tensor], runs: list[Replay], *tensors: Tensor) -> tuple[Tensor, ...]:
        levels, devices = list(tensors[: len(tensors) - len(weights)]), devices_of(tensors)

        def recorded(f: nn.Module) -> Transform:
            def call(x: Tensor) -> Tensor:
                runs.append(Replay(f.modules(), devices))
                with runs[-1].recorded():
                    return f(x)

            return call

        for silo in stack:
            levels = silo.through(levels, [[(i, j, recorded(f)) for i, j, f in half] for half in silo.halves()])
        return tuple(levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stack, ctx.weights, ctx.runs, *tensors = inputs
        ctx.dtypes = [t.dtype for t in tensors[: len(tensors) - len(ctx.weights)]]
        ctx.outputs = len(output)
        # Parameters are saved for the check of their versions alone: hooks would return copies.
        ctx.save_for_backward(*output, *ctx.weights, *(t for run in ctx.runs for t in run.tensors))
        for run in ctx.runs:
            run.tensors = []

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = list(ctx.saved_tensors), ctx.needs_input_grad[3:]
        states = saved[ctx.outputs + len(ctx.weights) :]
        values, slopes = saved[: ctx.outputs], list(grads)
        sums: dict[int, Tensor | None] = dict.fromkeys(id(p) for p in ctx.weights)
        end = len(ctx.runs)
        for silo in reversed(ctx.stack):
            for half in reversed(silo.halves()):
                runs, end = ctx.runs[end - len(half) : end], end - len(half)
                size = sum(run.count for run in runs)
                own: Iterator[Tensor] = iter(states[len(states) - size :])
                del states[len(states) - size :]
                for (i, j, f), run in zip(half, runs, strict=True):
                    with torch.enable_grad(), run.again([next(own) for _ in range(run.count)]):
                        x = values[i].detach().requires_grad_()
                        change = f(x)
                    values[j] = values[j] - change.detach().to(values[j].dtype)
                    by = [x, *(p for p in f.parameters() if id(p) in sums)]
                    found = torch.autograd.grad(change, by, slopes[j].to(change.dtype), allow_unused=True)
                    for t, g in zip(by, found, strict=True):
                        if g is not None and t is x:
                            slopes[i] = slopes[i] + g.to(slopes[i].dtype)
                        elif g is not None:
                            total = sums[id(t)]
                            sums[id(t)] = g.clone() if total is None else total.add_(g)
                    del change, found
            values, slopes = values[: silo.inputs], slopes[: silo.inputs]
        out = [g.to(dtype) if n else None for g, n, dtype in zip(slopes, needed, ctx.dtypes, strict=False)]
        return (None, None, None, *out, *sums.values())


def _stack(seed: int, depth: int, dropout: float = 0.1, grow: bool = True, norm: bool = True) -> Any:
    """Silos of three levels in float64, of which the first adds one; statistics of a batch where ``norm``."""
    generator = torch.Generator().manual_seed(seed)

    def layers(before: int, after: int, factor: int) -> list[nn.Module]:
        own = nn.BatchNorm2d(after) if norm else nn.GroupNorm(2, after)
        conv = nn.Conv2d(before, after, 2 * factor - 1, factor, factor - 1, bias=False)
        return [conv, own, nn.GELU(), nn.Dropout(dropout)]

    def up(before: int, after: int, factor: int) -> nn.Module:
        return nn.Sequential(*layers(before, after, 1), nn.Upsample(scale_factor=factor))

    def down(before: int, after: int, factor: int) -> nn.Module:
        return nn.Sequential(*layers(before, after, factor))

    sizes = [2 if grow and k == 0 else 3 for k in range(depth)]
    silos = nn.ModuleList(Silo((4, 6, 8), inputs=n, down=down, up=up) for n in sizes).double()
    with torch.no_grad():
        for p in silos.parameters():
            p.normal_(0, max(1, p[0].numel()) ** -0.5, generator=generator)
    return silos


def _pyramid(seed: int, levels: int, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = ((4, 8, 12), (6, 4, 6), (8, 2, 3))[:levels]
    return [torch.randn(batch, *side, generator=generator).double().requires_grad_() for side in sides]


def example() -> Example:
    """Two silos, of which the first adds a level; it stands for autograd through both."""

    def plain(silos: nn.ModuleList, *levels: Tensor) -> tuple[Tensor, ...]:
        for silo in silos:
            levels = silo(*levels)
        return levels

    return Example(plain, (_stack(0, 2, 0.0, norm=False), *_pyramid(0, 2)), torch.empty(0))


@claim(
    "the inverse recovers all inputs of a stack of 8 silos to 1e-5 of the output's size in float32, 1e-12 in float64",
    row=331,
    mutants={
        "up from the finest": (
            "for i in reversed(range(n)) for j in range(i)",
            "for i in range(n) for j in range(i)",
            "weft.ops.silo",
        ),
        "down from the coarsest": (
            "for i in range(self.inputs) for j",
            "for i in reversed(range(self.inputs)) for j",
            "weft.ops.silo",
        ),
        "reads what has changed": ("given = list(out)", "given = out", "weft.ops.silo"),
        "down undone first": ("for half in reversed(self.halves()):", "for half in self.halves():", "weft.ops.silo"),
    },
)
def inverse(seed: int) -> list[Check]:
    """Largest difference of any level, beside the largest entry of the output."""
    checks = []
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        silos, levels = _stack(seed, 8, 0.0, grow=False, norm=False).to(dtype), [t.to(dtype) for t in _pyramid(seed, 3)]
        with torch.no_grad():
            out: Sequence[Tensor] = levels
            for silo in silos:
                out = silo(*out)
            size = max(float(t.abs().max()) for t in out)
            for silo in reversed(silos):
                out = silo.inverse(*out)
        off = max(float((a - b).detach().abs().max()) for a, b in zip(out, levels, strict=True))
        checks.append(Check(off / size, bound, what=str(dtype)))
    return checks


@claim(
    "outputs, statistics of BatchNorm and random numbers are those of the equations under autograd, bit for bit, and "
    "gradients of inputs and parameters, to 1e-4 in float32 and 1e-9 in float64",
    row=331,
    mutants={
        "reads what has changed": ("given = list(out)", "given = out", "weft.ops.silo"),
        "gradient of what passes by": ("slopes[i] = slopes[i] + g", "slopes[i] = g"),
        "masks drawn anew": ("_set_state(device, state)\n            for", "pass\n            for", "weft.ops.replay"),
        "statistics counted twice": ("setattr(module, name, buffer)", "pass", "weft.ops.replay"),
        "levels not undone": ("values[j] = values[j] - change.detach().to(values[j].dtype)", "pass"),
        "the last silo alone": ("total.add_(g)", "total"),
        "generator left behind": ("zip(self._drawn, now, strict=True)", "()", "weft.ops.replay"),
    },
)
def as_autograd(seed: int) -> list[Check]:
    """Largest difference of a gradient beside its largest entry; three silos that share one transform, with dropout."""
    checks = []
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        silos = _stack(seed, 3).to(dtype)
        silos[2].up[0] = silos[1].up[0]
        twin, results = copy.deepcopy(silos), []
        for stack in (silos, twin):
            levels = [t.detach().to(dtype).requires_grad_() for t in _pyramid(seed, 2)]
            torch.manual_seed(seed)
            if stack is silos:
                out: Sequence[Tensor] = reversible_pyramid(stack, *levels)
            else:
                out = levels
                for k, silo in enumerate(stack):
                    down, up = iter(silo.down), iter(silo.up)
                    x = list(out)
                    f = {(i, j): next(down)(x[i]) for i in range(2 if k == 0 else 3) for j in range(i + 1, 3)}
                    y0, y1 = x[0], x[1] + f[0, 1]
                    y2 = f[0, 2] + f[1, 2] if k == 0 else x[2] + f[0, 2] + f[1, 2]
                    out = [y0, y1, y2]
                    g20, g21, g10 = next(up)(y2), next(up)(y2), next(up)(y1)
                    out = [y0 + g20 + g10, y1 + g21, y2]
            errors = [torch.linspace(-1, 1, t.numel(), dtype=dtype).view_as(t) for t in out]
            found = torch.autograd.grad(out, [*levels, *stack.parameters()], errors)
            state = torch.get_rng_state()
            results.append((out, found, [*stack.buffers(), state]))
        mine, plain = results
        pairs = [(a, b) for a, b in zip(mine[1], plain[1], strict=True)]
        scale = max(float(b.abs().max()) for _, b in pairs)
        off = max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * scale) for a, b in pairs)
        checks.append(Check(off, bound, what=f"gradients, {dtype}"))
        same = [torch.equal(a, b) for k in (0, 2) for a, b in zip(mine[k], plain[k], strict=True)]
        checks.append(Check(same.count(False), 0, "==", "outputs, buffers, generators that differ"))
    return checks


@claim(
    "bytes kept for a stack run as one function are those of its output, with 2 silos and with 8",
    row=331,
    mutants={
        "inputs kept too": (
            "ctx.save_for_backward(*output,",
            "ctx.save_for_backward(*output, *(t.clone() for t in tensors),",
        ),
        "graphs kept": ("with runs[-1].recorded():", "with torch.enable_grad(), runs[-1].recorded():"),
        "states that nothing drew": (
            "for device, state in states if not",
            "for device, state in states if True or not",
            "weft.ops.replay",
        ),
    },
)
def constant_bytes(seed: int) -> list[Check]:
    """Bytes at the end of the forward pass, and at most in the backward pass, both beside the output's."""
    levels, checks = _pyramid(seed, 3, batch=2 + seed % 5), []
    for depth in (2, 8):
        silos = _stack(seed, depth, 0.0, grow=False)
        with kept(silos) as count:
            out = reversible_pyramid(silos, *levels)
            size = sum(t.numel() * t.element_size() for t in out)
            checks.append(Check(count.peak_bytes, size, "==", f"bytes of {depth} silos"))
            torch.autograd.grad(out, levels, [torch.ones_like(t) for t in out])
        checks.append(Check(count.total_bytes, 0 if out is None else size, "<=", "bytes left"))
    return checks
