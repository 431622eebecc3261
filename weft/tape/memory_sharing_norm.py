"""Norm layers whose backward works from their output, which the linear layer after them keeps anyway.

LayerNorm gives z = (x - mean) r with r = 1 / sqrt(var + eps), RMSNorm z = x r with r = 1 / sqrt(mean(x^2) + eps); means
are over the normalised features. With dz the gradient of z,

    LayerNorm: dx = r (dz - mean(dz) - z mean(dz z)),    RMSNorm: dx = r (dz - z mean(dz z)),

so that z and one number a row suffice and x is not kept. A linear layer on z keeps z for the gradient of its weight:
the same tensor. An affine part y = gamma z + beta is between them. The paper moves it into the linear layers after it,

    W <- W diag(gamma),   b <- b + W beta,

once, before training, which `MemorySharingNorm.merge_` does: the function stays, gamma and beta are no parameters any
more. The paper leaves open what else can be done (a head that is tied to the embedding cannot be merged into). Here a
norm that keeps its affine part works from y, which the next layer keeps, by z = (y - beta) / gamma; features where that
would lose digits, |gamma| <= |beta| / 8 or next to 0, are kept apart as z.

Under autocast a linear layer keeps its own copy of z in the lower precision; the two share nothing then.

Paper: "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation", Yuchen Yang, Yingdong
Shi, Cheems Wang, Xiantong Zhen, Yuxuan Shi, Jun Xu, 2024, arXiv:2406.16282.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible, convert_
from weft.errors import Unsupported, UsageError
from weft.measure import kept_bytes
from weft.method import method
from weft.models.transformer import Block, CharTransformer
from weft.ops.shared_norm import SharedNorm
from weft.testing.example import Example


@method("memory-sharing-norm", contract="layer", family="tape", papers=[49], tags={"same-forward", "lean"})
class MemorySharingNorm(Convertible):
    """An ``nn.LayerNorm`` or ``nn.RMSNorm`` that keeps its output in place of its input.

    A transformer with the norms before its linear layers is converted as it is, or with the affine parts merged first,
    before the optimizer is made, as in the paper:

    >>> for block in model.blocks:  # doctest: +SKIP
    ...     MemorySharingNorm.merge_(block.norm1, block.qkv)
    ...     MemorySharingNorm.merge_(block.norm2, block.mlp[0])
    >>> weft.convert_(model, MemorySharingNorm)  # doctest: +SKIP

    Merged, it costs less time: without an affine part nothing has to be taken back out of y, and no device has to wait
    for the check of gamma.

    A layer after it that changes its output in place makes the backward pass raise; torch's own norms bear that.

    Args:
        layer: used, not copied.

    Raises:
        Unsupported: for other layers.
    """

    converts = (nn.LayerNorm, nn.RMSNorm)
    layer: nn.LayerNorm | nn.RMSNorm

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            raise Unsupported(
                f"{type(layer).__name__} does not normalise the last dimensions", "nn.LayerNorm, nn.RMSNorm"
            )
        self.layer = layer

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> MemorySharingNorm:
        """The layer with another backward pass, on the same parameters."""
        return cls(layer, **options)

    @staticmethod
    def merge_(norm: nn.Module, *linears: nn.Linear) -> None:
        """Move a norm's weight and bias into all the linear layers that read its output, in place, for good.

        Call it before the optimizer is made: parameters of the norm go, and a linear layer without a bias gets one if
        the norm has one. Whatever else reads the norm's output, or has the linear layer's weight, gets something else
        than before.

        Args:
            norm: of one dimension; without an affine part it stays as it is.
            linears: each reads the norm's output and nothing else.

        Raises:
            UsageError: for no linear layer, one given twice, or another number of features.
            Unsupported: for other layers.
        """
        if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            raise Unsupported(f"{type(norm).__name__} has no affine part to merge", "nn.LayerNorm, nn.RMSNorm")
        if not linears or len({id(w.weight) for w in linears if isinstance(w, nn.Linear)}) < len(linears):
            raise UsageError("merge_ takes the linear layers that read the norm's output, each weight once")
        size = math.prod(norm.normalized_shape)
        wrong = [w.in_features for w in linears if w.in_features != size]
        if wrong or len(norm.normalized_shape) != 1:
            raise UsageError(f"a norm over {tuple(norm.normalized_shape)} and linear layers of {wrong or size} inputs")
        gamma, beta = norm.weight, getattr(norm, "bias", None)
        with torch.no_grad():
            for linear in linears if gamma is not None else ():
                if beta is not None:
                    moved = linear.weight @ beta.to(linear.weight.dtype)
                    if linear.bias is None:
                        linear.bias = nn.Parameter(moved, requires_grad=linear.weight.requires_grad)
                    else:
                        linear.bias.add_(moved)
                linear.weight.mul_(gamma.to(linear.weight.dtype))
        norm.elementwise_affine = False
        for name in ("weight", "bias"):
            norm.register_parameter(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output, ``[..., *normalized_shape]``."""
        layer = self.layer
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return layer(x)
        centred = isinstance(layer, nn.LayerNorm)
        return SharedNorm.apply(x, weight, bias, tuple(layer.normalized_shape), layer.eps, centred)[0]


