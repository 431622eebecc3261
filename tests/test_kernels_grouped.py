"""Products by group and by row against plain loops, over random shapes with empty groups, 0 and 1 among them."""

import ctypes
import mmap
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.kernels import grouped, rows
from weft.kernels.grouped import grouped_linear
from weft.kernels.rows import row_products, row_sums


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def leaf(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).requires_grad_()


def plain(x, weights, sizes, bias=None, taken=None, scale=None):
    x, out, start = x if taken is None else x[taken], [], 0
    for g, size in enumerate(sizes.tolist()):
        y = x[start : start + size] @ weights[g].T
        if bias is not None:
            y = y + (bias[g] if scale is None else scale[start : start + size, None] * bias[g])
        out.append(y)
        start += size
    return torch.cat(out)


def close(a, b, tolerance=1e-12):
    assert all(p.shape == q.shape and p.dtype == q.dtype for p, q in zip(a, b, strict=True))
    assert all(torch.allclose(p, q, rtol=tolerance, atol=tolerance) for p, q in zip(a, b, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    tokens=st.integers(1, 6), d=st.integers(1, 7), o=st.integers(1, 7),
    bias=st.booleans(), scale=st.booleans(), gather=st.booleans(),
)  # fmt: skip
def test_groups_against_a_plain_loop(counts, tokens, d, o, bias, scale, gather):
    sizes = torch.tensor(counts)
    n = int(sizes.sum())
    taken = torch.arange(n) * 7 % tokens if gather else None
    x, weights = leaf(tokens if gather else n, d), [leaf(o, d, seed=g) for g in range(len(counts))]
    b = leaf(len(counts), o) if bias else None
    s = leaf(n) if bias and scale else None
    leaves = [x, *weights, *(t for t in (b, s) if t is not None)]
    out, wanted = grouped_linear(x, weights, sizes, bias=b, rows=taken, scale=s), plain(x, weights, sizes, b, taken, s)
    error = torch.randn(n, o, dtype=torch.float64)
    close([out], [wanted])
    close(*(torch.autograd.grad(y, leaves, error, materialize_grads=True) for y in (out, wanted)))


SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 130]))


def both_passes(x, weights, sizes, bias, taken, scale, error, made=grouped_linear):
    leaves = [t.detach().requires_grad_() for t in (x, *weights, *(t for t in (bias, scale) if t is not None))]
    rest = iter(leaves[1 + len(weights) :])
    b, s = (None if t is None else next(rest) for t in (bias, scale))
    args = leaves[0], leaves[1 : 1 + len(weights)], sizes
    out = made(*args, bias=b, rows=taken, scale=s) if made is grouped_linear else made(*args, b, taken, s)
    return [out, *torch.autograd.grad(out, leaves, error, materialize_grads=True)]


def agree(found, wanted, terms):
    """Sums of so many products of numbers around 1, in float32."""
    for mine, right in zip(found, wanted, strict=True):
        assert mine.shape == right.shape and mine.dtype == torch.float32
        assert torch.allclose(mine.double(), right, rtol=1e-5, atol=1e-6 * terms)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.one_of(st.integers(0, 8), st.sampled_from([12, 64, 70])), min_size=1, max_size=4),
    d=SIZES, o=SIZES, tokens=st.integers(1, 40), strided=st.booleans(),
    bias=st.booleans(), scale=st.booleans(), gather=st.booleans(),
)  # fmt: skip
def test_loops_of_groups_against_a_plain_loop_in_float64(counts, d, o, tokens, strided, bias, scale, gather):
    sizes = torch.tensor(counts)
    n, g = int(sizes.sum()), len(counts)
    taken = torch.arange(n) * 7 % tokens if gather else None
    x = leaf(tokens if gather else n, d + 3 * strided, dtype=torch.float32).detach()[:, strided : d + strided]
    wide = leaf(g * o, d + 5 * strided, dtype=torch.float32).detach()
    weights = [w[:, strided : d + strided] for w in wide.split(o)]
    b = leaf(g, o, dtype=torch.float32).detach() if bias else None
    s = leaf(n, dtype=torch.float32).detach() if bias and scale else None
    error = leaf(n, o, dtype=torch.float32, seed=1).detach()
    given = [x, weights, sizes, b, taken, s, error]
    exact = [x.double(), [w.double() for w in weights], sizes, *(t if t is None else t.double() for t in (b,)), taken]
    exact += [None if s is None else s.double(), error.double()]
    agree(both_passes(*given), both_passes(*exact, made=plain), max(d, o, n) + 1)


