"""Every kernel gives its reference's bits, for every shape, dtype and number of threads, and keeps to its bounds."""

import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.kernels import bits as stream
from weft.kernels import compiled, cpu, groups, step_lookup
from weft.kernels.bits import pack_bits, unpack_bits
from weft.kernels.groups import dequantise_groups, quantise_groups
from weft.kernels.step_lookup import bucketize_pack, gather_unpack

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [0, 1, 7, 8, 63, 64, 65, 1023, 1024, 1025, 2500]
WIDE = 3 * compiled.GRAIN + 77  # elements that several threads share, the last of them with an odd part


def numbers(shape, dtype=torch.float32, device="cpu", seed=0):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.randn(shape, generator=draw).mul(3).exp2()
    return (torch.randn(shape, generator=draw) * scale).to(device, dtype)


def case(name, n, dtype, device, bits=3, group=64, seed=None):
    """The operator's arguments and its reference's result."""
    x = numbers((n,), dtype if dtype in compiled.NATIVE else torch.float32, device)
    x[n // 3 : n // 2].relu_()  # some groups begin at 0
    centred = seed is None and group > 64
    codes = torch.arange(n, device=device).mul(7).to(torch.uint8)
    if name == "pack_bits":
        return stream._pack, stream.pack_bits_reference, (codes, bits)
    if name == "unpack_bits":
        return stream._unpack, stream.unpack_bits_reference, (stream.pack_bits_reference(codes, bits), bits, n)
    if name == "quantise_groups":
        return groups._quantise, groups.quantise_groups_reference, (x, bits, group, seed, centred)
    if name == "dequantise_groups":
        made = groups.quantise_groups_reference(x, bits, group, seed, centred)
        return groups._dequantise, groups.dequantise_groups_reference, (*made, n, x.dtype, bits, group, centred)
    bits = min(bits, 4)
    if name == "bucketize_pack":
        boundaries = numbers(((1 << bits) - 1,), device=device, seed=1).sort().values
        return step_lookup._bucketize, step_lookup.bucketize_pack_reference, (x, boundaries, bits)
    packed = stream.pack_bits_reference(codes, bits)
    args = packed, numbers((1 << bits,), device=device), numbers((n,), dtype, device)
    return step_lookup._gather, step_lookup.gather_unpack_reference, (*args, bits)


NAMES = ["pack_bits", "unpack_bits", "quantise_groups", "dequantise_groups", "bucketize_pack", "gather_unpack"]


def same(given, expected):
    if isinstance(given, torch.Tensor):
        given, expected = [given], [expected]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
        for a, b in zip(given, expected, strict=True)
    )


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_operator_is_covered():
    defined = {name for file in (stream, groups, step_lookup) for name in vars(file) if name.endswith("_reference")}
    assert {f"{name}_reference" for name in NAMES} | {"uniform_reference"} == defined
    assert {name for name in NAMES if hasattr(torch.ops.weft, name)} == set(NAMES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_operator_gives_the_bits_of_its_reference(name, bits, device):
    for n in SIZES:
        for dtype in DTYPES:
            for group, seed in ((64, None), (8, 5), (136, -3), (1024, None)):
                op, reference, args = case(name, n, dtype, device, bits, group, seed)
                assert same(op(*args), reference(*args)), (n, dtype, group, seed)


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_give_the_bits_of_one(name, threads):
    op, reference, args = case(name, WIDE, torch.float32, "cpu", seed=11)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(op(*args))
    assert same(found[0], reference(*args)) and same(found[1], found[0]) and same(found[2], found[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_torch_accepts_the_operator(name):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype, seed in ((torch.float32, None), (torch.bfloat16, 5)):
        op, _, args = case(name, 100, dtype, "cpu", seed=seed)
        torch.library.opcheck(op, args, test_utils=checks)


def test_meta_tensors_have_the_shapes_and_dtypes():
    for name in NAMES:
        op, _, args = case(name, 131, torch.bfloat16, "cpu")
        meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        found = [
            [(t.shape, t.dtype) for t in (result if isinstance(result, tuple) else (result,))]
            for result in (meta, op(*args))
        ]
        assert found[0] == found[1]


# packing


@given(n=st.integers(0, 400), bits=st.integers(1, 8), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_packed_codes_come_back_and_lie_where_the_docstring_says(n, bits, seed):
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    low = codes & (1 << bits) - 1
    stored = int.from_bytes(bytes(packed.tolist()), "little")
    assert stored == sum(code << i * bits for i, code in enumerate(low.tolist()))
    assert len(packed) == -(-n * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, n), low)


def test_packing_reads_other_shapes_and_strides():
    codes = torch.arange(600, dtype=torch.uint8).view(20, 30).T
    packed = pack_bits(codes, 5)
    assert torch.equal(unpack_bits(packed, 5, 600), codes.flatten() & 31)
    assert torch.equal(unpack_bits(torch.stack([packed, packed], 1)[:, 0], 5, 600), codes.flatten() & 31)


# groups


def exact_error(x, back, scale, group):
    """|x - x'| and the scale of each element, as float64."""
    x, back = x.double().flatten(), back.double().flatten()
    return (x - back).abs(), scale.double().repeat_interleave(group)[: len(x)]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_within_the_bound(dtype, bits, seed):
    for shift, group in ((0.0, 64), (1000.0, 8), (-1000.0, 64), (1e-3, 72)):
        x = (numbers((40, 77), torch.float64) + shift).to(dtype)
        made = quantise_groups(x, bits, group, seed)
        top, e = (1 << bits) - 1, 2.0**-24
        back = dequantise_groups(*made, x.shape, torch.float32, bits, group)
        error, s = exact_error(x, back, made[1], group)
        size = back.double().flatten().abs() + (x.double().flatten().abs() if dtype == torch.float64 else 0)
        assert (error <= s * ((0.5 if seed is None else 1) + 4 * top * e) + e * size).all()
        rows = torch.cat([x.double().flatten(), x.double().flatten()[-1:].expand(-x.numel() % group)]).view(-1, group)
        low, high = rows.amin(1), rows.amax(1)
        most = (1 + 2.0**-7) * (high - low + 2.0**-7 * low.abs()) / top * (1 + 3 * e)
        assert (made[1].double() <= most.clamp_min(2.0**-126)).all()


def test_the_bound_is_close():
    """A correct method could be within twice the bound; that half of a step is reached shows it to be this one."""
    x = torch.linspace(0, 3, 1024)
    made = quantise_groups(x, 2, 1024)
    error, s = exact_error(x, dequantise_groups(*made, x.shape, torch.float32, 2, 1024), made[1], 1024)
    assert (error / s).max() > 0.49


def test_codes_are_rounded_half_to_even():
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.25]) - 1
    made = quantise_groups(x, 2, 8)
    assert made[1].item() == 1 and made[2].item() == -1
    assert unpack_bits(made[0], 2, 8).tolist() == [0, 0, 2, 2, 3, 1, 2, 0]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_zeros_and_nothing_else_come_back_as_zeros_where_a_group_begins_at_zero(bits, centred):
    x = numbers((700,)).relu()
    made = quantise_groups(x, bits, centred=centred)
    back = dequantise_groups(*made, x.shape, x.dtype, bits, centred=centred)
    assert torch.equal(back > 0, x > 0) and torch.equal(back == 0, x == 0)
    error, s = exact_error(x, back, made[1], 64)
    assert (error <= s * 0.5001).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_centres_have_a_smaller_step_within_the_same_bound(bits):
    x = numbers((40, 64)) + 3
    made = quantise_groups(x, bits, centred=True)
    error, s = exact_error(x, dequantise_groups(*made, x.shape, x.dtype, bits, centred=True), made[1], 64)
    assert (error <= s * (0.5 + 4 * 2**bits * 2.0**-24) + 2.0**-24 * x.abs().flatten()).all()
    low, high = x.double().amin(1), x.double().amax(1)
    assert (made[1].double() <= (1 + 2.0**-7) * (high - low + 2.0**-7 * low.abs()) / 2**bits * (1 + 2.0**-22)).all()


def test_centres_are_for_rounding_to_nearest():
    with pytest.raises(UsageError, match="seed and centred"):
        quantise_groups(X, 2, seed=1, centred=True)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0e38, 1e-40, 0.1, -0.1, 12345.678])
