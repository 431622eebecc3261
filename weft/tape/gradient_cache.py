"""Train on a contrastive loss over a large batch with the activations of one chunk of it at a time.

    a = f(x) for chunks of x, without a graph;   u = dL(a, b, ...)/da for the whole batch;
    dL/dtheta = sum over chunks c of (df(x_c)/dtheta)^T u_c,   each f(x_c) computed once more

A row's embedding needs its own input alone, so that the rows of a batch meet only in the loss L and in u. The second
forward pass of a chunk has the random numbers, the autocast state and the buffers of its first one; torch's generators
end up as after one run of the chunks in order, encoder by encoder, then the loss. Kept between the passes: inputs,
embeddings, the loss's own graph, a generator's state for each chunk that drew from it. The cost is a forward pass.

The authors' code computes u in the forward pass and calls ``backward`` chunk by chunk, which adds to ``.grad``. Here
the embeddings are a node of the graph whose backward pass is the loop: the loss is an ordinary one, parameters of the
loss get their gradient as ever, scaling and accumulation work, and a parameter's hooks run once for each encoder.

Paper: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", Luyu Gao, Yunyi Zhang, Jiawei Han,
Jamie Callan, 2021, arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.ops.row_chunks import Encoder, in_chunks
from weft.testing.example import Example


@method("gradient-cache", contract="function", family="tape", papers=[368], tags={"exact"})
def gradient_cache(
    encoders: Encoder | Sequence[Encoder],
    inputs: Any,
    loss: Callable[..., Tensor],
    *,
    chunk: int | Sequence[int] = 32,
    parameters: Iterable[Tensor] = (),
) -> Tensor:
    """The loss of a whole batch; its ``backward()`` takes the encoders through the batch again, chunk by chunk.

    >>> loss = gradient_cache([queries, documents], [q, d], InfoNCE(), chunk=16)  # doctest: +SKIP
    >>> loss.backward()  # doctest: +SKIP

    Args:
        encoders: a module or a module's method, or a list (an ``nn.ModuleList``) of several; one may stand twice.
        inputs: a tensor ``[B, ...]``, a tuple of arguments or a dict of keyword arguments, of which every tensor has
            B rows or no dimension at all; with several encoders a list of as many.
        loss: called with the embeddings, for each encoder what it returns: a tensor, tuple or dict of tensors whose
            rows are those of the input.
        chunk: rows that pass an encoder at a time, for all encoders or for each.
        parameters: further tensors that get gradients; needed where an encoder is a plain function. Those of the loss
            need not be named.

    Returns:
        What ``loss`` returns. It can be differentiated once.

    Raises:
        UsageError: for a chunk below 1, lists of unequal length, an encoder whose parameters cannot be told; from the
            backward pass, where they have been replaced since, as `torch.func.functional_call` does.
        DataError: for inputs of which no tensor has rows or two have unequal numbers, or outputs with other rows.
        Unsupported: for BatchNorm in training mode, whose statistics would be those of a chunk, and for an encoder that
            changes its input in place.
    """
    several = isinstance(encoders, list | tuple | nn.ModuleList)
    calls: list[Encoder] = list(encoders) if several else [encoders]  # type: ignore[arg-type, list-item]
    batches = list(inputs) if several and isinstance(inputs, list | tuple) else [inputs]
    sizes = list(chunk) if isinstance(chunk, Sequence) else [chunk] * len(calls)
    if not calls or not len(calls) == len(batches) == len(sizes):
        raise UsageError(f"{len(calls)} encoders, {len(batches)} inputs, {len(sizes)} chunk sizes; give one of each")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise UsageError(f"chunk={chunk!r}; a chunk has at least 1 row")
    more = list(parameters)
    return loss(*(in_chunks(f, x, n, more) for f, x, n in zip(calls, batches, sizes, strict=True)))


class _Cosine(nn.Module):
    """Cross-entropy of cosine similarities over a learned temperature; row i belongs to row i of the other side."""

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).t() * self.log_scale.exp()
        return F.cross_entropy(scores, torch.arange(len(a), device=a.device))


def _encoder(generator: torch.Generator, width: int = 32, dropout: float = 0.0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU())
    net.append(nn.Linear(width, 8))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
    return net


def example() -> Example:
    """Two encoders, ten pairs in chunks of four; it stands for the loss of both encoders' outputs."""
    generator = torch.Generator().manual_seed(0)
    encoders = nn.ModuleList([_encoder(generator), _encoder(generator)])
    x, y = torch.randn(2, 10, 16, generator=generator)

    def plain(encoders: nn.ModuleList, inputs: tuple[Tensor, Tensor], loss: nn.Module) -> Tensor:
        return loss(*(f(x) for f, x in zip(encoders, inputs, strict=True)))

    return Example(plain, (encoders, (x, y), _Cosine()), torch.empty(0), {"chunk": 4})


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of two gradients, in norm, beside the largest norm."""
    worst = max(float((a.double() - b.double()).norm()) for a, b in zip(found, wanted, strict=True))
    return worst / max(float(b.double().norm()) for b in wanted)


@claim(
    "for batch 128 in chunks of 8 the loss, all gradients and torch's generator are those of full-batch autograd with "
    "dropout masks drawn chunk by chunk: gradients to 1e-6 of the largest norm",
    row=368,
    mutants={
        "masks drawn anew": ("_set_state(device, state)\n            for", "pass\n            for", "weft.ops.replay"),
        "one chunk's cache for all": ("g[start : start + chunk]", "g[:chunk]", "weft.ops.row_chunks"),
        "the last chunk alone": ("found[i].add_(g)", "g", "weft.ops.row_chunks"),
        "sums in bfloat16": (
            "promote_types(g.dtype, torch.float32)",
            "promote_types(g.dtype, g.dtype)",
            "weft.ops.row_chunks",
        ),
        "chunks of an input turned": ("torch.cat(found[i])", "torch.cat(found[i][::-1])", "weft.ops.row_chunks"),
        "generator left behind": ("zip(self._drawn, now, strict=True)", "()", "weft.ops.replay"),
    },
)
def full_batch(seed: int) -> list[Check]:
    """Two encoders with dropout, a temperature, inputs that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    f, g = _encoder(generator, 64, 0.2), _encoder(generator, 48, 0.1)
    loss = _Cosine(0.1)
    x, y = (torch.randn(128, 16, generator=generator).requires_grad_() for _ in range(2))
    leaves = [x, y, *f.parameters(), *g.parameters(), *loss.parameters()]
    torch.manual_seed(seed)
    plain = loss(torch.cat([f(c) for c in x.split(8)]), torch.cat([g(c) for c in y.split(8)]))
    wanted, state = torch.autograd.grad(plain, leaves), torch.get_rng_state()
    torch.manual_seed(seed)
    value = gradient_cache([f, g], [x, y], loss, chunk=8)
    found = torch.autograd.grad(value, leaves)
    same = torch.equal(value, plain) and torch.equal(state, torch.get_rng_state())
    by_group = [found[:1], found[1:2], found[2:8], found[8:14], found[14:]]
    against = [wanted[:1], wanted[1:2], wanted[2:8], wanted[8:14], wanted[14:]]
    names = ("first input", "second input", "first encoder", "second encoder", "temperature")
    checks = [Check(_relative(a, b), 1e-6, what=n) for n, a, b in zip(names, by_group, against, strict=True)]
    narrow = nn.Linear(16, 1).bfloat16()  # of whose bias the gradient is the number of rows
    bias = torch.autograd.grad(gradient_cache(narrow, torch.ones(512, 16).bfloat16(), torch.sum, chunk=1), narrow.bias)[
        0
    ]
    checks.append(Check(float(bias), 512, "==", "sum over 512 chunks in bfloat16, in which 256 + 1 is 256"))
    return [Check(same, True, "==", "same loss, generator as after the plain run"), *checks]