@pytest.mark.parametrize(("count", "d", "o"), [(9, 2100, 70), (1500, 40, 72), (70, 96, 1100)])
def test_products_deeper_than_a_panel(count, d, o):
    x, weights = leaf(count, d, dtype=torch.float32), [leaf(o, d, dtype=torch.float32)]
    bias, error = leaf(1, o, dtype=torch.float32), leaf(count, o, dtype=torch.float32, seed=3).detach()
    given = [x, weights, torch.tensor([count]), bias, None, None, error]
    exact = [x.double(), [weights[0].double()], given[2], bias.double(), None, None, error.double()]
    agree(both_passes(*given), both_passes(*exact, made=plain), max(count, d, o))


def test_large_gradients_and_two_threads(threads):
    sizes, found = torch.tensor([70, 0, 3, 50]), []
    x, weights = leaf(60, 1024, dtype=torch.float32), [leaf(1024, 1024, dtype=torch.float32, seed=g) for g in range(4)]
    taken, bias = torch.arange(123) * 11 % 60, leaf(4, 1024, dtype=torch.float32)
    scale, error = leaf(123, dtype=torch.float32), leaf(123, 1024, dtype=torch.float32, seed=1).detach()
    for count in (1, 2):
        threads(count)
        found.append(both_passes(x, weights, sizes, bias, taken, scale, error))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = x.double(), [w.double() for w in weights], sizes, bias.double(), taken, scale.double(), error.double()
    agree(found[0], both_passes(*exact, made=plain), 1024)


