"""Keep one number for each sub-token of a linear layer's input: its projection on a fixed unit vector.

    x = (x_1 .. x_G) in R^D,   x_g in R^m,   z_g = <x_g, v>,   x~ = (z_1 v .. z_G v)
    dL/dW = dL/dy^T x~ = dL/dy^T z (I_G kron v^T)

Each token x is cut into G = D / m sub-tokens of length m, which share v with each other and all positions, |v| = 1.
The forward pass is not touched. Each block of m columns of the gradient is the exact one projected on v, hence of rank
one; as a projection it is never longer, and right where all sub-tokens are parallel to v. v is the normalised mean of
the sub-tokens of the first batch, and stays. As x~ is never formed, dL/dW costs 1/m of the ordinary products.

Paper: "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", Roy Miles, Pradyumna Reddy, Ismail Elezi,
Jiankang Deng, 2024, arXiv:2405.17991. The paper speaks of the length m, the authors' code of the number G, by default
32; "m = 32" in the one is 32 sub-tokens in the other. The code multiplies the gradient by 0.1 to 1.5, casts x to
float16 and takes the ordinary layer in eval mode; here the factor is an option, and dtypes and modes change nothing.
The authors convert the value and the down projections of a transformer. After a normalisation the mean is small, v
hardly better than a random vector, and the gradient keeps about 1/m of its energy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.session import kept
from weft.tape.linear import CompressedLinear, Gradient
from weft.testing.example import Example


def project(x: Tensor, v: Tensor) -> Tensor:
    """Coefficients z ``[N, D / m]`` of the sub-tokens of ``x [N, D]`` on ``v [m]``."""
    return x.reshape(len(x), x.shape[1] // len(v), len(v)) @ v


def projected_gradient(grad: Tensor, z: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """The weight's gradient ``[O, D]`` from dL/dy ``[N, O]`` and z ``[N, D / m]``: dL/dy^T x~, multiplied out."""
    return ((grad.mT @ z * scale).unsqueeze(2) * v.to(grad.dtype)).flatten(1)


def average_direction(x: Tensor, length: int, seed: int = 0) -> Tensor:
    """The normalised mean of the sub-tokens of ``x [N, D]``; where it is zero, a random direction.

    Zero for a batch that tells nothing: empty, zero or not finite.
    """
    mean = x.reshape(-1, length).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
    if not bool(torch.isfinite(mean).all()) or not bool(x.any()):
        return torch.zeros_like(mean)
    if not bool(mean.any()):
        mean = torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(mean)
    mean = mean / mean.abs().max()
    return mean / mean.norm()


@method("velora", contract="layer", family="tape", papers=[50], tags={"same-forward", "lean"})
class VeLoRA(CompressedLinear):
    """An ``nn.Linear`` that keeps one number of each sub-token of its input: ``length`` times less.

    With several processes, each has its own first batch: broadcast the buffer ``v`` (DistributedDataParallel does).

    Args:
        layer: the ordinary layer; its weight and bias are used, not copied.
        groups: sub-tokens of each token; it divides the input's features D.
        length: m, elements of a sub-token, in place of ``groups``; 1/m of the input is kept.
        scale: a factor on the weight's gradient.
        seed: of v, where the first batch has no mean.

    Raises:
        Unsupported: for other layers.
        UsageError: where the features cannot be cut so.
    """

    v: Tensor

    def __init__(
        self, layer: nn.Module, *, groups: int = 32, length: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(layer)
        features = self.in_features
        number = groups if length is None else length
        if number < 1 or features % number:
            given = f"groups={groups}" if length is None else f"length={length}"
            raise UsageError(
                f"{given} does not divide {features} features; give one that does, or leave this layer out"
            )
        self.length = features // groups if length is None else length
        self.scale, self.seed = float(scale), int(seed)
        self.register_buffer("v", self.weight.new_zeros(self.length))
        self._fitted = False
        self.register_load_state_dict_post_hook(_look_again)

    def extra_repr(self) -> str:
        """Sizes and the length of a sub-token."""
        return f"{super().extra_repr()}, length={self.length}"

    def keep(self, x: Tensor) -> tuple[Gradient, tuple[Tensor, ...]]:
        """z ``[N, D / m]``, and v, which is the layer's own."""
        if not self._fitted:
            if not bool(self.v.any()):
                self.v.copy_(average_direction(x, self.length, self.seed))
            self._fitted = bool(self.v.any())
        v = self.v if self._fitted else self.v.clone()  # what a graph holds may not change when v is found later
        return functools.partial(projected_gradient, scale=self.scale), (project(x, v.to(x.dtype)), v)


def _look_again(layer: VeLoRA, keys: object) -> None:
    layer._fitted = False


def example() -> Example:
    """Sub-tokens of four features, with a mean, on an input with two leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 5)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    x = 0.5 + torch.randn(6, 4, 16, generator=generator)
    return Example(layer, x, torch.arange(6) % 5, {"length": 4})


def _case(seed: int, dtype: torch.dtype, shape: tuple[int, ...] = (5, 7)) -> list[Any]:
    """A layer 64 -> 24, an input with a mean, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, 24, dtype=dtype)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return [layer, *(torch.randn(*shape, d, generator=generator, dtype=dtype) + 0.2 for d in (64, 24))]


