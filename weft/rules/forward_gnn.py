"""Train every layer of a graph network on its own loss, with a virtual node for each class that training nodes join.

    z_k = f_k(n(z_{k-1}), G'),  n(h) = h / (|h| + 1e-8) for each node, detached;   z_0 = [x; v], v [K, D] fixed, normal
    G' = G with K more nodes, each joined to the training nodes of its class;   r_i, v_c: rows of z_k, nodes and classes
    L_k = CE(<r_i, v_c> / T, y_i) over training nodes;   prediction: sum over k of softmax_c(<r_i, v_c> / T)
    top_down="input":   f_k sees n(z_{k-1}) and n(s_{k+1}), s the states of the last sweep; above all, the labels' codes
    top_down="loss":    r and v are means over z_k and all n(z_j), j > k, detached

This is the paper's single forward pass. As in the authors' code, but for: layers learn together, not each to its end
before the next; top-down states are found anew in each step, by ``sweeps`` from the bottom up, not kept from the step
before; the last layer has no activation. Codes are one-hot, 1 / K throughout for nodes without a label.

Paper: "Forward Learning of Graph Neural Networks", Namyong Park, Xing Wang, Antoine Simoulin, Shuai Yang, Grey Yang,
Ryan Rossi, Puja Trivedi, Nesreen Ahmed, 2024, arXiv:2403.11004.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported, UsageError, unknown
from weft.method import method
from weft.ops.graph_labels import codes, join_classes, normalise, without_learning
from weft.rules.base import Ready, Scale
from weft.rules.graphs import GraphRule
from weft.stages import frozen_statistics
from weft.testing.example import Example
from weft.testing.graphs import Dense, cora, small_graph, without_edges

TOP_DOWN = ("none", "input", "loss")


def products(h: Tensor, nodes: int, temperature: float) -> Tensor:
    """Inner products ``[N, K]`` of the rows of N nodes with those of the K classes that follow them, over T."""
    return h[:nodes] @ h[nodes:].T / temperature


@method(
    "forward-gnn",
    contract="rule",
    family="rules",
    papers=[1],
    tags={"local", "deterministic"},
    defaults={"optimizer": "adam", "lr": 1e-2, "schedule": "constant"},
    variants={
        "forward-gnn-top-down": {
            "options": {"top_down": "input"},
            "tags": {"deterministic"},
            "summary": "Train each graph layer on its own loss, with the layer above and the labels as further inputs.",
        }
    },
)
class ForwardGNN(GraphRule):
    """ForwardGNN with a single pass; ``step`` returns the loss of the last layer. It takes all nodes at once.

    Args:
        model: as :class:`weft.rules.graphs.GraphRule` takes it.
        top_down: what comes from the layers above: ``"none"``, ``"input"``, or ``"loss"`` (for layers of one width).
        temperature: T.
        sweeps: over the top-down inputs, in each step and prediction, at least 3; the scores of the first two are left
            out of a prediction.
    """

    def __init__(
        self, model: nn.Module, *, top_down: str = "none", temperature: float = 1.0, sweeps: int = 4, **common: Any
    ) -> None:
        super().__init__(model, **common)
        if top_down not in TOP_DOWN:
            raise UsageError(unknown("top_down", top_down, list(TOP_DOWN)))
        if sweeps < 3:
            raise UsageError(f"sweeps={sweeps}; give at least 3")
        if top_down == "loss" and len(set(self.widths)) > 1:
            raise Unsupported(f"layers of widths {self.widths} have no mean: they need one", "top_down='input'")
        self.top_down, self.temperature, self.sweeps = top_down, temperature, sweeps
        for k, width in enumerate([*self.widths[1:], self.classes] if top_down == "input" else []):
            self.add_inlet(k, width)

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """Passes forward, then one backward pass inside layers; see :meth:`weft.rules.base.Rule.step`.

        Raises:
            Unsupported: for a part of a batch: the loss of a node depends on all others.
        """
        assert self.cut is not None
        x = self.checked(x, y)
        losses = [self.criterion(products(h, len(y), self.temperature), y) for h in self.passes(x, y)[-1]]
        self.cut.require_unshared("forward-gnn")
        self.descend(losses, self.trainable(), scale=scale, ready=ready)
        self.labels = y.clone()
        return losses[-1]

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Scores ``[N, K]`` of all nodes, given the labels of the last step, whose nodes stay joined to their class."""
        x = self.checked(x)
        with frozen_statistics(self.model):
            runs = self.passes(x, self.known(x))
        kept = [h for outs in runs[3 if self.top_down == "input" else -1 :] for h in outs]
        return torch.stack([products(h, len(x), self.temperature).softmax(1) for h in kept]).sum(0)

    def passes(self, x: Tensor, y: Tensor) -> list[list[Tensor]]:
        """What every layer gives for nodes and classes ``[N + K, D_k]``, in each sweep; the last one with its graph."""
        label = torch.cat([codes(y, self.classes, x), torch.eye(self.classes).to(x)])
        graph = join_classes(self.graph, y, self.classes)
        start = normalise(torch.cat([x, self.fixed_normal((self.classes, x.shape[1]), x, "classes")]))
        runs: list[list[Tensor]] = []
        count = {"none": 1, "loss": 2, "input": self.sweeps + 1}[self.top_down]
        for number in range(count):
            states = [normalise(h.detach()) for h in runs[-1]] if runs else []
            above = [*states[1:], normalise(label)] if states and self.top_down == "input" else []
            last = number == count - 1
            with contextlib.nullcontext() if last else without_learning(self.model):
                outs = self.layerwise(graph, start, above)
            if last and states and self.top_down == "loss":
                outs = [torch.stack([h, *states[k + 1 :]]).mean(0) for k, h in enumerate(outs)]
            runs.append(outs)
        return runs


