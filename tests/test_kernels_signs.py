"""Signs as bits: kernels against references over shapes, dtypes and threads, and what torch asks of operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.kernels import signs as bits
from weft.kernels.sign_matrix import SignMatrix
from weft.kernels.signs import pack_signs, sign_product, sign_sums, signs, unpack_signs

WIDTHS = [0, 1, 7, 8, 63, 64, 65, 72, 128, 130, 200, 256]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def numbers(*shape, seed=0):
    """Normal numbers, of which some are 0 and -0."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    x[torch.rand(shape, generator=draw) < 0.1] = 0.0
    x[torch.rand(shape, generator=draw) < 0.1] = -0.0
    return x


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_zeros_are_positive_and_nan_is_not():
    assert signs(torch.tensor([0.0, -0.0, torch.nan, -1e-45, torch.inf])).tolist() == [1, 1, -1, -1, 1]


@pytest.mark.parametrize("columns", WIDTHS)
def test_packing_gives_the_bits_of_its_reference_and_comes_back(columns):
    for rows in (0, 1, 7, 8, 9, 16, 23):
        w = numbers(rows, columns, seed=rows)
        packed = pack_signs(w)
        assert packed.dtype == torch.uint8 and packed.shape == (rows * -(-columns // 8),)
        assert torch.equal(packed, bits.pack_signs_reference(w))
        assert torch.equal(unpack_signs(packed, rows, columns), signs(w))


def test_the_bytes_lie_where_the_docstring_says():
    w = numbers(11, 70)
    packed, stored = pack_signs(w), [int("".join("01"[v >= 0] for v in reversed(row)), 2) for row in w.tolist()]
    low, high = [s & (1 << 64) - 1 for s in stored], [s >> 64 for s in stored]
    first = b"".join(v.to_bytes(8, "little") for v in low[:8]) + bytes(high[:8])
    last = b"".join(v.to_bytes(8, "little") for v in low[8:]) + bytes(high[8:])
    assert bytes(packed.tolist()) == first + last


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_reference(columns, biased):
    for rows in (0, 1, 2, 4, 5, 9, 66):
        for outputs in (0, 1, 5, 8, 9, 16, 23, 40):
            x, w = numbers(rows, columns, seed=1), numbers(outputs, columns, seed=2)
            packed, scale = pack_signs(w), torch.rand(outputs)
            bias = torch.randn(outputs) if biased else None
            for factored in (False, True):
                found = sign_product(x, packed, scale, bias, factored=factored)
                wanted = bits.sign_product_reference(x, packed, scale, bias, factored)
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            exact = sign_product(x, packed, torch.ones(outputs))
            assert torch.equal(exact, signs(x) @ signs(w).T)
            found = sign_sums(x, packed, scale, bias)
            wanted = bits.sign_sums_reference(x.double(), packed, scale, bias)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@given(rows=st.integers(0, 70), outputs=st.integers(0, 40), columns=st.integers(0, 300), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_counts_of_bits_are_exact(rows, outputs, columns, seed):
    x, w = numbers(rows, columns, seed=seed), numbers(outputs, columns, seed=seed + 1)
    assert torch.equal(sign_product(x, pack_signs(w), torch.ones(outputs)), signs(x) @ signs(w).T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_shapes_and_strides(dtype):
    x, w = numbers(3, 4, 2, 70).to(dtype)[:, :, 0], numbers(9, 70, seed=1).to(dtype)
    assert not x.is_contiguous()
    x[0, 0, 0], w[0, 0] = -1e-300, -1e-300  # a negative number in float64 alone
    packed = pack_signs(w)
    assert torch.equal(unpack_signs(packed, 9, 70, dtype), signs(w))
    found = sign_product(x, packed, torch.ones(9))
    assert found.shape == (3, 4, 9) and torch.equal(found, (signs(x) @ signs(w).T).float())
    wanted = (x.double() @ signs(w).double().T).float()
    torch.testing.assert_close(sign_sums(x, packed, torch.ones(9)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", bits.INPUTS)
def test_threads_give_the_bits_of_one(inputs, threads):
    x, w = numbers(300, 520), numbers(1031, 520, seed=1)
    matrix, found = SignMatrix(pack_signs(w), torch.rand(1031), torch.randn(1031), 520, inputs), []
    assert len(x) > bits.most_rows(520, 1031, inputs)
    for count in (1, 2, 3):
        threads(count)
        found.append(matrix(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("inputs", bits.INPUTS)
def test_a_call_past_the_dispatcher_is_the_same(inputs):
    w, bias = numbers(17, 130), torch.randn(17)
    matrix = SignMatrix(pack_signs(w), torch.rand(17), bias, 130, inputs)
    for x in (numbers(1, 130), numbers(6, 130), numbers(2, 3, 130), numbers(130), numbers(130, 4).T, numbers(0, 130)):
        plain = matrix(x)
        with torch.inference_mode():
            assert torch.equal(matrix(x), plain)
            assert torch.equal(matrix(x.double()), matrix(x.double().clone()))
    x = numbers(5, 3, 130)
    with torch.inference_mode():
        assert torch.equal(torch.vmap(lambda one: matrix(one))(x), matrix(x))
    with pytest.raises(UsageError, match="128"):
        matrix(numbers(1, 128))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_accepts_the_operators():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, w = numbers(5, 70), numbers(9, 70)
    packed, scale = pack_signs(w), torch.rand(9)
    torch.library.opcheck(bits._pack, (w,), test_utils=checks)
    for bias in (None, torch.randn(9)):
        torch.library.opcheck(bits._product, (x, packed, scale, bias, True), test_utils=checks)
        torch.library.opcheck(bits._sums, (x, packed, scale, bias), test_utils=checks)


def test_compiled_and_exported_code_takes_an_operator_as_one_step():
    x, packed, scale = numbers(5, 70), pack_signs(numbers(9, 70)), torch.rand(9)

    class Both(torch.nn.Module):
        def forward(self, x):
            return sign_product(x, packed, scale, factored=True) + sign_sums(x, packed, scale) * 2

    wanted = Both()(x)
    assert torch.equal(torch.compile(Both(), backend="aot_eager", fullgraph=True)(x), wanted)
    assert torch.equal(torch.export.export(Both(), (x,)).module()(x), wanted)


PACKED, ONES = torch.zeros(9 * 2, dtype=torch.uint8), torch.ones(9)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack_signs(torch.zeros(3)), "give 2 dimension"),
        (lambda: pack_signs(torch.zeros(3, 3, dtype=torch.int8)), "torch.int8"),
        (lambda: unpack_signs(PACKED, 9, 17), "18 bytes: the signs of 9 x 17 have 27"),
        (lambda: sign_product(torch.zeros(2, 17), PACKED, ONES), "18 bytes"),
        (lambda: sign_product(torch.zeros(2, 16), PACKED, ONES.double()), "scale has the dtype torch.float64"),
        (lambda: sign_sums(torch.zeros(2, 16), PACKED, ONES, ONES[:8]), "bias has 8 elements for 9 outputs"),
        (lambda: sign_sums(torch.zeros(2, 16, dtype=torch.int32), PACKED, ONES), "torch.int32"),
        (lambda: SignMatrix(PACKED, ONES, None, 16, "sign"), "did you mean signs"),
    ],
)
def test_wrong_use_is_an_error_that_says_what_to_give(call, says):
    with pytest.raises(UsageError) as error:
        call()
    assert says in str(error.value)


@pytest.mark.parametrize("inputs", bits.INPUTS)
def test_what_a_call_past_the_dispatcher_leaves_to_it(inputs):
    w, bias = numbers(17, 130), torch.randn(17)
    matrix, x = SignMatrix(pack_signs(w), torch.rand(17), bias, 130, inputs), numbers(2, 130)
    plain = matrix(x)
    with torch.inference_mode():
        for wrong in (numbers(2, 129), numbers(2, 131), numbers(130, 2)):
            with pytest.raises(UsageError, match="give"):
                matrix(wrong)
        torch.testing.assert_close(matrix(x.double()), plain, rtol=1e-5, atol=1e-4)
        assert torch.equal(matrix(torch._neg_view(-x)), plain)
        assert torch.equal(torch.func.functionalize(matrix)(x), plain)
        torch.set_default_dtype(torch.float64)
        try:
            found = matrix(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, plain) and found.dtype == torch.float32
        with torch.device("meta"):
            assert torch.equal(matrix(x), plain)


def test_a_matrix_refuses_what_does_not_fit():
    packed = pack_signs(numbers(17, 130))
    for wrong in (
        lambda: SignMatrix(packed[:-1], torch.rand(17), None, 130, "signs"),
        lambda: SignMatrix(packed, torch.rand(17).double(), None, 130, "signs"),
        lambda: SignMatrix(packed, torch.rand(17), torch.rand(16), 130, "signs"),
        lambda: SignMatrix(packed, torch.rand(17, 1), None, 130, "signs"),
    ):
        with pytest.raises(UsageError):
            wrong()
    strided = SignMatrix(torch.stack([packed, packed], 1)[:, 0], torch.rand(34)[::2], torch.rand(34)[::2], 130, "signs")
    x = numbers(2, 130)
    with torch.inference_mode():
        torch.testing.assert_close(strided(x), strided.dispatched(x))