def test_a_constant_group_comes_back(value):
    x = torch.full((100,), value)
    made = quantise_groups(x, 2)
    back = dequantise_groups(*made, x.shape, x.dtype, 2)
    if value == float(torch.tensor(value).bfloat16()):
        assert torch.equal(back, x) and (made[1] == 0).all()
    else:
        assert ((back - x).abs() <= made[1].float().max() / 2 + 2.0**-23 * abs(value)).all()
        assert (back - x).abs().max() <= 2.0**-8 * abs(value) + 2.0**-126


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_group_that_is_not_finite_comes_back_as_nan_alone(bad, dtype, seed):
    x = numbers((300,), dtype)
    for place in (64, 70, 127):
        x[64:128] = 1
        x[place] = bad
        made = quantise_groups(x, 4, 64, seed)
        back = dequantise_groups(*made, x.shape, dtype, 4)
        assert back[64:128].isnan().all() and back[:64].isfinite().all() and back[128:].isfinite().all()
        assert same(made, groups.quantise_groups_reference(x.float(), 4, 64, seed))


def test_ranges_at_the_ends_of_float32():
    huge = torch.tensor([-3e38, 3e38] * 4)
    assert dequantise_groups(*quantise_groups(huge, 2, 8), (8,), torch.float32, 2, 8).isnan().all()
    for x in (torch.tensor([0.0, 2.0**126] * 4), torch.tensor([0.0, 1e-44] * 4), torch.tensor([1e-38, 2e-38] * 4)):
        made = quantise_groups(x, 1, 8)
        assert same(made, groups.quantise_groups_reference(x, 1, 8, None))
        assert ((dequantise_groups(*made, (8,), x.dtype, 1, 8) - x).abs() <= made[1].float() / 2).all()