@claim(
    "the encoders' activations that are kept at once are those of one chunk of 8 of 128, to the byte",
    row=368,
    mutants={
        "with a graph at once": (
            "with run.recorded():",
            "with run.recorded(), torch.enable_grad():",
            "weft.ops.row_chunks",
        ),
        "a larger chunk": (
            "range(0, max(*rows, 1), chunk)",
            "range(0, max(*rows, 1), 2 * chunk)",
            "weft.ops.row_chunks",
        ),
        "the whole batch once more": (
            "outs = plan.call(cut)",
            "outs = [plan.call(inputs), plan.call(cut)][1]",
            "weft.ops.row_chunks",
        ),
    },
)
def one_chunk(seed: int) -> list[Check]:
    """Most bytes at once of what the first encoder's layers save, beside those of one chunk; inputs left out."""
    generator = torch.Generator().manual_seed(seed)
    f, g = _encoder(generator, 32 + seed % 32, 0.2), _encoder(generator, 40, 0.1)
    x, y = torch.randn(2, 128, 16, generator=generator)
    x.requires_grad_()
    level, peak = [0], [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, own = (
                tensor.detach(),
                {p.data_ptr() for p in f.parameters()} | {c.data_ptr() for c in x.split(8)},
            )
            self.size = 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
            level[0] += self.size
            peak[0] = max(peak[0], level[0])

        def __del__(self) -> None:
            level[0] -= self.size

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = f

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                return self.inner(x)

    watched = Watched()
    chunk = watched(x[:8])
    one, peak[0] = peak[0], 0
    del chunk
    value = gradient_cache([watched, g], [x, y], _Cosine(), chunk=8)
    forward = peak[0]
    value.backward()
    return [
        Check(forward, 0, "==", "bytes of activations that the forward pass keeps"),
        Check(peak[0], one, "==", "bytes of activations at most, beside one chunk's"),
        Check(level[0], 0, "==", "bytes left"),
    ]


class _Words(nn.Module):
    """Normalised embeddings of words: called by name, with a mask, and with two outputs."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 16), nn.Sequential(nn.Linear(16, 12), nn.Dropout(0.3))
        self.register_buffer("calls", torch.zeros(()))
        for p in self.parameters():
            nn.init.normal_(p, 0, 0.5, generator=generator)

    def forward(self, *, words: Tensor, mask: Tensor, power: float) -> dict[str, Tensor]:
        self.calls: Tensor = self.calls + 1
        h = self.head((self.table(words) * mask[..., None]).sum(1) * power)
        return {"pooled": h * self.calls.sqrt(), "length": mask.sum(1)}


@claim(
    "one encoder for both sides, under autocast, inputs by name and a buffer that counts: gradients, buffers and a "
    "later use of the encoder are those of plain chunks to 1e-5",
    row=368,
    mutants={
        "another precision": ("self._casts = _autocast(self.devices)", "self._casts = []", "weft.ops.replay"),
        "buffers changed twice": ("setattr(module, name, buffer)", "pass", "weft.ops.replay"),
        "buffers of another call": ("setattr(module, name, value.clone())", "pass", "weft.ops.replay"),
        "one output's gradient alone": (
            "for o, g in zip(outs, into, strict=True) if",
            "for o, g in [(outs[0].detach(), into[0])] if",
            "weft.ops.row_chunks",
        ),
    },
)
def shared_encoder(seed: int) -> list[Check]:
    """Largest difference of gradients beside the largest norm, and of the buffer; 21 rows in chunks of 5 and 8."""
    generator = torch.Generator().manual_seed(seed)
    model = _Words(generator)
    batches = [
        {"words": torch.randint(11, (21, 6), generator=generator), "mask": mask, "power": 0.5}
        for mask in (torch.rand(2, 21, 6, generator=generator) < 0.7).float()
    ]
    leaves = [*model.parameters()]

    def loss(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        scores = a["pooled"] @ b["pooled"].t() / (1 + a["length"][:, None])
        return F.cross_entropy(scores.float(), torch.arange(21))

    def rows(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
        pairs = zip(batch["words"].split(size), batch["mask"].split(size), strict=True)
        return [{"words": words, "mask": mask, "power": 0.5} for words, mask in pairs]

    def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    results = []
    for cached in (False, True):
        model.calls.zero_()
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            if cached:
                value = gradient_cache([model, model], batches, loss, chunk=(5, 8))
            else:
                value = loss(*(joined([model(**c) for c in rows(b, n)]) for b, n in zip(batches, (5, 8), strict=True)))
            value = value + model(**rows(batches[0], 4)[0])["pooled"].float().square().mean()
        results.append([value.detach(), *torch.autograd.grad(value, leaves), model.calls.clone()])
    plain, found = results
    return [
        Check(abs(float(found[0] - plain[0])), 0, "==", "difference of the loss"),
        Check(_relative(found[1:-1], plain[1:-1]), 1e-5, what="gradients"),
        Check(float(found[-1]), float(plain[-1]), "==", "calls that the buffer counted"),
    ]
