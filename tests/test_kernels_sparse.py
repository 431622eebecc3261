"""The loops of sparse products agree with references and dense products, whatever the shape and the threads."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from weft.errors import UsageError
from weft.kernels import sparse

HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def starts_of(counts):
    return F.pad(counts.cumsum(0), (1, 0)).int()


def index_of(mask):
    """The CSR index of a matrix, that of its transpose, and the order of the values there."""
    rows, columns = mask.nonzero(as_tuple=True)
    order = (columns * len(mask) + rows).argsort()
    turned = starts_of(mask.sum(0)), rows[order].int(), order.int()
    return (starts_of(mask.sum(1)), columns.int()), turned


def linear_case(outputs, inputs, batch, density, seed=0, dtype=torch.float32):
    mask = draw(seed + 1, outputs, inputs).sigmoid() < density
    weight = draw(seed, outputs, inputs) * mask
    x, grad, bias = draw(seed + 2, batch, inputs), draw(seed + 3, batch, outputs), draw(seed + 4, outputs)
    (starts, columns), turned = index_of(mask)
    given = [t.to(dtype) for t in (x, grad, bias, weight[mask], weight)]
    return given, mask, (starts, columns), turned


def near(found, wanted, tolerance=2e-6):
    assert found.shape == wanted.shape
    if wanted.numel():
        assert (found - wanted).abs().max() <= tolerance * max(1e-30, float(wanted.abs().max()))


@given(
    outputs=st.integers(0, 70),
    inputs=st.integers(0, 70),
    batch=st.sampled_from([0, 1, 2, 15, 16, 17, 32, 33, 64, 65, 100, 129, 200]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
    native=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_linear_products_are_those_of_the_dense_matrix(outputs, inputs, batch, density, seed, native):
    (x, grad, bias, values, weight), mask, index, turned = linear_case(outputs, inputs, batch, density, seed)
    if not native:
        x, grad, bias, values, weight = (t.double() for t in (x, grad, bias, values, weight))
    X, G, W, B = (t.double() for t in (x, grad, weight, bias))
    near(sparse.sparse_linear(x, values, bias, *index), (X @ W.T + B).to(x.dtype))
    near(sparse.sparse_linear(x, values, None, *index), (X @ W.T).to(x.dtype))
    for flags in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        found = sparse.sparse_linear_backward(grad, x, values, *index, *turned, *flags)
        wanted = G @ W, (G.T @ X)[mask], G.sum(0)
        for part, whole, flag in zip(found, wanted, flags, strict=True):
            near(part, whole.to(x.dtype) if flag else x.new_empty(0))


CONVS = [
    {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "size": (6, 7)},
    {"kernel": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "size": (9, 8)},
    {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "size": (1, 1)},
    {"kernel": (5, 3), "stride": (2, 3), "padding": (2, 3), "dilation": (1, 1), "size": (11, 12)},
    {"kernel": (2, 3), "stride": (3, 3), "padding": (1, 1), "dilation": (2, 2), "size": (4, 16)},
]


def conv_case(case, outputs, inputs, batch, density, seed=0):
    how = [list(case[name]) for name in ("kernel", "stride", "padding", "dilation")]
    mask = draw(seed + 1, outputs, inputs, *case["kernel"]).sigmoid() < density
    weight = draw(seed, *mask.shape) * mask
    x, bias = draw(seed + 2, batch, inputs, *case["size"]), draw(seed + 4, outputs)
    return x, weight, bias, mask, (starts_of(mask.flatten(1).sum(1)), mask.flatten(1).nonzero()[:, 1].int()), how


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CONVS, ids=lambda case: "-".join(map(str, case["kernel"])))
def test_convolutions_are_the_dense_ones(case, dtype):
    for outputs, inputs, batch, density in (
        (1, 1, 1, 1.0),
        (4, 3, 5, 0.3),
        (5, 2, 16, 0.0),
        (3, 6, 33, 0.2),
        (2, 2, 0, 1),
    ):
        x, weight, bias, mask, index, how = conv_case(case, outputs, inputs, batch, density)
        X, W, B = (t.double().requires_grad_() for t in (x, weight, bias))
        y = F.conv2d(X, W, B, *how[1:])
        grad = draw(9, *y.shape)
        by_x, by_weight, by_bias = torch.autograd.grad(y, (X, W, B), grad.double())
        x, values, bias, grad = (t.to(dtype) for t in (x, weight[mask], bias, grad))
        near(sparse.sparse_conv2d(x, values, bias, *index, *how), y.detach().to(dtype))
        found = sparse.sparse_conv2d_backward(grad, x, values, *index, *how, True, True, True)
        for part, whole in zip(found, (by_x, by_weight[mask], by_bias), strict=True):
            near(part, whole.to(dtype), 3e-6)
        one = sparse.sparse_conv2d_backward(grad, x, values, *index, *how, True, False, False)
        assert torch.equal(one[0], found[0]) and one[1].numel() == one[2].numel() == 0
        other = sparse.sparse_conv2d_backward(grad, x, values, *index, *how, False, True, True)
        assert other[0].numel() == 0 and torch.equal(other[1], found[1])


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_computed_in_float32(dtype):
    (x, grad, bias, values, weight), mask, index, turned = linear_case(40, 30, 70, 0.3, dtype=dtype)
    X, G, W, B = (t.double() for t in (x, grad, weight, bias))
    y = sparse.sparse_linear(x, values, bias, *index)
    assert y.dtype == dtype
    near(y.double(), X @ W.T + B, HALF[dtype])
    reference = sparse.sparse_linear_reference(x, values, bias, *index)
    assert reference.dtype == dtype
    near(reference.double(), X @ W.T + B, HALF[dtype])
    found = sparse.sparse_linear_backward(grad, x, values, *index, *turned, True, True, True)
    for part, whole in zip(found, (G @ W, (G.T @ X)[mask], G.sum(0)), strict=True):
        assert part.dtype == dtype
        near(part.double(), whole, HALF[dtype])


def test_strides_are_no_matter():
    (x, grad, bias, values, weight), _, index, turned = linear_case(40, 30, 70, 0.3)
    wide = [torch.stack([t, t + 1], -1)[..., 0] for t in (x, grad)]
    assert torch.equal(
        sparse.sparse_linear(wide[0], values, bias, *index), sparse.sparse_linear(x, values, bias, *index)
    )
    flags = True, True, True
    for a, b in zip(
        sparse.sparse_linear_backward(wide[1], wide[0], values, *index, *turned, *flags),
        sparse.sparse_linear_backward(grad, x, values, *index, *turned, *flags),
        strict=True,
    ):
        assert torch.equal(a, b)
    image, weight, bias, mask, index, how = conv_case(CONVS[0], 4, 3, 5, 0.5)
    last = image.contiguous(memory_format=torch.channels_last)
    args = weight[mask], bias, *index, *how
    assert torch.equal(sparse.sparse_conv2d(last, *args), sparse.sparse_conv2d(image, *args))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_parts_of_a_batch_have_several_tiles():
    (x, grad, _, values, weight), mask, index, turned = linear_case(12, 9, 1500, 0.4)
    found = sparse.sparse_linear_backward(grad, x, values, *index, *turned, True, True, True)
    X, G, W = (t.double() for t in (x, grad, weight))
    for part, whole in zip(found, (G @ W, (G.T @ X)[mask], G.sum(0)), strict=True):
        near(part, whole.float(), 1e-5)


def test_every_number_of_threads_gives_the_same_bits(threads):
    (x, grad, bias, values, weight), _, index, turned = linear_case(300, 400, 700, 0.2)
    image, weight, _, mask, places, how = conv_case(CONVS[0], 16, 16, 200, 0.5)
    errors = draw(5, 200, 16, *image.shape[2:])
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(
            [
                sparse.sparse_linear(x, values, bias, *index),
                *sparse.sparse_linear_backward(grad, x, values, *index, *turned, True, True, True),
                sparse.sparse_conv2d(image, weight[mask], None, *places, *how),
                *sparse.sparse_conv2d_backward(errors, image, weight[mask], *places, *how, True, True, True),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class Multiplications(TorchDispatchMode):
    """Elements that the plain-torch references multiply."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mul and out.is_floating_point():
            self.count += out.numel()
        assert func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.convolution)
        return out


