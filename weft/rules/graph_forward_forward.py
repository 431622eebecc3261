"""Train every layer of a graph network to be active where nodes have their true label, quiet where a wrong one.

    z_k = f_k(n(z_{k-1}), G'),  n(h) = h / (|h| + 1e-8) for each node, detached;   g_i = |r_i|^2, r_i row i of z_k
    L_k = mean softplus(theta - g_i) + sum over the wrong classes of mean softplus(g_i' - theta), over training nodes
    label="code":  z_0 = n([x, one-hot label; 1 / K throughout where it is not known]),  G' = G
    label="node":  z_0 = n([x; v]), v [K, D] fixed, normal;  G' = G with K more nodes, each joined to the nodes of its
                   class; layers above the first see what is below in the graph with the true labels
    prediction: a class's score is g, summed over layers, where every node without a known label has this class

g is with true labels, g' with wrong ones: for each training node all, in an order drawn once. As in the authors' code,
but for: layers learn together, not each to its end before the next; the last layer has no activation.

Paper: "Forward Learning of Graph Neural Networks", Namyong Park, Xing Wang, Antoine Simoulin, Shuai Yang, Grey Yang,
Ryan Rossi, Puja Trivedi, Nesreen Ahmed, 2024, arXiv:2403.11004.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.ops.graph_labels import codes, join_classes, node_loss, normalise, wrong_classes
from weft.rules.base import IGNORED, Ready, Scale
from weft.rules.graphs import GraphRule
from weft.stages import frozen_statistics
from weft.testing.example import Example
from weft.testing.graphs import Dense, small_graph, without_edges


@method(
    "graph-forward-forward",
    contract="rule",
    family="rules",
    papers=[1],
    tags={"local", "deterministic"},
    defaults={"optimizer": "adam", "lr": 1e-2, "schedule": "constant"},
    variants={
        "graph-forward-forward-nodes": {
            "options": {"label": "node"},
            "summary": "Train every graph layer to be active where nodes are joined to a node of their true class.",
        }
    },
)
class GraphForwardForward(GraphRule):
    """Forward-Forward on a graph; ``step`` returns the loss of the last layer. It takes all nodes at once.

    Args:
        model: as :class:`weft.rules.graphs.GraphRule` takes it.
        label: ``"code"`` (the paper's label appending) or ``"node"`` (its virtual nodes).
        threshold: theta.
    """

    def __init__(self, model: nn.Module, *, label: str = "code", threshold: float = 2.0, **common: Any) -> None:
        super().__init__(model, **common)
        if label not in ("code", "node"):
            raise UsageError(f"label={label!r}; it is 'code' or 'node'")
        self.label, self.threshold = label, threshold
        if label == "code":
            self.add_inlet(0, self.classes)

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """K passes forward, one backward pass inside layers; see :meth:`weft.rules.base.Rule.step`.

        Raises:
            Unsupported: for a part of a batch: the loss of a node depends on all others.
        """
        assert self.cut is not None
        x = self.checked(x, y)
        rows = (y != IGNORED).nonzero()[:, 0]
        true = self.passed(x, y)
        below = [normalise(h.detach()) for h in true] if self.label == "node" else None
        wrong = []
        with frozen_statistics(self.model):
            for order in wrong_classes(y[rows], self.classes, self.rng("wrong", fixed=True)).T:
                wrong.append(self.passed(x, y.index_put((rows,), order), below))
        good = [h[rows].square().sum(1) for h in true]
        bad = [torch.stack([h[rows].square().sum(1) for h in outs]) for outs in zip(*wrong, strict=True)]
        losses = [node_loss(g, b, self.threshold) for g, b in zip(good, bad, strict=True)]
        self.cut.require_unshared("graph-forward-forward")
        self.descend(losses, self.trainable(), scale=scale, ready=ready)
        self.labels = y.clone()
        return losses[-1]

    @torch.no_grad()
    def forward(self, x: Any) -> Tensor:
        """Scores ``[N, K]`` of all nodes; those of the last step's labels have a score for their own class alone."""
        x = self.checked(x)
        y, scores = self.known(x), []
        with frozen_statistics(self.model):
            for c in range(self.classes):
                outs = self.passed(x, torch.where(y == IGNORED, c, y))
                scores.append(torch.stack([h[: len(x)].square().sum(1) for h in outs]).sum(0))
        found = torch.stack(scores, 1)
        return torch.where((y == IGNORED)[:, None], found, found * codes(y, self.classes, found))

    def passed(self, x: Tensor, labels: Tensor, below: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What every layer gives where nodes have these labels ``[N]``; -100 where it is not known."""
        if self.label == "code":
            whole = normalise(torch.cat([x, codes(labels, self.classes, x)], 1))
            return self.layerwise(self.graph, whole[:, : x.shape[1]], [whole[:, x.shape[1] :]])
        start = torch.cat([x, self.fixed_normal((self.classes, x.shape[1]), x, "classes")])
        return self.layerwise(join_classes(self.graph, labels, self.classes), normalise(start), below=below)


def example() -> Example:
    """A graph network and six nodes without edges."""
    return without_edges()


def _against_dense(seed: int, **options: Any) -> list[Check]:
    model, x, y = small_graph(seed)
    gradient, scores = Dense(GraphForwardForward(model, seed=seed, threshold=1.5, **options), x, y).worst()
    return [Check(gradient, 1e-9, what="gradients"), Check(scores, 1e-9, what="scores")]


@claim(
    "forward-forward on graphs, by codes or by nodes: gradients and scores are those of the equations",
    row=1,
    mutants={
        "sign": ("F.softplus(threshold - good)", "F.softplus(good - threshold)", "weft.ops.graph_labels"),
        "mean of classes": (".mean(1).sum()", ".mean()", "weft.ops.graph_labels"),
        "true class too": (".argsort(1)[:, :-1]", ".argsort(1)", "weft.ops.graph_labels"),
        "zeros where unknown": ("1 / classes)", "0.0)", "weft.ops.graph_labels"),
        "own features below": ('if self.label == "node" else None', "if False else None"),
    },
)
def forward_forward(seed: int) -> list[Check]:
    """Largest errors relative to the largest entry, of 3-layer networks."""
    return _against_dense(seed, label="code") + _against_dense(seed, label="node")
