"""Fine-tune the smallest weights of a trained layer alone: one short vector is trained, and has the optimizer's state.

    M = {i : |w_i| <= theta},   p = w[M],   W(p) = w with p at M,   dL/dp = (dL/dW)[M]
    L' = L + lambda ||P||_*,   P = 0 with p at M,   d||P||_* / dP = U V^T for P = U S V^T

The forward pass is the ordinary layer's on w, into which p is written after each step of the optimizer. On the way back
the gradient of W exists for as long as it takes to pick those of p. Half way, `SaRA.reselect` lets go of what has grown
beyond theta: it keeps its value, and the rest, of no effect so far, is trained on.

Paper: "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", Teng Hu,
Jiangning Zhang, Ran Yi, Hongrui Huang, Yabiao Wang, Lizhuang Ma, 2024, arXiv:2409.06633. The authors take one theta for
a whole model (0.002 for Stable Diffusion), which selects 10 to 20% of it, biases included, and lambda = 0.0005, applied
in each step to one matrix drawn from the model. Here biases are frozen, and lambda counts in every layer that has it,
at the cost of a singular value decomposition in each backward pass. As in the authors' code the norm is that of the
trained weights, which begin near zero, not of their change; the code also makes them positive first, this does not.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.ops.auxiliary import add_loss
from weft.ops.nuclear_norm import NuclearNorm
from weft.ops.token_layers import own_weights
from weft.session import kept
from weft.testing.example import Example


class _Merged(torch.autograd.Function):
    """The whole weight, in which the values at ``index`` stand already; the gradient goes to these alone."""

    @staticmethod
    def forward(compact: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.take(ctx.saved_tensors[0]), None, None

    @staticmethod
    def jvp(ctx: Any, by_compact: Tensor, *_: None) -> Tensor:
        index, size = ctx.saved_tensors[0], math.prod(ctx.shape)
        return by_compact.new_zeros(size).index_put((index,), by_compact).view(ctx.shape)


@method("sara", contract="layer", family="sparsity", papers=[166], tags={"same-forward"})
class SaRA(Convertible):
    """An ``nn.Linear`` or ``nn.Conv2d`` whose smallest weights are trained, as the parameter ``compact``.

    ``weight`` and bias are frozen for as long as the layer stands in. Build the optimizer after the layer is swapped,
    and anew after `reselect`. A step is written into the weight by the next forward pass, by ``state_dict`` and by
    ``restore_``; to read the weight in between, call `merge`. Weight decay acts on the trained weights alone.

    Args:
        layer: the ordinary layer; its weight and bias are used, not copied.
        fraction: of this layer's weights, the smallest.
        threshold: theta, in place of the fraction; as many weights as are not larger.
        nuclear: lambda.

    Raises:
        Unsupported: for other layers, and a weight that another `SaRA` trains.
        UsageError: for a fraction outside of (0, 1] or a threshold that no weight is below.
    """

    converts = (nn.Linear, nn.Conv2d)
    _training: ClassVar = weakref.WeakValueDictionary[int, "SaRA"]()  # by the id of the weight, which the layer holds
    weight: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor
    threshold: Tensor
    _layer: Any

    def __init__(
        self, layer: Any, *, fraction: float = 0.1, threshold: float | None = None, nuclear: float = 0.0
    ) -> None:
        super().__init__()
        if type(layer) not in self.converts:
            raise Unsupported(f"{type(layer).__name__} is fine-tuned as it is", "an nn.Linear or nn.Conv2d")
        own_weights(layer)
        if id(layer.weight) in self._training:
            raise Unsupported("another SaRA trains the same weight", "where=, for one of the layers that share it")
        if not 0 < fraction <= 1:
            raise UsageError(f"fraction={fraction!r}; give one above 0, at most 1")
        vars(self)["_layer"] = layer  # not a module of this one: weight and bias are its own under their names
        self.weight, self.nuclear = layer.weight, float(nuclear)
        self.register_parameter("bias", layer.bias)
        self._trained = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        size = layer.weight.detach().abs().flatten()
        if threshold is None:
            found = size.topk(max(1, round(fraction * len(size))), largest=False).indices.sort().values
        elif not len(found := (size <= threshold).nonzero().squeeze(1)):
            raise UsageError(f"threshold={threshold!r}: the smallest of {len(size)} weights is {float(size.min()):.3g}")
        self.register_buffer("index", found)
        self.register_buffer("threshold", size[found].max() if threshold is None else size.new_tensor(threshold))
        self.compact = nn.Parameter(layer.weight.detach().take(found), layer.weight.requires_grad)
        for p in self._trained:
            p.requires_grad_(False)
        self._training[id(self.weight)] = self
        self.register_state_dict_pre_hook(_merge)
        self.register_load_state_dict_pre_hook(_resize)

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer that trains its smallest weights."""
        return cls(layer, **options)

    def to_dense(self) -> None:
        """Merges, and unfreezes weight and bias, which the ordinary layer has too."""
        self.merge()
        self._training.pop(id(self.weight), None)
        for p in self._trained:
            p.requires_grad_(True)

    def extra_repr(self) -> str:
        """The ordinary layer's sizes, and how many weights are trained."""
        return f"{self._layer.extra_repr()}, trained={len(self.compact)} of {self.weight.numel()}"

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the trained values into the weight, where they are not there yet."""
        if not torch.equal(self.weight.take(self.index), self.compact):  # fused steps do not count as versions
            self.weight.put_(self.index, self.compact)

    @torch.no_grad()
    def reselect(self) -> int:
        """Half way: how many are still at most ``threshold`` and trained on, in a new `compact`; the rest stay."""
        self.merge()
        small = self.compact.abs() <= self.threshold
        self.index, trained = self.index[small], self.compact.requires_grad
        self.compact = nn.Parameter(self.compact[small], trained)
        return len(self.compact)

    def forward(self, x: Tensor) -> Tensor:
        """As the ordinary layer's, with the trained values in place."""
        if torch.compiler.is_compiling():  # no control flow by data
            weight = torch.put(self.weight, self.index, self.compact)
        else:
            self.merge()
            weight = _Merged.apply(self.compact, self.weight, self.index)
        if self.nuclear and len(self.compact):
            weight = add_loss(weight, NuclearNorm.apply(self.compact, self.index, self.weight.shape, self.nuclear))
        if type(self._layer) is nn.Linear:
            return F.linear(x, weight, self.bias)
        given = {"weight": weight} if self.bias is None else {"weight": weight, "bias": self.bias}
        out: Tensor = torch.func.functional_call(self._layer, given, (x,))
        return out


