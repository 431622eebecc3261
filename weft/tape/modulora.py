"""Train low-rank adapters over a weight that any quantiser holds; its matrix exists only while it is multiplied.

    y = x D(S)^T + b + s x A^T B^T,   s = alpha / r;      dx = g D(S) + s g B A,   dA = s (g B)^T x,   dB = s g^T x A^T

S is the quantiser's state of W [out, in], D its way back to a matrix: it is called in the forward pass, its result is
multiplied and dropped, and it is called again in the backward pass for dx (not at all where x needs no gradient).
Nothing is known of D but that it gives the same matrix twice. Only A [r, in] and B [out, r] get gradients; B starts at
zero, A as torch's linear layers do, both as in the authors' code, whose dropout in front of A is left to the model.

Any quantiser does; the paper takes OPTQ and, later, QuIP#. The default here rounds to nearest on an affine grid for
each group of weights, w ~ z + c (m - z) / (2^b - 1), c = 0 .. 2^b - 1, z and m the group's ends, b bits for each code.

Paper: "ModuLoRA: Finetuning 3-Bit LLMs on Consumer GPUs by Integrating with Modular Quantizers", Junjie Yin, Jiahao
Dong, Yingheng Wang, Christopher De Sa, Volodymyr Kuleshov, 2023, arXiv:2309.16119.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.method import method
from weft.ops.weight_quantisers import GroupQuantiser, Quantiser
from weft.testing.example import Example


class _Product(torch.autograd.Function):
    """x D^T (or x D, turned) for the matrix D that ``dense`` makes of tensors which are kept in D's place."""

    @staticmethod
    def forward(x: Tensor, dense: Callable[..., Tensor], turned: bool, *state: Tensor) -> Tensor:
        weight = dense(*state).to(x.dtype)
        return x @ weight if turned else F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dense, ctx.turned, *state = inputs
        ctx.save_for_backward(*state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state = ctx.saved_tensors
        return _Product.apply(grad, ctx.dense, not ctx.turned, *state), None, None, *[None] * len(state)


@method("modulora", contract="layer", family="tape", papers=[347])
class ModuLoRA(Convertible):
    """An ``nn.Linear`` whose weight a quantiser holds and whose adapters are trained.

    The state's tensors and the frozen bias are buffers, so that a state dict has them; the rest of a state is the
    layer's own and not in it: load into a layer that was made with the same quantiser. Floating tensors of a state
    follow ``module.to(dtype)``. `to_dense` adds the adapters to the dequantised weight: an ordinary layer, unquantised.

    Args:
        layer: is not changed; its weight is not kept.
        rank: r.
        alpha: the adapters' part is scaled by alpha / r.
        quantiser: see `Quantiser`; None for a `GroupQuantiser` of ``bits`` and ``group``.
        bits: 2, 3, 4 or 8 for each weight, for the default quantiser.
        group: weights that share a grid, for the default quantiser.
        seed: of A, which is the same for layers of one shape.

    Raises:
        Unsupported: for other layers.
        UsageError: for a rank below 1, or a quantiser that gives no tensors or a matrix of another shape.
    """

    converts = (nn.Linear,)
    rebuilds = True
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        quantiser: Quantiser | None = None,
        bits: int = 3,
        group: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if type(layer) is not nn.Linear:
            raise Unsupported(f"ModuLoRA stands in for nn.Linear, not for {type(layer).__name__}", "nn.Linear")
        if rank < 1 or not math.isfinite(alpha):
            raise UsageError(f"rank={rank!r}, alpha={alpha!r}; the rank is at least 1, alpha a number")
        self.quantiser = GroupQuantiser(bits, group) if quantiser is None else quantiser
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, alpha / rank
        weight = layer.weight.detach()
        state = dict(self.quantiser.quantise(weight))
        self.names = [name for name, value in state.items() if isinstance(value, Tensor)]
        if not self.names:
            raise UsageError(f"{type(self.quantiser).__name__}.quantise gave no tensors by name: {list(state)}")
        for name in self.names:
            self.register_buffer(f"state_{name}", state.pop(name).detach())
        self.rest = state
        if (shape := self._dense(*self._state()).shape) != weight.shape:
            raise UsageError(f"the quantiser gave {tuple(shape)} back; the weight is {tuple(weight.shape)}")
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        start = torch.rand(rank, self.in_features, generator=torch.Generator().manual_seed(seed))
        self.A = nn.Parameter(((2 * start - 1) * self.in_features**-0.5).to(weight))
        self.B = nn.Parameter(weight.new_zeros(self.out_features, rank))

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> ModuLoRA:
        """Adapters over the layer's weight, quantised now; the output is near the layer's and not the same."""
        return cls(layer, **options)

    def to_dense(self) -> nn.Linear:
        """An ordinary layer with weight D(S) + s B A."""
        with torch.no_grad():
            weight = self._dense(*self._state()).to(self.A.dtype) + self.scale * (self.B @ self.A)
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        kind = x.device.type
        cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        given = x.to(torch.get_autocast_dtype(kind)) if cast else x
        out = _Product.apply(given, self._dense, False, *self._state())
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out + self.scale * F.linear(F.linear(x, self.A), self.B)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.A)}"

    def _state(self) -> Sequence[Tensor]:
        return [self.get_buffer(f"state_{name}") for name in self.names]

    def _dense(self, *state: Tensor) -> Tensor:
        with torch.no_grad():
            return self.quantiser.dequantise({**self.rest, **dict(zip(self.names, state, strict=True))})


