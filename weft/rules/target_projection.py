"""Train every stage toward a fixed random projection of the label, in forward order, one stage at a time.

    J_k = mean_B 1/2 |h_k - P_k y*|^2   (l2),   mean_B |h_k - P_k y*|_1   (l1),   mean_B -<h_k, P_k y*>   (linear)
    dJ_k / dz_k = (h_k - P_k y*) s'(z_k) / B   (l2),   sign(h_k - P_k y*) s'(z_k) / B   (l1);   h_{k-1} is a constant

``y*`` is the one-hot label, ``P_k [D_k, K]`` is drawn once and never trained; the last stage has the ordinary loss. The
linear loss pushes by -P_k y* whatever the activation: direct random target projection, which the rule generalises.
A recurrent layer has a target at each of its steps, h_t = s(W x_t + U h_{t-1} + b) with h_{t-1} a constant too.

Only the abstract and second-hand equations could be had. Read into them: that entries of P_k are +-target_scale, that
each unit of a feature map has its own, the last stage's loss, and what is constant in a recurrence.

Paper: "Learning with Local Gradients at the Edge", Michael Lomnitz, Zachary Daniels, David Zhang, Michael Piacentino,
2022, arXiv:2208.08503.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import DataError, Unsupported, UsageError
from weft.method import method
from weft.rules.base import IGNORED, Ready, Rule, Scale, check_labels
from weft.testing.example import Example, classification
from weft.testing.tools import gradients

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda h, target: 0.5 * (h - target).square(),
    "l1": lambda h, target: (h - target).abs(),
    "linear": lambda h, target: -h * target,
}


def single_steps(module: nn.RNNBase, x: Tensor, first: Tensor | None, h: Tensor) -> Tensor:
    """A recurrent layer's outputs again, each from its own input and a constant state before it.

    For an ``nn.RNN`` or ``nn.GRU`` of one layer and direction: its input ``x`` ``[B, T, D]``, its ``first`` state
    ``[1, B, H]`` (None: zeros), and what it gave, ``h`` ``[B, T, H]``; T before B where it is not ``batch_first``.
    """
    time = 1 if module.batch_first else 0
    start = torch.zeros_like(h.narrow(time, 0, 1)) if first is None else first[0].unsqueeze(time)
    before = torch.cat([start, h.narrow(time, 0, h.shape[time] - 1)], time).detach()
    alone = x.flatten(0, 1).unsqueeze(time)  # every step is a row of its own, one step long
    again, _ = type(module).forward(module, alone, before.flatten(0, 1)[None].contiguous())  # without hooks
    return again.squeeze(time).view_as(h)


@method(
    "target-projection",
    contract="rule",
    family="rules",
    papers=[402],
    tags={"additive", "local", "deterministic"},
    variants={
        "direct-random-target-projection": {
            "options": {"local_loss": "linear"},
            "papers": [],
            "summary": "Push every stage along a fixed random projection of the label, whatever it gave.",
        }
    },
    defaults={"optimizer": "adam", "lr": 2e-3, "schedule": "cosine"},
)
class TargetProjection(Rule):
    """Target projection; ``step`` returns the last stage's loss, and the model's own scores predict.

    Args:
        model: any model that can be cut (``at``) and has a hidden stage. With labels ``[B, T]`` each token of
            ``[B, T, D]`` has its label's target; with labels ``[B]`` each position has the row's.
        local_loss: of the hidden stages: ``"l2"``, ``"l1"`` or ``"linear"``.
        target_scale: the size of targets, the entries of P_k; it should lie within the range of the activation.
        through_time: differentiate recurrent layers through their steps. Otherwise a step's state is a constant for
            the next: ``nn.RNN`` and ``nn.GRU`` of one layer and direction, run once more for it.
        backward: ``"stage"``: each stage's backward pass as soon as it has run, so that no more than one stage's
            activations are kept; ``"joint"``: one at the end.
    """

    stages = "cut"

    def __init__(
        self,
        model: nn.Module,
        *,
        local_loss: str = "l2",
        target_scale: float = 1.0,
        through_time: bool = False,
        backward: str = "stage",
        **common: Any,
    ) -> None:
        super().__init__(model, **common)
        if local_loss not in LOSSES or backward not in ("joint", "stage") or not 0 < target_scale < math.inf:
            raise UsageError(
                f"{local_loss=}, {backward=}, {target_scale=}; 'l2', 'l1' or 'linear', 'stage' or 'joint', a size > 0"
            )
        assert self.cut is not None
        self.last = len(self.cut) - 1
        if self.last < 1:
            raise Unsupported("target projection trains hidden stages, and the model has none", "backprop")
        self.classes = self.cut.width(self.last)
        self.local_loss, self.target_scale, self.backward = local_loss, target_scale, backward
        self.recurrent = [] if through_time else [n for n, m in model.named_modules() if isinstance(m, nn.RNNBase)]
        for name in self.recurrent:
            layer: Any = model.get_submodule(name)
            if isinstance(layer, nn.LSTM) or layer.num_layers > 1 or layer.bidirectional:
                raise Unsupported(f"{name!r} has states that its output hides", "nn.GRU layers, or through_time=True")

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward pass; see :meth:`weft.rules.base.Rule.step`."""
        assert self.cut is not None
        cut = self.cut
        if y.dtype != torch.int64 or y.ndim > 2:
            raise Unsupported("targets are projections of classes [B] or [B, T]", "feedback-alignment")
        check_labels(torch.empty(y.numel(), self.classes, device="meta"), y.flatten())
        left = {id(p): p for p in self.trainable()}
        losses: list[Tensor] = []

        def behind(k: int, h: Tensor) -> None:
            loss = self.criterion(h, y) if k == self.last else self._local(k, h, y)
            if self.backward == "stage":
                own = [left.pop(id(p)) for p in cut.parameters(k) if id(p) in left]
                self.descend([loss], own, scale=scale, ready=ready)
                loss = loss.detach()
            losses.append(loss)

        with self._constant_states():
            cut.run(x, behind)
        cut.require_unshared("target-projection")
        self.descend(losses if self.backward == "joint" else [], left.values(), scale=scale, ready=ready)
        return losses[-1]

    def projection(self, k: int, features: tuple[int, ...], like: Tensor) -> Tensor:
        """The targets of stage ``k`` for every class, ``[K, *features]``: P_k transposed, the same at every step."""
        drawn = self.fixed_normal((self.classes, *features), like, "target", k)
        return torch.where(drawn > 0, self.target_scale, -self.target_scale).to(like)

    def _local(self, k: int, h: Tensor, y: Tensor) -> Tensor:
        """The mean over labels of J_k, for activations ``[B, D]``, ``[B, C, H, W]`` or ``[B, ..., D]``."""
        assert self.cut is not None
        if h.ndim < 2 or h.shape[: y.ndim] != y.shape or h.ndim == y.ndim:
            raise DataError(f"stage {k} gives {tuple(h.shape)} for labels {tuple(y.shape)}; cut elsewhere (at=[...])")
        used = y != IGNORED
        h, y = h.to(torch.promote_types(h.dtype, torch.float32))[used], y[used]
        positions = h.ndim - 2 if h.ndim > 2 and self.cut.channels_last(k) else 0
        target = self.projection(k, tuple(h.shape[1 + positions :]), h.detach())[y]
        target = target.view(len(y), *[1] * positions, *target.shape[1:])
        return LOSSES[self.local_loss](h, target).sum() / (len(y) * math.prod(h.shape[1 : 1 + positions]))

    @contextlib.contextmanager
    def _constant_states(self) -> Iterator[None]:
        """Inside, recurrent layers of the model differentiate each step on its own."""

        def behind(module: Any, args: Any, named: dict[str, Any], whole: Any) -> Any:
            x, first = (*args, named.get("hx"))[:2] if args else (named["input"], named.get("hx"))
            if not isinstance(x, Tensor) or x.ndim != 3:
                raise Unsupported("recurrent layers are run step by step on [B, T, D] alone", "through_time=True")
            h = single_steps(module, x, first, whole[0])
            return h, h.narrow(1 if module.batch_first else 0, -1, 1).reshape(whole[1].shape)

        handles = [self.model.get_submodule(n).register_forward_hook(behind, with_kwargs=True) for n in self.recurrent]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def example() -> Example:
    """A small MLP and a batch for it."""
    return classification()