def example() -> Example:
    """A graph network and six nodes without edges."""
    return without_edges()


def _against_dense(seed: int, **options: Any) -> list[Check]:
    model, x, y = small_graph(seed, widths=(3, 3) if options.get("top_down") == "loss" else (7, 6))
    gradient, scores = Dense(ForwardGNN(model, seed=seed, temperature=0.7, **options), x, y).worst()
    return [Check(gradient, 1e-9, what="gradients"), Check(scores, 1e-9, what="scores")]


@claim(
    "single forward: every gradient and score is that of the equations with dense matrices, to 1e-9 in float64",
    row=1,
    mutants={
        "classes do not learn": ("h[:nodes] @ h[nodes:].T", "h[:nodes] @ h[nodes:].detach().T"),
        "temperature": ("h[nodes:].T / temperature", "h[nodes:].T"),
        "length kept": ("h / (h.norm(dim=1, keepdim=True) + 1e-8)", "h * 1.0", "weft.ops.graph_labels"),
        "last layer's scores": ("for outs in runs[3 if", "for outs in [runs[-1][-1:]] or runs[3 if"),
        "one way": ("[graph.edges, joins, joins.flip(0)]", "[graph.edges, joins, joins]", "weft.ops.graph_labels"),
        "a class apart": ("(labels != IGNORED).nonzero()", "(labels > 0).nonzero()", "weft.ops.graph_labels"),
    },
)
def single_forward(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, of a 3-layer network."""
    return _against_dense(seed)


@claim(
    "with top-down signals, as inputs or in the losses, gradients and scores are those of the equations",
    row=1,
    mutants={
        "labels alone": ("[*states[1:], normalise", "[*(0 * s for s in states[1:]), normalise"),
        "no labels above": ("start, above)", "start, above[:-1])"),
        "sum, not mean": ("*states[k + 1 :]]).mean(0)", "*states[k + 1 :]]).sum(0)"),
        "a sweep less": ('"input": self.sweeps + 1', '"input": self.sweeps'),
    },
)
def top_down_signals(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, of 3-layer networks."""
    return _against_dense(seed, top_down="input") + _against_dense(seed, top_down="loss")


@claim(
    "the gradient of a layer's loss by any other layer's weights is None",
    row=1,
    mutants={
        "one loss": ("self.descend(losses, self", "self.descend([sum(losses) * h for h in losses], self"),
        "last layer's loss": ("self.passes(x, y)[-1]]", "self.passes(x, y)[-1][-1:] * 3]"),
    },
)
def boundaries(seed: int) -> Check:
    """How many of the six pairs of a loss and another layer's weight have a gradient, in a 3-layer network."""
    model, x, y = small_graph(seed)
    rule, seen = ForwardGNN(model, seed=seed), list[Tensor]()
    rule.descend = lambda losses, *given, **how: seen.extend(losses)  # type: ignore[method-assign]
    rule.step(x, y)
    pairs = [(loss, rule.layers[j].weight) for k, loss in enumerate(seen) for j in range(3) if j != k]
    found = [torch.autograd.grad(a, b, allow_unused=True, retain_graph=True)[0] for a, b in pairs]
    return Check(sum(g is not None for g in found) + abs(len(pairs) - 6), 0, "==")


@claim(
    "on Cora a 2-layer network is at most 5 points of test accuracy behind the same one under backprop (3 seeds)",
    row=1,
    tier="slow",
    budget=90.0,
    mutants={
        "pushed apart": ("h[:nodes] @ h[nodes:].T", "-h[:nodes] @ h[nodes:].T"),
        "never learned": ("self.descend(losses, self", "self.descend([0 * h for h in losses], self"),
    },
)
def cora_accuracy(seed: int) -> Check:
    """Points that backprop is ahead of: gcn, 200 epochs, both by Adam, 0.01, with weight decay 5e-4."""
    seeds = range(3 * seed, 3 * seed + 3)
    return Check(100 * sum(cora("backprop", s) - cora(ForwardGNN, s) for s in seeds) / 3, 5.0)
