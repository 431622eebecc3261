"""Products by group and by row against plain loops, over random shapes with empty groups, 0 and 1 among them."""

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
    with pytest.raises(UsageError, match="5 rows together, but 4"):
        grouped_linear(x, weights, torch.tensor([2, 3]))


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
    ):
        torch.library.opcheck(op, args)
