"""A feed-forward layer as a tree of small ones: in training all leaves are computed, at inference one for each row.

    z_i = <n_i, x> + b_i,   c_i = sigmoid(z_i)                                   node neurons, i < 2^d - 1
    m_j = product over the path to leaf j of c_i, where it goes right, and 1 - c_i, where it goes left
    y   = sum_j m_j leaf_j(x),   leaf_j(x) = W2_j act(W1_j x + b1_j) + b2_j      training
    y   = leaf_j(x), where j is reached by going right wherever z_i >= 0         eval()
    L'  = L + h mean_i H(c_i) + a 2^d sum_j f_j mean(m_j)

H is the entropy of a decision in nats; f_j is the part of the batch that goes to leaf j. The last term, that of
`MasterLeafFeedForward`, keeps leaves in use. Both join the backward pass of any loop, see `weft.ops.auxiliary`.

Paper: "Fast Feedforward Networks", Peter Belcak, Roger Wattenhofer, 2023, arXiv:2308.14711. It sums the entropies over
nodes and batch; the authors' code takes the mean, as here. The paper has h = 3 and a = 0, where all inputs may end in
one leaf; the code's example has h = 0.1, with which what was trained is not what is computed (MNIST, d = 3, w = 16: 96%
by the mixture, 92% by one leaf). So ``fast-feed-forward`` takes the one leaf in training, too, and nodes get the
gradient that the mixture has there; ``soft-fast-feed-forward`` is the paper's training, by the mixture. Training costs
what a dense layer of 2^d w units costs. A leaf sees 2^-d of the data: deep trees overfit where these are few.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft._keeping import plain_math
from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.ffn.mixture import uniform
from weft.kernels.compiled import check_whole
from weft.kernels.direct_tree import direct_tree, frozen_tree
from weft.kernels.row_skipping import differentiated
from weft.kernels.tree import leaves_of, tree_feed_forward
from weft.method import method
from weft.ops.auxiliary import add_loss
from weft.ops.feed_forward import rows_of, two_layers
from weft.ops.token_layers import POINTWISE
from weft.ops.tree import entropy, imbalance, kernel_activation, leaf_outputs, mixed_leaves, mixture
from weft.testing.example import Example

NAMES = ("node_weight", "node_bias", "up_weight", "up_bias", "down_weight", "down_bias")


@method(
    "fast-feed-forward", contract="layer", family="ffn", papers=[24], variants={"soft-fast-feed-forward": {
        "options": {"straight_through": False, "hardening": 3.0, "balance": 0.0},
        "summary": "A feed-forward layer as a tree of small ones, trained as published: as a mixture that hardens.",
    }},
)  # fmt: skip
class FastFeedForward(Convertible):
    """An ``nn.Sequential(nn.Linear, activation, nn.Linear)`` as a tree with ``2^depth`` leaves.

    In training mode every leaf is computed; in eval mode each row descends to one, on CPUs in float32 by a kernel.

    Args:
        in_features, out_features: D and O.
        depth, leaf_width: d, levels of nodes, and w, hidden units of a leaf.
        activation: elementwise, without parameters; GELU by default.
        bias: whether leaves have biases.
        hardening: h, the weight of the decisions' mean entropy.
        balance: a, the weight of the load balancing.
        straight_through: training, too, takes the one leaf of each row; False: the mixture.
        seed: of the weights, uniform within 1 / sqrt(inputs of the layer that they belong to).
        device, dtype: of the weights.

    Raises:
        UsageError, Unsupported: for sizes that do not fit, for other activations.
    """

    converts = (nn.Sequential,)
    node_weight: Tensor
    node_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    activation: Any
    _direct: Callable[[Tensor], Tensor | None]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        depth: int = 3,
        leaf_width: int = 32,
        activation: nn.Module | None = None,
        bias: bool = True,
        hardening: float = 0.1,
        balance: float = 0.1,
        straight_through: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("leaf_width", leaf_width)):
            check_whole(name, size, 1, 1 << 31)
        check_whole("depth", depth, 1, 24)
        activation = nn.GELU() if activation is None else activation
        if type(activation) not in POINTWISE or getattr(activation, "inplace", False):
            raise Unsupported(f"{activation!r} between the layers", "an activation such as nn.GELU(), not in place")
        self.in_features, self.out_features, self.depth, self.leaf_width = in_features, out_features, depth, leaf_width
        self.hardening, self.balance, self.straight_through = float(hardening), float(balance), bool(straight_through)
        draw, leaves = torch.Generator().manual_seed(seed), 1 << depth
        shapes: list[tuple[int, ...]] = [(leaves - 1, in_features), (leaves - 1,), (leaves, leaf_width, in_features)]
        shapes += [(leaves, leaf_width), (leaves, leaf_width, out_features), (leaves, out_features)]
        for name, shape in zip(NAMES, shapes, strict=True):
            start = uniform(shape, leaf_width if name.startswith("down") else in_features, draw)
            start = nn.Parameter(start.to(device, dtype or torch.get_default_dtype()))
            self.register_parameter(name, None if not bias and name in ("up_bias", "down_bias") else start)
        self.activation, self._kind = activation, kernel_activation(activation)
        self._find()

    @classmethod
    def from_dense(cls, layer: nn.Module, *, depth: int = 3, **options: Any) -> Self:
        """A tree whose leaves are the layer's hidden units, cut in their order, with new nodes.

        The second layer's weights are multiplied by ``2^depth``: where every decision is even, the mixture is the
        layer's output. `restore_` puts back the layer as it was given.

        Args:
            layer: ``nn.Sequential(nn.Linear, activation, nn.Linear)`` with a multiple of ``2^depth`` hidden units.
            depth: d.
            options: as for the class; sizes, activation and dtype are the layer's.
        """
        check_whole("depth", depth, 1, 24)
        if given := {"leaf_width", "activation", "device", "dtype"} & options.keys():
            raise UsageError(f"{', '.join(sorted(given))} of a tree that stands in for a layer: they are the layer's")
        (first, act, second), leaves = two_layers(layer), 1 << depth
        if (width := first.out_features // leaves) * leaves != first.out_features or not width:
            raise UsageError(f"depth={depth}: {first.out_features} hidden units are not cut into {leaves} leaves")
        options |= {"depth": depth, "leaf_width": width, "activation": act}
        made = cls(first.in_features, second.out_features, **options).to(first.weight)
        shape, last = (leaves, width), None if second.bias is None else second.bias.expand(leaves, -1)
        cut = [t if t is None else t.unflatten(0, shape) for t in (first.weight, first.bias, leaves * second.weight.mT)]
        for name, start in zip(NAMES[2:], (*cut, last), strict=True):
            kept = None if start is None else start.detach().clone(memory_format=torch.contiguous_format)
            made.register_parameter(name, None if kept is None else nn.Parameter(kept))
        return made

    def extra_repr(self) -> str:
        """Sizes and the weights of the losses."""
        names = ("in_features", "out_features", "depth", "leaf_width", "hardening", "balance", "straight_through")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``: all leaves in training mode, one leaf for each row in eval mode."""
        if not self.training:
            return self.one_leaf(x) if (out := self._direct(x)) is None else out
        return self.all_leaves(rows_of(x, self.in_features, self.up_weight)).reshape(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_direct"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find()

    def _find(self) -> None:
        vars(self)["_direct"] = direct_tree(self._parameters, NAMES, self._kind) if self._kind else lambda x: None

    def one_leaf(self, x: Tensor) -> Tensor:
        """Hard inference, ``[..., D] -> [..., O]``, in either mode; decisions have no derivative, leaves have."""
        leaves = self.up_weight, self.up_bias, self.down_weight, self.down_bias
        nodes, node_bias, kind = self.node_weight, self.node_bias, x.device.type
        lower = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        rows = rows_of(x, self.in_features, nodes).to(nodes.dtype if lower else x.dtype)
        with plain_math(x.device):
            if differentiated(x, *leaves) or not self._kind:
                leaf = leaves_of(rows.detach(), nodes.detach(), node_bias.detach())
                out = leaf_outputs(rows, leaf, *leaves, self.activation)
            else:
                out = tree_feed_forward(rows, nodes, node_bias, *leaves, self._kind)
        return (out.to(torch.get_autocast_dtype(kind)) if lower else out).view(*x.shape[:-1], self.out_features)

    def frozen(self) -> Callable[..., Tensor]:
        """Hard inference as a function of a copy of the weights, for rows that come one by one: `frozen_tree`."""
        return frozen_tree([getattr(self, name) for name in NAMES], self._kind)

    def all_leaves(self, x: Tensor) -> Tensor:
        """Training, ``[N, D] -> [N, O]``, through which the losses of the decisions join the backward pass."""
        z = F.linear(x, self.node_weight, self.node_bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        m, taken = mixture(z.sigmoid()), mixture((z >= 0).to(z.dtype))
        if len(x) and (self.hardening or self.balance):
            m = add_loss(m, self.hardening * entropy(z).mean() + self.balance * imbalance(m, taken))
        m = taken + (m - m.detach()) if self.straight_through else m
        return mixed_leaves(x, m, self.up_weight, self.up_bias, self.down_weight, self.down_bias, self.activation)


def example() -> Example:
    """Hidden units four times the width, in eight leaves, and six sequences of five tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        return Example(layer, torch.randn(6, 5, 32), torch.arange(6) % 2)


def _case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[FastFeedForward, Tensor]:
    """A layer of depth 3 or 4, all of its weights drawn, and 40 rows."""
    d, w, n_in, n_out = 3 + seed % 2, 3 + seed % 7, 20 + seed % 13, 6
    layer = FastFeedForward(n_in, n_out, depth=d, leaf_width=w, straight_through=False, seed=seed, dtype=dtype)
    return layer, torch.randn(40, n_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _paths(layer: FastFeedForward, x: Tensor) -> tuple[list[list[int]], Tensor]:
    """Nodes that each row passes, last the leaf's number, and the least |z| among them; one row at a time, float64."""
    found, least = [], []
    w, b = layer.node_weight.detach().double(), layer.node_bias.detach().double()
    for row in x.detach().double():
        path, closest = [0], torch.inf
        for _ in range(layer.depth):
            z = float(w[path[-1]] @ row + b[path[-1]])
            closest = min(closest, abs(z))
            path.append(path[-1] * 2 + (2 if z >= 0 else 1))
        found.append([*path[:-1], path[-1] - len(w)])
        least.append(closest)
    return found, torch.tensor(least)


def _mixed(layer: FastFeedForward, row: Tensor, node: int = 0) -> Tensor:
    """The mixture below a node, by recursion."""
    if (j := node - len(layer.node_bias)) >= 0:
        bias = layer.up_bias[j], layer.down_bias[j]  # type: ignore[index]
        return layer.down_weight[j].T @ F.gelu(layer.up_weight[j] @ row + bias[0]) + bias[1]
    right = 1 / (1 + torch.exp(-(layer.node_weight[node] @ row + layer.node_bias[node])))
    return (1 - right) * _mixed(layer, row, 2 * node + 1) + right * _mixed(layer, row, 2 * node + 2)


@claim(
    "With 2^d leaves, hard inference evaluates exactly d node neurons and one leaf: with every other one made nan, the "
    "outputs keep all bits, in the kernel and in plain torch, with a gradient and without",
    row=24,
    mutants={
        "all leaves at inference": ("return self.one_leaf(x) if", "return self.all_leaves(x) if"),
        "another leaf": ("return place - len(nodes)", "return (place - len(nodes)) ^ 1", "weft.kernels.tree"),
        "right where negative": ("+ (z >= 0)", "+ (z < 0)", "weft.kernels.tree"),
        "every leaf is read": ("x[rows], up[j]", "x[rows], up[j] + 0 * up.sum(0)", "weft.kernels.tree"),
        "children of another node": ("1 + (z >= 0)", "2 - (z >= 0).long()", "weft.kernels.tree"),
        "every trained leaf is read": ("part, ups[j]", "part, ups[j] + 0 * up.sum(0)", "weft.ops.tree"),
    },
)
def the_rest_is_not_read(seed: int) -> list[Check]:
    """Entries that differ, for each row by itself and for all; rows whose logits nearly vanish are left out."""
    checks = []
    for dtype, trained in ((torch.float32, False), (torch.float64, False), (torch.float64, True)):
        layer, x = _case(seed, dtype)
        intact = copy.deepcopy(layer.eval().requires_grad_(trained))
        paths, least = _paths(layer, x)
        clear, differ = (least > 1e-4).nonzero().flatten().tolist(), 0
        for rows in (*([r] for r in clear[:12]), clear):
            passed = torch.tensor([paths[r] for r in rows])
            with torch.no_grad():
                for name, p in layer.named_parameters():
                    read = passed[:, :-1].flatten() if name in NAMES[:2] else passed[:, -1]
                    p.fill_(torch.nan)[read] = intact.get_parameter(name)[read]
            differ += int((layer(x[rows]) != intact(x[rows])).sum())
        checks.append(Check(differ, 0, "==", f"{dtype}, {'trained' if trained else 'frozen'}"))
    return checks


@claim(
    "With node logits scaled by 1e4, the output of hard inference equals the soft mixture to 1e-5 on every input whose "
    "path logits exceed 2e-3 in magnitude before scaling",
    row=24,
    mutants={
        "left and right swapped": ("[m * (1 - level), m * level]", "[m * level, m * (1 - level)]", "weft.ops.tree"),
        "levels out of order": ("c[:, first : 2 * first + 1]", "c.flip(1)[:, first : 2 * first + 1]", "weft.ops.tree"),
        "no bias of nodes": ("F.linear(x, self.node_weight, self.node_bias)", "F.linear(x, self.node_weight)"),
        "one bias for all leaves": ("down_bias.mT)", "down_bias.mean(0).expand_as(down_bias).mT)", "weft.ops.tree"),
        "leaves out of order": ("1, up.shape[:2])", "1, up.shape[:2]).flip(1)", "weft.ops.tree"),
        "leaves mixed up": ("return torch.cat(parts)[order.argsort()]", "return torch.cat(parts)", "weft.ops.tree"),
        "hidden layer unweighted": ("* m.unsqueeze(2)", "* m.mean(1)[:, None, None]", "weft.ops.tree"),
        "another leaf taken": ("return place - len(nodes)", "return 2 * len(nodes) - place", "weft.kernels.tree"),
    },
)
def hard_is_the_limit_of_soft(seed: int) -> list[Check]:
    """Largest differences, in float32 and float64, from the mixture of the layer itself and from one by recursion."""
    checks = []
    for dtype in (torch.float32, torch.float64):
        layer, x = _case(seed, dtype)
        x = x[_paths(layer, x)[1] > 2e-3]
        with torch.no_grad():
            soft = torch.stack([_mixed(layer, row) for row in x])
            checks.append(Check(float((layer(x) - soft).abs().max()), 1e-5, what="mixture, by recursion"))
            for p in (layer.node_weight, layer.node_bias):
                p.mul_(1e4)
            scaled = torch.stack([_mixed(layer, row) for row in x])
            hard = layer.eval()(x)
            with torch.enable_grad():
                checks.append(Check(float((layer(x) - hard).detach().abs().max()), 1e-5, what="with a gradient"))
            checks.append(Check(float((hard - scaled).abs().max()), 1e-5, what="scaled, by recursion"))
            checks.append(Check(float((hard - layer.train()(x)).abs().max()), 1e-5, what="scaled, by the layer"))
    return checks
