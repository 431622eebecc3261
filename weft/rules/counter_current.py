"""Train every stage to match what a second network makes of the labels on its way down; both learn, stage by stage.

    forward:   a_k = stage_k(a_{k-1}, detached)   [B, d_k], k = 1 .. L        feedback: s_L = I_K, the K classes
    feedback:  s_{k-1} = elu(V_k s_k, s_k detached)   [K, d_{k-1}], k = L .. 2
    L_k = (strength / d_k) mean((a_k s_k^T - onehot(y))^2), over B K entries, k < L;      L_L = CE(a_L, y)

W_k and V_{k+1} learn by L_k alone. The feedback net mirrors the model's widths, without biases, and is the rule's own;
prediction is the model's. Its signals belong to classes, not to rows: it costs K rows of a linear network.
The authors train both nets by SGD with a rate of 1 and the norm of their gradients clipped to 1; so are the defaults,
with momentum; by Adam a rate above 1e-3 diverges. Their loss has a further term, for the input and s_0, which trains
V_1 and nothing else: left out. Their convolutional nets have a convolutional feedback net; here images are averaged
over places, and tokens taken one by one.

Paper: "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning", Chia-Hsiang Kao,
Bharath Hariharan, 2024, arXiv:2409.19841.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import DataError, StageError, Unsupported, UsageError
from weft.method import method
from weft.rules.base import IGNORED, Ready, Rule, Scale
from weft.testing.example import Example, classification


def prototypes(weights: list[Tensor]) -> list[Tensor]:
    """s_{L-1} .. s_1, each ``[K, d]``: the classes on their way down, cut between layers.

    Args:
        weights: V_L .. V_2, each ``[d_{k-1}, d_k]``, the first ``[d_{L-1}, K]``.
    """
    s, found = torch.eye(weights[0].shape[1], dtype=weights[0].dtype, device=weights[0].device), []
    for weight in weights:
        s = F.elu(F.linear(s.detach(), weight))
        found.append(s)
    return found


def matching_loss(a: Tensor, s: Tensor, y: Tensor, strength: float = 128.0) -> Tensor:
    """How far the products of activations and prototypes are from the labels' one-hot codes.

    Args:
        a: ``[N, D]``.
        s: ``[K, D]``.
        y: ``[N]``, 0 to K - 1.
        strength: divided by D, the weight of the squared error.
    """
    return strength / a.shape[1] * F.mse_loss(a @ s.t(), F.one_hot(y, len(s)).to(a.dtype))


@method(
    "counter-current",
    contract="rule",
    family="rules",
    papers=[23],
    tags={"additive", "local", "deterministic"},
    defaults={"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "clip": 1.0},
)
class CounterCurrent(Rule):
    """Counter-current learning; the feedback net is in ``feedback`` and trained along.

    Args:
        model: any model that can be cut (``at``).
        strength: of the matching losses beside the cross-entropy of the last stage.
        backward: ``"joint"``: one backward pass at the end; ``"stage"``: each stage's as soon as it has run.
    """

    stages = "cut"

    def __init__(self, model: nn.Module, *, strength: float = 128.0, backward: str = "joint", **common: Any) -> None:
        super().__init__(model, **common)
        if backward not in ("joint", "stage") or not 0 < strength < math.inf:
            raise UsageError(f"{strength=}, {backward=}; a positive number, and 'joint' or 'stage'")
        assert self.cut is not None
        self.strength, self.backward = strength, backward
        widths, like = [self.cut.width(k) for k in range(len(self.cut))], next(model.parameters())
        self.feedback = nn.ParameterList()
        for k in range(len(widths) - 1):
            shape, generator = (widths[k], widths[k + 1]), self.rng("feedback", k, fixed=True)
            drawn = 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1
            self.feedback.append((drawn / math.sqrt(shape[1])).to(like))

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward pass of both nets, and a backward pass that stays inside stages."""
        assert self.cut is not None
        trained = self.trainable()
        left = {id(p): p for p in trained} if self.backward == "stage" else {}
        down = prototypes(list(self.feedback)[::-1])[::-1] if len(self.feedback) else []
        losses: list[Tensor] = []

        def behind(k: int, h: Tensor) -> None:
            loss = self.criterion(h, y) if k == len(down) else self._matching(k, h, down[k], y)
            if self.backward == "stage":
                self.descend([loss], self._own(k, left), scale=scale, ready=ready)
                loss = loss.detach()
            losses.append(loss)

        self.cut.run(x, behind)
        self.cut.require_unshared("counter-current learning")
        if self.backward == "joint":
            self.descend(losses, trained, scale=scale, ready=ready)
        else:
            self.descend([], left.values(), scale=scale, ready=ready)
        return losses[-1]

    def _matching(self, k: int, h: Tensor, s: Tensor, y: Tensor) -> Tensor:
        assert self.cut is not None
        last = self.cut.channels_last(k)
        if h.shape[-1 if last else 1] != s.shape[1]:
            raise StageError(
                f"stage {k} gives {tuple(h.shape)}, where {s.shape[1]} channels were expected in dimension "
                f"{h.ndim - 1 if last else 1}; cut behind a layer whose output has them there (at=[...])"
            )
        if y.is_floating_point() or y.ndim > 2:
            raise Unsupported(f"labels {tuple(y.shape)} of {y.dtype}: it matches classes", "feedback-alignment")
        tokens = last and h.shape[:-1] == y.shape
        if h.ndim > 2 and not tokens:
            h = h.flatten(1, -2).mean(1) if last else h.flatten(2).mean(2)
        used = y != IGNORED
        if y.shape != h.shape[:-1] or not used.any() or not 0 <= int(y[used].min()) <= int(y[used].max()) < len(s):
            raise DataError(f"labels {tuple(y.shape)} are no classes 0 to {len(s) - 1} for {tuple(h.shape)}")
        return matching_loss(h[used], s, y[used], self.strength)

    def _own(self, k: int, left: dict[int, nn.Parameter]) -> list[nn.Parameter]:
        """What stage ``k`` and its prototypes train, taken out of ``left``."""
        assert self.cut is not None
        own = self.cut.parameters(k)
        if any(id(p) not in left for p in own):
            self.cut.require_unshared("counter-current learning")
        own += list(self.feedback[k : k + 1])
        return [p for p in (left.pop(id(p), None) for p in own) if p is not None]