def _run(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[list[Tensor], int]:
    """Output, gradients of input, weight and bias, and the bytes kept."""
    x = x.detach().requires_grad_()
    wanted = [x, layer.get_parameter("weight"), layer.get_parameter("bias")]
    with kept(layer) as count:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out, wanted, g)], count.peak_bytes


@claim(
    "VeLoRA keeps exactly 1/m of the input; the input's gradient is autograd's bit for bit, and the weight's is exact "
    "to 1e-5 when all sub-tokens are parallel to v.",
    row=50,
    budget=1.0,
    mutants={
        "not a unit vector": ("return mean / mean.norm()", "return 2 * mean / mean.norm()"),
        "another v in backward": ("* v.to(grad.dtype)).flatten(1)", "* v.flip(0).to(grad.dtype)).flatten(1)"),
        "v is kept anew by each pass": ("v = self.v if self._fitted else self.v.clone()", "v = self.v.clone()"),
        "another rounding of the input's gradient": (
            "else rows @ weight",
            "else (rows.double() @ weight.double()).to(rows.dtype)",
            "weft.tape.linear",
        ),
        "another output": (
            "    ) -> Tensor:\n        return F.linear(x, weight, bias)",
            "    ) -> Tensor:\n        return F.linear(x.bfloat16().to(x), weight, bias)",
            "weft.tape.linear",
        ),
    },
)
def exact_where_parallel(seed: int) -> list[Check]:
    """Largest bit differences over shapes, bytes kept, and the weight's gradient for sub-tokens a_g u."""
    off, most = 0, 0.0
    for shape in ((40,), (5, 7), (2, 3, 5)):
        dense, x, g = _case(seed, torch.float32, shape)
        layer = VeLoRA.from_dense(dense, length=16)
        (plain, plain_bytes), (mine, bytes_kept) = _run(dense, x, g), _run(layer, x, g)
        off += int((plain[0] != mine[0]).sum() + (plain[1] != mine[1]).sum())
        most = max(most, bytes_kept * 16 / plain_bytes)
    generator = torch.Generator().manual_seed(seed)
    u, a = (torch.randn(*s, generator=generator) for s in ((16,), (5, 7, 4, 1)))
    dense, _, g = _case(seed, torch.float32)
    parallel = ((a + 0.5) * u).flatten(2)
    exact, found = (_run(m, parallel, g)[0][2] for m in (dense, VeLoRA.from_dense(dense, length=16)))
    far = float((exact - found).norm() / exact.norm())
    return [
        Check(most, 1.0, "==", "kept, of 1/m of what autograd keeps"),
        Check(off, 0, "==", "bits of output and input's gradient"),
        Check(far, 1e-5, what="the weight's gradient"),
    ]


@claim(
    "Each block of m columns of the weight's gradient is autograd's, projected on the normalised mean of the first "
    "batch's sub-tokens; v then stays, and a loaded state brings it back.",
    budget=1.0,
    mutants={
        "a new v for each batch": ("self._fitted = bool(self.v.any())", "self.v.zero_()"),
        "the mean over positions alone": ("x.reshape(-1, length).mean(0", "x[:, :length].mean(0"),
        "sub-tokens across positions": ("return x.reshape(len(x), x", "return x.mT.reshape(len(x), x"),
        "a random direction": ("if not bool(mean.any()):", "if bool(mean.any()):"),
        "the state is not looked at": ("layer._fitted = False", "layer.v.zero_()"),
        "no scale": ("(grad.mT @ z * scale)", "(grad.mT @ z)"),
    },
)
def projected_on_first_mean(seed: int) -> Check:
    """Largest relative error over three batches, the last one through a layer that loads the state; float64."""
    dense, x, g = _case(seed, torch.float64)
    layer, other = (VeLoRA.from_dense(m, groups=8, scale=1.5) for m in (dense, _case(seed, torch.float64)[0]))
    v, worst = x.reshape(-1, 8).mean(0), 0.0
    onto = torch.block_diag(*[torch.outer(v, v) / v.square().sum()] * 8)
    for k in range(3):
        if k == 2:
            other.load_state_dict(layer.state_dict())
        (_, _, mine, by_bias), _ = _run(other if k == 2 else layer, x, g)
        (_, _, exact, bias_exact), _ = _run(dense, x, g)
        worst = max(worst, float((mine - 1.5 * exact @ onto).abs().max() / exact.abs().max()))
        worst = max(worst, float((by_bias - bias_exact).abs().max() / bias_exact.abs().max()))
        x = x.roll(1, 2) * 2 - 1
    return Check(worst, 1e-9)
