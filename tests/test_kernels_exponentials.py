"""Softmax by pairs: against float64 over shapes, ranges, dtypes and threads; derivatives; torch's operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from weft.errors import UsageError
from weft.kernels import exponentials as pairs
from weft.kernels import pages
from weft.ops import softmax

METHODS = ["two-pass", "online"]
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 4095, 4096, 4097, 4160, 8193]
PART = 1 << 18


def numbers(*shape, scale=1.0, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).clamp(-1e4, 1e4)


def near(found, x, dim=-1):
    wanted = x.double().softmax(dim)
    assert found.shape == x.shape and torch.equal(found.isnan(), wanted.isnan())
    return float((found - wanted).nan_to_num(0.0).abs().max()) <= 2e-7 if x.numel() else True


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0, 1e4])
def test_all_lengths_and_ranges(method, scale):
    for length in LENGTHS:
        x = numbers(3, length, scale=scale, seed=length)
        if length:
            x[1], x[2] = x[1].sort().values, x[2].sort(descending=True).values
        assert near(softmax(x, -1, method), x), length
        masked = x.masked_fill(x > x.mean(), -torch.inf)
        assert near(softmax(masked, -1, method), masked), length


@pytest.mark.parametrize("method", METHODS)
def test_relative_errors_are_small_far_below_the_maximum(method):
    x = torch.linspace(-60, 0, 20_000)
    wanted = x.double().softmax(0)
    for row in (x, x.flip(0), x[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))]):
        found, right = softmax(row, 0, method), row.double().softmax(0)
        assert ((found - right).abs() / right).max() < 2e-6
    assert wanted.min() < 1e-28


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 87_001.0, -87_001.0, 86_900.0])
def test_what_is_left_to_torch(method, value):
    for length in (5, 64, 300, 2 * PART + 5):
        x = numbers(3, length)
        x[0, length // 2], x[1] = value, value
        assert near(softmax(x, -1, method), x)
        assert torch.equal(softmax(x, -1, method)[2:], softmax(x[2:], -1, method))


@pytest.mark.parametrize("method", METHODS)
def test_dimensions_shapes_and_strides(method):
    for shape in ((), (0,), (1,), (0, 5), (5, 0), (4, 7), (2, 3, 5, 7)):
        x = numbers(*shape)
        for dim in range(-max(1, len(shape)), max(1, len(shape))):
            assert near(softmax(x, dim, method), x, dim)
    x = numbers(6, 8, 10)
    for view in (x.mT, x[::2], x[..., ::3], x.expand(2, 6, 8, 10), x[:, :1].expand(6, 9, 10), x.to(memory_format=None)):
        assert near(softmax(view, -1, method), view)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_torchs(method, dtype):
    x = numbers(5, 77, scale=5.0).to(dtype)
    found = softmax(x, 1, method)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.softmax(x, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert softmax(x, 1, method).dtype == torch.softmax(x, 1).dtype


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 300),
    scale=st.sampled_from([0.1, 10.0, 3000.0]),
    seed=st.integers(0, 999),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=60, deadline=None)
def test_rows_sum_to_one(rows, columns, scale, seed, method):
    x = numbers(rows, columns, scale=scale, seed=seed)
    found = softmax(x, 1, method)
    assert near(found, x) and (not columns or torch.allclose(found.sum(1), torch.ones(rows), atol=1e-6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 5 * PART + 77), (3, 2 * PART), (700, 1500)])
def test_threads_give_the_bits_of_one(method, shape, threads):
    x, found = numbers(*shape, scale=20.0), []
    for count in (1, 2, 3):
        threads(count)
        found.append(softmax(x, -1, method))
    assert near(found[0], x) and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(170, 50_257), (1, pages.LEAST // 4 + 9)])
def test_results_past_the_caches(method, shape):
    x = numbers(*shape)
    assert x.nbytes >= pages.LEAST
    assert near(softmax(x, -1, method), x)


def test_advice_on_pages_is_for_large_results_alone(monkeypatch):
    given = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *what: given.append(what))
    pages.prefer_huge(torch.empty(1000))
    assert not given
    x = torch.empty(pages.LEAST // 4)
    assert pages.prefer_huge(x) is x
    ((start, size, advice),) = given
    assert advice == 14 and start % pages.HUGE == size % pages.HUGE == 0
    assert x.data_ptr() <= start and start + size <= x.data_ptr() + x.nbytes
    monkeypatch.setattr(pages, "_advise", lambda: None)
    pages.prefer_huge(x)


@pytest.mark.parametrize("method", METHODS)
def test_derivatives(method):
    x, g, t = numbers(4, 90).requires_grad_(), numbers(4, 90, seed=1), numbers(4, 90, seed=2)

    def mine(x):
        return softmax(x, -1, method)

    def plain(x):
        return torch.softmax(x, -1)

    for function in (lambda f: torch.autograd.grad(f(x), x, g)[0], lambda f: torch.func.jvp(f, (x,), (t,))[1]):
        torch.testing.assert_close(function(mine), function(plain), rtol=1e-4, atol=1e-6)
    second = [torch.func.hessian(lambda x, f=f: f(x).square().sum())(x[0, :9].detach()) for f in (mine, plain)]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-6)
    for dims in (0, 1):
        torch.testing.assert_close(torch.vmap(mine, dims)(x), torch.vmap(plain, dims)(x))
    each = [torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).square().sum()))(x.detach()) for f in (mine, plain)]
    torch.testing.assert_close(*each, rtol=1e-4, atol=1e-6)


def test_the_way_back_gives_its_references_numbers(threads):
    for shape in ((0, 5), (5, 0), (1, 1), (3, 17), (9, 64), (500, 1201)):
        y, g = numbers(*shape).softmax(-1), numbers(*shape, seed=1)
        wanted, found = pairs.softmax_rows_backward_reference(y.double(), g.double()), []
        for count in (1, 2):
            threads(count)
            found.append(pairs.softmax_rows_backward(y, g))
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[0], wanted.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_accepts_the_operators():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for stored in (False, True):
        torch.library.opcheck(pairs._softmax, (numbers(3, 70), stored), test_utils=checks)
    torch.library.opcheck(pairs._back, (numbers(3, 70), numbers(3, 70)), test_utils=checks)


def test_compiled_and_exported_code():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return softmax(2 * x, 1)

    x = numbers(3, 70).requires_grad_()
    made = torch.compile(Twice(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(made(x), torch.softmax(2 * x, 1))
    made(x).square().sum().backward()
    torch.testing.assert_close(torch.export.export(Twice(), (x,)).module()(x), torch.softmax(2 * x, 1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: softmax(torch.zeros(3), 1), "dim=1 of a tensor with 1 dimension(s): give -1 to 0"),
        (lambda: softmax(torch.zeros(3, 3), True), "dim=True"),
        (lambda: softmax(torch.zeros(3), 0, "three-pass"), "did you mean two-pass"),
        (lambda: softmax(torch.zeros(3, dtype=torch.int64)), "torch.int64"),
        (lambda: softmax([1.0]), "give a tensor"),
        (lambda: pairs.softmax_rows(torch.zeros(3).double()), "torch.float64"),
    ],
)
def test_wrong_use_is_an_error_that_says_what_to_give(call, says):
    with pytest.raises(UsageError) as error:
        call()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("shape", "torchs"), [((64, 128), True), ((8192, 32), True), ((1 << 17, 2), False), ((2, 1 << 17), False)]
)
def test_the_fastest_way_is_one_of_two(shape, torchs):
    x = numbers(*shape)
    assert torch.equal(softmax(x, 1), torch.softmax(x, 1) if torchs else softmax(x, 1, "online"))
    assert torch.equal(softmax(x.T, 0), torch.softmax(x.T, 0) if torchs else softmax(x, 1).T)
    assert torch.equal(softmax(x, 0), torch.softmax(x, 0))
    assert torch.equal(softmax(x.bfloat16()), torch.softmax(x.bfloat16(), -1))
    g, given = numbers(*shape, seed=1), x.requires_grad_()  # with its way back it pays later
    found, wanted = (torch.autograd.grad(f(given, 1), given, g)[0] for f in (softmax, torch.softmax))
    assert torch.equal(found, wanted)


def test_where_it_is_found():
    assert weft.ops.softmax is softmax
    assert weft.precision.softmax(torch.zeros(2)).tolist() == [0.5, 0.5]
    assert weft.precision.OnlineSoftmax(torch.zeros(2)).tolist() == [0.5, 0.5]
    with pytest.raises(AttributeError, match="nothing"):
        weft.ops.nothing  # noqa: B018


def test_the_plain_method_reads_what_the_loops_read():
    """The readable one in plain torch and the loops agree to the last digits."""
    from weft.precision.two_pass_softmax import two_passes

    for scale in (1.0, 100.0, 1e4):
        x = numbers(3000, scale=scale)
        assert (torch.cat(two_passes(list(x.split(256)))) - softmax(x)).abs().max() < 3e-7
