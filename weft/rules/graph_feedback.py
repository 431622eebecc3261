"""Carry the error to every layer of a graph network through fixed random matrices, and back along the edges.

    dh_k = A^m e B_k,   e = dL/dscores [N, K],  B_k [K, D_k] fixed,   m: graph convolutions behind layer k
    A = D^-1/2 (G + I) D^-1/2, as the layers have it;   spread=False: m = 0, direct feedback alignment node by node

The exact signal of a network without activations is A^m e W_n^T ... W_{k+1}^T: the matrix stands for the weights alone,
not for the graph. With m = 0, as in the paper, only labelled nodes get a signal, though the scores of these depend on
what their neighbours compute. Entries of B_k are uniform in (-1, 1) / sqrt(D), D the width of the widest layer, and all
layers share one matrix, of which each takes its first D_k columns, as in the authors' code; the last layer's is exact.

Paper: "Direct Feedback Alignment Scales to Modern Deep Learning Tasks and Architectures", Julien Launay, Iacopo Poli,
François Boniface, Florent Krzakala, 2020, arXiv:2006.12878.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported
from weft.method import method
from weft.models.graph import convolutions
from weft.rules.base import Ready, Rule, Scale
from weft.testing.example import Example
from weft.testing.graphs import cora, small_graph, without_edges


def spread_error(error: Tensor, graph: nn.Module, times: int) -> Tensor:
    """``error`` ``[N, K]`` sent back along the edges: ``A^times error``, A symmetric."""
    for _ in range(times):
        error = graph(error)
    return error


@method(
    "graph-feedback-alignment",
    contract="rule",
    family="rules",
    papers=[156],
    tags={"additive", "deterministic"},
    defaults={"optimizer": "adam", "lr": 1e-2, "schedule": "constant"},
)
class GraphFeedbackAlignment(Rule):
    """Direct feedback alignment for graph networks.

    Args:
        model: graph convolutions (:class:`weft.models.GraphConvolution`) on one graph whose edges go both ways.
        spread: send the error back along the edges too.
    """

    stages = "cut"

    def __init__(self, model: nn.Module, *, spread: bool = True, **common: Any) -> None:
        super().__init__(model, **common)
        self.layers, self.spread = convolutions(model), spread
        if not self.layers or len({id(layer.graph) for layer in self.layers}) > 1:
            raise Unsupported("the model has no graph convolutions on one graph", "direct-feedback-alignment")
        assert self.cut is not None
        self.width = max(self.cut.width(k) for k in range(len(self.cut)))

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward and one backward pass; see :meth:`weft.rules.base.Rule.step`."""
        assert self.cut is not None
        outputs: list[Tensor] = []
        reached: list[int] = []  # graph convolutions up to the end of each stage
        passed = itertools.count()
        at = [0]

        def count(module: nn.Module, args: Any, out: Tensor) -> None:
            at[0] = next(passed) + 1

        def behind(k: int, h: Tensor) -> None:
            outputs.append(h)
            reached.append(at[0])

        with contextlib.ExitStack() as undo:
            for layer in self.layers:
                undo.callback(layer.register_forward_hook(count).remove)
            scores = self.cut.run(x, behind).detach().requires_grad_()
        loss = self.criterion(scores, y)
        (error,) = torch.autograd.grad(loss, scores)
        signals = [self.signal(h, error, reached[-1] - m) for h, m in zip(outputs[:-1], reached, strict=False)]
        heads = [loss.detach(), *outputs]
        self.descend(heads, self.trainable(), gradients=[None, *signals, error], scale=scale, ready=ready)
        return loss

    def signal(self, h: Tensor, error: Tensor, behind: int) -> Tensor:
        """The teaching signal of a stage that gives ``h`` ``[N, D]``, with so many graph convolutions behind it."""
        matrix = self.uniform((error.shape[1], self.width), h) / self.width**0.5
        return spread_error(error, self.layers[0].graph, behind * self.spread) @ matrix[:, : h.shape[1]]

    def uniform(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A matrix of numbers in (-1, 1) that stays the same for the life of the rule."""
        drawn = torch.rand(*shape, generator=self.rng("feedback", fixed=True), dtype=torch.float64)
        return (2 * drawn - 1).to(like)


def example() -> Example:
    """A graph network and six nodes without edges."""
    return without_edges()


@claim(
    "gradients are those of the equations written in numpy, with the error along the edges and without, to 1e-10",
    row=156,
    mutants={
        "sign": ("* self.spread) @ matrix", "* self.spread) @ -matrix"),
        "one hop for all": ("for _ in range(times)", "for _ in range(min(times, 1))"),
        "always along the edges": ("behind * self.spread", "behind"),
        "scale": ("/ self.width**0.5", "/ h.shape[1] ** 0.5"),
        "last columns": ("matrix[:, : h.shape[1]]", "matrix[:, -h.shape[1] :]"),
    },
)
def equations(seed: int) -> list[Check]:
    """Largest error relative to the largest entry, over all gradients of a 3-layer network."""
    import numpy as np

    found = []
    for spread in (False, True):
        model, x, y = small_graph(seed)
        rule = GraphFeedbackAlignment(model, spread=spread, seed=seed)
        rule.step(x, y)
        a = np.eye(14)
        for s, t in rule.layers[0].graph.edges.T.tolist():
            a[t, s] = 1
        a = a / np.sqrt(a.sum(1)[:, None] * a.sum(1)[None])
        w = [p.detach().numpy() for p in model.parameters()]
        h = [x.numpy()]
        for k in range(3):
            out = a @ h[-1] @ w[2 * k].T + w[2 * k + 1]
            h.append(out if k == 2 else np.maximum(0, out))
        known = y.numpy() >= 0
        e = np.exp(h[3] - h[3].max(1, keepdims=True))
        e = e / e.sum(1, keepdims=True) - np.eye(3)[np.maximum(0, y.numpy())]
        e = e * known[:, None] / known.sum()
        b = rule.uniform((3, 7), x).numpy() / np.sqrt(7)
        signals = [(a @ a if spread else np.eye(14)) @ e @ b, (a if spread else np.eye(14)) @ e @ b[:, :6], e]
        want = []
        for k, d in enumerate(signals):
            d = d if k == 2 else d * (h[k + 1] > 0)
            want += [(a @ d).T @ h[k], d.sum(0)]
        pairs = zip(model.parameters(), want, strict=True)
        worst = max(float(abs(p.grad.numpy() - g).max() / abs(g).max()) for p, g in pairs if p.grad is not None)
        found.append(Check(worst, 1e-10, what=f"spread={spread}"))
    return found


@claim(
    "without spreading nodes that have no label get no signal; with it the signal of a network without activations, "
    "whose weights are the feedback, is exact",
    row=156,
    mutants={
        "along no edge": ("behind * self.spread", "0"),
        "from neighbours alone": ("error = graph(error)", "error = graph(error) - error"),
        "always along the edges": ("behind * self.spread", "behind"),
    },
)
def signals(seed: int) -> list[Check]:
    """How many unlabelled nodes have a signal, and the largest error of the signal against autograd's."""
    model, _, y = small_graph(seed, widths=(6,))
    rule = GraphFeedbackAlignment(model, spread=False, seed=seed)
    error = torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * (y >= 0)[:, None]
    h = torch.zeros(14, 6, dtype=torch.float64, requires_grad=True)
    count = int(rule.signal(h, error, 1)[y < 0].count_nonzero())
    rule.spread = True
    matrix = rule.uniform((3, 6), h)[:, :6] / 6**0.5
    with torch.no_grad():
        rule.layers[1].weight.copy_(matrix)
    (want,) = torch.autograd.grad(rule.layers[1](h), h, error)
    off = float((rule.signal(h, error, 1) - want).abs().max() / want.abs().max())
    return [Check(count, 0, "==", "unlabelled nodes"), Check(off, 1e-10, what="signal")]


@claim(
    "on Cora a 2-layer network trained with the error sent along the edges is within 3 points of test accuracy of the "
    "same one under backprop (5 seeds)",
    row=156,
    tier="slow",
    budget=150.0,
    mutants={
        "drawn anew each step": ('"feedback", fixed=True', '"feedback"'),
        "errors of other nodes": ("spread_error(error, ", "spread_error(error.roll(1, 0), "),
    },
)
def cora_accuracy(seed: int) -> Check:
    """Points that backprop is ahead of: gcn by Adam, 0.01; each with the authors' dropout, decay and epochs."""
    own: dict[str, Any] = {"dropout": 0.1, "decay": 1e-4, "epochs": 250}
    seeds = range(5 * seed, 5 * seed + 5)
    return Check(20 * sum(cora("backprop", s) - cora(GraphFeedbackAlignment, s, **own) for s in seeds), 3.0)
