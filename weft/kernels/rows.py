"""Products with chosen rows of a table, and weighted sums of them, without a tensor of all chosen rows.

The two are each other's derivatives; the second is what an embedding bag computes. In plain torch rows are read in
blocks of tokens; on CPUs float32 has loops of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.compiled import operations_of, operator, share
from weft.kernels.pages import prefer_huge

__all__ = ["row_products", "row_sums"]

BLOCK = 1 << 18  # elements of rows at once: they stay in the second-level cache


def row_products(x: Tensor, table: Tensor, numbers: Tensor, *, sparse: bool = False) -> Tensor:
    """``x[t] . table[numbers[t, j]]``, ``[T, J]``.

    Args:
        x: ``[T, D]``, of the table's dtype.
        table: ``[N, D]``.
        numbers: ``[T, J]`` int64.
        sparse: the table's gradient is a sparse tensor with T J rows, instead of as large as the table.
    """
    out: Tensor = _kind().apply(x, table, numbers, True, sparse)
    return out


def row_sums(weights: Tensor, table: Tensor, numbers: Tensor, *, sparse: bool = False) -> Tensor:
    """``sum_j weights[t, j] table[numbers[t, j]]``, ``[T, D]``; arguments as in `row_products`, weights ``[T, J]``."""
    out: Tensor = _kind().apply(weights, table, numbers, False, sparse)
    return out


class _Rows(torch.autograd.Function):
    """One of the two; by its first argument its derivative is the other one."""

    @staticmethod
    def forward(first: Tensor, table: Tensor, numbers: Tensor, products: bool, sparse: bool) -> Tensor:
        out: Tensor = (_products if products else _sums)(first, table, numbers)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, table, numbers, ctx.products, ctx.sparse = inputs
        ctx.save_for_backward(first, table, numbers)
        ctx.save_for_forward(first, table, numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, table, numbers = ctx.saved_tensors
        again, of_first, of_table = torch.is_grad_enabled(), None, None  # they may be differentiated again
        if ctx.needs_input_grad[0]:
            made = (row_sums if ctx.products else row_products) if again else (_sums if ctx.products else _products)
            of_first = made(grad, table, numbers)
        weights, x = (grad, first) if ctx.products else (first, grad)
        if ctx.needs_input_grad[1]:
            of_table = _table_gradient(weights, x, table, numbers, ctx.sparse, again)
        return of_first, of_table, None, None, None


class _WithTangents(_Rows):
    """And forward mode."""

    @staticmethod
    def jvp(ctx: Any, by_first: Tensor | None, by_table: Tensor | None, *_: None) -> Tensor:
        (first, table, numbers), made = ctx.saved_tensors, row_products if ctx.products else row_sums
        parts = [] if by_first is None else [made(by_first, table, numbers)]
        parts += [] if by_table is None else [made(first, by_table, numbers)]
        return torch.stack(parts).sum(0)


def _kind() -> type[_Rows]:
    return _Rows if torch.compiler.is_compiling() else _WithTangents  # the compiler takes no function with a jvp


def _table_gradient(weights: Tensor, x: Tensor, table: Tensor, numbers: Tensor, sparse: bool, again: bool) -> Tensor:
    """``sum_tj weights[t, j] x[t]`` into row ``numbers[t, j]`` of a tensor like the table."""
    if not sparse and again:
        return table.new_zeros(table.shape).index_add(0, numbers.reshape(-1), weighted_reference(weights, x))
    if not sparse:
        return _add_rows(weights, x, numbers, table.shape[0])
    values = weighted_reference(weights, x) if again else _weighted(weights, x)
    return torch.sparse_coo_tensor(numbers.reshape(1, -1), values, table.shape, check_invariants=False)


def _block(numbers: Tensor, width: int) -> int:
    """Tokens of a block."""
    return max(1, BLOCK // max(1, numbers.shape[1] * width))


@torch.no_grad()
def row_products_reference(x: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    """`row_products`, block by block."""
    out = x.new_empty(numbers.shape)
    size = _block(numbers, x.shape[1])
    for of_x, of_numbers, into in zip(x.split(size), numbers.split(size), out.split(size), strict=True):
        rows = table.index_select(0, of_numbers.reshape(-1)).view(*of_numbers.shape, x.shape[1])
        into.copy_(torch.bmm(rows, of_x[:, :, None]).squeeze(2))
    return out


@torch.no_grad()
def row_sums_reference(weights: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    """`row_sums` by torch's embedding bag."""
    if not numbers.numel():
        return table.new_zeros(numbers.shape[0], table.shape[1])
    return F.embedding_bag(numbers, table, per_sample_weights=weights.contiguous(), mode="sum")


@torch.no_grad()
def add_rows_reference(weights: Tensor, x: Tensor, numbers: Tensor, rows: int) -> Tensor:
    """``[rows, D]``: weighted vectors ``[T, D]`` added to the rows of their numbers ``[T, J]``."""
    out = x.new_zeros(rows, x.shape[1])
    size = _block(numbers, x.shape[1])
    for of_weights, of_x, of_numbers in zip(weights.split(size), x.split(size), numbers.split(size), strict=True):
        out.index_add_(0, of_numbers.reshape(-1), (of_weights[:, :, None] * of_x[:, None, :]).flatten(0, 1))
    return out


def weighted_reference(weights: Tensor, x: Tensor) -> Tensor:
    """``weights[t, j] x[t]``, ``[T J, D]``."""
    return (weights[:, :, None] * x[:, None, :]).flatten(0, 1)