def example() -> Example:
    """A LayerNorm with an affine part that is nearly the identity, and rows for it."""
    generator, layer = torch.Generator().manual_seed(0), nn.LayerNorm(12)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return Example(layer, 1 + 2 * torch.randn(6, 12, generator=generator), torch.arange(6) % 2)


def _drawn(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module with weights from the generator; of every norm, three features have a weight at or next to zero."""
    with torch.no_grad():
        for part in module.modules():
            for p in part.parameters(recurse=False):
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.weight.add_(1)
                part.weight.view(-1)[:3] = torch.tensor([0.0, 1e-12, -1e-3])
    return module


@claim(
    "a norm and the linear layer after it keep one tensor of the input's size and a number a row; torch keeps two",
    row=49,
    mutants={
        "the input kept": ("y if keeps else None", "x if keeps else None", "weft.ops.shared_norm"),
        "a copy kept": ("y if keeps else None", "y.clone() if keeps else None", "weft.ops.shared_norm"),
        "every feature apart": ("bias.abs() / RATIO + small", "bias.abs() * RATIO + 1", "weft.ops.shared_norm"),
        "r for every feature": (
            "scale if ctx.needs_input_grad[0]",
            "scale[:, None] * y if ctx.needs_input_grad[0]",
            "weft.ops.shared_norm",
        ),
    },
)
def one_tensor(seed: int) -> list[Check]:
    """Bytes kept by the two, for both norms, with the affine part and after merging; and those of torch's own."""
    rows, size, checks = 16 + seed % 9, 32, []
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    for norm in (nn.LayerNorm, nn.RMSNorm):
        for merged in (False, True):
            plain = nn.Sequential(norm(size), nn.Linear(size, 8))
            if merged:
                MemorySharingNorm.merge_(*plain)
            mine = nn.Sequential(MemorySharingNorm.from_dense(plain[0]), plain[1])
            counts = [kept_bytes(functools.partial(model, x), model).peak_bytes for model in (mine, plain)]
            name = f"{norm.__name__}{', merged' if merged else ''}"
            checks.append(Check(counts[0], 4 * rows * size + 4 * rows, "==", f"bytes, {name}"))
            checks.append(Check(counts[1], 2 * 4 * rows * size, ">=", f"bytes of torch's {name}"))
    return checks


@claim(
    "gradients of input, weight and bias are those of the formula to 1e-9, where the weight is zero or next to it too",
    row=49,
    mutants={
        "not centred": ("if ctx.centred:", "if False:", "weft.ops.shared_norm"),
        "second term lost": ("keepdim=True), value=-1)", "keepdim=True), value=0)", "weft.ops.shared_norm"),
        "no r": ("dx.mul_(scale[:, None])", "dx", "weft.ops.shared_norm"),
        "bias left in": (
            "z if bias is None else z - bias",
            "z if bias is None else z - 0 * bias",
            "weft.ops.shared_norm",
        ),
        "weight left in": ("wide)) / gamma", "wide)) / gamma.sign()", "weft.ops.shared_norm"),
        "nothing apart": ("return columns if len(columns) else None", "return None", "weft.ops.shared_norm"),
        "apart without r": ("(picked * scale[:, None])", "picked", "weft.ops.shared_norm"),
        "gradient at y": ("g = g * gamma", "g = g * 1", "weft.ops.shared_norm"),
    },
)
def formula(seed: int) -> Check:
    """Largest error in float64 against autograd through the equations, of the largest entry of each gradient."""
    generator, errors = torch.Generator().manual_seed(seed), list[Tensor]()
    for norm, shape in ((nn.LayerNorm, (10,)), (nn.RMSNorm, (10,)), (nn.LayerNorm, (5, 4)), (nn.RMSNorm, (5, 4))):
        layer = _drawn(norm(shape), generator).double()
        assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        x = (1 + 2 * torch.randn(3, 4, *shape, generator=generator)).double().requires_grad_()
        g = torch.randn(x.shape, generator=generator).double()
        found = torch.autograd.grad(MemorySharingNorm.from_dense(layer)(x), [x, *layer.parameters()], g)
        over = tuple(range(2, x.ndim))
        centred = x - x.mean(over, keepdim=True) if norm is nn.LayerNorm else x
        eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
        y = layer.weight * centred / (centred.square().mean(over, keepdim=True) + eps).sqrt()
        y = y + layer.bias if isinstance(layer, nn.LayerNorm) else y
        wanted = torch.autograd.grad(y, [x, *layer.parameters()], g)
        errors += [(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return Check(float(torch.stack(errors).max()), 1e-9)


@claim(
    "a transformer keeps its outputs and gradients to 1e-9 when its norms are converted, and its outputs when their "
    "affine parts are merged into the linear layers first",
    row=49,
    mutants={
        "bias not moved": ("bias.add_(moved)", "bias.add_(0 * moved)"),
        "bias moved after the weight": ("moved = linear.weight @ beta", "moved = (linear.weight * gamma) @ beta"),
        "columns not scaled apart": ("weight.mul_(gamma.to", "weight.mul_(gamma.mean().to"),
        "affine part kept": ("norm.register_parameter(name, None)", "pass"),
        "not centred": ("if ctx.centred:", "if False:", "weft.ops.shared_norm"),
    },
)
def transformer(seed: int) -> list[Check]:
    """Largest relative errors in float64 on a transformer of two blocks, all norms before linear layers."""
    generator = torch.Generator().manual_seed(seed)
    model = _drawn(CharTransformer(11, width=12, heads=2, layers=2, context=8), generator).double()
    ids, labels = (torch.randint(11, (3, 8), generator=generator) for _ in range(2))

    def gradients(net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        out = net(ids)
        return out.detach(), list(torch.autograd.grad(F.cross_entropy(out.mT, labels), list(net.parameters())))

    def off(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    out, wanted = gradients(model)
    merged = copy.deepcopy(model)
    assert isinstance(merged, CharTransformer)
    for block in merged.blocks:
        assert isinstance(block, Block) and isinstance(block.mlp[0], nn.Linear)
        MemorySharingNorm.merge_(block.norm1, block.qkv)
        MemorySharingNorm.merge_(block.norm2, block.mlp[0])
    MemorySharingNorm.merge_(merged.norm, merged.head)
    for net in (model, merged):
        convert_(net, MemorySharingNorm)
    again, found = gradients(model)
    errors = max(off(a, b) for a, b in zip(found, wanted, strict=True))
    moved, others = gradients(merged)
    left = len(others) - len(wanted) + 2 * 5 - 1  # two parameters fewer for each norm, and a bias for the head
    return [
        Check(max(off(again, out), errors), 1e-9, what="converted"),
        Check(off(moved, out), 1e-9, what="merged"),
        Check(left, 0, "==", "parameters of norms left"),
    ]
