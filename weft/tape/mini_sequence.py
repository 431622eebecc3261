"""Send a sequence through MLP, head and loss in M chunks, recomputed on the way back: large tensors exist per chunk.

Blocks that act on each position alone split along the positions, x = (x_1, ..., x_M):

    MLP:  y = (f(x_1), ..., f(x_M)),                dW = sum_i dW_i,
    loss: L = sum_i sum CE(x_i W^T + b, y_i) / n,   dlogits_i = (softmax(x_i W^T + b) - onehot(y_i)) / n,

with n the number of labels that are not ignored in all chunks together; the mean of the chunks' means is another
number. Between the passes x alone is kept. Each chunk's hidden units and logits are computed again on the way back, so
that the largest hidden tensor and the largest logits have ceil(S / M) of the S = B T positions, in either pass. Only
the order of summation differs from one piece, and that dropout draws its mask chunk by chunk, the same in both passes.

The paper leaves M to the user. The authors' code takes chunks of max(4096 / B, 1024) positions for the MLP and 64 for
the head, and leaves the recomputation of the MLP to checkpoints of whole decoder layers; its chunks leave the last
positions out where 64 does not divide their number, and the head's gradient is added twice. Neither is done here.

Paper: "Mini-Sequence Transformer: Optimizing Intermediate Memory for Long Sequences Training", Cheng Luo, Jiawei Zhao,
Zhuoming Chen, Beidi Chen, Anima Anandkumar, 2024, arXiv:2407.15892.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from weft.claim import Check, claim
from weft.convert import Convertible, convert_
from weft.errors import DataError, Unsupported, UsageError
from weft.measure import kept_bytes, peak_bytes
from weft.method import method
from weft.models.transformer import CharTransformer
from weft.ops.positions import first_mixing
from weft.ops.row_chunks import in_chunks
from weft.testing.example import Example


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunks: int = 8,
    ignore_index: int = -100,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits as a whole; differentiable once.

    >>> loss = chunked_cross_entropy(body(tokens), model.head.weight, labels, chunks=16)  # doctest: +SKIP

    Args:
        hidden: ``[..., D]``, such as ``[B, T, D]``.
        weight: of the head, ``[K, D]``.
        labels: int64 ``[...]``, such as ``[B, T]``; not shifted.
        bias: of the head, ``[K]``.
        chunks: M, how many parts the positions are cut into.
        ignore_index: a label that counts neither in the sum nor in the mean.

    Returns:
        The mean over labels that are not ignored, in float32 at least; nan where all are, with gradients of zero.

    Raises:
        UsageError: for a number of chunks below 1.
        DataError: for shapes that do not fit.
    """
    _check(chunks)
    if labels.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        raise DataError(f"hidden, weight and labels of shapes {shapes}; expected [..., D], [K, D] and [...]")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # once for all chunks, as the linear layer would
        narrow = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
        bias = None if bias is None else bias.to(narrow)
    with torch.autocast(kind, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1])
        return _HeadLoss.apply(rows, weight, bias, labels.reshape(-1), chunks, ignore_index)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a linear head; logits of one chunk at a time."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunks: int, ignored: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start, stop in _bounds(len(hidden), chunks):
            logits = F.linear(hidden[start:stop], weight, bias).to(total.dtype)
            total += F.cross_entropy(logits, labels[start:stop], ignore_index=ignored, reduction="sum")
        return total / (labels != ignored).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, labels, ctx.chunks, ctx.ignored = inputs
        ctx.save_for_backward(hidden, weight, bias, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wants, wide = ctx.needs_input_grad, grad.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            into = torch.empty_like(hidden) if wants[0] else None
            sums = [torch.zeros_like(p, dtype=wide) if w else None for p, w in ((weight, wants[1]), (bias, wants[2]))]
            scale = grad / (labels != ctx.ignored).sum().clamp(min=1)
            for start, stop in _bounds(len(hidden), ctx.chunks):
                rows, y = hidden[start:stop], labels[start:stop]
                counted = y != ctx.ignored
                slope = F.linear(rows, weight, bias).to(wide).softmax(1)
                slope[torch.arange(len(y), device=y.device), y.where(counted, 0)] -= 1
                slope = slope.mul_((scale * counted)[:, None]).to(hidden.dtype)
                if into is not None:
                    torch.mm(slope, weight, out=into[start:stop])
                if sums[0] is not None:
                    sums[0] += slope.T @ rows
                if sums[1] is not None:
                    sums[1] += slope.sum(0)
                del slope
        found = [None if s is None else s.to(p.dtype) for s, p in zip(sums, (weight, bias), strict=True)]
        return (into, *found, None, None, None)


def _bounds(rows: int, chunks: int) -> Iterator[tuple[int, int]]:
    """First and last rows of the chunks, the last of which may be shorter; of no rows, one empty chunk."""
    size = max(1, math.ceil(rows / chunks))
    return ((start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def _check(chunks: int) -> None:
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise UsageError(f"chunks={chunks!r}; it is a whole number, at least 1")


@method("mini-sequence", contract="layer", family="tape", papers=[357], tags={"same-forward", "lean"})
class MiniSequence(Convertible):
    """An ``nn.Sequential`` that acts on each position alone, run in chunks of positions and again on the way back.

    >>> weft.convert_(model, weft.tape.MiniSequence.options(chunks=8), where="blocks.*.mlp")  # doctest: +SKIP

    Of other modules it takes the caller's word that every position's output needs its own input alone:

    >>> weft.convert_(model, {LlamaMLP: lambda mlp: MiniSequence(mlp, chunks=8)})  # doctest: +SKIP

    The head and the loss are for `chunked_cross_entropy`, of this file.

    Args:
        layer: used, not copied; from ``[..., D]`` to ``[..., D']``.
        chunks: M, how many parts the positions are cut into.

    Raises:
        UsageError: for a number of chunks below 1.
        Unsupported: from ``from_dense``, for a layer that is not known to act on each position alone; from ``forward``,
            for one that changes its input in place.
        DataError: from ``forward``, for a layer whose output has other positions than its input.
    """

    converts = (nn.Sequential,)

    def __init__(self, layer: nn.Module, *, chunks: int = 4) -> None:
        super().__init__()
        _check(chunks)
        self.layer, self.chunks = layer, chunks

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> MiniSequence:
        """The layer in chunks, on the same parameters."""
        if not isinstance(layer, nn.Sequential):
            raise Unsupported(
                f"{type(layer).__name__} is no nn.Sequential", "MiniSequence(layer) if it acts on each position alone"
            )
        mixing = first_mixing(layer)
        if mixing:
            raise Unsupported(f"{mixing} may mix positions", "MiniSequence(layer) if it does not")
        return cls(layer, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D']``, as the layer."""
        rows = x.reshape(-1, x.shape[-1])
        y = in_chunks(self.layer, rows, max(1, math.ceil(len(rows) / self.chunks)))
        return y.view(*x.shape[:-1], y.shape[-1])


def example() -> Example:
    """An MLP, and three sequences of seven positions, which four does not divide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 5)), torch.randn(3, 7, 6)
    return Example(layer, x, torch.arange(3) % 2, {"chunks": 4})


def _results(seed: int, dtype: torch.dtype, chunks: int) -> list[Tensor]:
    """Loss and all gradients of a transformer on 4 x 32 tokens with some labels ignored; unchunked for no chunks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = CharTransformer(65, width=32, heads=4, layers=2, context=32).to(dtype)
    head, body.head = body.head, nn.Identity()  # type: ignore[assignment]
    ids, labels = (torch.randint(65, (4, 32), generator=generator) for _ in range(2))
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, 4)[:, None]] = -100
    weights = [*body.parameters(), head.weight]
    if chunks:
        convert_(body, MiniSequence.options(chunks=chunks), where="blocks.*.mlp")
        loss = chunked_cross_entropy(body(ids), head.weight, labels, chunks=chunks)
    else:
        loss = F.cross_entropy(head(body(ids)).flatten(0, 1), labels.flatten())
    return [loss.detach(), *torch.autograd.grad(3 * loss, weights)]


@claim(
    "loss and all gradients of a transformer are the unchunked one's to 1e-6, for M = 2, 4, 8 and some labels ignored",
    row=357,
    mutants={
        "mean of means": ('reduction="sum"', 'reduction="mean"'),
        "ignored labels in the mean": ("return total / (labels != ignored).sum()", "return total / labels.numel()"),
        "ignored labels in the gradient": ("(scale * counted)[:, None]", "scale"),
        "scores left out of the slope": ("y.where(counted, 0)] -= 1", "y.where(counted, 0)] -= 0"),
        "last chunk lost": ("range(0, max(rows, 1), size)", "range(0, max(rows - size, 1), size)"),
        "gradient of the last chunk alone": ("sums[0] += slope.T @ rows", "sums[0] = slope.T @ rows"),
        "gradient of the loss lost": ("scale = grad / ", "scale = grad * 0 + 1 / "),
    },
)
def unchunked(seed: int) -> list[Check]:
    """Relative differences in norm: of the loss and each gradient in float64, of all gradients together in float32."""
    exact, single = list[Tensor](), list[Tensor]()
    wanted = {dtype: _results(seed, dtype, 0) for dtype in (torch.float64, torch.float32)}
    for chunks in (2, 4, 8):
        found = {dtype: _results(seed, dtype, chunks) for dtype in wanted}
        pairs = zip(found[torch.float64], wanted[torch.float64], strict=True)
        exact += [(a - b).norm() / b.norm() for a, b in pairs]
        a, b = (torch.cat([t.flatten() for t in all_of[torch.float32]]) for all_of in (found, wanted))
        single.append((a - b).norm() / b.norm())
    return [Check(float(torch.stack(t).max()), 1e-6, what=w) for t, w in ((exact, "float64"), (single, "float32"))]


class _Largest(TorchFunctionMode):
    """The most elements of a tensor that any function of torch returns, by the size of its last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim:
            self.sizes[out.shape[-1]] = max(out.numel(), self.sizes.get(out.shape[-1], 0))
        return out


@claim(
    "the largest MLP hidden tensor and the largest logits shrink exactly M-fold for M = 2, 4, 8, in both passes, and "
    "no more than the inputs are kept between them",
    row=357,
    mutants={
        "MLP as a whole": ("math.ceil(len(rows) / self.chunks)", "len(rows)"),
        "MLP without recomputation": ("y = in_chunks(self.layer,", "y = (lambda f, r, n: f(r))(self.layer,"),
        "logits as a whole": ("size = max(1, math.ceil(rows / chunks))", "size = max(1, rows)"),
        "twice as many chunks": ("math.ceil(rows / chunks))", "math.ceil(rows / chunks / 2))"),
    },
)
def chunks_alone(seed: int) -> list[Check]:
    """Elements of the largest tensors, all of torch's calls watched; bytes kept, and the peak of M = 8."""
    generator, checks = torch.Generator().manual_seed(seed), []
    positions, width, hidden, classes = 512, 16, 256, 384 + seed % 7
    mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    head = nn.Linear(width, classes)
    both = nn.Sequential(mlp, head)
    x = torch.randn(4, positions // 4, width, generator=generator).requires_grad_()
    labels = torch.randint(classes, (4, positions // 4), generator=generator)

    def loss(chunks: int) -> Tensor:
        return chunked_cross_entropy(x, head.weight, labels, head.bias, chunks=chunks)

    for chunks in (2, 4, 8):
        layer = MiniSequence(mlp, chunks=chunks)
        calls = ("MLP", lambda m=layer: m(x).sum(), hidden), ("head", lambda m=chunks: loss(m), classes)
        for name, call, last in calls:
            with _Largest() as seen:
                call().backward()
            inputs = 4 * positions * width + (8 * positions if name == "head" else 0)
            kept, what = kept_bytes(call, both).peak_bytes, f"{name}, M = {chunks}"
            checks.append(Check(seen.sizes[last] * chunks, positions * last, "==", f"M x the most elements, {what}"))
            checks.append(Check(kept, inputs, "==", f"bytes kept, {what}"))
    for name, step, last in (("MLP", lambda: layer(x).sum(), hidden), ("head", lambda: loss(8), classes)):
        x.grad = torch.zeros_like(x)
        peak = peak_bytes(lambda f=step: f().backward(), parameters=both.parameters(), gradients=False)  # type: ignore[misc]
        checks.append(Check(peak, 4 * positions * last, "<", f"bytes at the peak, {name}, M = 8"))
    return checks
