"""Offload the inner activations of a fraction of the tokens, and compute those of the others again on the way back.

Of a block of token-wise layers f_n o ... o f_1 on x [..., T, D] the inner activations are a_i = f_i(a_{i-1}), a_0 = x.
Kept of each a_i, i < n, are the tokens before k = round(alpha T); in the backward pass

    a_i = [ kept_i ; f_i(a_{i-1}) of the tokens from k on ],   starting from x, which is kept whole,

and each layer's backward is then the ordinary one for all tokens. So kept bytes grow with alpha in a straight line, and
tokens computed again fall, T - k. Products with weights are done again for those tokens alone; what elementwise layers
and norms need is cheap and computed for all. The paper offloads x and the attention's output whole and never computes
attention again: attention is not token-wise and stays outside the block here; x is another layer's output.

Kept rows go where saved tensors go, so that `weft.tape.Offload` moves them to disk and `weft.session.kept` counts them,
or to a ``target``: `host_memory` for accelerators. `weft.ops.memory_plan` has the paper's plans.

Paper: "MEMO: Fine-grained Tensor Management For Ultra-long Context LLM Training" (first version: "Efficiently Training
7B LLM with 1 Million Sequence Length on 8 GPUs"), Pinxue Zhao, Hailin Zhang, Fangcheng Fu, Xiaonan Nie, Qibin Liu,
Fang Yang, Yuanbo Peng, Dian Jiao, Shuaipeng Li, Jinbao Xue, Yangyu Tao, Bin Cui, 2024, arXiv:2407.12117.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.measure import operations
from weft.method import method
from weft.ops.memory_plan import fraction, placement
from weft.ops.token_layers import call, own_weights, token_layers, weights
from weft.session import kept
from weft.testing.example import Example

Target = Callable[[Tensor], Callable[[], Tensor]]


def host_memory(rows: Tensor) -> Callable[[], Tensor]:
    """A target: a copy in host memory, pinned for CUDA so that it runs beside what is computed next."""
    held = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
    held.copy_(rows, non_blocking=rows.is_cuda)
    device = rows.device
    return lambda: held.to(device, non_blocking=True)


class _Block:
    """Layers, how many tokens are kept, and what the passes tell each other."""

    def __init__(self, layers: list[nn.Module], keep: int, target: Target | None, count: Callable[[int], None]) -> None:
        self.layers, self.keep, self.target, self.count = layers, keep, target, count
        self.fetch, self.autocast = list[Callable[[], Tensor]](), dict[str, Any]()

    def cut(self, a: Tensor) -> Tensor:
        return a if self.keep == a.shape[-2] else a[..., : self.keep, :].clone()  # a view would hold all tokens


class _TokenWise(torch.autograd.Function):
    """The block's output and the rows that are kept, which have no derivative."""

    @staticmethod
    def forward(x: Tensor, block: _Block, *params: Tensor) -> tuple[Tensor, ...]:
        a, kind, rows, given = x.detach(), x.device.type, list[Tensor](), iter(params)
        block.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        block.autocast["enabled"] = torch.is_autocast_enabled(kind)
        for number, layer in enumerate(block.layers):
            if number and block.keep:
                rows.append(block.cut(a))
            a = call(layer, a, [next(given) for _ in weights(layer)])
        return a, *rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (x, ctx.block, *params), rows = inputs, output[1:]
        ctx.mark_non_differentiable(*rows)
        ctx.set_materialize_grads(False)  # zeros in the place of the rows' gradients would take as much as the rows
        if ctx.block.target is not None:
            ctx.block.fetch, rows = [ctx.block.target(one) for one in rows], ()
        ctx.save_for_backward(x, *params, *rows)  # the parameters as they are now, and not what the layers have later

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        block, needs, (x, *saved) = ctx.block, ctx.needs_input_grad, ctx.saved_tensors
        if grad is None:
            return (None,) * len(needs)
        params, rows = saved[: len(needs) - 2], saved[len(needs) - 2 :]
        if block.target is not None:  # it has done with them: a second backward pass computes all tokens again
            rows, block.fetch = [fetch() for fetch in block.fetch], []
        with torch.autocast(**block.autocast, cache_enabled=False):
            return _backward(block.layers, [x, *_inner(block, x, rows, params)], grad, needs, params)