def test_bytes_are_exact():
    for n, bits, group in ((1000, 2, 64), (1001, 1, 8), (1, 4, 64), (4097, 8, 1024), (0, 2, 64)):
        made = quantise_groups(torch.randn(n), bits, group)
        assert sum(t.nbytes for t in made) == -(-n * bits // 8) + 4 * -(-n // group)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in made)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_stochastic_rounding_has_the_right_mean(bits):
    """Over seeds, against Hoeffding's bound at a false alarm of 1e-9 for all elements together."""
    x = numbers((256,), seed=4)
    draws = [quantise_groups(x, bits, 64, seed) for seed in range(2000)]
    mean = torch.stack([dequantise_groups(*made, x.shape, torch.float64, bits) for made in draws]).mean(0)
    error, s = exact_error(x, mean, draws[0][1], 64)
    e, top = 2.0**-24, (1 << bits) - 1
    slack = s * (4 * top + 1) * e + e * mean.abs().max()
    assert (error <= s * (torch.tensor(2 * 256 * 1e9).log() / (2 * 2000)).sqrt() + slack).all()


def test_draws_are_uniform_and_independent():
    u = torch.stack([groups.uniform_reference(1 << 16, seed) for seed in (0, 1, -1, 1 << 40)])
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(1) - 0.5).abs().max() < 7 * (1 / 12 / 65536) ** 0.5
    counts = torch.histc(u[0], 256, 0, 1)
    assert ((counts - 256).square() / 256).sum() < 400  # chi-squared with 255 degrees of freedom: 1e-8
    centred = u - 0.5
    for shift in (1, 2, 3, 64, 1024):
        for other in centred:
            assert (centred[0] * other.roll(shift)).mean().abs() * 12 < 7 / 256


def test_seeds_differ_and_repeat():
    x = torch.rand(4096)
    codes = [quantise_groups(x, 2, seed=seed)[0] for seed in (1, 1, 2, -1, 1 << 62)]
    assert torch.equal(codes[0], codes[1])
    assert all(not torch.equal(codes[i], codes[j]) for i in range(2, 5) for j in range(i))


def test_shapes_strides_and_gradients_are_left_alone():
    x = numbers((6, 50, 7)).transpose(0, 2).requires_grad_()
    made = quantise_groups(x, 8, 8)
    back = dequantise_groups(*made, x.shape, torch.bfloat16, 8, 8)
    assert not any(t.requires_grad for t in (*made, back))
    assert back.shape == x.shape and back.dtype == torch.bfloat16
    assert same(made, groups.quantise_groups_reference(x.detach().flatten(), 8, 8, None))


# steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 5))
def test_steps_are_those_of_bucketize(dtype, bits):
    for count in {0, 1, 2**bits // 2, 2**bits - 1}:
        boundaries = torch.linspace(-2, 2, count)
        x = torch.cat([numbers((500,)), boundaries, torch.tensor([torch.nan, torch.inf, -torch.inf])]).to(dtype)
        index = torch.bucketize(x.float(), boundaries)
        packed = bucketize_pack(x, boundaries, bits)
        assert torch.equal(unpack_bits(packed, bits, len(x)).long(), index)
        levels, grad = numbers((count + 1,), seed=2), numbers(x.shape, dtype, seed=3)
        product = gather_unpack(packed, levels, grad, bits)
        wide = torch.promote_types(dtype, torch.float32)
        assert product.dtype == dtype and torch.equal(product, (grad.to(wide) * levels[index]).to(dtype))


def test_an_index_without_level_is_nan():
    packed = pack_bits(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2)
    product = gather_unpack(packed, torch.tensor([1.0, 2.0, 3.0]), torch.ones(4), 2)
    assert product[:3].tolist() == [1, 2, 3] and product[3].isnan()


def test_steps_of_other_shapes_and_strides():
    x, grad = numbers((30, 20)).T, numbers((20, 30), seed=1)
    boundaries, levels = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, 1.0, 2.0])
    product = gather_unpack(bucketize_pack(x, boundaries, 2), levels, grad, 2)
    assert torch.equal(product, grad * levels[torch.bucketize(x.contiguous(), boundaries)])


def test_one_bit_of_relu():
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2.0], requires_grad=True)
    (expected,) = torch.autograd.grad(x.relu().sum(), x)
    kept = bucketize_pack(x, torch.tensor([0.0]), 1)
    assert torch.equal(gather_unpack(kept, torch.tensor([0.0, 1.0]), torch.ones(5), 1), expected)


# use


X, B, PACKED = torch.ones(64), torch.zeros(1), torch.zeros(8, dtype=torch.uint8)
MADE = torch.zeros(16, dtype=torch.uint8), B.bfloat16(), B.bfloat16()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack_bits(PACKED, 0), "bits=0: give a whole number from 1 to 8"),
        (lambda: pack_bits(PACKED, True), "bits=True"),
        (lambda: pack_bits(X, 2), "codes has the dtype torch.float32: give one of torch.uint8"),
        (lambda: pack_bits([1], 2), "codes is a list: give a tensor"),
        (lambda: unpack_bits(PACKED, 2, 33), "8 bytes: 33 elements of 2 bits have 9"),
        (lambda: unpack_bits(PACKED, 2, -1), "n=-1"),
        (lambda: unpack_bits(PACKED.view(2, 4), 2, 32), "packed has the shape (2, 4): give 1 dimension"),
        (lambda: quantise_groups(X, 9), "bits=9"),
        (lambda: quantise_groups(X, 2, 12), "group=12: give a multiple of 8 up to 1024"),
        (lambda: quantise_groups(X, 2, 2048), "group=2048"),
        (lambda: quantise_groups(X, 2, seed=1 << 63), "seed=9223372036854775808"),
        (lambda: quantise_groups(X.long(), 2), "x has the dtype torch.int64"),
        (lambda: quantise_groups(X.to_sparse(), 2), "x has the layout torch.sparse_coo: give a dense tensor"),
        (lambda: dequantise_groups(*MADE, (65,), torch.float32, 2), "16 bytes: 65 elements of 2 bits have 17"),
        (lambda: dequantise_groups(*MADE, (64,), torch.float32, 2, 8), "1 scales, 1 zeros: 64 elements in groups of 8"),
        (lambda: dequantise_groups(*MADE, (64,), torch.int8, 2), "dtype=torch.int8"),
        (lambda: dequantise_groups(MADE[0], B, B, (64,), torch.float32, 2), "scale has the dtype torch.float32"),
        (lambda: bucketize_pack(X, B, 5), "bits=5: give a whole number from 1 to 4"),
        (lambda: bucketize_pack(X, torch.zeros(2), 1), "2 boundaries: with these bits, give 0 to 1"),
        (lambda: bucketize_pack(X, B.double(), 1), "boundaries has the dtype torch.float64"),
        (lambda: gather_unpack(PACKED, B[:0], X, 1), "0 levels: with these bits, give 1 to 2"),
        (lambda: gather_unpack(PACKED, B, X, 2), "8 bytes: 64 elements of 2 bits have 16"),
        (lambda: gather_unpack(PACKED, B.to("meta"), X, 1), "levels on meta: put them on cpu"),
    ],
)
def test_wrong_use_is_an_error_that_says_what_to_give(call, says):
    with pytest.raises(UsageError) as error:
        call()
    assert says in str(error.value)


def run(code, **env):
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert made.returncode == 0, made.stderr
    return made


