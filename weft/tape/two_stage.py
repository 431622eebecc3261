"""Split the backward pass: first the gradients of inputs, which another stage waits for, then those of weights.

    p1: d_{l-1} = (df_l / dz_{l-1})^T d_l        p2: dL/dw_l = (df_l / dw_l)^T d_l, at any time after d_l is known

Inside `deferred()`, ``loss.backward()`` does p1 alone and holds z_{l-1} and d_l of every layer with weights; `finish()`
does p2, in the order of p1. Outside, the backward pass is the ordinary one. Held are, for each micro-batch, the layers'
inputs for longer (as a tape unpacked them, where one had packed them), and d_l besides; what p1 alone needs (masks,
variances) is freed by it. A LayerNorm is divided into its normalisation, which has no weights, and its affine part.

As in the paper, the held tensors of one layer may be joined, so that p2 is one larger product: the same sum, rounded
differently. Its layers are written by hand, outside autograd; here only p2 leaves it, and comes back at the parameters.
`weft.ops.pipeline.simulate` tells what a schedule gains by it.

Paper: "2BP: 2-Stage Backpropagation", Christopher Rae, Joseph K. L. Lee, James Richings, 2024, arXiv:2405.18047.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import WeftError
from weft.measure import operations
from weft.method import method
from weft.ops.pipeline import simulate
from weft.ops.weight_gradients import Linear, operation
from weft.testing.example import Example


class Later:
    """Weight gradients that wait, as `deferred` gives them."""

    def __init__(self) -> None:
        self._held: list[tuple[Linear, tuple[nn.Parameter | None, ...], Tensor | None, Tensor, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are held for the second stage: unique storages of layers' inputs and output gradients."""
        held = [t.untyped_storage() for _, _, x, grad, _ in self._held for t in (x, grad) if t is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    def hold(self, op: Linear, owners: tuple[nn.Parameter | None, ...], x: Tensor | None, grad: Tensor) -> None:
        """Called by layers in p1; ``owners`` are the weight and the bias, None where it is not trained."""
        x = None if x is None else x.detach()  # the version stays shared, the graph behind does not stay alive
        self._held.append((op, owners, x, grad, _version(x, grad)))

    @torch.no_grad()
    def finish(self, *, joined: bool = False) -> None:
        """The second stage: adds to ``.grad`` of the parameters what p1 left out.

        Args:
            joined: one product for all calls of a layer whose inputs differ in their first dimension at most; takes
                the memory of a copy of what is held for the layer.

        Raises:
            WeftError: when a layer's input was changed in place since p1; no gradient is added then.
        """
        held, self._held = self._held, []
        if any(_version(x, grad) != version for _, _, x, grad, version in held):
            raise WeftError("a layer's input was changed in place between the two stages; change a copy of it")
        groups: dict[Any, list[tuple[Tensor | None, Tensor]]] = {}
        for number, (op, owners, x, grad, _) in enumerate(held):
            alike = number if x is None or not joined else (x.shape[1:], grad.shape[1:], x.dtype, grad.dtype)
            groups.setdefault((op, *(id(p) for p in owners), alike), []).append((x, grad))
        params = {(op, *(id(p) for p in owners)): owners for op, owners, *_ in held}
        held.clear()
        for key in list(groups):
            (weight, bias), calls = params[key[:3]], groups.pop(key)  # what is done with is freed
            x = calls[0][0] if len(calls) == 1 else torch.cat([x for x, _ in calls if x is not None])
            grad = calls[0][1] if len(calls) == 1 else torch.cat([grad for _, grad in calls])
            del calls
            if weight is not None and x is not None:
                weight.backward(key[0].weight(grad, x, weight.shape).to(weight.dtype))
            if bias is not None:
                bias.backward(key[0].bias(grad).to(bias.dtype))

    def __del__(self) -> None:
        if self._held:
            warnings.warn(f"weight gradients of {len(self._held)} calls were never finished", ResourceWarning, 1)


def _version(*tensors: Tensor | None) -> int:
    return sum(t._version for t in tensors if t is not None)


_active: list[Later] = []  # of the process: backward passes on accelerators run in threads of their own


@contextlib.contextmanager
def deferred() -> Iterator[Later]:
    """Inside, backward passes through `TwoStage` layers leave the gradients of their weights for `Later.finish`.

    >>> with deferred() as later:  # doctest: +SKIP
    ...     loss.backward()
    >>> later.finish()  # doctest: +SKIP

    It is the backward pass that counts, wherever the forward was; one with ``create_graph=True`` is not split. An
    error inside drops what is held.

    Raises:
        WeftError: inside another one.
    """
    if _active:
        raise WeftError("weight gradients are deferred here already; finish() adds those of all backward passes inside")
    later = Later()
    _active.append(later)
    try:
        yield later
    except BaseException:
        later._held.clear()
        raise
    finally:
        _active.clear()


class _Split(torch.autograd.Function):
    """One operation with weights; ``owners`` are its parameters, which the tensors may be copies of (autocast)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, op: Linear, owners: Any) -> Tensor:
        return op.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.op, ctx.owners = inputs
        ctx.shapes = x.shape, weight.shape
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), op, needs = ctx.saved_tensors, ctx.op, ctx.needs_input_grad
        owners = tuple(p if need else None for p, need in zip(ctx.owners, needs[1:3], strict=True))
        towards = op.inputs(grad, weight, ctx.shapes[0]) if needs[0] else None
        later = _active[0] if _active and not torch.is_grad_enabled() else None
        if later is not None and all(p is None or p.is_leaf for p in owners):
            if any(p is not None for p in owners):
                later.hold(op, owners, x, grad)
            return towards, None, None, None, None
        of_weight = op.weight(grad, x, ctx.shapes[1]) if needs[1] else None
        return towards, of_weight, op.bias(grad) if needs[2] else None, None, None


@method("two-stage-backward", contract="layer", family="tape", papers=[101], tags={"same-forward"})
class TwoStage(Convertible):
    """A layer whose weight gradients can wait, see `deferred`; its parameters are those of the layer given.

    Until `Later.finish` a deferred parameter's ``.grad`` lacks its part: clip, exchange and step after it. Hooks on
    parameters run in both stages, so gradients cannot be exchanged by hooks: in p1 those of ``register_hook`` are given
    None, and the others find ``.grad`` as it was.

    Raises:
        Unsupported: for layers other than `weft.ops.weight_gradients.operation` takes.
    """

    converts = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.op = operation(layer)
        self.weight: Any = layer.weight
        self.bias: Any = getattr(layer, "bias", None)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> TwoStage:
        """The layer, on the same parameters; without options."""
        return cls(layer, **options)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer itself; torch refuses to change a linear layer's output in place where it has 3 dimensions."""
        kind, weight, bias, single = x.device.type, self.weight, self.bias, x.ndim < self.op.least
        x = self.op.before(x[None] if single else x)
        if self.op.cast and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out = x if weight is None else _Split.apply(x, weight, bias, self.op, (self.weight, self.bias))
        return out[0] if single else out


def example() -> Example:
    """A linear layer and inputs with two leading dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 5), torch.randn(4, 3, 6)
    return Example(layer, x, torch.arange(4) % 2)


@claim(
    "input gradients leave no weight gradient in the first stage, and those of the second stage are autograd's to 1e-9 "
    "in float64, joined over micro-batches or not, for linear, convolution, normalisation and embedding layers",
    row=101,
    mutants={
        "not deferred": ("return towards, None, None, None, None", "later = None"),
        "nothing held": ("later.hold(op, owners, x, grad)", "0"),
        "the last call of a layer alone": ("alike), []).append((x, grad))", "alike), [])[:] = [(x, grad)]"),
        "averaged over a batch": (
            "grad.flatten(0, -2).sum(0)",
            "grad.flatten(0, -2).mean(0)",
            "weft.ops.weight_gradients",
        ),
        "not normalised": ("return self.bias(grad * x)", "return self.bias(grad)", "weft.ops.weight_gradients"),
        "padding trained": ("!= self.padding)", "!= -5)", "weft.ops.weight_gradients"),
        "bias lost": ("bias.backward(key", "bias.detach().requires_grad_().backward(key"),
    },
)
def deferred_gradients(seed: int) -> list[Check]:
    """Largest relative error over parameters and the input, after three micro-batches; gradients there before p2."""
    torch.manual_seed(seed)
    layers = {
        "table": nn.Embedding(7, 8, padding_idx=2),
        "norm": nn.LayerNorm([5, 8]),
        "tied": nn.Linear(8, 8),
        "conv": nn.Conv2d(2, 4, (3, 2), stride=(1 + seed % 2, 1), padding=(1, 2), groups=2, dilation=(1, 2)),
        "ring": nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode="circular", bias=False),
    }
    model = nn.ModuleDict(layers).double()
    batches = [(torch.arange(15).view(3, 5) % 7, torch.randn(3, 5, 8).double().requires_grad_()) for _ in range(3)]
    params = list(model.parameters())
    leaves = [*params, *(x for _, x in batches)]

    def run(given: tuple[Tensor, Tensor]) -> Tensor:
        h = model["tied"](model["norm"](model["table"](given[0]) + given[1]).tanh())
        h = model["tied"](h.tanh() + h).unflatten(-1, (2, 4)).transpose(1, 2)
        return model["ring"](model["conv"](h).tanh()).square().sum()

    wanted = torch.autograd.grad([run(batch) for batch in batches], leaves)
    for name, layer in layers.items():
        model[name] = TwoStage.from_dense(layer)
    checks = []
    for joined in (False, True):
        for t in leaves:
            t.grad = None
        with deferred() as later:
            for batch in batches:
                run(batch).backward()
        early = sum(p.grad is not None for p in params)
        later.finish(joined=joined)
        found = [torch.zeros(1) if t.grad is None else t.grad for t in leaves]
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
        checks += [Check(early, 0, "==", "weight gradients after p1"), Check(worst, 1e-9, what=f"joined={joined}")]
    return checks


@claim(
    "the first stage takes no product for weights, and holds exactly the layers' inputs and output gradients",
    row=101,
    mutants={
        "weights in both": ("later.hold(op, ow", "op.weight(grad, x, ctx.shapes[1]), later.hold(op, ow"),
        "inputs nobody needs": ("if needs[0] else None", "if needs[0] else grad @ ctx.owners[0]"),
        "copies held": ("owners, x, grad, _version(x, grad)))", "owners, x, torch.cat([grad] * 2)[: len(grad)], 0))"),
    },
)
def stages_of_work(seed: int) -> list[Check]:
    """Operations of p1 and p2 for two layers of n x n, and bytes between them, with an input that needs no gradient."""
    rows, n, width = 4 + seed % 5, 8 + seed % 7, 4
    layers = [TwoStage.from_dense(nn.Linear(n, n)) for _ in range(2)]
    loss = layers[1](layers[0](torch.ones(rows, n)).tanh()).square().sum()
    with deferred() as later:
        first = operations(loss.backward)["total"]
    held, second = later.nbytes, operations(later.finish)["total"]
    return [
        Check(first, 2 * rows * n * n, "==", "operations of p1"),
        Check(second, 2 * 2 * rows * n * n, "==", "operations of p2"),
        Check(held, 2 * 2 * rows * n * width, "==", "bytes held"),
    ]


@claim(
    "the idle time of a 4-stage 1F1B pipeline is S (S - 1) (F + p1 + p2) unsplit and S (S - 1) (F + p1) with weight "
    "gradients last, and less where they fill waits; likewise for the other schedules",
    row=101,
    mutants={
        "not split": ("times[1][s] + (0 if split else times[2][s])", "times[1][s] + times[2][s]", "weft.ops.pipeline"),
        "late weights first": ("(not queues[s] or (split", "(True or (split", "weft.ops.pipeline"),
        "never filled": ('(split == "fill" and at > clock[s])', "False", "weft.ops.pipeline"),
        "backward before the next stage's": ('("B", s + 1, batch) if s + 1 < stages else', "", "weft.ops.pipeline"),
        "forwards one at a time": ("min(batches, stages - s)", "1", "weft.ops.pipeline"),
    },
)
def idle_time(seed: int) -> list[Check]:
    """Idle time for times that are multiples of 1/64, against the closed forms."""
    draw, checks = torch.Generator().manual_seed(seed), list[Check]()
    f, p1, p2 = ((torch.randint(16, 128, (3,), generator=draw)) / 64).tolist()
    for schedule, batches in (("naive", 1), ("gpipe", 4), ("1f1b", 4), ("1f1b", 8), ("1f1b", 5 + seed % 9)):
        whole, last, fill = (
            simulate(schedule, 4, batches, split=split, forward=f, inputs=p1, weights=p2)
            for split in (None, "last", "fill")
        )
        checks.append(Check(whole.idle, 12 * (f + p1 + p2), "==", f"{schedule} {batches}"))
        checks.append(Check(last.idle, 12 * (f + p1), "==", f"{schedule} {batches}, weights last"))
        if schedule == "1f1b":
            checks.append(Check(fill.idle, last.idle, "<", f"{schedule} {batches}, weights between"))
    return checks
