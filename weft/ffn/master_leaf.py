"""A tree of small feed-forward layers beside one that every input passes, with an even load on the tree's leaves.

    y  = k tree(x) + (1 - k) master(x),   k = sigmoid(kappa)
    L' = L + h mean_i H(c_i) + a 2^d sum_j f_j mean(m_j)

The tree, with its decisions c, its mixture m and both losses, is `FastFeedForward`; f_j is the part of the batch that
goes to leaf j. The master leaf learns what all inputs share; kappa is trained with the rest. Without the last term, a
leaf that few inputs reach early is reached by none later.

Paper: "Enhancing Fast Feed Forward Networks with Load Balancing and a Master Leaf Node", Andreas Charalampopoulos,
Nikolas Chatzis, Foivos Ntoulas-Panagiotopoulos, Charilaos Papaioannou, Alexandros Potamianos, 2024, arXiv:2405.16836.
In the authors' code the master leaf has 8 hidden units, kappa starts at 1/2, and training is by the mixture, in two
phases: h = a = 1, then h = 3 and a = 0. ``soft-master-leaf`` is that (set the attributes ``hardening`` and ``balance``
between the two); ``master-leaf`` takes one leaf in training, too, see `FastFeedForward`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import Unsupported
from weft.ffn.fast_feed_forward import FastFeedForward
from weft.ffn.mixture import uniform
from weft.kernels.compiled import check_whole
from weft.method import method
from weft.testing.example import Example


@method(
    "master-leaf",
    contract="layer",
    family="ffn",
    papers=[19],
    variants={
        "soft-master-leaf": {
            "options": {"straight_through": False, "hardening": 1.0, "balance": 1.0},
            "summary": "A tree of small feed-forward layers beside one for every input, trained as a mixture.",
        }
    },
)
class MasterLeafFeedForward(FastFeedForward):
    """A `FastFeedForward` with a leaf that is always computed.

    Args:
        in_features: D.
        out_features: O.
        depth: d.
        leaf_width: w.
        master_width: hidden units of the master leaf.
        hardening: h.
        balance: a.
        options: the others are those of `FastFeedForward`.

    Raises:
        UsageError, Unsupported: as there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        depth: int = 3,
        leaf_width: int = 32,
        master_width: int = 8,
        hardening: float = 0.1,
        balance: float = 0.1,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"depth": depth, "leaf_width": leaf_width, "hardening": hardening, "balance": balance}
        super().__init__(in_features, out_features, **given, **options)
        check_whole("master_width", master_width, 1, 1 << 31)
        draw = torch.Generator().manual_seed(options.get("seed", 0) + 1)
        like, bias = self.node_weight, self.up_bias is not None
        up, down = (
            nn.Linear(in_features, master_width, bias, "meta"),
            nn.Linear(master_width, out_features, bias, "meta"),
        )
        for linear in (up, down):
            for name, p in list(linear.named_parameters()):
                start = uniform(tuple(p.shape), linear.in_features, draw)
                linear.register_parameter(name, nn.Parameter(start.to(like)))
        self.master: Any = nn.Sequential(up, copy.deepcopy(self.activation), down)
        self.kappa = nn.Parameter(torch.full_like(self.node_bias[0], 0.5).detach())

    @classmethod
    def from_dense(cls, layer: nn.Module, *, depth: int = 3, **options: Any) -> Self:
        """As `FastFeedForward.from_dense`; the master leaf is new and gives zero at first."""
        made = super().from_dense(layer, depth=depth, **options)
        with torch.no_grad():
            for p in made.master[2].parameters():
                p.zero_()
            made.down_weight.div_(made.kappa.sigmoid())
            if made.down_bias is not None:
                made.down_bias.div_(made.kappa.sigmoid())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., O]``: the tree, as in `FastFeedForward`, and the master leaf."""
        k = self.kappa.sigmoid()
        return k * super().forward(x) + (1 - k) * self.master(x)

    def frozen(self) -> Callable[..., Tensor]:
        """Raises Unsupported."""
        raise Unsupported("the master leaf is computed by torch's own layers", "the layer as it is, in eval mode")


def example() -> Example:
    """Hidden units four times the width, in eight leaves, and six sequences of five tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)), torch.randn(6, 5, 32)
    return Example(layer, x, torch.arange(6) % 2, {"master_width": 5})