USE = "import torch; from weft.kernels.bits import pack_bits; pack_bits(torch.ones(9, dtype=torch.uint8), 3)"


def test_numba_is_loaded_at_the_first_use_and_the_environment_stays():
    run(
        "import os, sys; before = dict(os.environ); import weft.kernels.bits, weft.kernels.groups\n"
        f"import weft.kernels.step_lookup; assert 'numba' not in sys.modules\n{USE}\n"
        "assert 'numba' in sys.modules and 'torch._dynamo' not in sys.modules and dict(os.environ) == before"
    )


LOOPS = [info.name for info in pkgutil.iter_modules(cpu.__path__)]


@pytest.mark.parametrize("name", LOOPS)
def test_the_first_use_of_a_kernel_takes_at_most_five_seconds(name, tmp_path):
    """CPU seconds of this process and its compiler for each kernel of a file; the first one's with Numba's import."""
    code = (
        "import importlib, time; from weft.kernels.compiled import Kernel; start, most = time.process_time(), 0\n"
        f"file = importlib.import_module('weft.kernels.cpu.{name}')\n"
        "for one in [k for k in vars(file).values() if isinstance(k, Kernel) and k.loop.__module__ == file.__name__]:\n"
        "    one.compile(); now = time.process_time(); start, most = now, max(most, now - start)\n"
        "print(most)"
    )
    assert float(run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout) <= 5


def test_machine_code_is_kept_on_disk(tmp_path):
    code = f"{USE}; from weft.kernels.cpu import packing; s = packing.pack.dispatcher.stats\n" + (
        "print(sum(s.cache_hits.values()), sum(s.cache_misses.values()))"
    )
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split() == ["0", "1"]
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split() == ["1", "0"]


def test_a_folder_that_cannot_be_written_is_no_obstacle():
    """Neither the package's folder nor the user's cache: the code stays in the process."""
    code = (
        "import os, tempfile\n"
        "def refuse(*args, **kwargs): raise PermissionError('read-only')\n"
        f"import numba, torch\ntempfile.TemporaryFile = refuse\n{USE}\n"
        "from weft.kernels.cpu import packing\nassert packing.pack.dispatcher.stats.cache_path is None"
    )
    run(code)


def test_a_long_compilation_is_announced(caplog):
    class Stats:
        cache_misses, cache_path = {"one": 1}, "somewhere"

    class Found:
        stats = Stats

    from weft.kernels.cpu import packing

    packing.pack._announce(Found)
    assert "weft: compiling the kernel pack for this CPU, once" in caplog.text
    caplog.clear()
    Stats.cache_misses = {}
    packing.pack._announce(Found)
    assert not caplog.text


def test_a_first_use_by_several_threads_compiles_once():
    from weft.kernels.cpu import packing

    fresh = compiled.Kernel(packing.unpack.loop, packing.unpack.signature)
    with ThreadPoolExecutor(4) as pool:
        found = {id(code) for code in pool.map(lambda _: fresh.compile(), range(4))}
    assert len(found) == 1


def test_an_error_in_a_thread_is_raised(threads):
    threads(4)

    def fail(start, stop):
        if start:
            raise ValueError(f"from {start}")

    with pytest.raises(ValueError, match="from"):
        compiled.share(fail, 4 * compiled.GRAIN, 64)


@given(size=st.integers(0, 5 * compiled.GRAIN), unit=st.sampled_from([8, 64, 1000, 1024]), count=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_parts_cover_the_whole_once(size, unit, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        parts = []
        compiled.share(lambda start, stop: parts.append((start, stop)), size, unit)
    finally:
        torch.set_num_threads(before)
    parts = sorted(part for part in parts if part[0] < part[1])
    assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
    assert (parts[0][0], parts[-1][1]) == (0, size) if size else not parts
    assert all(start % unit == 0 for start, _ in parts) and len(parts) <= count


def test_the_key_depends_on_all_bits_of_the_seed():
    found = {groups.keys(seed) for seed in [0, *(1 << k for k in range(63)), -(1 << 63)]}
    assert len(found) == 65 and all(0 <= word < 1 << 32 for pair in found for word in pair)


def test_compiled_models_take_an_operator_as_one_step():
    def f(x):
        made = quantise_groups(x, 2)
        return dequantise_groups(*made, x.shape, x.dtype, 2) * 2

    x = torch.randn(5, 64)
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))
