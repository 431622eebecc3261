"""Words of pixels and products of windows: loops against references over shapes, dtypes and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.kernels import sign_words
from weft.kernels.sign_words import image_words, window_product
from weft.kernels.signs import signs


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


@given(
    batch=st.integers(0, 3), channels=st.sampled_from([0, 1, 5, 63, 64, 65, 128, 200]),
    height=st.integers(0, 7), width=st.integers(0, 9), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_words_of_pixels(batch, channels, height, width, seed):
    x = numbers(batch, channels, height, width, seed=seed)
    words, means = image_words(x)
    wanted, exact = sign_words.image_words_reference(x)
    assert torch.equal(words, wanted) and words.shape == (batch, height, width, -(-channels // 64))
    torch.testing.assert_close(means, exact, rtol=1e-5, atol=1e-6)
    if channels:
        torch.testing.assert_close(means, x.abs().mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
        bits = words[..., 0] >> min(channels, 64) - 1 & 1
        assert torch.equal(bits.bool(), x[:, min(channels, 64) - 1] >= 0)


@given(
    batch=st.integers(0, 2), places=st.integers(0, 30), outputs=st.sampled_from([0, 1, 3, 4, 7, 64, 65, 130]),
    columns=st.integers(1, 200), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_products_of_windows(batch, places, outputs, columns, seed):
    w, x = numbers(outputs, columns, 1, 1, seed=seed), numbers(batch, columns, places, 1, seed=seed + 1)
    weights, windows = image_words(w)[0].flatten(1), image_words(x)[0].flatten(1, 2)
    scale, factors = torch.rand(outputs), torch.rand(batch, places)
    found = window_product(weights, windows, scale, factors, columns)
    wanted = signs(w[..., 0, 0]).double() @ signs(x[..., 0]).double() * scale[:, None] * factors[:, None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    plain = sign_words.window_product_reference(weights, windows, scale, factors, columns)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)
    ones = torch.ones(outputs), torch.ones(batch, places)
    exact = signs(w[..., 0, 0]) @ signs(x[..., 0])
    assert torch.equal(window_product(weights, windows, *ones, columns), exact)


def test_threads_give_the_bits_of_one(threads):
    x, w, found = numbers(40, 70, 20, 19), numbers(300, 70, 3, 3, seed=1), []
    for count in (1, 2, 3):
        threads(count)
        words, means = image_words(x)
        windows = words.flatten(1, 2)[:, :, None].expand(-1, -1, 9, -1).flatten(2)
        y = window_product(image_words(w)[0].flatten(1), windows, torch.ones(300), means.flatten(1), 630)
        found.append((words, means, y))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_dtypes_and_strides():
    small = torch.tensor([-1e-300, 1.0, -0.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert image_words(small)[0].item() == 0b110 and image_words(small.float())[0].item() == 0b111
    x = numbers(2, 70, 5, 6)
    for dtype in (torch.bfloat16, torch.float16):
        words, means = image_words(x.to(dtype))
        assert torch.equal(words, image_words(x)[0]) and means.dtype == torch.float32
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(image_words(other)[0], image_words(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_accepts_the_operators():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, w = numbers(2, 70, 3, 4), numbers(9, 70, 1, 1)
    torch.library.opcheck(sign_words._words, (x,), test_utils=checks)
    given = image_words(w)[0].flatten(1), image_words(x)[0].flatten(1, 2), torch.rand(9), torch.rand(2, 12), 70
    torch.library.opcheck(sign_words._product, given, test_utils=checks)


WEIGHTS, WINDOWS = torch.zeros(9, 2, dtype=torch.int64), torch.zeros(2, 5, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: image_words(torch.zeros(3, 3)), "give 4 dimension"),
        (lambda: image_words(torch.zeros(1, 1, 1, 1, dtype=torch.int8)), "torch.int8"),
        (lambda: window_product(WEIGHTS.float(), WINDOWS, torch.ones(9), torch.ones(2, 5), 99), "torch.float32"),
        (lambda: window_product(WEIGHTS, WINDOWS[..., :1], torch.ones(9), torch.ones(2, 5), 99), "give [O, L]"),
        (lambda: window_product(WEIGHTS, WINDOWS, torch.ones(8), torch.ones(2, 5), 99), "scale has 8 elements for 9"),
        (lambda: window_product(WEIGHTS, WINDOWS, torch.ones(9), torch.ones(2, 4), 99), "factors [2, 4]"),
        (lambda: window_product(WEIGHTS, WINDOWS, torch.ones(9), torch.ones(2, 5), 129), "from 0 to 128"),
    ],
)
def test_wrong_use_is_an_error_that_says_what_to_give(call, says):
    with pytest.raises(UsageError) as error:
        call()
    assert says in str(error.value)
