"""The loop that sends rows down a tree gives its reference's values, for every shape, and looks at what is its own."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import measure
from weft.errors import Unsupported, UsageError
from weft.kernels import compiled, tree
from weft.kernels.direct_tree import direct_tree, frozen_tree
from weft.kernels.tree import ACTIVATIONS, tree_feed_forward, tree_feed_forward_reference

NAMES = ["nodes", "node_bias", "up", "up_bias", "down", "down_bias"]


def case(depth, width, features, outputs, rows, seed=0, bias=True, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    leaves = 1 << depth
    shapes = [(leaves - 1, features), (leaves - 1,), (leaves, width, features), (leaves, width)]
    shapes += [(leaves, width, outputs), (leaves, outputs)]
    parts = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    if not bias:
        parts[3] = parts[5] = None
    return torch.randn(rows, features, generator=draw, dtype=torch.float64).to(dtype), parts


def exact(x, parts, activation="gelu"):
    return tree_feed_forward_reference(x.double(), *(p if p is None else p.double() for p in parts), activation)


def near(found, wanted):
    assert found.shape == wanted.shape
    return torch.allclose(
        found.double(), wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().amax() if wanted.numel() else 0))
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.sampled_from([1, 2, 7, 8, 9, 16, 19]),
    st.sampled_from([1, 15, 16, 17, 63, 64, 81, 130]),
    st.sampled_from([1, 15, 16, 33, 70]),
    st.sampled_from([0, 1, 2, 17, 65, 130]),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_loop_gives_the_reference(depth, width, features, outputs, rows, activation, bias, seed):
    x, parts = case(depth, width, features, outputs, rows, seed, bias)
    clear = torch.ones(rows, dtype=torch.bool)
    if depth:  # rows near a boundary may go either way
        clear = ((x.double() @ parts[0].double().T + parts[1].double()).abs() > 1e-4).all(1)
    assert near(tree_feed_forward(x, *parts, activation)[clear], exact(x, parts, activation)[clear])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_plain_torch(dtype):
    x, parts = case(3, 4, 10, 6, 20, dtype=dtype)
    assert torch.equal(tree_feed_forward(x, *parts, "relu"), tree_feed_forward_reference(x, *parts, "relu"))


def test_strided_inputs_and_weights():
    x, parts = case(3, 4, 10, 6, 20)
    wide = torch.stack([x, x], 2)[..., 0]
    mixed = [torch.stack([p, p], -1)[..., 0] for p in parts]
    assert not wide.is_contiguous() and torch.equal(tree_feed_forward(wide, *mixed), tree_feed_forward(x, *parts))


def test_rows_by_themselves_and_on_two_threads_give_the_same_bits():
    x, parts = case(4, 32, 256, 256, 300)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(tree_feed_forward(x, *parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(torch.cat([tree_feed_forward(row[None], *parts) for row in x]), found[0])


def test_nan_goes_left_as_in_the_reference():
    x, parts = case(3, 4, 10, 6, 3)
    x[1, 2] = torch.nan
    assert near(tree_feed_forward(x, *parts).nan_to_num(7.0), exact(x, parts).nan_to_num(7.0))


def test_operator():
    x, parts = case(2, 3, 5, 4, 6)
    torch.library.opcheck(tree._tree, (x, *parts, "gelu"))
    torch.library.opcheck(tree._tree, (x, *parts[:3], None, parts[4], None, "relu"))
    compiled = torch.compile(lambda x: tree_feed_forward(x, *parts) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), tree_feed_forward(x, *parts) + 1)


def test_operations_are_those_of_one_leaf():
    x, parts = case(3, 5, 20, 7, 9)
    found = measure.operations(lambda: tree_feed_forward(x, *parts))["total"]
    assert found == 9 * 2 * (3 * 20 + 5 * (20 + 7))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(3, 9)},
        {"x": torch.randn(3, 10, dtype=torch.float64)},
        {"x": torch.randint(3, (3, 10))},
        {"nodes": torch.randn(6, 10)},
        {"node_bias": torch.randn(7, 1)},
        {"up": torch.randn(7, 4, 10)},
        {"up": torch.randn(8, 40)},
        {"up_bias": torch.randn(8, 5)},
        {"down": torch.randn(8, 4)},
        {"down_bias": torch.randn(6)},
        {"activation": "tanh"},
    ],
)
def test_what_does_not_fit(change):
    x, parts = case(3, 4, 10, 6, 3)
    with pytest.raises(UsageError):
        tree_feed_forward(**{"x": x, **dict(zip(NAMES, parts, strict=True)), "activation": "gelu", **change})


def direct(parts):
    parameters = dict(zip(NAMES, parts, strict=True))
    return parameters, direct_tree(parameters, NAMES, "gelu")


def test_direct_calls_see_every_change_of_the_weights():
    x, parts = case(3, 4, 10, 6, 5)
    parameters, run = direct(parts)
    with torch.inference_mode():
        assert torch.equal(run(x), tree_feed_forward(x, *parts))
        parts[4].mul_(2.0)
        assert torch.equal(run(x), tree_feed_forward(x, *parts))
        parameters["up"].data = parts[2] * 3
        assert torch.equal(run(x), tree_feed_forward(x, *parameters.values()))
        parameters["up"] = parts[2] * 5
        assert torch.equal(run(x.view(1, 5, 10)), tree_feed_forward(x, *parameters.values())[None])
        parameters["up"] = parts[2].double()
        assert run(x) is None


def test_direct_calls_leave_the_rest_to_the_operator():
    x, parts = case(3, 4, 10, 6, 5)
    _, run = direct(parts)
    with torch.no_grad():
        assert run(x) is not None
        for other in (x.double(), x[:, ::2], x[:, :9].contiguous(), torch.randn(200_000, 10), torch.tensor(1.0)):
            assert run(other) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert run(x) is None
        with compiled.dispatched():
            assert run(x) is None
        assert torch.func.vmap(lambda row: torch.zeros(()) if run(row) is None else row.sum())(x).shape == (5,)
        assert direct([*parts[:3], None, *parts[4:]])[1](x) is None
    assert run(x) is None


def test_direct_calls_from_several_threads():
    x, parts = case(4, 8, 64, 64, 40)
    _, run = direct(parts)
    wanted, wrong = tree_feed_forward(x, *parts), []

    def work(rows):
        with torch.inference_mode():
            for _ in range(200):
                if not torch.equal(run(x[:rows]), wanted[:rows]):
                    wrong.append(rows)

    workers = [threading.Thread(target=work, args=[rows]) for rows in (1, 7, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(("outputs", "bias"), [(10, True), (6, False)])
def test_a_frozen_tree(outputs, bias):
    x, parts = case(3, 5, 10, outputs, 24, bias=bias)
    run, wanted = frozen_tree(parts, "relu"), tree_feed_forward(x, *parts, "relu")
    assert torch.equal(run(x), wanted) and torch.equal(run(x[3]), wanted[3]) and run(x[:0]).shape == (0, outputs)
    assert torch.equal(run(x.view(2, 3, 4, 10)), wanted.view(2, 3, 4, outputs))
    for other in (torch.stack([x, x], -1)[..., 0], x.expand(1, -1, -1)):
        assert torch.equal(run(other).view_as(wanted), wanted)
    for out in (torch.empty(24, outputs), torch.empty(24, 2 * outputs)[:, ::2], torch.empty(outputs, 24).t()):
        assert run(x, out=out) is out and torch.equal(out, wanted)
    for p in parts:
        if p is not None:
            p.data = torch.full_like(p, torch.nan)
    assert torch.equal(run(x), wanted)
    assert measure.operations(lambda: run(x))["total"] == 24 * 2 * (3 * 10 + 5 * (10 + outputs))


def test_a_frozen_tree_refuses():
    x, parts = case(2, 3, 5, 4, 6)
    run = frozen_tree(parts, "gelu")
    for other, out in ((x.clone().requires_grad_(), None), (x, torch.empty(6, 4, requires_grad=True))):
        with pytest.raises(UsageError, match="no derivative"):
            run(other, out)
        with torch.no_grad():
            assert torch.equal(run(other, out), tree_feed_forward(x, *parts))
    for out in (torch.empty(6, 5), torch.empty(5, 4), torch.empty(24), torch.empty(6, 4, dtype=torch.float64)):
        with pytest.raises(UsageError, match=r"give \[6, 4\] torch.float32"):
            run(x, out)
    for other in (x.double(), x[:, :4], torch.zeros(0), torch.zeros(())):
        with pytest.raises(UsageError, match="give"):
            run(other)
    with pytest.raises(Unsupported, match="gelu"):
        frozen_tree(parts, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_tree_of_another_dtype_is_plain_torch(dtype):
    x, parts = case(3, 4, 10, 6, 20, dtype=dtype)
    assert torch.equal(frozen_tree(parts, "relu")(x), tree_feed_forward(x, *parts, "relu"))


def test_weights_of_a_frozen_tree_on_huge_pages():
    x, parts = case(6, 64, 512, 512, 30)  # 8 MiB up and down
    run, wanted = frozen_tree(parts, "gelu"), tree_feed_forward(x, *parts)
    for p in parts:
        p.share_memory_().zero_()  # which frees what was there
    assert torch.equal(run(x), wanted)


def test_what_a_frozen_tree_writes_may_overlap_what_it_reads():
    memory, (_, parts) = torch.randn(33 * 10), case(3, 8, 10, 10, 1)
    run = frozen_tree(parts, "gelu")
    for at in (0, 10, 20):
        x, out = memory[10:-10].view(31, 10), memory[at : at + 310].view(31, 10)
        wanted = tree_feed_forward(x, *parts)
        assert torch.equal(run(x, out), wanted)


@pytest.mark.filterwarnings("error")
def test_autograd_sees_what_a_frozen_tree_writes():
    x, parts = case(2, 3, 5, 4, 6)
    run, out, weight = frozen_tree(parts, "gelu"), torch.empty(6, 4), torch.ones(6, 4, requires_grad=True)
    loss = (run(x, out) * weight).sum()
    run(2 * x, out)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
    with torch.inference_mode():
        kept = torch.empty(6, 4)
        assert torch.equal(run(x, kept), run(x))
    assert torch.equal(run(x, kept), run(x)), "an inference tensor has no version"


def test_a_frozen_tree_inside_transforms():
    x, parts = case(2, 3, 5, 4, 6)
    run, wanted = frozen_tree(parts, "gelu"), tree_feed_forward(x, *parts)
    assert torch.allclose(torch.func.vmap(run)(x), wanted)
    with pytest.raises(UsageError, match="no derivative"):
        torch.func.jvp(run, (x,), (x,))
    compiled_run = torch.compile(lambda t: 2 * run(t), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled_run(x), 2 * wanted)
    for wrong, out in ((None, None), ([1.0], None), (x, [1.0])):
        with pytest.raises(UsageError, match="give a tensor"):
            run(wrong, out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_is_the_operator():
    x, parts = case(2, 3, 5, 4, 6)
    direct = direct_tree(dict(zip(NAMES, parts, strict=True)), NAMES, "gelu")
    for call in (frozen_tree(parts, "gelu"), lambda t: found if (found := direct(t)) is not None else 0 * t.sum() - 1):
        with torch.no_grad():
            traced = torch.jit.trace(call, (x,), check_trace=False)
            found, again = traced(x), traced(2 * x)
        if found.ndim:
            assert torch.equal(found, tree_feed_forward(x, *parts))
            assert torch.equal(again, tree_feed_forward(2 * x, *parts))
        else:
            assert found == -1


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as quantised ones are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(t.inner if isinstance(t, Wrapped) else t for t in args), **(kwargs or {}))


def test_weights_without_memory_are_left_to_the_operator():
    x, parts = case(2, 3, 5, 4, 6)
    wanted = tree_feed_forward(x, *parts)
    wrapped = [Wrapped(p) if k == 2 else p for k, p in enumerate(parts)]
    with torch.no_grad():
        assert direct_tree(dict(zip(NAMES, wrapped, strict=True)), NAMES, "gelu")(x) is None
    run = frozen_tree([Kept(p) if k == 2 else p for k, p in enumerate(parts)], "gelu")
    assert torch.equal(run(x), wanted)


class Kept(Wrapped):
    """One that stays wrapped when it is detached."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(func, types, args, kwargs)
        return cls(found) if func is torch.ops.aten.detach.default else found