def _native(*floats: Tensor) -> bool:
    """Whether the loops take these: the reference says what is wrong with others."""
    return all(t.ndim == 2 and t.dtype == torch.float32 for t in floats)


def _chosen(numbers: Tensor, tokens: int) -> bool:
    return numbers.ndim == 2 and numbers.dtype == torch.int64 and numbers.shape[0] == tokens


def _checked(numbers: Tensor, rows: int) -> Tensor:
    """The numbers as the loops read them."""
    if numbers.numel():
        least, most = (int(n) for n in torch.aminmax(numbers))
        if least < 0 or most >= rows:
            raise IndexError(f"rows from {least} to {most} of {rows}: give 0 to {rows - 1}")
    return numbers.contiguous()


def _tokens(loop: Any, numbers: Tensor, width: int, *given: int) -> None:
    """Calls the loop on parts of the tokens."""
    tokens, j = numbers.shape
    unit = max(1, j * width)
    share(lambda start, stop: loop(*given, start // unit, stop // unit, j, width), tokens * unit, unit)


def _products_cpu(x: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    if not (_native(x, table) and _chosen(numbers, len(x)) and x.shape[1] == table.shape[1] and table.stride(1) == 1):
        return row_products_reference(x, table, numbers)
    from weft.kernels.cpu import rows as loops

    x, numbers, out = x.contiguous(), _checked(numbers, table.shape[0]), x.new_empty(numbers.shape)
    given = x.data_ptr(), table.data_ptr(), 4 * table.stride(0), numbers.data_ptr(), out.data_ptr()
    _tokens(loops.products, numbers, table.shape[1], *given)
    return out


def _sums_cpu(weights: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    if not (
        _native(weights, table)
        and _chosen(numbers, len(weights))
        and weights.shape == numbers.shape
        and table.stride(1) == 1
    ):
        return row_sums_reference(weights, table, numbers)
    from weft.kernels.cpu import rows as loops

    weights, numbers = weights.contiguous(), _checked(numbers, table.shape[0])
    out = table.new_empty(numbers.shape[0], table.shape[1])
    given = weights.data_ptr(), table.data_ptr(), 4 * table.stride(0), numbers.data_ptr(), out.data_ptr()
    _tokens(loops.sums, numbers, table.shape[1], *given)
    return out


def _add_rows_cpu(weights: Tensor, x: Tensor, numbers: Tensor, rows: int) -> Tensor:
    if not (_native(weights, x) and _chosen(numbers, len(x)) and weights.shape == numbers.shape):
        return add_rows_reference(weights, x, numbers, rows)
    from weft.kernels.cpu import rows as loops

    weights, x, numbers = weights.contiguous(), x.contiguous(), _checked(numbers, rows)
    (tokens, j), d, out = numbers.shape, x.shape[1], prefer_huge(x.new_empty(rows, x.shape[1])).zero_()
    given = weights.data_ptr(), x.data_ptr(), numbers.data_ptr(), out.data_ptr(), tokens, j, d
    cost = max(1, tokens * j)
    share(lambda start, stop: loops.scatter(*given, start // cost, stop // cost), d * cost, 16 * cost)
    return out


def _weighted_cpu(weights: Tensor, x: Tensor) -> Tensor:
    if not _native(weights, x) or len(x) != len(weights):
        return weighted_reference(weights, x)
    from weft.kernels.cpu import rows as loops

    weights, x = weights.contiguous(), x.contiguous()
    out = prefer_huge(x.new_empty(weights.numel(), x.shape[1]))
    _tokens(loops.outer, weights, x.shape[1], weights.data_ptr(), x.data_ptr(), out.data_ptr())
    return out


def _products_fake(x: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    return x.new_empty(numbers.shape)


def _sums_fake(weights: Tensor, table: Tensor, numbers: Tensor) -> Tensor:
    return table.new_empty(numbers.shape[0], table.shape[1])


def _add_rows_fake(weights: Tensor, x: Tensor, numbers: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1])


def _weighted_fake(weights: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(weights.shape[0] * weights.shape[1], x.shape[1])


_products, _sums, _add_rows, _weighted = (
    operator(schema, reference, fake=fake, cpu=cpu, cuda=reference)
    for schema, reference, fake, cpu in (
        (
            "row_products(Tensor x, Tensor table, Tensor numbers) -> Tensor",
            row_products_reference,
            _products_fake,
            _products_cpu,
        ),
        (
            "row_sums(Tensor weights, Tensor table, Tensor numbers) -> Tensor",
            row_sums_reference,
            _sums_fake,
            _sums_cpu,
        ),
        (
            "add_rows(Tensor weights, Tensor x, Tensor numbers, SymInt rows) -> Tensor",
            add_rows_reference,
            _add_rows_fake,
            _add_rows_cpu,
        ),
        (
            "weighted_rows(Tensor weights, Tensor x) -> Tensor",
            weighted_reference,
            _weighted_fake,
            _weighted_cpu,
        ),
    )
)


@operations_of("row_products", "row_sums")
def _products_operations(x: Any, table: Any, numbers: Any, **given: Any) -> int:
    return 2 * numbers[0] * numbers[1] * table[1]


@operations_of("add_rows")
def _add_rows_operations(weights: Any, x: Any, numbers: Any, rows: Any, **given: Any) -> int:
    return 2 * numbers[0] * numbers[1] * x[1]