def example() -> Example:
    """A layer of 12 weights a row and inputs with two leading dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Linear(12, 7), torch.randn(5, 3, 12)
    return Example(layer, x, torch.arange(5) % 2, {"rank": 2, "group": 16})


@claim(
    "with a 3-bit quantiser that is a black box, gradients of A, B and the input are those of autograd through the "
    "explicitly dequantised weight, to 1e-9 in float64; the quantiser is asked once a pass, and between passes no "
    "full-precision weight is saved or alive",
    row=347,
    mutants={
        "weight kept": (
            "_Product.apply(given, self._dense, False, *",
            "(lambda *s: F.linear(given, self._dense(*s)))(*",
        ),
        "weight cached": ("ctx.save_for_backward(", "ctx.w = ctx.dense(*state); ctx.save_for_backward("),
        "weight not turned back": ("not ctx.turned, *state", "ctx.turned, *state"),
        "adapters not scaled": ("return out + self.scale * F.linear(", "return out + F.linear("),
        "scale without the rank": ("layer.out_features, alpha / rank", "layer.out_features, alpha"),
        "input reached by the adapters alone": ("given = x.to(", "given = x.detach() if not cast else x.to("),
        "bias lost": ("out = out + self.bias.to(out.dtype)", "out = out + 0 * self.bias.to(out.dtype)"),
    },
)
def explicit_weight(seed: int) -> list[Check]:
    """Largest relative error of output and gradients; calls of D; matrices that are saved, and that are alive."""
    torch.manual_seed(seed)
    size, rank, alpha = 24 + seed % 9, 2 + seed % 4, 6.5 + seed % 5
    alive: list[weakref.ref[Tensor]] = []

    class Rows:
        """Codes from -3 to 3 and a scale for each row."""

        def quantise(self, weight: Tensor) -> dict[str, Any]:
            scale = weight.abs().amax(1, keepdim=True) / 3
            return {"codes": (weight / scale).round().to(torch.int8), "scale": scale}

        def dequantise(self, state: Mapping[str, Any]) -> Tensor:
            made: Tensor = state["codes"] * state["scale"]
            alive.append(weakref.ref(made))
            return made

    dense = nn.Linear(size, size).double()
    layer = ModuLoRA.from_dense(dense, rank=rank, alpha=alpha, quantiser=Rows())
    nn.init.normal_(layer.B)
    scale = dense.weight.detach().abs().amax(1, keepdim=True) / 3
    explicit = (dense.weight.detach() / scale).round() * scale
    x, errors = torch.randn(2, 3, 5, size, dtype=torch.float64).requires_grad_()
    plain = x @ explicit.T + dense.bias.detach() + alpha / rank * (x @ layer.A.T @ layer.B.T)
    wanted = torch.autograd.grad(plain, [x, layer.A, layer.B], errors)
    alive.clear()
    large = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal large
        large += tensor.is_floating_point() and tensor.numel() == size * size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    gc.collect()
    living, forward = sum(ref() is not None for ref in alive), len(alive)
    found = torch.autograd.grad(out, [x, layer.A, layer.B], errors)
    backward = len(alive) - forward
    pairs = zip([out.detach(), *found], [plain.detach(), *wanted], strict=True)
    torch.autograd.grad(layer(x.detach()), [layer.A, layer.B], errors)
    return [
        Check(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs), 1e-9, what="gradients"),
        Check(large, 0, "==", "full-precision matrices saved"),
        Check(living, 0, "==", "full-precision matrices alive between the passes"),
        *(Check(n, 1, "==", "calls in a pass") for n in (forward, backward, len(alive) - forward - backward)),
    ]


@claim(
    "only the r (in + out) numbers of A and B are trained, and the merged layer gives the trained layer's outputs",
    row=347,
    mutants={
        "merged unscaled": ("+ self.scale * (self.B @ self.A)", "+ self.B @ self.A"),
        "adapters not merged": ("+ self.scale * (self.B @ self.A)", "+ 0 * (self.B @ self.A)"),
        "bias trained": ("layer.bias.detach().clone())", "layer.bias.detach())\n        self.extra = layer.bias"),
        "adapters start off": ("weight.new_zeros(self.out_features, rank)", "weight.new_ones(self.out_features, rank)"),
    },
)
def adapters_alone(seed: int) -> list[Check]:
    """Numbers that are trained; outputs before training against those of rank 1; the merged layer's after it."""
    torch.manual_seed(seed)
    size, out, rank = 16 + seed % 5, 10 + seed % 7, 1 + seed % 3
    dense = nn.Linear(size, out).double()
    x = torch.randn(9, size, dtype=torch.float64)
    layer = ModuLoRA.from_dense(dense, rank=rank, alpha=rank + 2.0, bits=4, group=32)
    plain = ModuLoRA.from_dense(dense, rank=1, alpha=0.0, bits=4, group=32)
    start = float((layer(x) - plain(x)).detach().abs().max())
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    moved = float((layer(x) - plain(x)).detach().abs().max())
    merged = float((layer.to_dense()(x) - layer(x)).detach().abs().max())
    return [
        Check(sum(p.numel() for p in layer.parameters() if p.requires_grad), rank * (size + out), "==", "trained"),
        Check(start, 1e-12, what="change before training"),
        Check(moved, 1e-6, ">", "change by training"),
        Check(merged, 1e-12, what="merged"),
    ]


