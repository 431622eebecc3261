"""The contract checks of tapes, conversions and functions can fail: each broken promise is caught by its check."""

import pytest

from weft.testing.conversion import conversion_checks
from weft.testing.function import function_checks
from weft.testing.tape import tape_checks

TAPE = '''
"""Half of each number's bits.

    y = half(x)
"""

import os
import threading

import torch

from weft.method import method
from weft.session import Kept, Tape
from weft.testing.example import Example, classification

HALF = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
LEFT = []


@method("broken-tape", contract="tape", family="broken", papers=[])
class Broken(Tape):
    """Half of each number's bits."""

    error = 0.05

    def takes(self, saved):
        return super().takes(saved) and saved.dtype in HALF

    def pack(self, tensor, saved):
        return Kept.of(tensor, tensor.to(HALF[tensor.dtype]))

    def unpack(self, kept):
        value = kept.tensors[0].to(kept.dtype)
        return value

    def bytes(self, shape, dtype):
        return shape.numel() * dtype.itemsize // 2


def example():
    return classification()
'''
LAYER = '''
"""A linear layer that keeps its input in half of the bits.

    y = w x
"""

import torch
from torch import nn
from torch.nn import functional as F

from weft.convert import Convertible
from weft.errors import Unsupported
from weft.method import method
from weft.testing.example import Example, classification


class Product(torch.autograd.Function):
    @staticmethod
    def forward(x, weight):
        return x @ weight.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight = inputs
        ctx.save_for_backward(x.bfloat16(), weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_weight = grad.T @ x.to(grad)
        return grad @ weight, of_weight


@method("broken-layer", contract="layer", family="broken", papers=[], tags={"same-forward", "lean"})
class Broken(Convertible):
    """The layer itself."""

    converts = (nn.Linear,)

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    @classmethod
    def from_dense(cls, layer):
        if not isinstance(layer, nn.Linear):
            raise Unsupported("it is not linear", "nn.Linear")
        return cls(layer)

    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            x, weight = x.bfloat16(), weight.bfloat16()
        out = Product.apply(x, weight)
        return out + self.bias.to(out.dtype)


def example():
    made = classification()
    return Example(made.model[0], made.x, made.y)
'''
FUNCTION = '''
"""A sum of squares in parts.

    y = sum x^2
"""

import torch
from torch import nn

from weft.errors import UsageError
from weft.method import method
from weft.testing.example import Example


@method("broken-function", contract="function", family="broken", papers=[], tags={"exact"})
def broken(x, layer, *, parts=2):
    """Softmax of a layer's output, by parts of the rows."""
    if parts < 1:
        raise UsageError(f"parts={parts}")
    out = torch.cat([layer(part).softmax(-1) for part in x.tensor_split(parts)])
    return out


class Plain(nn.Module):
    def forward(self, x, layer):
        return layer(x).softmax(-1)


def example():
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3)
    nn.init.normal_(layer.weight, generator=draw)
    nn.init.normal_(layer.bias, generator=draw)
    return Example(Plain(), (torch.randn(7, 4, generator=draw), layer), torch.zeros(7), {"parts": 3})
'''
TAKES, KEEP = (
    "return super().takes(saved) and saved.dtype in HALF",
    "return Kept.of(tensor, tensor.to(HALF[tensor.dtype]))",
)
GIVE, BYTES, ERROR = "        return value", "return shape.numel() * dtype.itemsize // 2", "    error = 0.05"
OUT, MADE = "return out + self.bias.to(out.dtype)", "        return cls(layer)"
MUL, STILL = "Product.apply(x, weight)", "return out + self.bias.detach().to(out.dtype)"
TAPES = {  # changes of the source, the check that fails, and what it says
    "another scale": ([(GIVE, "        return 2 * value")], "gradients", "what the tape promises"),
    "not finite": ([(GIVE, "        return value / 0")], "gradients", "not finite"),
    "packs nothing": ([(TAKES, "return False")], "gradients", "in fewer bytes"),
    "says it is exact": ([(ERROR, "    exact, error = True, 1.0")], "gradients", "not exact"),
    "a byte more": ([(BYTES, f"{BYTES} + 1")], "accounting", "bytes() says"),
    "other complex numbers": (
        [
            (TAKES, "return super().takes(saved) and saved.dtype in HALF or saved.dtype.is_complex"),
            (KEEP, "return Kept.of(tensor, tensor.to(HALF.get(tensor.dtype, tensor.dtype), copy=True))"),
            (GIVE, "        return 2 * value if value.is_complex() else value"),
        ],
        "left_alone",
        "",
    ),
    "kept twice": (
        [(KEEP, "half = tensor.to(HALF[tensor.dtype])\n        return Kept.of(tensor, half, half.clone())")],
        "shared",
        "kept twice",
    ),
    "the order in memory": (
        [(KEEP, KEEP.replace("tensor.to", "tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride()).to"))],
        "strides",
        "",
    ),
    "another the second time": (
        [
            (KEEP, "return Kept.of(tensor, tensor.to(HALF[tensor.dtype]), meta=[])"),
            (GIVE, "        kept.meta.append(1)\n        return value * (1 + 0.001 * len(kept.meta))"),
        ],
        "modes",
        "a second pass",
    ),
    "keeps the memory itself": (
        [
            (
                KEEP,
                "if tensor.shape == (96, 64):\n"
                "            return Kept.of(tensor, torch.from_numpy(tensor.numpy()))\n"
                f"        {KEEP}",
            )
        ],
        "in_place",
        "reached what was packed",
    ),
    "a file stays open": (
        [(ERROR, f"{ERROR}\n\n    def enter(self, hold):\n        LEFT.append(os.open(os.devnull, os.O_RDONLY))")],
        "nothing_left",
        "threads and files",
    ),
    "a thread stays": (
        [
            (
                ERROR,
                f"{ERROR}\n\n    def enter(self, hold):\n"
                "        threading.Thread(target=threading.Event().wait, daemon=True).start()",
            )
        ],
        "nothing_left",
        "threads and files",
    ),
    "the global generator": ([(KEEP, f"torch.rand(1)\n        {KEEP}")], "generator_untouched", "global generator"),
    "an unseeded draw": (
        [
            (
                GIVE,
                "        g = torch.Generator()\n        g.seed()\n        return value + torch.rand(1, generator=g)",
            )
        ],
        "generator_untouched",
        "same clock",
    ),
    "keeps more": (
        [(KEEP, "return Kept.of(tensor, *[tensor.clone() for _ in range(9)])"), ("kept.tensors[0]", "kept.tensors[8]")],
        "checkpointed",
        "",
    ),
    "no bfloat16": (
        [
            ("saved.dtype in HALF", "saved.dtype in (*HALF, torch.bfloat16)"),
            (KEEP, "return Kept.of(tensor, tensor.to(HALF.get(tensor.dtype, torch.float16)))"),
            (GIVE, "        return 0 * value if kept.dtype == torch.bfloat16 else value"),
        ],
        "autocast",
        "",
    ),
    "an error of its own": (
        [(ERROR, f"{ERROR}\n\n    def enter(self, hold):\n        raise RuntimeError('not today')")],
        "functional_transforms",
        "",
    ),
}
LAYERS = {
    "another dtype": ([(OUT, f"{OUT}.float()")], "dtypes", "another shape or dtype"),
    "another shape": ([(OUT, f"out = out[None]\n        {OUT}")], "dtypes", "another shape or dtype"),
    "not finite": ([(OUT, f"{OUT} + (1e6 * x.detach()).half().to(x.dtype).sum() * 0")], "dtypes", "not finite"),
    "no tangents": (
        [(MUL, "x @ weight.T"), (OUT, f"out = out if x.requires_grad else out.detach()\n        {STILL}")],
        "forward_mode",
        "the tangents are lost",
    ),
    "other tangents": ([(MUL, "(x if x.requires_grad else x.detach()) @ weight.T")], "forward_mode", "neither"),
    "the order in memory": (
        [
            (
                "        weight = self.weight",
                "        weight, x = self.weight, x.as_strided(x.shape, torch.empty(x.shape).stride())",
            )
        ],
        "strided",
        "",
    ),
    "a gradient of nothing": (
        [("x.to(grad)", "x.to(grad) if len(x) else weight * 0 + 1")],
        "empty",
        "batch without rows",
    ),
    "floats under autocast": (
        [(OUT, f"{OUT} if weight is self.weight else out.float()")],
        "autocast",
        "another shape or dtype",
    ),
    "another without gradients": (
        [(OUT, f"{OUT} * (1 if torch.is_grad_enabled() else 2)")],
        "no_gradients",
        "",
    ),
    "names no type": ([("converts = (nn.Linear,)", "converts = ()")], "converts_and_back", "converts does not name"),
    "goes back to another": (
        [(MADE, f"{MADE}\n\n    def to_dense(self):\n        return nn.Identity()")],
        "converts_and_back",
        "",
    ),
    "goes back to other weights": (
        [(MADE, f"{MADE}\n\n    def to_dense(self):\n        return nn.Linear(8, 12)")],
        "converts_and_back",
        "restored",
    ),
    "takes any width": ([(MUL, "Product.apply(x[..., : weight.shape[1]], weight)")], "wrong_shapes", "is taken"),
    "another from a file": (
        [
            (
                MADE,
                f"{MADE}\n\n    def __setstate__(self, state):\n        super().__setstate__(state)\n"
                "        self.weight.data *= 2",
            )
        ],
        "pickled",
        "another output",
    ),
    "another when compiled": (
        [(OUT, "return out + self.bias.to(out.dtype) * (2 if torch.compiler.is_compiling() else 1)")],
        "compiled",
        "another output",
    ),
    "keeps more": ([("x.bfloat16(), weight)", "x.double(), weight)")], "lean", "bytes are kept"),
}
LAST = "    return out"
FUNCTIONS = {
    "an unseeded draw": (
        [(LAST, "    g = torch.Generator()\n    g.seed()\n    return out * (1 + torch.rand((), generator=g))")],
        "repeatable",
        "a second call",
    ),
    "the global generator": ([(LAST, f"    torch.rand(1)\n{LAST}")], "repeatable", "global generator"),
    "no gradient": ([(LAST, f"{LAST}.detach()")], "repeatable", "no output depends"),
    "a hook": ([(LAST, f"    layer.register_forward_hook(print)\n{LAST}")], "repeatable", "a hook was left"),
    "any number of parts": ([("if parts < 1:", "if not parts:"), ("tensor_split(parts)", "tensor_split(abs(parts))")],
                            "unknown_options", "was not raised"),
    "another output": ([(LAST, f"{LAST} * 1.001")], "exact", "not those of the plain"),
    "another gradient": ([(LAST, "    return 2 * out - out.detach()")], "exact", "not those of the plain"),
}  # fmt: skip
KINDS = {
    "tape": (TAPE, tape_checks, TAPES),
    "layer": (LAYER, conversion_checks, LAYERS),
    "function": (FUNCTION, function_checks, FUNCTIONS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_broken_is_good(said_of, kind):
    source, checks, _ = KINDS[kind]
    said = said_of(source, checks)
    assert len(said) == {"tape": 12, "layer": 11, "function": 3}[kind] and not any(said.values()), said


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k, (_, _, breaks) in KINDS.items() for name in breaks])
def test_broken_promise_is_caught(said_of, kind, name):
    source, checks, breaks = KINDS[kind]
    changes, check, message = breaks[name]
    said = said_of(source, lambda card: [c for c in checks(card) if c[0] == check], *changes)
    assert said[check] is not None and said[check].startswith("AssertionError") and message in said[check], said[check]


def test_every_check_is_broken_once():
    """What is added to a contract needs a case here."""
    from weft.testing import conversion, function, tape

    assert {check.__name__ for check in tape.EVERY} == {check for _, check, _ in TAPES.values()}
    assert {check.__name__ for check in (*conversion.EVERY, conversion.lean)} == {c for _, c, _ in LAYERS.values()}
    assert {check.__name__ for check in (*function.EVERY, function.exact)} == {c for _, c, _ in FUNCTIONS.values()}