def _merge(layer: SaRA, *given: object) -> None:
    layer.merge()


def _resize(layer: SaRA, state: dict[str, Tensor], prefix: str, *given: object) -> None:
    """A state saved after `reselect` has fewer values."""
    if (found := state.get(f"{prefix}compact")) is not None and found.shape != layer.compact.shape:
        layer.compact = nn.Parameter(layer.compact.new_empty(found.shape), layer.compact.requires_grad)
        layer.index = layer.index.new_empty(found.shape)


def example() -> Example:
    """A tenth of 80 weights, on an input with two leading dimensions."""
    layer, generator = nn.Linear(16, 5), torch.Generator().manual_seed(0)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return Example(layer, torch.randn(6, 4, 16, generator=generator), torch.arange(6) % 5)


def _case(seed: int) -> tuple[Any, Tensor, Tensor]:
    """A convolution of 360 and a linear layer of 1,280 weights, images and classes; float64."""
    draw = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(4, 10, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(160, 8))
    for p in net.double().parameters():
        nn.init.normal_(p, std=0.2, generator=draw)
    return net, torch.randn(12, 4, 8, 8, generator=draw, dtype=torch.float64), torch.randint(8, (12,), generator=draw)


@claim(
    "With 10% of entries selected, retained gradient plus Adam state take 10% of full fine-tuning's bytes (index "
    "excluded) and updated weights equal masked full-gradient Adam to 1e-6, without weight decay; the forward pass "
    "keeps what the ordinary layers' keeps",
    row=166,
    mutants={
        "the largest": ("largest=False", "largest=True"),
        "one too many": ("max(1, round(fraction * len(size)))", "max(1, round(fraction * len(size)) + 1)"),
        "another place's gradient": ("grad.take(ctx.saved_tensors[0])", "grad.take(ctx.saved_tensors[0].flip(0))"),
        "steps not written": ("self.weight.put_(self.index, self.compact)", "None"),
        "written elsewhere": ("self.weight.put_(self.index,", "self.weight.put_(self.index.flip(0),"),
        "biases trained": ("for p in (layer.weight, layer.bias) if", "for p in (layer.weight,) if"),
        "a copy is kept": ("return weight.detach()", "return weight.clone()"),
    },
)
def masked_adam(seed: int) -> list[Check]:
    """Ten steps of Adam, and the same by its equations on gradients times a mask; the mask by sorting."""
    (plain, x, y), mine = _case(seed), _case(seed)[0]
    mine[0], mine[4] = (SaRA.from_dense(mine[k], fraction=0.1) for k in (0, 4))
    with kept(plain) as ours:
        plain(x)
    with kept(mine) as theirs:
        mine(x)
    full = [plain[0].weight, plain[4].weight]
    masks = [(p.abs() <= p.abs().flatten().sort().values[p.numel() // 10 - 1]).double() for p in full]
    m, v = [torch.zeros_like(p) for p in full], [torch.zeros_like(p) for p in full]
    adam = torch.optim.Adam([p for p in mine.parameters() if p.requires_grad], lr=0.02)
    for t in range(1, 11):
        adam.zero_grad()
        F.cross_entropy(mine(x), y).backward()
        adam.step()
        grads = torch.autograd.grad(F.cross_entropy(plain(x), y), full)
        with torch.no_grad():
            for k, (p, mask) in enumerate(zip(full, masks, strict=True)):
                m[k], v[k] = 0.9 * m[k] + 0.1 * grads[k] * mask, 0.999 * v[k] + 0.001 * (grads[k] * mask) ** 2
                p -= 0.02 * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-8)
    slots: list[Any] = [t for p, s in adam.state.items() for t in (p.grad, s["exp_avg"], s["exp_avg_sq"])]
    for k in (0, 4):
        mine[k].to_dense()
    found = [mine[0].weight, mine[0].bias, mine[4].weight, mine[4].bias]
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(found, plain.parameters(), strict=True))
    return [
        Check(sum(t.nbytes for t in slots), 3 * sum(p.nbytes for p in full) // 10, "==", "bytes"),
        Check(worst, 1e-6, what="weights and biases"),
        Check(theirs.peak_bytes, ours.peak_bytes, "==", "bytes kept by the forward pass"),
    ]


@claim(
    "The penalty's gradient is that of lambda times the nuclear norm of the trained weights' matrix, and re-selection "
    "trains on exactly those that are still at most theta, with every weight as it was",
    mutants={
        "all weights' norm": ("torch.zeros(shape, dtype=kind", "torch.ones(shape, dtype=kind", "weft.ops.nuclear_norm"),
        "no lambda": ("grad * ctx.weight * nuclear", "grad * nuclear", "weft.ops.nuclear_norm"),
        "one factor": ("((u * rank) @ v).take", "u.flatten()[:1].expand(shape.numel()).take", "weft.ops.nuclear_norm"),
        "a squared norm": ("((u * rank) @ v)", "((u * s) @ v)", "weft.ops.nuclear_norm"),
        "those that grew": ("self.compact.abs() <= self.threshold", "self.compact.abs() > self.threshold"),
        "all of them": ("self.compact.abs() <= self.threshold", "self.compact.abs() >= 0"),
        "what grew is undone": ("        self.merge()\n        small", "        small"),
    },
)
def penalty_and_reselection(seed: int) -> list[Check]:
    """Against torch's derivative of its own norm; counts and differences."""
    net, x, y = _case(seed)
    net[0], net[4] = (SaRA.from_dense(net[k], fraction=0.2, nuclear=0.3) for k in (0, 4))
    layers: list[SaRA] = [net[0], net[4]]
    found, worst = torch.autograd.grad(F.cross_entropy(net(x), y), [layer.compact for layer in layers]), 0.0
    weights = [layer.weight.detach().requires_grad_() for layer in layers]
    bare = torch.func.functional_call(_case(seed)[0], {"0.weight": weights[0], "4.weight": weights[1]}, (x,))
    exact = torch.autograd.grad(F.cross_entropy(bare, y), weights)
    for w, g, by in zip(weights, found, exact, strict=True):
        small = w.abs() <= w.detach().abs().flatten().sort().values[round(0.2 * w.numel()) - 1]
        norm = torch.autograd.grad(torch.linalg.matrix_norm((w * small).flatten(1), "nuc"), w)[0]
        worst = max(worst, (g - (by + 0.3 * norm)[small]).abs().max().item())
    layer, limit = layers[1], layers[1].compact.abs().max().item()
    with torch.no_grad():
        layer.compact.add_(2 * limit * (torch.arange(len(layer.compact)) % 3 == 0))
        before, stay = copy.deepcopy(net)(x), int((layer.compact.abs() <= limit).sum())
    count = layer.reselect()
    other = _case(seed + 1)[0]
    other[0], other[4] = (SaRA.from_dense(other[k], fraction=0.2) for k in (0, 4))
    other.load_state_dict(net.state_dict())
    off = [(m(x) - before).abs().max().item() for m in (net, other)]
    return [
        Check(worst, 1e-9, what="gradients"),
        Check(count, stay, "==", "weights trained on"),
        Check(max(off), 1e-12, what="outputs after re-selection, and in a layer that loads the state"),
    ]