@claim(
    "the default quantiser takes b bits a weight and 32 a group, and errs by half a step at most",
    mutants={
        "rounded down": (
            "/ step.where(step > 0, 1)).round()",
            "/ step.where(step > 0, 1)).floor()",
            "weft.ops.weight_quantisers",
        ),
        "a level short": (
            "low, (high - low) / (2**self.bits - 1)",
            "low, (high - low) / 2**self.bits",
            "weft.ops.weight_quantisers",
        ),
        "grid from zero": ("[groups.amin(1), groups", "[0 * groups.amin(1), groups", "weft.ops.weight_quantisers"),
        "the last group filled up with zeros": (
            "flat[-1:].expand(short)",
            "flat[-1:].expand(short) * 0",
            "weft.ops.weight_quantisers",
        ),
        "ends in full precision": ("], 1).bfloat16()", "], 1)", "weft.ops.weight_quantisers"),
    },
)
def group_grid(seed: int) -> list[Check]:
    """Errors against (m - z) / (2 (2^b - 1)) + 2^-8 max(|m|, |z|), the ends' rounding; and the state's bits."""
    generator, checks = torch.Generator().manual_seed(seed), []
    for bits in (2, 3, 4, 8):
        group = 32 * (1 + seed % 2)
        weight = 5 + torch.randn(7 + seed % 4, 61, generator=generator)  # the last group is not full
        quantiser = GroupQuantiser(bits, group)
        state = quantiser.quantise(weight)
        found, worst = quantiser.dequantise(state).double().flatten(), 0.0
        held = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor))
        for k, one in enumerate(weight.double().flatten().split(group)):
            low, high = one.min(), one.max()
            bound = (high - low) / (2 * (2**bits - 1)) + 2**-8 * torch.maximum(low.abs(), high.abs())
            worst = max(worst, float(((one - found[k * group :][: len(one)]).abs() / bound).max()))
        groups = -(-weight.numel() // group)
        checks.append(Check(worst, 1.0, what=f"error over its bound at {bits} bits"))
        checks.append(Check(held, -(-weight.numel() * bits // 8) + 4 * groups, "==", f"bytes at {bits} bits"))
    return checks