def test_a_decision_of_zero_goes_right():
    x, parts = case(3, 8, 10, 10, 4)
    parts[0].zero_(), parts[1].zero_()
    wanted = torch.nn.functional.gelu(x @ parts[2][-1].T + parts[3][-1]) @ parts[4][-1] + parts[5][-1]
    for found in (tree_feed_forward(x, *parts), tree_feed_forward_reference(x, *parts, "gelu")):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_decision_of_zero_goes_right_for_one_row_as_for_many():
    x, parts = case(3, 4, 20, 5, 6)
    parts = [None if p is None else p.clone() for p in parts]
    parts[0][1], parts[1][1] = 0, 0  # of a node in the second level
    parts[0][0], parts[1][0] = 0, -1  # which every row passes
    many = tree_feed_forward(x, *parts, "relu")
    wanted = tree_feed_forward_reference(x.double(), *(None if p is None else p.double() for p in parts), "relu")
    assert torch.allclose(many.double(), wanted, atol=1e-5)
    for r in range(len(x)):
        assert torch.equal(tree_feed_forward(x[r : r + 1], *parts, "relu")[0], many[r])


def test_threads_that_have_one_row_each():
    before = torch.get_num_threads()
    x, parts = case(1, 1200, 512, 512, 3)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(tree_feed_forward(x, *parts, "relu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_transforms_without_addresses_take_the_operator():
    x, parts = case(2, 4, 10, 10, 4)
    run, wanted = frozen_tree(parts, "relu"), tree_feed_forward(x, *parts, "relu")
    for one in (x, torch._neg_view(-x)):
        assert torch.equal(run(one), wanted)
    assert torch.equal(torch.func.functionalize(run)(x), wanted)
    names = ("nodes", "node_bias", "up", "up_bias", "down", "down_bias")
    direct = direct_tree(dict(zip(names, parts, strict=True)), names, "relu")
    with torch.inference_mode():
        assert torch.equal(direct(x), wanted)
        assert direct(torch._neg_view(-x)) is None and torch.func.functionalize(lambda x: direct(x) is None)(x)