def _inner(block: _Block, x: Tensor, rows: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The inputs of all layers but the first, for all tokens."""
    keep, given = block.keep if rows else 0, iter(params)
    if keep == x.shape[-2]:
        return rows
    again, inner = x.detach()[..., keep:, :], list[Tensor]()
    block.count(math.prod(again.shape[:-1]))
    for number, layer in enumerate(block.layers[:-1]):
        again = call(layer, again, [next(given) for _ in weights(layer)])
        inner.append(torch.cat([rows[number], again], -2) if keep else again)
    return inner


def _backward(
    layers: list[nn.Module], inner: list[Tensor], grad: Tensor | None, needs: tuple[bool, ...], given: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the function's arguments, layer by layer from the last."""
    found, last = list[Tensor | None](), len(given)
    for number in range(len(layers) - 1, -1, -1):
        layer, a, below = layers[number], inner.pop(), number > 0 or needs[0]
        first = last - len(weights(layer))
        params, wanted, last = given[first:last], needs[2 + first : 2 + last], first
        if type(layer) is nn.Linear:
            grad, of = _linear(a, grad, params, (below, *wanted))
        else:
            with torch.enable_grad():
                a = a.detach().requires_grad_(below)
                params = [p.detach().requires_grad_(want) for p, want in zip(params, wanted, strict=True)]
                leaves = [t for t in (a, *params) if t.requires_grad]
                results = iter(torch.autograd.grad(call(layer, a.view_as(a), params), leaves, grad) if leaves else ())
            grad = next(results) if below else None
            of = [next(results) if want else None for want in wanted]
        found = of + found
    return grad, None, *found


def _linear(a: Tensor, grad: Any, params: list[Tensor], wanted: tuple[bool, ...]) -> tuple[Any, list[Tensor | None]]:
    """Gradients of the input and of the parameters, without the forward product."""
    flat = grad.flatten(0, -2)
    with torch.autocast(grad.device.type, enabled=False):
        of = [(flat.T @ a.flatten(0, -2).to(grad.dtype)).to(params[0].dtype) if wanted[1] else None]
        of += [flat.sum(0).to(p.dtype) if want else None for p, want in zip(params[1:], wanted[2:], strict=True)]
        return (grad @ params[0].to(grad.dtype)).to(a.dtype) if wanted[0] else None, of


@method("token-wise", contract="layer", family="tape", papers=[367], tags={"same-forward"})
class TokenWise(Convertible):
    """A token-wise ``nn.Sequential`` (a transformer's feed-forward part) that keeps a fraction of the tokens.

    Differentiable once, and not by transforms of ``torch.func``, which raise; torch refuses to change the output in
    place where the last layer is linear.

    Attributes:
        offloaded_bytes: of the last forward pass that kept anything.
        recomputed_tokens: of all backward passes so far.

    Args:
        layer: linear layers, elementwise activations and norms over the last dimension; it is used, not copied.
        fraction: alpha, of the tokens of ``x [..., T, D]``, the first ones.
        target: where kept rows go: called with a tensor, it returns what gives the tensor back, and is dropped by the
            first backward pass (a second one, by ``retain_graph``, computes all tokens again). None: saved tensors.

    Raises:
        Unsupported: for other layers, in place or with dropout; see `weft.ops.token_layers`.
        UsageError: for a fraction outside [0, 1].
    """

    converts = (nn.Sequential,)

    def __init__(self, layer: nn.Module, *, fraction: float = 0.5, target: Target | None = None) -> None:
        super().__init__()
        if not 0 <= fraction <= 1:
            raise UsageError(f"fraction={fraction!r}; it is from 0 to 1")
        if type(layer) is not nn.Sequential:
            raise Unsupported(f"{type(layer).__name__} is no chain of layers", "an nn.Sequential")
        own_weights(*token_layers(layer))
        self.layers, self.fraction, self.target = layer, float(fraction), target
        self.offloaded_bytes = self.recomputed_tokens = 0

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> TokenWise:
        """The chain, with another backward pass."""
        return cls(layer, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., T, D] -> [..., T, D']``."""
        layers = token_layers(self.layers)
        params = [p for layer in layers for p in weights(layer).values()]
        if x.ndim < 2 or not layers or not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params))):
            return self.layers(x)
        block = _Block(layers, round(self.fraction * x.shape[-2]), self.target, self._count)
        out, *rows = _TokenWise.apply(x, block, *params)
        self.offloaded_bytes = sum(row.nbytes for row in rows)
        return out

    def _count(self, tokens: int) -> None:
        self.recomputed_tokens += tokens