def example() -> Example:
    """A small MLP and a batch for it."""
    return classification()


@claim(
    "every gradient, of the model and of the feedback net, is that of the equations written in numpy, to 1e-10",
    row=23,
    mutants={
        "labels' codes": ("F.one_hot(y, len(s)).to(a.dtype)", "1 - F.one_hot(y, len(s)).to(a.dtype)"),
        "strength": ("strength / a.shape[1] *", "strength *"),
        "linear feedback net": ("F.elu(F.linear(s.detach(), weight))", "F.linear(s.detach(), weight)"),
        "feedback net untrained": ("a @ s.t()", "a @ s.detach().t()"),
        "layers untrained": ("a @ s.t()", "a.detach() @ s.t()"),
        "last layer alone": ("self.descend(losses, trained", "self.descend(losses[-1:], trained"),
    },
)
def equations(seed: int) -> Check:
    """Largest error relative to the largest entry, over all gradients of a 4-layer MLP, in float64."""
    import numpy as np

    made = classification(seed=seed, hidden=(12, 11, 10), dtype=torch.float64, batch=9)
    rule = CounterCurrent(made.model, strength=5.0, seed=seed)
    rule.step(made.x, made.y)
    params, down = ([p.detach().numpy() for p in ps] for ps in (made.model.parameters(), rule.feedback))
    h, codes, want = made.x.numpy(), np.eye(3)[made.y.numpy()], list[Any]()
    above, z = [np.eye(3)], list[Any]()
    for weight in down[::-1]:
        z.insert(0, above[0] @ weight.T)
        above.insert(0, np.where(z[0] > 0, z[0], np.exp(np.minimum(z[0], 0)) - 1))
    for k in range(4):
        layer, out = made.model[2 * k], h @ params[2 * k].T + params[2 * k + 1]
        e = np.exp(out - out.max(1, keepdims=True))
        d = (e / e.sum(1, keepdims=True) - codes) / 9 if k == 3 else None
        if d is None:
            a = np.maximum(0, out)
            missed = 5.0 / a.shape[1] * 2 / (9 * 3) * (a @ above[k].T - codes)
            d = (out > 0) * (missed @ above[k])
            slope = np.where(z[k] > 0, 1, np.exp(np.minimum(z[k], 0)))
            want.append((rule.feedback[k].grad, (missed.T @ a * slope).T @ above[k + 1]))
        want += [(layer.weight.grad, d.T @ h), (layer.bias.grad, d.sum(0))]
        h = np.maximum(0, out)
    return Check(max(float(abs(g.numpy() - r).max() / abs(r).max()) for g, r in want), 1e-10)