@claim(
    "gradients are those of each layer's own distance from a fixed random target written in numpy, to 1e-10",
    row=402,
    mutants={
        "away from the target": ("0.5 * (h - target).square()", "0.5 * (h + target).square()"),
        "no residual for l1": ("(h - target).abs()", "(h - target).square()"),
        "linear without its sign": ("-h * target", "h * target"),
        "the next label's target": ("h.detach())[y]", "h.detach())[(y + 1) % self.classes]"),
        "one target for all stages": ('like, "target", k)', 'like, "target")'),
        "summed over rows": (".sum() / (len(y) *", ".sum() / ("),
    },
)
def local_equations(seed: int) -> list[Check]:
    """Largest error relative to a gradient's largest entry, by local loss; two stages' agreement, size of targets."""
    import numpy as np

    made = classification(seed=seed, dtype=torch.float64, batch=9, hidden=(16, 16), smooth=True)
    weights = [p.detach().numpy() for p in made.model.parameters()]
    checks = []
    for name in ("l2", "l1", "linear"):
        rule = TargetProjection(made.model, local_loss=name, seed=seed)
        targets = [rule.projection(k, (16,), made.x).numpy() for k in range(2)]
        found, h, onehot, want = gradients(rule, made.x, made.y), made.x.numpy(), np.eye(3)[made.y.numpy()], list[Any]()
        for k in range(3):
            out = h @ weights[2 * k].T + weights[2 * k + 1]
            if k == 2:
                d = np.exp(out) / np.exp(out).sum(1, keepdims=True) - onehot
            else:
                out, goal = np.tanh(out), targets[k][made.y.numpy()]
                d = {"l2": out - goal, "l1": np.sign(out - goal), "linear": -goal}[name] * (1 - out * out)
            want += [d.T @ h / 9, d.sum(0) / 9]
            h = out
        worst = max(float(abs(g.numpy() - r).max() / abs(r).max()) for g, r in zip(found, want, strict=True))
        checks.append(Check(worst, 1e-10, what=name))
    alike = abs(float((np.sign(targets[0]) * np.sign(targets[1])).mean()))
    return [*checks, Check(alike, 1.0, "<", "agreement"), Check(abs(targets[0]).min(), 1.0, "==")]