def example() -> Example:
    """A norm, two linear layers and an activation, and two sequences of eight tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        x = torch.randn(2, 8, 6)
    return Example(layer, x, torch.arange(2))


@claim(
    "for token fractions 0, 1/4, 1/2, 3/4 and 1 outputs and gradients are plain autograd's to 1e-9 in float64; kept "
    "bytes, tokens computed again and products done again are exact straight lines in the fraction",
    row=367,
    mutants={
        "the other tokens kept": ("a[..., : self.keep, :].clone()", "a[..., -self.keep :, :].clone()"),
        "a view kept": ("a[..., : self.keep, :].clone()", "a[..., : self.keep, :]"),
        "joined in another order": ("torch.cat([rows[number], again], -2)", "torch.cat([again, rows[number]], -2)"),
        "computed twice": ("again = call(layer, again,", "layer(again); again = call(layer, again,"),
        "everything kept": ("round(self.fraction * x.shape[-2])", "x.shape[-2]"),
        "nothing kept": ("round(self.fraction * x.shape[-2])", "0"),
        "the forward product again": ("grad, of = _linear(a", "layer(a); grad, of = _linear(a"),
    },
)
def straight_lines(seed: int) -> list[Check]:
    """A norm, three linear layers and activations; bytes beyond the input, by the session and by the target."""
    torch.manual_seed(seed)
    d, wide, tokens = 4 + seed % 3, 7 + seed % 4, 4 * (2 + seed % 3)
    chain = [nn.LayerNorm(d), nn.Linear(d, wide), nn.GELU(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, d)]
    dense = nn.Sequential(*chain).double()
    x, errors = torch.randn(3, tokens, d).double().requires_grad_(), torch.randn(3, tokens, d).double()
    leaves = [x, *dense.parameters()]
    wanted, checks, moved = torch.autograd.grad(dense(x), leaves, errors), list[Check](), list[int]()

    def target(rows: Tensor) -> Callable[[], Tensor]:
        moved.append(rows.nbytes)
        return lambda: rows

    token = 3 * 8 * (d + 4 * wide)  # bytes of the inputs of all layers but the first, for a token of each sequence
    product = 2 * 3 * (d * wide + wide * wide)  # operations of the linear layers but the last, for the same
    rest = 2 * 2 * 3 * tokens * (2 * d * wide + wide * wide)  # an ordinary backward pass's
    for part in range(5):
        keep, found = part * tokens // 4, list[Tensor]()
        layer = TokenWise.from_dense(dense, fraction=part / 4)
        with kept(layer) as count:
            out = layer(x)
        done = operations(lambda: found.extend(torch.autograd.grad(out, leaves, errors)))["total"]  # noqa: B023
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
        checks += [
            Check(max(worst, float((out - dense(x)).detach().abs().max())), 1e-9, what=f"gradients at {part}/4"),
            Check(count.peak_bytes - x.nbytes, keep * token, "==", f"bytes kept at {part}/4"),
            Check(layer.recomputed_tokens, 3 * (tokens - keep), "==", f"tokens computed again at {part}/4"),
            Check(done, rest + (tokens - keep) * product, "==", f"operations of the backward pass at {part}/4"),
        ]
        moved.clear()
        other = torch.autograd.grad(TokenWise(dense, fraction=part / 4, target=target)(x), leaves, errors)
        checks.append(Check(sum(moved), keep * token, "==", f"bytes moved at {part}/4"))
        checks.append(Check(all(map(torch.equal, other, found)), True, "==", "gradients with a target"))
    return checks


@claim(
    "addresses by mixed-integer programming have the lowest peak of all placements, and no two buffers that are alive "
    "together overlap; the fraction is the largest whose offload hides behind the computation and fits",
    row=367,
    mutants={
        "memory never used again": ("lifetimes[j][0]) < min(", "0) < 9 + min(", "weft.ops.memory_plan"),
        "pairs forgotten": ("in combinations(range(count)", "in combinations(range(1, count)", "weft.ops.memory_plan"),
        "another aim": ("objective[top], whole", "objective[0], whole", "weft.ops.memory_plan"),
        "order turned": ("[(j, i) if found", "[(i, j) if found", "weft.ops.memory_plan"),
        "memory of the host forgotten": ("host_bytes / moved if moved", "math.inf if moved", "weft.ops.memory_plan"),
        "the whole part forgotten": ("else math.inf) - whole", "else math.inf)", "weft.ops.memory_plan"),
    },
)
def plans(seed: int) -> list[Check]:
    """Six instances against all orders, each buffer as low as it can be; fractions against a search."""
    draw, checks = random.Random(seed), list[Check]()
    for _ in range(6):
        s = [draw.randint(1, 9) for _ in range(6)]
        lives = [(a := draw.randint(0, 6), a + draw.randint(1, 4)) for _ in s]
        clash = [[max(a[0], b[0]) < min(a[1], b[1]) for b in lives] for a in lives]
        best = sum(s)
        for order in itertools.permutations(range(6)):
            at: dict[int, int] = {}
            for i in order:
                near = [j for j in at if clash[i][j]]
                free = [0, *(at[j] + s[j] for j in near)]
                at[i] = min(c for c in free if all(c >= at[j] + s[j] or at[j] >= c + s[i] for j in near))
            best = min(best, max(at[i] + s[i] for i in at))
        made = placement(s, lives)
        low, pairs = made.addresses, itertools.combinations(range(6), 2)
        hits = sum(clash[i][j] and low[i] < low[j] + s[j] and low[j] < low[i] + s[i] for i, j in pairs)
        checks += [Check(made.peak, best, "==", "peak"), Check(hits + (min(low) < 0), 0, "==", "overlaps")]
        whole, rest, room, host = (draw.randint(1, 99) for _ in range(4))
        fits = [n for n in range(1001) if whole + n / 1000 * rest <= room and n / 1000 * rest * 3 <= host]
        found = fraction(whole, rest, seconds=room / 7, bandwidth=7, layers=5, host_bytes=3 * whole + host)
        checks.append(Check(abs(found - max(fits, default=0) / 1000), 1 / 999, what="fraction"))
    return checks
