"""A tree of linear decisions over two-layer networks: each row is computed by one leaf alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import UsageError
from weft.kernels.compiled import FLOATS, GRAIN, check_tensor, operations_of, operator, share

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def tree_feed_forward(
    x: Tensor,
    nodes: Tensor,
    node_bias: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """``[N, O]``: each row's leaf, ``act(x up_j^T + up_bias_j) down_j + down_bias_j``; without a derivative.

    A row starts at node 0 and goes from node i to 2 i + 2 where ``x nodes_i + node_bias_i >= 0``, else to 2 i + 1.

    Args:
        x: ``[N, D]``.
        nodes: ``[2^d - 1, D]``.
        node_bias: ``[2^d - 1]``.
        up: ``[2^d, w, D]``.
        up_bias: ``[2^d, w]`` or None.
        down: ``[2^d, w, O]``.
        down_bias: ``[2^d, O]`` or None.
        activation: a key of `ACTIVATIONS`.

    Raises:
        UsageError: for other shapes, unequal dtypes, or another activation.
    """
    given = {"x": x, "nodes": nodes, "node_bias": node_bias, "up": up, "up_bias": up_bias, "down": down}
    given["down_bias"] = down_bias
    dtype = x.dtype if isinstance(x, Tensor) and x.dtype in FLOATS else torch.float32
    found = {name: check_tensor(name, t, (dtype,)) for name, t in given.items() if t is not None}
    if activation not in ACTIVATIONS:
        raise UsageError(f"activation={activation!r}: give one of {', '.join(ACTIVATIONS)}")
    leaves, width, features = up.shape if up.ndim == 3 else (0, 0, 0)
    outputs = down.shape[-1]
    shapes = {
        "x": (*x.shape[:1], features),
        "nodes": (leaves - 1, features),
        "node_bias": (leaves - 1,),
        "up": (leaves, width, features),
        "up_bias": (leaves, width),
        "down": (leaves, width, outputs),
        "down_bias": (leaves, outputs),
    }
    wrong = [f"{name} {list(t.shape)}" for name, t in found.items() if tuple(t.shape) != shapes[name]]
    if wrong or leaves < 1 or leaves & (leaves - 1):
        raise UsageError(
            f"{', '.join(wrong) or f'{leaves} leaves'}: give x [N, D], nodes [L - 1, D], node_bias [L - 1], "
            "up [L, w, D], up_bias [L, w], down [L, w, O] and down_bias [L, O] with L a power of two"
        )
    whole = {name: t.contiguous() for name, t in found.items()}
    return _tree(*(whole.get(name) for name in given), activation)


def leaves_of(x: Tensor, nodes: Tensor, node_bias: Tensor) -> Tensor:
    """The leaf ``[N]`` int64 to which each row of ``x [N, D]`` descends, in plain torch."""
    place = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)  # len(x) would be fixed in exported code
    for _ in range((nodes.shape[0] + 1).bit_length() - 1):
        z = torch.linalg.vecdot(nodes[place], x) + node_bias[place]
        place = 2 * place + 1 + (z >= 0)
    return place - len(nodes)


def tree_feed_forward_reference(
    x: Tensor,
    nodes: Tensor,
    node_bias: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """`tree_feed_forward` in plain torch."""
    out = x.new_zeros(len(x), down.shape[2])
    if len(x):
        leaf = leaves_of(x, nodes, node_bias)
        for j in leaf.unique().tolist():
            rows = (leaf == j).nonzero().squeeze(1)
            h = ACTIVATIONS[activation](F.linear(x[rows], up[j], None if up_bias is None else up_bias[j]))
            y = h @ down[j]
            out[rows] = y if down_bias is None else y + down_bias[j]
    return out


def _fake(
    x: Tensor, nodes: Tensor, node_bias: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any, activation: str
) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[2])


def native(parts: Sequence[Tensor | None]) -> bool:
    """Whether the loop for CPUs reads these as they are."""
    return sys.byteorder == "little" and all(
        p is None or (p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous()) for p in parts
    )


def plan_of(parts: Sequence[Tensor | None], activation: str) -> Any:
    """What the loop for CPUs needs to know of nodes and leaves; for as long as the memory of ``parts`` stays."""
    import numpy as np

    up, down = parts[2], parts[4]
    assert up is not None and down is not None
    leaves, width, features = up.shape
    numbers = [0 if p is None else p.data_ptr() for p in parts]
    numbers += [features, down.shape[2], leaves.bit_length() - 1, width, _NUMBERS[activation]]
    return np.array(numbers, np.uint64)


def most_rows(up: Tensor, down: Tensor) -> int:
    """Rows that the operator, too, would compute on one thread."""
    return 2 * GRAIN // _unit(up, down) - 1


def _unit(up: Tensor, down: Tensor) -> int:
    """Elements whose thread's share costs as much as a row."""
    return max(1, (up[0].numel() + down[0].numel()) // 4)


def _cpu(
    x: Tensor, nodes: Tensor, node_bias: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any, activation: str
) -> Tensor:
    parts = (nodes, node_bias, up, up_bias, down, down_bias)
    if not native((x, *parts)):
        return tree_feed_forward_reference(x, *parts, activation)
    from weft.kernels.cpu import tree as loops

    out = x.new_empty(x.shape[0], down.shape[2])
    plan, source, target = plan_of(parts, activation), x.data_ptr(), out.data_ptr()
    unit = _unit(up, down)
    share(lambda start, stop: loops.descend(plan, source, target, start // unit, stop // unit), len(x) * unit, unit)
    return out


def _cuda(*args: Any) -> Tensor:
    raise ImportError("plain torch runs there")


_tree = operator(
    "tree_feed_forward(Tensor x, Tensor nodes, Tensor node_bias, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, str activation) -> Tensor",
    tree_feed_forward_reference,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


@operations_of("tree_feed_forward")
def _operations(x: Any, nodes: Any, node_bias: Any, up: Any, up_bias: Any, down: Any, *_: Any, **__: Any) -> int:
    """A row passes one node of each level and one leaf."""
    depth = up[0].bit_length() - 1
    return int(2 * x[0] * (depth * x[1] + up[1] * (up[2] + down[2])))
