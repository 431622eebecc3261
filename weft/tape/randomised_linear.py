"""Keep a random sketch of a linear layer's input along the batch: the weight's gradient is right in the mean.

    Z = S^T X,   S in R^{N x k} with E[S S^T] = I,   dL/dW ~ (S^T dL/dY)^T Z

X [N, D] are all rows of the input (batch times length), k = ratio N. S is drawn from a seed, block by block, and drawn
again in backward; it is never kept. Each forward pass has another seed. One draw of a Gaussian S is off by
sqrt((1 / alpha + 1) / k) of the gradient's length, alpha = |X^T dY|^2 / (|X|^2 |dY|^2): about sqrt(1 / ratio) for
inputs and gradients that have nothing to do with each other.

Paper: "Memory-Efficient Backpropagation through Large Linear Layers", Daniel Bershatsky, Aleksandr Mikhalev, Alexandr
Katrutsa, Julia Gusak, Daniil Merkulov, Ivan Oseledets, 2022, arXiv:2201.13195. In the authors' code S is Gaussian, of
random signs, or of random rows of a discrete cosine or Fourier transform; the last is left out, as complex numbers take
twice the bytes. The cosine transform follows random signs, without which data with a mean give several times the error.
That code scales cosine sketches by N k in place of N / k and, on CUDA, may draw one S for all layers and steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.method import method
from weft.session import kept
from weft.tape.linear import CompressedLinear, Gradient
from weft.testing.example import Example

KINDS = ("gaussian", "rademacher", "dct")
BLOCK = 1 << 20  # numbers of S that exist at a time


def sketch_blocks(n: int, k: int, kind: str, seed: int, device: torch.device) -> Iterator[Tensor]:
    """S ``[n, k]`` in float32, block by block of rows, the same for the same arguments; E[S S^T] = I.

    Each block of all but "dct" is drawn after the one before it. Devices draw different numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.randint(max(1, n), (k,), generator=generator, device=device) if kind == "dct" else None
    for first in range(0, n, max(1, BLOCK // k)):
        rows = min(max(1, BLOCK // k), n - first)
        if kind == "gaussian":
            yield torch.randn(rows, k, generator=generator, device=device) / math.sqrt(k)
            continue
        signs = torch.randint(2, (rows, 1 if chosen is not None else k), generator=generator, device=device)
        block = (2.0 * signs - 1) / math.sqrt(k)
        if chosen is not None:  # sqrt(n / k) of rows of the orthonormal transform, row 0 being constant
            place = torch.arange(first, first + rows, device=device)[:, None]
            angle = (2 * place + 1) * chosen % (4 * n)  # whole numbers: exact, however large n is
            block = block * torch.where(chosen == 0, 1.0, math.sqrt(2) * torch.cos(angle * (math.pi / (2 * n))))
        yield block


def sketch(t: Tensor, k: int, kind: str, seed: int) -> Tensor:
    """S^T t ``[k, F]`` of ``t [N, F]``, summed in float32 at least."""
    total = torch.zeros(k, t.shape[1], dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
    first = 0
    for block in sketch_blocks(len(t), k, kind, seed, t.device):
        total += block.to(t.dtype).mT @ t[first : first + len(block)]
        first += len(block)
    return total.to(t.dtype)


def sketched_gradient(grad: Tensor, z: Tensor, seed: Tensor, kind: str) -> Tensor:
    """The weight's gradient ``[O, D]`` from dL/dY ``[N, O]`` and Z ``[k, D]``."""
    return sketch(grad, len(z), kind, int(seed)).mT @ z


@method("randomised-linear", contract="layer", family="tape", papers=[356], tags={"same-forward", "lean"})
class RandomisedLinear(CompressedLinear):
    """An ``nn.Linear`` that keeps ``ratio`` as many rows as its input has, and a seed of 8 bytes.

    Forward passes are counted, and the count is in the state: a run that is resumed draws what it would have drawn.

    Args:
        layer: the ordinary layer; its weight and bias are used, not copied.
        ratio: k / N, rounded down to whole rows, at least one.
        kind: of S: ``"gaussian"``, ``"rademacher"`` or ``"dct"``.
        seed: of S. Layers with the same seed draw the same S, which leaves each gradient right in the mean.

    Raises:
        Unsupported: for other layers.
        UsageError: for another kind or a ratio outside (0, 1).
    """

    def __init__(self, layer: nn.Module, *, ratio: float = 0.25, kind: str = "gaussian", seed: int = 0) -> None:
        super().__init__(layer)
        if not 0 < ratio < 1:
            raise UsageError(f"ratio={ratio!r}; it is a fraction between 0 and 1")
        if kind not in KINDS:
            raise UsageError(f"kind={kind!r}; it is one of {', '.join(KINDS)}")
        self.ratio, self.kind, self.seed, self.passes = float(ratio), kind, int(seed), 0

    def extra_repr(self) -> str:
        """Sizes, ratio and kind."""
        return f"{super().extra_repr()}, ratio={self.ratio}, kind={self.kind!r}"

    def keep(self, x: Tensor) -> tuple[Gradient, tuple[Tensor, ...]]:
        """Z ``[k, D]`` and its seed: a tensor, so that a checkpoint keeps the two together."""
        self.passes += 1
        seed = hash((self.seed, self.passes)) % 2**63
        k = max(1, int(self.ratio * len(x)))
        return functools.partial(sketched_gradient, kind=self.kind), (sketch(x, k, self.kind, seed), torch.tensor(seed))

    def get_extra_state(self) -> Tensor:
        """How many forward passes there were."""
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes up the count of a saved state."""
        self.passes = int(state)


def example() -> Example:
    """A quarter of 24 rows, in two leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 5)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return Example(layer, torch.randn(6, 4, 16, generator=generator), torch.arange(6) % 5, {"ratio": 0.25})


def _case(seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer 32 -> 16, an input [4, 8, 32] and a gradient of its output."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(32, 16)
    for p in dense.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    x, g = (torch.randn(4, 8, d, generator=generator) for d in (32, 16))
    return dense, x, g


def _error_of_mean(layer: nn.Module, x: Tensor, g: Tensor, draws: int) -> float:
    """Relative error, in norm, of the mean of so many weight gradients."""
    weight = layer.get_parameter("weight")
    weight.grad = None
    for _ in range(draws):
        layer(x).backward(g)
    exact = g.flatten(0, 1).T @ x.flatten(0, 1)
    assert weight.grad is not None
    return float((weight.grad / draws - exact).norm() / exact.norm())


@claim(
    "Input gradients equal autograd's exactly, bytes kept are the sketch ratio of the full input (and a seed), and at "
    "ratio 1/4 the mean weight gradient of 5,000 sketches is within 5% of autograd's, with input and gradient random.",
    row=356,
    budget=5.0,
    mutants={
        "one sketch for all passes": ("seed = hash((self.seed, self.passes)) % 2**63", "seed = self.seed"),
        "another S in backward": ("kind, int(seed)).mT @ z", "kind, int(seed) + 1).mT @ z"),
        "entries of variance 1": ("device=device) / math.sqrt(k)", "device=device)"),
        "all rows kept": ("k = max(1, int(self.ratio * len(x)))", "k = len(x)"),
        "another rounding of the input's gradient": (
            "else rows @ weight",
            "else (rows.double() @ weight.double()).to(rows.dtype)",
            "weft.tape.linear",
        ),
    },
)
def mean_of_sketches(seed: int) -> list[Check]:
    """By theory the mean is off by sqrt((32 + 1) / (8 * 5,000)) = 2.9%."""
    dense, x, g = _case(seed)
    layer = RandomisedLinear.from_dense(dense, ratio=0.25, seed=seed)
    inputs = x.clone().requires_grad_()
    plain = dense(inputs)
    exact = torch.autograd.grad(plain, inputs, g)[0]
    with kept(layer) as count:
        out = layer(inputs)
        off = (torch.autograd.grad(out, inputs, g)[0] != exact).sum() + (out != plain).sum()
    return [
        Check(int(off), 0, "==", "bits of input's gradient and output"),
        Check(count.peak_bytes, x.numel() * 4 / 4 + 8, "==", "bytes kept"),
        Check(_error_of_mean(layer, x, g, 5000), 0.05, what="mean of 5,000 weight gradients"),
    ]


@claim(
    "Sketches by random signs and by random rows of a cosine transform are right in the mean, too.",
    row=356,
    budget=4.0,
    mutants={
        "signs that do not average out": ("(2.0 * signs - 1) / math", "(2.0 * signs - 0.5) / math"),
        "the cosine transform scaled by N k": ("math.sqrt(2) * torch.cos", "k * math.sqrt(2) * torch.cos"),
        "cosines at whole places": ("(2 * place + 1) * chosen", "2 * place * chosen"),
    },
)
def other_sketches(seed: int) -> list[Check]:
    """Relative error of the mean of 2,000; about 4.5% in theory."""
    dense, x, g = _case(seed)
    signs, cosines = (RandomisedLinear.from_dense(dense, kind=kind, seed=seed) for kind in ("rademacher", "dct"))
    return [
        Check(_error_of_mean(signs, x, g, 2000), 0.08, what="signs"),
        Check(_error_of_mean(cosines, x, g, 2000), 0.08, what="cosines"),
    ]


@claim(
    "Both passes have one S, in blocks and under a checkpoint too; the next pass has another, as a loaded state knows.",
    budget=3.0,
    mutants={
        "the seed is not kept with the sketch": (
            "functools.partial(sketched_gradient, kind=self.kind)",
            "lambda g, z, s: sketched_gradient(g, z, torch.tensor(seed), self.kind)",
        ),
        "blocks on the same rows": ("first += len(block)", "first += 0 * len(block)"),
        "the state has no count": ("self.passes = int(state)", "self.passes = 0"),
        "the same S in each pass": ("self.passes += 1", "self.passes += 0"),
    },
)
def one_sketch_in_both_passes(seed: int) -> list[Check]:
    """For identities as input and gradient, dL/dW is S S^T: symmetric, with ones on the diagonal for signs."""
    n = 1100
    eye, dense = torch.eye(n), nn.Linear(n, n, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        dense.weight.zero_()
    layer, other = (RandomisedLinear.from_dense(dense, ratio=0.9, kind="rademacher", seed=seed) for _ in range(2))

    def gram(layer: RandomisedLinear, recompute: bool) -> Tensor:
        out = checkpoint(layer, eye, use_reentrant=False) if recompute else layer(eye)
        return torch.autograd.grad(out, layer.weight, eye)[0]

    grams = [gram(layer, False), gram(layer, True)]
    other.load_state_dict(layer.state_dict())
    again = float((gram(other, False) - gram(layer, False)).abs().max())
    return [
        Check(max(float((s - s.T).abs().max()) for s in grams), 1e-5, what="asymmetry"),
        Check(max(float((s.diagonal() - 1).abs().max()) for s in grams), 1e-5, what="diagonal"),
        Check(float((grams[0] - grams[1]).abs().max()), 0.01, ">", "difference of two passes"),
        Check(again, 0.0, "==", "difference after loading"),
    ]
