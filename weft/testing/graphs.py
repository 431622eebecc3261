"""Small graphs for claims, and ForwardGNN's equations written out with dense matrices and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.testing.example import Example, classification


def without_edges() -> Example:
    """A graph network for a graph without edges, with six nodes, so that fewer are a graph too."""
    from weft.models.graph import gcn

    made = classification()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gcn(8, 3, widths=(12, 10), dropout=0.0)
    return Example(model, made.x, made.y)


def small_graph(seed: int, *, classes: int = 3, widths: Sequence[int] = (7, 6)) -> tuple[nn.Module, Tensor, Tensor]:
    """A graph network in float64 for a random graph of 14 nodes; features ``[14, 5]``; labels, five of them -100."""
    from weft.models.graph import gcn

    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(14, 14, generator=generator).triu(1) > 0.75
    edges = torch.cat([near.nonzero(), near.T.nonzero()]).T
    y = torch.arange(14) % classes
    y[9:] = -100
    y = y[torch.randperm(14, generator=generator)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = gcn(5, classes, edges, 14, widths, dropout=0.0).double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.7)
    return model, torch.randn(14, 5, generator=generator, dtype=torch.float64), y


def blocks(
    seed: int, *, nodes: int = 160, classes: int = 4, labelled: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes whose edges are mostly within their class: edges, features ``[N, 8]``, labels of a few, labels of all."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(nodes) % classes
    share = torch.where(true[:, None] == true, 0.25, 0.01)
    near = torch.rand(nodes, nodes, generator=generator).triu(1) > 1 - share
    means = torch.randn(classes, 8, generator=generator)
    x = 2 * means[true] + torch.randn(nodes, 8, generator=generator)
    known = torch.where(torch.arange(nodes) < labelled * classes, true, -100)
    return torch.cat([near.nonzero(), near.T.nonzero()]).T, x, known, true


def _trained(
    kind: Any, model: nn.Module, x: Tensor, y: Tensor, seed: int, epochs: int, options: Any, **how: Any
) -> Tensor:
    """The best class of each node, after some epochs by Adam of a rule, given by its class or name."""
    from weft.method import card

    rule = (card(kind).build if isinstance(kind, str) else kind)(model, seed=seed, **options)
    optimizer = torch.optim.Adam(rule.trainable(), **how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what dropout draws from
        for _ in range(epochs):
            optimizer.zero_grad()
            rule.step(x, y)
            optimizer.step()
    rule.eval()
    with torch.no_grad():
        return rule(x).argmax(1)


def cora(
    kind: Any, seed: int, *, dropout: float = 0.5, decay: float = 5e-4, epochs: int = 200, **options: Any
) -> float:
    """Test accuracy of ``gcn`` on Cora, trained by a rule.

    Raises:
        DataError: the data set is neither in ``WEFT_DATA`` nor in the cache; claims do not download.
    """
    from weft import data, models

    loaded = data.load("cora", download=False)
    model = models.build("gcn", seed=seed, **loaded.form)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    x, y = loaded.x_train, loaded.y_train
    best = _trained(kind, model, x, y, seed, epochs, options, lr=0.01, weight_decay=decay)
    assert loaded.y_test is not None
    known = loaded.y_test != -100
    return float((best == loaded.y_test)[known].double().mean())


def _unit(h: Tensor) -> Tensor:
    return h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-8)


def _matrix(edges: Sequence[tuple[int, int]], nodes: int) -> Tensor:
    """``D^-1/2 (G + I) D^-1/2``, entry by entry."""
    dense = torch.eye(nodes, dtype=torch.float64)
    for a, b in edges:
        dense[b, a] = 1
    degree = dense.sum(1)
    return dense / (degree[:, None] * degree[None]).sqrt()


class Dense:
    """What ForwardGNN's equations say of one rule's weights, inputs and labels, in float64.

    Args:
        rule: from which weights, options and virtual nodes' features are taken.
        x: features ``[N, D]``.
        y: labels ``[N]``.
    """

    def __init__(self, rule: Any, x: Tensor, y: Tensor) -> None:
        self.rule, self.x, self.y, self.n, self.k = rule, x, y.tolist(), len(y), rule.classes
        given = list(rule.model.parameters())
        self.w, self.b, self.u = given[0::2], given[1::2], list(rule.inlets)
        self.edges = [(int(a), int(b)) for a, b in rule.layers[0].graph.edges.T]
        self.virtual = rule.fixed_normal((self.k, x.shape[1]), x, "classes")
        self.rows = [i for i, label in enumerate(self.y) if label >= 0]

    def joined(self, labels: Sequence[int]) -> Tensor:
        """The matrix of the graph with a node for each class."""
        more = [(i, self.n + c) for i, c in enumerate(labels) if c >= 0]
        return _matrix([*self.edges, *more, *((b, a) for a, b in more)], self.n + self.k)

    def code(self, labels: Sequence[int]) -> Tensor:
        """One-hot rows, or even ones."""
        even = torch.full((self.k,), 1 / self.k, dtype=torch.float64)
        eye = torch.eye(self.k, dtype=torch.float64)
        return torch.stack([eye[c] if c >= 0 else even for c in labels])

    def layer(self, k: int, matrix: Tensor, z: Tensor, seen: Tensor | None = None) -> Tensor:
        """One layer on ``z`` as it is, and on ``seen``."""
        out = matrix @ z @ self.w[k].T + self.b[k]
        if seen is not None:
            out = out + matrix @ seen @ self.u[k].T
        return out if k == len(self.w) - 1 else out * (out > 0)

    def single(self) -> tuple[list[Tensor], Tensor]:
        """Losses of the layers, and scores."""
        matrix, depth, n = self.joined(self.y), len(self.w), self.n
        start = torch.cat([self.x, self.virtual])
        label = torch.cat([self.code(self.y), torch.eye(self.k, dtype=torch.float64)])
        states: list[Tensor] = []
        totals: list[list[Tensor]] = []
        mode = self.rule.top_down
        for sweep in range(self.rule.sweeps + 1 if mode == "input" else 1):
            z, outs = start, []
            for k in range(depth):
                above = [*states[1:], label][k] if sweep else None
                outs.append(self.layer(k, matrix, _unit(z), None if above is None else _unit(above)))
                z = outs[-1].detach()
            states = [h.detach() for h in outs]
            totals.append(outs)
        if mode == "loss":
            totals = [[sum(map(_unit, states[k + 1 :]), h) / (depth - k) for k, h in enumerate(totals[-1])]]
        sweeps = [[h[:n] @ h[n:].T / self.rule.temperature for h in outs] for outs in totals]
        losses = [-sum(s.log_softmax(1)[i, self.y[i]] for i in self.rows) / len(self.rows) for s in sweeps[-1]]
        kept = [s for outs in (sweeps[3:] if mode == "input" else sweeps) for s in outs]
        return losses, sum(s.softmax(1) for s in kept)

    def contrast(self) -> tuple[list[Tensor], Tensor]:
        """Losses of the layers with all wrong classes, each of which meets a node once, and scores.

        Where the wrong classes of different nodes meet is drawn by the rule and taken from it.
        """
        drawn = torch.rand(len(self.rows), self.k, generator=self.rule.rng("wrong", fixed=True)).tolist()
        orders = [
            sorted(set(range(self.k)) - {self.y[i]}, key=d.__getitem__) for i, d in zip(self.rows, drawn, strict=True)
        ]
        true = self.run(self.y)
        fixed = [_unit(h.detach()) for h in true] if self.rule.label == "node" else None
        losses = [self.soft(self.rule.threshold - self.energy(h)) for h in true]
        for j in range(self.k - 1):
            labels = list(self.y)
            for i, order in zip(self.rows, orders, strict=True):
                labels[i] = order[j]
            outs = self.run(labels, fixed)
            losses = [t + self.soft(self.energy(h) - self.rule.threshold) for t, h in zip(losses, outs, strict=True)]
        scores = []
        for c in range(self.k):
            outs = self.run([label if label >= 0 else c for label in self.y])
            total = sum(h[: self.n].pow(2).sum(1) for h in outs)
            scores.append(torch.stack([t * (self.y[i] in (-100, c)) for i, t in enumerate(total)]))  # type: ignore[arg-type]
        return losses, torch.stack(scores, 1)

    def run(self, labels: Sequence[int], below: list[Tensor] | None = None) -> list[Tensor]:
        """Every layer's output where nodes carry or join these labels."""
        codes, outs = self.code(labels), list[Tensor]()
        if self.rule.label == "code":
            matrix = _matrix(self.edges, self.n)
            length = torch.cat([self.x, codes], 1).pow(2).sum(1, keepdim=True).sqrt() + 1e-8
            z, seen = self.x / length, codes / length
        else:
            matrix, z = self.joined(labels), _unit(torch.cat([self.x, self.virtual]))
        for k in range(len(self.w)):
            outs.append(self.layer(k, matrix, z, seen if self.u and k == 0 else None))
            z = _unit(outs[-1].detach()) if below is None else below[k]
        return outs

    def energy(self, h: Tensor) -> Tensor:
        """Sums of squares of the labelled nodes' rows."""
        return torch.stack([h[i].pow(2).sum() for i in self.rows])

    def soft(self, v: Tensor) -> Tensor:
        """The mean of log(1 + exp v)."""
        return (1 + v.exp()).log().mean()

    def worst(self) -> tuple[float, float]:
        """Largest errors relative to the largest entry, of the rule's gradients and of its scores."""
        losses, scores = self.contrast() if hasattr(self.rule, "label") else self.single()
        want = torch.autograd.grad(sum(losses), self.rule.trainable())  # type: ignore[arg-type]
        self.rule.zero_grad(set_to_none=True)
        self.rule.step(self.x, torch.tensor(self.y))
        pairs = [(p.grad, g) for p, g in zip(self.rule.trainable(), want, strict=True)]
        found = self.rule(self.x)
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in [*pairs, (found, scores.detach())]]
        return max(errors[:-1]), errors[-1]