def test_the_operators_declare_what_their_references_multiply():
    (x, grad, bias, values, _), _, index, turned = linear_case(40, 30, 70, 0.3)
    image, weight, _, mask, places, how = conv_case(CONVS[1], 4, 3, 5, 0.5)
    errors = torch.zeros_like(F.conv2d(image, weight, None, *how[1:]))
    calls = [
        ("sparse_linear", (x, values, bias, *index)),
        ("sparse_linear_backward", (grad, x, values, *index, *turned, True, True, True)),
        ("sparse_linear_backward", (grad, x, values, *index, *turned, False, True, False)),
        ("sparse_conv2d", (image, weight[mask], None, *places, *how)),
        ("sparse_conv2d_backward", (errors, image, weight[mask], *places, *how, True, True, False)),
    ]
    for name, args in calls:
        with FlopCounterMode(display=False) as declared:
            getattr(sparse, name)(*args)
        with Multiplications() as made:
            getattr(sparse, f"{name}_reference")(*args)
        assert declared.get_total_flops() == 2 * made.count > 0


def test_absent_weights_are_not_multiplied():
    """Zero times infinity is not a number: it stays where a weight is stored."""
    (_, _, bias, values, _), mask, index, turned = linear_case(20, 24, 24, 0.2)
    x = torch.eye(24).masked_fill(torch.eye(24).bool(), torch.inf)
    y = sparse.sparse_linear(x, values, bias, *index)
    assert torch.equal(y.isinf(), mask.T) and torch.equal(y.isfinite(), ~mask.T)
    grad = torch.eye(20).masked_fill(torch.eye(20).bool(), torch.inf)
    found = sparse.sparse_linear_backward(grad, torch.ones(20, 24), values, *index, *turned, True, False, False)[0]
    assert torch.equal(found.isinf(), mask) and torch.equal(found.isfinite(), ~mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_accepts_the_operators():
    (x, grad, bias, values, _), _, index, turned = linear_case(40, 30, 70, 0.3)
    image, weight, bias2, mask, places, how = conv_case(CONVS[1], 4, 3, 5, 0.5)
    errors = torch.zeros_like(F.conv2d(image, weight, None, *how[1:]))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, args in (
        (sparse.sparse_linear, (x, values, bias, *index)),
        (sparse.sparse_linear, (x.double(), values.double(), None, *index)),
        (sparse.sparse_linear_backward, (grad, x, values, *index, *turned, True, True, True)),
        (sparse.sparse_linear_backward, (grad, x, values, *index, *turned, False, True, False)),
        (sparse.sparse_conv2d, (image, weight[mask], bias2, *places, *how)),
        (sparse.sparse_conv2d_backward, (errors, image, weight[mask], *places, *how, True, True, True)),
        (
            sparse.sparse_conv2d_backward,
            (errors.double(), image.double(), weight[mask].double(), *places, *how, False, True, False),
        ),
    ):
        torch.library.opcheck(op, args, test_utils=checks)


def test_an_index_that_does_not_fit_is_an_error():
    (x, grad, bias, values, _), _, index, turned = linear_case(40, 30, 70, 0.3)
    with pytest.raises(UsageError, match="the rows end at"):
        sparse.sparse_linear(x, values[1:], bias, *index)
    with pytest.raises(UsageError, match="a gradient \\[70, 39\\] of an output \\[70, 40\\]"):
        sparse.sparse_linear_backward(grad[:, 1:], x, values, *index, *turned, True, True, True)
    starts, rows, order = turned
    for wrong in ((starts[1:], rows, order), (starts, rows, order[1:])):
        with pytest.raises(UsageError, match=r"give D \+ 1"):
            sparse.sparse_linear_backward(grad, x, values, *index, *wrong, True, True, True)


def test_the_default_dtype_is_of_no_account():
    (x, grad, bias, values, _), _, index, turned = linear_case(40, 30, 70, 0.3)

    def results():
        backward = sparse.sparse_linear_backward(grad, x, values, *index, *turned, True, True, True)
        return sparse.sparse_linear(x, values, bias, *index), sparse.sparse_linear(x, values, None, *index), *backward

    wanted = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


def test_numba_is_loaded_at_the_first_use():
    code = (
        "import sys, torch; from weft.kernels import sparse; assert 'numba' not in sys.modules\n"
        "one = torch.ones(1, dtype=torch.int32); index = torch.tensor([0, 1], dtype=torch.int32), one - 1\n"
        "assert sparse.sparse_linear(torch.ones(2, 1), torch.ones(1), None, *index).tolist() == [[1], [1]]\n"
        "assert 'numba' in sys.modules"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert made.returncode == 0, made.stderr