@claim(
    "a recurrent layer's gradients are those of its steps' distances from targets, none sent back in time, to 1e-10",
    row=402,
    mutants={
        "through time": ("else [n for n, m", "else [n for n, m in [] for _, m"),
        "its own state": ("h.narrow(time, 0, h.shape[time] - 1)", "h.narrow(time, 1, h.shape[time] - 1)"),
        "first state forgotten": ("if first is None else", "if True else"),
        "one unit alone": (".sum() / (len(y) *", "[:, -1:].sum() / (len(y) *"),
    },
)
def recurrent_equations(seed: int) -> Check:
    """Largest error relative to a gradient's largest entry, with a first state and a label for each step."""
    import numpy as np

    class Net(nn.Sequential):
        def forward(self, x: Tensor, first: Tensor) -> Tensor:  # type: ignore[override]
            return self[1](self[0](x, first)[0])

    net = Net(nn.RNN(4, 5, batch_first=True), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(0, 0.7, generator=generator)
    x, first = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((6, 7, 4), (1, 6, 5)))
    tokens = torch.randint(3, (6, 7), generator=generator)
    w, u, b, c = (p.detach().numpy() for p in net[0].parameters())
    found = gradients(rule := TargetProjection(net, at=["0"], seed=seed), (x, first), tokens)[:4]
    targets = rule.projection(0, (5,), x).numpy()
    h, want = first[0].numpy(), [np.zeros_like(p) for p in (w, u, b, c)]
    for t in range(7):
        now = np.tanh(x[:, t].numpy() @ w.T + b + h @ u.T + c)
        d = (now - targets[tokens[:, t].numpy()]) * (1 - now * now) / 42
        want = [s + g for s, g in zip(want, (d.T @ x[:, t].numpy(), d.T @ h, d.sum(0), d.sum(0)), strict=True)]
        h = now
    return Check(max(float(abs(g.numpy() - r).max() / abs(r).max()) for g, r in zip(found, want, strict=True)), 1e-10)


@claim(
    "tensors saved for backward belong to a single layer at any time",
    row=402,
    mutants={
        "one pass at the end": ('backward: str = "stage"', 'backward: str = "joint"'),
        "hidden layers last": ('if self.backward == "stage":', 'if self.backward == "stage" and k == self.last:'),
    },
)
def one_layer_saved(seed: int) -> list[Check]:
    """The most layers of a 4-layer network that have saved tensors alive at once, and how many save any in a step."""
    import weakref

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.layer = tensor, running[0]

    made = classification(seed=seed, hidden=(12, 11, 10), batch=16)
    rule, running, alive = TargetProjection(made.model, seed=seed), [-1], weakref.WeakSet[Kept]()
    counts, seen = list[int](), set[int]()

    def pack(tensor: Tensor) -> Kept:
        alive.add(one := Kept(tensor))
        seen.add(one.layer)
        counts.append(len({kept.layer for kept in alive}))
        return one

    for k, layer in enumerate(made.model[::2]):
        layer.register_forward_pre_hook(lambda *_, k=k: running.__setitem__(0, k))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        rule.step(made.x, made.y)
    return [Check(max(counts), 1, "==", "layers at once"), Check(len(seen), 4, "==", "layers in a step")]


@claim(
    "mean digits accuracy over 3 seeds of a 3-layer network is within 5 points of backprop's after 15 epochs",
    row=402,
    mutants={
        "hidden layers untrained": ("else self._local(k, h, y)", "else 0 * self._local(k, h, y)"),
        "no label": ("h.detach())[y]", "h.detach())[0 * y]"),
        "away from the target": ("0.5 * (h - target).square()", "-0.5 * (h - target).square()"),
    },
)
def digits_accuracy(seed: int) -> Check:
    """Points that backprop is ahead of (128, 128); both by Adam, 5e-3 with a cosine to zero, batch 64."""
    from weft.rules.backprop import Backprop
    from weft.testing.train import points_behind

    return Check(points_behind(TargetProjection, Backprop, seed, (128, 128), seeds=3, epochs=15, lr=5e-3), 5.0)