def at_the_end(t):
    """A copy that ends where memory may not be read."""
    if not t.numel():
        return t
    pages = -(-t.nbytes // mmap.PAGESIZE) + 1
    held = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + (pages - 1) * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    first = (pages - 1) * mmap.PAGESIZE - t.nbytes
    return torch.frombuffer(held, dtype=t.dtype, count=t.numel(), offset=first).view(t.shape).copy_(t)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize(("counts", "d", "o"), [([7, 0, 65], 70, 33), ([1], 16, 64), ([12, 3], 31, 47), ([9], 130, 15)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nothing_is_read_past_the_end(counts, d, o, dtype):
    n, g = sum(counts), len(counts)
    taken = (torch.arange(n) * 3 % n).to(dtype)
    x, bias, scale, error = leaf(n, d), leaf(g, o), leaf(n), leaf(n, o, seed=1)
    weights, sizes = [leaf(o, d, seed=k) for k in range(g)], torch.tensor(counts)
    near = [at_the_end(t.detach().float()) for t in (x, bias, scale, error, *weights)]
    bounds = at_the_end(taken), at_the_end(sizes)
    given = near[0], near[4:], bounds[1], near[1], bounds[0], near[2], near[3]
    exact = x, weights, sizes, bias, taken.long(), scale, error.detach()
    agree(both_passes(*given), both_passes(*exact, made=plain), max(n, d, o))


@pytest.mark.parametrize("wide", [False, True])
def test_what_lies_otherwise_in_memory(wide):
    sizes, taken = torch.tensor([5, 8]), torch.arange(26, dtype=torch.int32)[::2] % 6
    x = leaf(20, 6, dtype=torch.float32).detach().t()
    weights = [leaf(33, 20, dtype=torch.float32, seed=g).detach() for g in range(2)]
    if wide:  # rows of other lengths
        weights[1] = torch.cat([weights[1], weights[1]], 1)[:, :20]
    bias, scale = leaf(33, 2, dtype=torch.float32).detach().t(), leaf(26, dtype=torch.float32).detach()[::2]
    apart = torch.stack([taken.long(), 5 - taken.long()], 1)[:, 0]
    assert torch.equal(*(grouped_linear(x, weights, sizes, rows=t) for t in (taken, apart)))
    for error in (torch.ones(()).expand(13, 33), leaf(13, 50, dtype=torch.float32).detach()[:, 9:42]):
        exact = x.double(), [w.double() for w in weights], sizes, bias.double(), taken.long(), scale.double()
        wanted = both_passes(*exact, error.double(), made=plain)
        agree(both_passes(x, weights, sizes, bias, taken, scale, error), wanted, 33)


def test_gradients_of_some_of_the_weights():
    for last in (0, 1):
        weights = [leaf(4, 8, dtype=torch.float32, seed=g).detach().requires_grad_(g == last) for g in range(2)]
        grouped_linear(leaf(5, 8, dtype=torch.float32).detach(), weights, torch.tensor([2, 3])).sum().backward()
        assert weights[1 - last].grad is None and weights[last].grad.abs().max() > 0


@pytest.mark.parametrize(("d", "o"), [(0, 3), (3, 0)])
def test_nothing_to_multiply(d, o):
    x, weights = torch.randn(4, d, requires_grad=True), [torch.randn(o, d, requires_grad=True)]
    out = grouped_linear(x, weights, torch.tensor([4]), bias=torch.ones(1, o))
    assert torch.equal(out, torch.ones(4, o))
    out.sum().backward()
    assert not x.grad.any() and not weights[0].grad.any()


def test_a_large_gradient_whose_rows_do_not_begin_with_a_line():
    x, weights = leaf(9, 1001, dtype=torch.float32), [leaf(1100, 1001, dtype=torch.float32, seed=g) for g in range(2)]
    given = [x, weights, torch.tensor([4, 5]), None, None, None, leaf(9, 1100, dtype=torch.float32).detach()]
    exact = [x.double(), [w.double() for w in weights], given[2], None, None, None, given[-1].double()]
    agree(both_passes(*given), both_passes(*exact, made=plain), 1100)


def test_the_loops_do_run():
    from weft.kernels.cpu import grouped as loops
    from weft.kernels.cpu.simd import has

    runs = []
    with loops.products.followed(lambda *args: runs.append(int(args[0]))):
        out = grouped_linear(
            torch.randn(5, 8, requires_grad=True), [torch.randn(4, 8).requires_grad_()], torch.tensor([5])
        )
        out.sum().backward()
    assert runs == ([0, 1, 2] if has("avx512f") else [])


@pytest.mark.parametrize("gather", [False, True])
def test_second_derivatives(gather):
    sizes, taken = torch.tensor([2, 0, 3]), torch.tensor([0, 3, 1, 1, 2]) if gather else None
    given = leaf(5, 3), leaf(3, 2), leaf(5), *(leaf(2, 3, seed=g) for g in range(3))

    def run(x, b, s, *w):
        return grouped_linear(x, list(w), sizes, bias=b, scale=s, rows=taken)

    assert torch.autograd.gradgradcheck(run, given)
    x, w = given[0].detach(), [t.detach() for t in given[3:]]
    mine, exact = (lambda q, f=f: f(q, w, sizes).pow(3).sum() for f in (grouped_linear, plain))
    direction = torch.ones_like(x)
    second = (torch.autograd.functional.hvp(f, x, direction)[1] for f in (mine, exact))
    close([next(second)], [next(second)], 1e-9)
    table, numbers = leaf(4, 3), torch.tensor([[0, 3], [3, 3]])
    for function, first in ((row_products, leaf(2, 3)), (row_sums, leaf(2, 2))):
        assert torch.autograd.gradgradcheck(lambda f, t, function=function: function(f, t, numbers), (first, table))


def test_compiled_code_has_the_gradients_or_refuses():
    weights, sizes = [leaf(4, 8, seed=g).detach() for g in range(2)], torch.tensor([2, 3])
    x = leaf(5, 8)

    def square(q):
        return grouped_linear(q, weights, sizes).square().sum()

    wanted = torch.autograd.grad(square(x), x)[0]
    torch.compiler.reset()
    assert torch.allclose(torch.autograd.grad(torch.compile(square, backend="aot_eager")(x), x)[0], wanted)
    torch.compiler.reset()
    with pytest.raises(RuntimeError):  # not zeros
        torch.compile(lambda q: torch.func.grad(square)(q), backend="aot_eager")(x.detach())

    class Module(torch.nn.Module):
        def forward(self, q):
            return square(q)

    made = torch.export.export(Module(), (x.detach(),)).module()
    assert torch.allclose(torch.autograd.grad(made(x), x)[0], wanted)


def test_loops_run_where_the_default_device_or_dtype_is_another():
    x, weights, sizes = torch.randn(5, 8), [torch.randn(4, 8)], torch.tensor([5])
    wanted = grouped_linear(x, weights, sizes)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = grouped_linear(x, weights, sizes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_in_other_dtypes_and_strides(dtype, threads):
    sizes, found = torch.tensor([40, 0, 24]), []
    x = leaf(16, 64, dtype=dtype).detach()[:, ::2]
    weights = [leaf(32, 48, dtype=dtype, seed=g).detach()[:, :48].t() for g in range(3)]  # [48, 32], strided
    taken = torch.arange(64) % 16
    for count in (1, 2):
        threads(count)
        found.append(grouped_linear(x, weights, sizes, rows=taken))
    assert torch.equal(*found) and found[0].dtype == dtype
    wide = plain(x.double(), [w.double() for w in weights], sizes, taken=taken)
    assert torch.allclose(found[0].double(), wide, rtol=0.02, atol=0.02 * float(wide.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moving", ["x", "weights", "bias", "scale", "all"])
def test_tangents_of_groups(dtype, moving):
    sizes, taken = torch.tensor([3, 0, 4]), torch.tensor([0, 4, 1, 1, 2, 3, 0])
    given = {"x": leaf(5, 6, dtype=dtype), "bias": leaf(3, 4, dtype=dtype), "scale": leaf(7, dtype=dtype)}
    weights = [leaf(4, 6, dtype=dtype, seed=g) for g in range(3)]
    names = list(given) if moving == "all" else [moving] if moving in given else []
    moved = weights[1:] if moving in ("weights", "all") else []

    def run(made, *values):
        held = {**given, **dict(zip(names, values, strict=False))}
        mine = [*weights[: 3 - len(moved)], *values[len(names) :]]
        more = (held["bias"], taken, held["scale"])
        if made is plain:
            return plain(held["x"], mine, sizes, *more)
        return grouped_linear(held["x"], mine, sizes, bias=more[0], rows=more[1], scale=more[2])

    primals = [given[n].detach() for n in names] + [w.detach() for w in moved]
    tangents = [leaf(*t.shape, dtype=dtype, seed=7).detach() for t in primals]
    found, wanted = (torch.func.jvp(lambda *v, m=m: run(m, *v), tuple(primals), tuple(tangents)) for m in (1, plain))
    close(found, wanted, 1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangents_of_rows(dtype):
    table, numbers = leaf(6, 20, dtype=dtype).detach(), torch.tensor([[0, 5, 0], [3, 3, 2]])
    pairs = ((row_products, 20, lambda x, t: (x[:, None] * t[numbers]).sum(2)),
             (row_sums, 3, lambda w, t: (w[:, :, None] * t[numbers]).sum(1)))  # fmt: skip
    for made, width, exact in pairs:
        first = leaf(2, width, dtype=dtype).detach()
        tangents = leaf(2, width, dtype=dtype, seed=1).detach(), leaf(6, 20, dtype=dtype, seed=1).detach()
        for which in ((0,), (1,), (0, 1)):
            moves = tuple(t if k in which else torch.zeros_like(t) for k, t in enumerate(tangents))
            found = torch.func.jvp(lambda f, t, made=made: made(f, t, numbers), (first, table), moves)
            close(found, torch.func.jvp(exact, (first, table), moves), 1e-4 if dtype == torch.float32 else 1e-12)
        alone = torch.func.jvp(lambda f, made=made: made(f, table, numbers), (first,), tangents[:1])
        close(alone, torch.func.jvp(lambda f, exact=exact: exact(f, table), (first,), tangents[:1]), 1e-4)


def test_a_group_without_rows_has_a_gradient_of_zeros():
    weights = [leaf(3, 2), leaf(3, 2)]
    grouped_linear(leaf(4, 2), weights, torch.tensor([4, 0])).sum().backward()
    assert weights[0].grad.any() and not weights[1].grad.any()


def test_groups_that_do_not_fit_are_refused():
    x, weights = leaf(4, 2), [leaf(3, 2), leaf(3, 2)]
    for sizes, other in (
        ([4], weights),
        ([2, 2], [leaf(3, 2), leaf(2, 2)]),
        ([2, 2], [leaf(3, 5), leaf(3, 5)]),
        ([], []),
    ):
        with pytest.raises(UsageError, match="give"):
            grouped_linear(x, other, torch.tensor(sizes))
    for dtype in (torch.float64, torch.float32):
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        with pytest.raises(UsageError, match="5 rows together, but 4"):
            grouped_linear(x, weights, torch.tensor([2, 3]))
        with pytest.raises(UsageError, match="give"):
            grouped_linear(x, weights, torch.tensor([2.0, 2.0]))
        for taken in ([0, 1, 2, 4], [0, -1, 0, 0]):
            with pytest.raises(IndexError):
                grouped_linear(x, weights, torch.tensor([2, 2]), rows=torch.tensor(taken))
        for wrong in ([2**62, 2**62, 2**62, 2**62 + 4], [2**63 - 1, 2**63 - 1, 6, 0]):  # whose sums wrap
            with pytest.raises(UsageError, match="rows together"):
                grouped_linear(x, [*weights, *weights], torch.tensor(wrong))
        for wrong in (torch.ones(2, 2).long(), torch.ones(4), torch.ones(4) > 0):
            with pytest.raises(UsageError, match=r"rows .* give int64"):
                grouped_linear(x, weights, torch.tensor([2, 2]), rows=wrong)
        with pytest.raises(UsageError, match="which x has"):
            grouped_linear(x, weights, torch.tensor([2, 2]), bias=torch.ones(2, 3).half())
        with pytest.raises(UsageError, match="give all tensors there"):
            grouped_linear(x, [w.to("meta") for w in weights], torch.tensor([2, 2]))
        with pytest.raises(UsageError, match="scale"):
            grouped_linear(x, weights, torch.tensor([2, 2]), bias=torch.ones(2, 3, dtype=dtype), scale=x[:3, 0])
        with pytest.raises(UsageError, match="rows together"):
            grouped_linear(x, weights, torch.tensor([6, -2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_refuses_what_does_not_fit(dtype):
    x, w, sizes, op = torch.randn(4, 2).to(dtype), torch.randn(3, 2).to(dtype), torch.tensor([2, 2]), grouped._product
    for args in (
        (x, None, sizes.float(), None, None, [w, w]),
        (x, None, sizes, None, None, [w, w[:2]]),
        (x, None, sizes, x, None, [w, w]),
        (x, None, sizes, None, x[:3, 0], [w, w]),
        (x[:, :1], None, sizes, None, None, [w, w]),
        (x, x[:, 0], sizes, None, None, [w, w]),
    ):
        with pytest.raises((RuntimeError, TypeError, UsageError)):
            op(*args)
    with pytest.raises((RuntimeError, UsageError)):
        grouped._gradients(x, x, None, sizes, None, None, [w, w], True, True, True, True)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 5), j=st.integers(0, 5), n=st.integers(1, 6), d=st.integers(1, 6), small=st.booleans())
def test_rows_of_a_table(tokens, j, n, d, small):
    before, rows.BLOCK = rows.BLOCK, 4 if small else rows.BLOCK
    try:
        table, x, weights = leaf(n, d), leaf(tokens, d), leaf(tokens, j)
        numbers = torch.randint(n, (tokens, j), generator=torch.Generator().manual_seed(n + d))
        pairs = (row_products(x, table, numbers), (x[:, None] * table[numbers]).sum(2), [x, table]), (
            row_sums(weights, table, numbers), (weights[:, :, None] * table[numbers]).sum(1), [weights, table],
        )  # fmt: skip
        for mine, wanted, leaves in pairs:
            error = torch.randn(mine.shape, dtype=torch.float64)
            close([mine], [wanted])
            close(*(torch.autograd.grad(y, leaves, error, materialize_grads=True) for y in (mine, wanted)))
    finally:
        rows.BLOCK = before


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 7), j=st.integers(0, 11), n=st.integers(1, 9), d=SIZES, sparse=st.booleans())
def test_loops_of_rows_against_float64(tokens, j, n, d, sparse):
    table = leaf(n, d + 3, dtype=torch.float32).detach()[:, 2 : d + 2]
    x, weights = (leaf(tokens, k, dtype=torch.float32).detach() for k in (d, j))
    numbers = torch.randint(n, (tokens, j), generator=torch.Generator().manual_seed(n + d))
    pairs = [(row_products, x, lambda x, table: (x[:, None] * table[numbers]).sum(2)),
             (row_sums, weights, lambda w, table: (w[:, :, None] * table[numbers]).sum(1))]  # fmt: skip
    for mine, first, exact in pairs:
        leaves = [t.detach().requires_grad_() for t in (first, table)]
        wide = [t.detach().double().requires_grad_() for t in (first, table)]
        out, wanted = mine(*leaves, numbers, sparse=sparse), exact(*wide)
        error = leaf(*wanted.shape, dtype=torch.float32, seed=2).detach()
        grads = torch.autograd.grad(out, leaves, error)
        found = [out, grads[0], grads[1].to_dense() if sparse else grads[1]]
        agree(found, [wanted, *torch.autograd.grad(wanted, wide, error.double(), materialize_grads=True)], d + 8 * j)


def test_many_rows_and_two_threads(threads):
    x, table, numbers = torch.randn(300, 512), torch.randn(20000, 512), torch.randint(20000, (300, 24))
    weights, found = torch.randn(300, 24), []
    for count in (1, 2, 3):
        threads(count)
        found.append([row_products(x, table, numbers), row_sums(weights, table, numbers)])
        found[-1] += [rows._add_rows(weights, x, numbers, 20000), rows._weighted(weights, x)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    args = (x, table, numbers), (weights, table, numbers), (weights, x, numbers, 20000), (weights, x)
    references = rows.row_products_reference, rows.row_sums_reference, rows.add_rows_reference, rows.weighted_reference
    for mine, reference, given_ in zip(found[0], references, args, strict=True):
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given_]
        assert torch.allclose(mine.double(), reference(*wide), rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("d", [5, 31, 64, 100])
@pytest.mark.parametrize("j", [1, 3, 4, 6])
def test_no_row_is_read_past_the_end(d, j):
    table, x, weights = (at_the_end(torch.randn(n, k)) for n, k in ((6, d), (3, d), (3, j)))
    numbers = at_the_end(torch.arange(3 * j).view(3, j) % 6)
    found = row_products(x, table, numbers), row_sums(weights, table, numbers), rows._add_rows(weights, x, numbers, 6)
    wanted = rows.row_products_reference, rows.row_sums_reference, rows.add_rows_reference
    given_ = (x, table, numbers), (weights, table, numbers), (weights, x, numbers, 6)
    for mine, reference, args in zip(found, wanted, given_, strict=True):
        torch.testing.assert_close(mine, reference(*args), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows._weighted(weights, x), rows.weighted_reference(weights, x))


def test_numbers_of_rows_that_a_table_does_not_have():
    x, table, weights = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 1)
    for wrong in ([[0], [4]], [[-1], [0]]):
        numbers = torch.tensor(wrong)
        for call in (lambda n: row_products(x, table, n), lambda n: row_sums(weights, table, n),
                     lambda n: rows._add_rows(weights, x, n, 4)):  # fmt: skip
            with pytest.raises(IndexError, match="give 0 to 3"):
                call(numbers)


def test_sparse_gradients_of_a_table_are_the_dense_ones():
    numbers = torch.tensor([[0, 2, 2], [5, 0, 1]])
    for function, first in ((row_products, leaf(2, 4)), (row_sums, leaf(2, 3))):
        grads = []
        for sparse in (False, True):
            table = leaf(6, 4)
            function(first, table, numbers, sparse=sparse).square().sum().backward()
            grads.append(table.grad)
        assert grads[1].is_sparse and torch.allclose(grads[1].to_dense(), grads[0])


def test_operators_are_described_correctly():
    x, w, sizes = torch.randn(5, 3), [torch.randn(4, 3), torch.randn(4, 3)], torch.tensor([2, 3])
    bias, scale, numbers = torch.randn(2, 4), torch.randn(5), torch.randint(6, (5, 2))
    table, few = torch.randn(6, 3), torch.randn(5, 2)
    for op, args in (
        (grouped._product, (x, None, sizes, bias, scale, w)),
        (grouped._product, (x, torch.tensor([0, 4, 4, 1, 1]), sizes, None, None, w)),
        (grouped._gradients, (torch.randn(5, 4), x, None, sizes, bias, scale, w, True, True, True, True)),
        (grouped._gradients, (torch.randn(5, 4), x, None, sizes, None, None, w, False, False, False, False)),
        (rows._products, (x, table, numbers)),
        (rows._sums, (few, table, numbers)),
        (rows._add_rows, (few, x, numbers, 6)),
        (rows._weighted, (few, x)),
    ):
        torch.library.opcheck(op, args)