@claim(
    "a layer's gradient of every other layer's loss is exactly zero, in both nets",
    row=23,
    mutants={
        "feedback net not cut": ("F.linear(s.detach(), weight)", "F.linear(s, weight)"),
        "feedback net untrained": ("a @ s.t()", "a @ s.detach().t()"),
        "layers untrained": ("a @ s.t()", "a.detach() @ s.t()"),
    },
)
def own_losses(seed: int) -> list[Check]:
    """Gradients of 4 losses that are not zero for another layer's parameters, and that are zero for their own."""
    made = classification(seed=seed, hidden=(12, 11, 10), batch=16)
    rule, losses = CounterCurrent(made.model, seed=seed), list[Tensor]()
    rule.descend = lambda tensors, *given, **how: losses.extend(tensors)  # type: ignore[method-assign]
    rule.step(made.x, made.y)
    owners = [(p, k // 2) for k, p in enumerate(made.model.parameters())] + [
        (p, k) for k, p in enumerate(rule.feedback)
    ]
    other = own = 0
    for k, loss in enumerate(losses):
        found = torch.autograd.grad(loss, [p for p, _ in owners], retain_graph=True, allow_unused=True)
        for gradient, (_, owner) in zip(found, owners, strict=True):
            reached = gradient is not None and bool(gradient.any())
            other, own = other + (reached and owner != k), own + (owner == k and not reached)
    return [Check(len(losses), 4, "=="), Check(other, 0, "==", "of others"), Check(own, 0, "==", "own, but zero")]


@claim(
    "images are averaged over places, tokens taken one by one, labels -100 left out; V begins with variance 1 / 3d",
    row=23,
    mutants={
        "summed over places": ("h.flatten(2).mean(2)", "h.flatten(2).sum(2)"),
        "ignored rows": (
            "matching_loss(h[used], s, y[used]",
            "matching_loss(h.flatten(0, -2), s, y.flatten().clamp(0)",
        ),
        "wider": ("(drawn / math.sqrt(shape[1]))", "(drawn / math.sqrt(shape[0]))"),
    },
)
def images_and_tokens(seed: int) -> list[Check]:
    """Largest relative error of the first weight's gradient against autograd, in float64; V's, in standard errors."""
    g = torch.Generator().manual_seed(seed)
    rows, worst = torch.tensor([0, 2, 1, -100, 0, 1]), 0.0
    cases: list[Any] = [
        ([nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(125, 3)], torch.randn(6, 2, 7, 7, generator=g), rows),
        ([nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)], torch.randn(2, 3, 4, generator=g), rows.view(2, 3)),
    ]
    for layers, x, y in cases:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            layers[0].weight.normal_()
            layers[-1].weight.normal_()
        model = nn.Sequential(*layers).double()
        rule, used = CounterCurrent(model, strength=2.0, seed=seed), y != -100
        rule.step(x.double(), y)
        a = torch.relu(layers[0](x.double()))
        a = a.mean((2, 3)) if a.ndim == 4 else a
        s = F.elu(rule.feedback[0].t())
        missed = torch.einsum("nd,kd->nk", a[used], s) - torch.eye(3).double()[y[used]]
        (want,) = torch.autograd.grad(2 / a.shape[-1] * missed.square().mean(), layers[0].weight)
        worst = max(worst, float((layers[0].weight.grad - want).abs().max() / want.abs().max()))
    drawn = CounterCurrent(nn.Sequential(nn.Linear(2, 200), nn.ReLU(), nn.Linear(200, 50)), seed=seed).feedback[0]
    off = abs(float(drawn.detach().double().square().mean()) * 150 - 1) * (10_000 / 0.8) ** 0.5
    return [Check(worst, 1e-10), Check(off, 6.5, "<=", "standard errors")]


@claim(
    "a 3-layer MLP reaches 95% on MNIST's test set in 20 epochs, above the same net trained in its output layer alone",
    row=23,
    tier="slow",
    budget=200.0,
    mutants={"hidden layers untrained": ("self.descend(losses, trained", "self.descend(losses[-1:], trained")},
)
def mnist_accuracy(seed: int) -> list[Check]:
    """Test accuracies; 256 ELU units in both hidden layers, Adam, 1e-3, batch 256."""
    from weft import data

    mnist, found = data.load("mnist"), list[float]()
    for alone in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(784, 256), nn.ELU(), nn.Linear(256, 256), nn.ELU(), nn.Linear(256, 10)]
        model = nn.Sequential(nn.Flatten(), *layers)
        model[1:5].requires_grad_(not alone)
        rule = CounterCurrent(model, seed=seed)
        optimizer = torch.optim.Adam(rule.trainable(), lr=1e-3, fused=True)
        for epoch in range(20):
            for index in data.batches(len(mnist.y_train), 256, seed=seed, epoch=epoch):
                optimizer.zero_grad()
                rule.step(mnist.x_train[index], mnist.y_train[index])
                optimizer.step()
        with torch.no_grad():
            found.append(float((rule(mnist.x_test).argmax(1) == mnist.y_test).double().mean()))
    return [Check(found[0], 0.95, ">="), Check(found[0] - found[1], 0.0, ">", "above the output layer alone")]