def _entropy_of_use(layer: FastFeedForward, x: Tensor) -> float:
    """In nats, of the leaves that hard inference takes; by the signs of the logits."""
    right = (x @ layer.node_weight.T + layer.node_bias >= 0).tolist()
    use = [0] * (1 + len(layer.node_bias))
    for row in right:
        node = 0
        while node < len(row):
            node = 2 * node + 1 + row[node]
        use[node - len(row)] += 1
    return -sum(n / len(right) * math.log(n / len(right)) for n in use if n)


@claim(
    "On digits the load-balancing loss raises leaf-usage entropy above that of plain FFF, while hard inference "
    "evaluates exactly depth node neurons, one leaf and the master leaf",
    row=19,
    budget=5.0,
    mutants={
        "no balance": ("self.balance * imbalance(m, taken)", "0 * imbalance(m, taken)", "weft.ffn.fast_feed_forward"),
        "balance rewarded": ("+ self.balance * imb", "- self.balance * imb", "weft.ffn.fast_feed_forward"),
        "no load, only means": ("(taken.mean(0) * m.mean(0)).sum()", "m.mean(0).sum()", "weft.ops.tree"),
        "no master leaf": ("(1 - k) * self.master(x)", "0 * self.master(x)"),
        "an untrained share": ("k = self.kappa.sigmoid()", "k = self.kappa.detach().sigmoid() + 0 * self.kappa"),
        "shares that do not add up": ("k * super().forward(x)", "super().forward(x)"),
        "all leaves": (
            "(out := self._direct(x)) is None",
            "(out := self.all_leaves(x)) is None",
            "weft.ffn.fast_feed_forward",
        ),
    },
)
def even_load(seed: int) -> list[Check]:
    """Entropies in nats, means of three networks; the last one's outputs from one leaf and the master leaf."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 8 - 1, dtype=torch.float32), torch.tensor(data.target)
    means = list[float]()
    for balance in (1.0, 0.0):
        total = 0.0
        for k in range(3):
            layer: Any = MasterLeafFeedForward(
                64, 10, depth=3, leaf_width=4, balance=balance, hardening=1.0, straight_through=False, seed=seed + k
            )
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
            draw = torch.Generator().manual_seed(seed + k)
            for _ in range(150):
                rows = torch.randint(len(x), (128,), generator=draw)
                optimizer.zero_grad()
                F.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                total += _entropy_of_use(layer, x) / 3
        means.append(total)
    rows, start = torch.arange(0, len(x), 97), copy.deepcopy(layer.eval())
    with torch.no_grad():
        share, far = 1 / (1 + math.exp(-start.kappa.item())), 0.0
        for r in rows.tolist():
            node, passed = 0, list[int]()
            while node < 7:
                passed.append(node)
                node = 2 * node + 1 + int(start.node_weight[node] @ x[r] + start.node_bias[node] >= 0)
            for name, p in layer.named_parameters():
                if not name.startswith(("master", "kappa")):
                    read = passed if name.startswith("node") else [node - 7]
                    p.fill_(torch.nan)[read] = start.get_parameter(name)[read]
            up, down = start.up_weight[node - 7], start.down_weight[node - 7]
            leaf = F.gelu(up @ x[r] + start.up_bias[node - 7]) @ down + start.down_bias[node - 7]
            first, second = start.master[0], start.master[2]
            master = second.weight @ F.gelu(first.weight @ x[r] + first.bias) + second.bias
            error = float((layer(x[r : r + 1])[0] - share * leaf - (1 - share) * master).abs().max())
            far = max(far, error if math.isfinite(error) else math.inf)
    return [
        Check(means[0] - means[1], 0.5, ">=", "entropy that balancing adds"),
        Check(far, 1e-4, what="outputs of d nodes, one leaf and the master leaf, the others nan"),
        Check(abs(start.kappa.item() - 0.5), 1e-4, ">=", "step of kappa"),
    ]


@claim(
    "Gradients of any loss are those of the loss plus h times the decisions' mean entropy and a times the load's "
    "imbalance, to 1e-9 in float64; straight-through, values are the one leaf's",
    row=19,
    mutants={
        "no hardening": ("self.hardening * entropy(z).mean()", "0 * entropy(z).mean()", "weft.ffn.fast_feed_forward"),
        "entropies summed": ("entropy(z).mean()", "entropy(z).sum()", "weft.ffn.fast_feed_forward"),
        "entropy in bits": (
            "F.softplus(z) - z * z.sigmoid()",
            "(F.softplus(z) - z * z.sigmoid()) / 0.6931",
            "weft.ops.tree",
        ),
        "no balance": ("self.balance * imbalance(m, taken)", "0 * imbalance(m, taken)", "weft.ffn.fast_feed_forward"),
        "balance of the mixture": ("imbalance(m, taken)", "imbalance(m, m)", "weft.ffn.fast_feed_forward"),
        "soft values": ("taken + (m - m.detach())", "m", "weft.ffn.fast_feed_forward"),
        "no gradient through decisions": ("taken + (m - m.detach())", "taken + 0 * m", "weft.ffn.fast_feed_forward"),
        "hidden layer unweighted": (
            "* m.unsqueeze(2).to(h.dtype)",
            "* m.detach().unsqueeze(2).to(h.dtype)",
            "weft.ops.tree",
        ),
    },
)
def losses_join(seed: int) -> list[Check]:
    """Largest relative errors of outputs and gradients, the input's too."""
    checks, draw = list[Check](), torch.Generator().manual_seed(seed)
    x = torch.randn(40, 20 + seed % 7, generator=draw, dtype=torch.float64, requires_grad=True)
    g = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    for through in (False, True):
        given: dict[str, Any] = {"hardening": 0.7, "balance": 0.4, "seed": seed, "straight_through": through}
        layer: Any = FastFeedForward(x.shape[1], 6, depth=3, leaf_width=2 + seed % 3, dtype=torch.float64, **given)
        by, nodes = [x, *layer.parameters()], 7
        found = [layer(x), *torch.autograd.grad((layer(x) * g).sum(), by)]
        c = 1 / (1 + torch.exp(-(x @ layer.node_weight.T + layer.node_bias)))
        soft, hard = [torch.ones_like(c[:, 0])], [torch.ones_like(c[:, 0])]
        for i in range(nodes):
            right = (c[:, i] >= 0.5).double()
            soft += [soft[i] * (1 - c[:, i]), soft[i] * c[:, i]]
            hard += [hard[i] * (1 - right), hard[i] * right]
        m, used = torch.stack(soft[nodes:], 1), torch.stack(hard[nodes:], 1)
        h = F.gelu(torch.einsum("nd,lwd->nlw", x, layer.up_weight) + layer.up_bias)
        leaves = torch.einsum("nlw,lwo->nlo", h, layer.down_weight) + layer.down_bias
        y = torch.einsum("nl,nlo->no", used + m - m.detach() if through else m, leaves)
        loss = -0.7 * (c * c.log() + (1 - c) * (1 - c).log()).sum() / c.numel()
        for j in range(nodes + 1):
            loss = loss + 0.4 * (nodes + 1) * used[:, j].mean() * m[:, j].mean()
        wanted = [y, *torch.autograd.grad((y * g).sum() + loss, by)]
        errors = [float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(found, wanted, strict=True)]
        checks.append(Check(max(errors), 1e-9, what="straight-through" if through else "mixture"))
    return checks
