"""Route tokens to experts of which some compute next to nothing: they give 0, the token, or a learned vector.

Of N experts E are feed-forward layers; the others are ``zero``, ``copy`` and ``constant`` ones:

    E_zero(x) = 0,   E_copy(x) = x,   E_const(x) = a_1 x + a_2 v,   [a_1, a_2] = softmax(W_c x)
    G_j(x) = W_j x + W'_j G_{j-1}(x)        scores of layer j; the second term is the pathway's, absent in the first
    y = sum_{i in top-K} g_i E_i(x),        g = softmax(G) over all N experts, divided by its sum over the chosen

Tokens whose experts are not feed-forward layers take no part in those products. In training the load is balanced by

    L_b = sum_i eta_i f_i P_i,   eta_i = 1 for feed-forward experts, tau for the others   (times beta, in the loss)
    C_i = gamma eta'_i S / (tau E + N - E),   eta'_i = tau for feed-forward experts, 1 for the others

with f_i the share of tokens that choose i, P_i the mean of its probability; an expert takes its first C_i of the S
slots (tokens times K), the others are dropped.

Paper: "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", Peng Jin, Bo Zhu, Li Yuan,
Shuicheng Yan, 2024, arXiv:2410.07348.

The paper's equation has softmax's own values for g; the authors' code divides them by their sum over the chosen
experts without the zero expert, so that another beside it counts fully: so here (``renormalise=False`` for the
equation). Their code also has a two-layer router and multiplies the experts' input by K; not here. Whether T in C_i
counts a token once or K times is left open; here K times, else half of all slots would be dropped for K = 2.
On a CPU the feed-forward experts' products bound the time: it falls with the share of slots that go elsewhere, which
training has to bring about (small tau); many small experts lose against a dense layer of as many operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.errors import UsageError
from weft.ffn.mixture import Mixture, compute_dtype, uniform
from weft.measure import operations
from weft.method import method
from weft.ops.auxiliary import add_loss
from weft.ops.feed_forward import rows_of
from weft.ops.pathway import Pathway
from weft.ops.routing import balance_loss, sorted_slots, top_gates, within_capacity
from weft.testing.example import Example


@method("moe-plus-plus", contract="layer", family="ffn", papers=[211])
class MoEPlusPlus(Mixture):
    """Feed-forward experts beside zero, copy and constant ones; ``[..., D]`` to ``[..., D']``.

    ``zero=0, copy=0, constant=0, tau=1.0`` is an ordinary mixture of experts. ``scores`` and ``balance_loss`` hold the
    last pass's router scores ``[T, N]`` and L_b, without gradient; experts are numbered with feed-forward ones first,
    then constant, copy, zero.

    Args:
        features: D.
        hidden: hidden units of one feed-forward expert.
        experts: E.
        zero, copy, constant: how many; None: ``max(E // 4 - zero - copy, 2)``. The last two kinds need D' = D.
        active: K, experts of a token.
        renormalise: gates of a token sum to 1 over its experts other than zero ones.
        tau: below 1, more tokens for experts that compute nothing.
        capacity: gamma; None for no limit. In training alone.
        balance: beta, weight of L_b, whose gradient joins the backward pass (`weft.ops.auxiliary`). In training alone.
        pathway: shared by layers that run one after another; None: the router sees the token alone.
        out_features, activation, bias, seed: see `weft.ffn.mixture.Mixture`.

    Raises:
        UsageError: for numbers that do not fit.
    """

    def __init__(
        self, features: int, hidden: int, *, experts: int = 8, zero: int = 1, copy: int = 1,
        constant: int | None = None, active: int = 2, renormalise: bool = True, tau: float = 0.75,
        capacity: float | None = 1.1, balance: float = 0.01, pathway: Pathway | None = None, seed: int = 0,
        **given: Any,
    ) -> None:  # fmt: skip
        super().__init__(features, hidden, experts=experts, seed=seed, **given)
        constant = max(experts // 4 - zero - copy, 2) if constant is None else constant
        count = experts + constant + copy + zero
        wrong = min(zero, copy, constant) < 0 or not 1 <= active <= count
        if wrong or tau <= 0 or (capacity is not None and capacity <= 0):
            raise UsageError(
                f"zero={zero}, copy={copy}, constant={constant}, active={active} of {count}, tau={tau}, "
                f"capacity={capacity}: give counts, 1 to {count} active experts, and tau and capacity above 0"
            )
        if copy + constant and self.out_features != features:
            raise UsageError(f"copy, constant experts for {features} to {self.out_features} features: give 0 of each")
        self.zero, self.copy, self.constant, self.active = zero, copy, constant, active
        self.renormalise, self.tau, self.capacity, self.balance = renormalise, tau, capacity, balance
        draw = torch.Generator().manual_seed(seed + 1)
        self.router = nn.Parameter(uniform((count, features), features, draw))
        self.mix = nn.Parameter(uniform((constant, 2, features), features, draw)) if constant else None
        self.constants = nn.Parameter(torch.randn(constant, features, generator=draw)) if constant else None
        self.pathway, self.place = pathway, 0 if pathway is None else pathway.join()
        self.residual = nn.Parameter(uniform((count, count), count, draw)) if self.place else None
        self.balance_loss: Tensor | None = None
        self.scores: Tensor | None = None

    def route(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Scores G ``[T, N]`` of tokens ``[T, D]``, in float32 at least, given the layer before's."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.router.to(wide))
            if previous is not None and self.residual is not None:
                scores = scores + F.linear(previous.to(wide), self.residual.to(wide))
        return scores

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """``[..., D] -> [..., D']``; ``previous`` are the scores ``[T, N]`` of the layer before, for its pathway's."""
        flat, pathway = rows_of(x, self.features, self.up[0]), self.pathway
        if previous is None and pathway is not None:
            previous = pathway.previous(self.place, flat.shape[0])
        scores = self.route(flat, previous)
        if pathway is not None:
            pathway.leave(self.place, scores)
        probabilities, gates, chosen = top_gates(scores, self.active)
        eta = torch.cat([scores.new_ones(len(self.up)), scores.new_full((scores.shape[1] - len(self.up),), self.tau)])
        loss = balance_loss(probabilities, chosen, eta)
        if not torch.compiler.is_exporting():  # which takes them for forgotten buffers
            self.scores, self.balance_loss = scores.detach(), loss.detach()
        last = scores.shape[1] - self.zero
        if self.renormalise:
            gates = gates.masked_fill(chosen >= last, 0)
            gates = gates / gates.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        served = chosen
        if self.training and self.capacity is not None:
            served = chosen.masked_fill(~within_capacity(chosen, self._capacity(eta, chosen.numel())), scores.shape[1])
        slots = sorted_slots(served, len(self.up), every=scores.shape[1] == len(self.up) and served is chosen)
        out = flat.new_zeros(flat.shape[0], self.out_features, dtype=compute_dtype(flat))
        if self.training and self.balance > 0:
            out = add_loss(out, self.balance * loss)
        out = out.index_add(0, slots.rows, self.experts(flat, slots, gates.reshape(-1)[slots.places]))
        if self.constant + self.copy:
            full = scores.new_zeros(flat.shape[0], scores.shape[1] + 1).scatter(1, served, gates)
            out = out + self._cheap(flat.to(out.dtype), full[:, len(self.up) : last])
        return out.view(*x.shape[:-1], self.out_features)

    def _capacity(self, eta: Tensor, slots: int) -> Tensor:
        """``[N]``: slots that each expert takes."""
        computing, others = len(self.up), len(eta) - len(self.up)
        unit = (self.capacity or 0) * slots / (self.tau * computing + others)
        most = [math.ceil(unit * self.tau)] * computing + [math.ceil(unit)] * others
        return torch.tensor(most, device=eta.device)

    def _cheap(self, x: Tensor, gates: Tensor) -> Tensor:
        """What constant and copy experts add for their gates ``[T, constant + copy]``."""
        own, direct = gates.split([self.constant, self.copy], 1)
        share = direct.sum(1, keepdim=True)
        if self.mix is None or self.constants is None:
            return share.to(x.dtype) * x
        mix = F.linear(x, self.mix.flatten(0, 1).to(x.dtype)).view(x.shape[0], self.constant, 2).softmax(-1)
        share = share + (own * mix[..., 0]).sum(1, keepdim=True)
        return share.to(x.dtype) * x + (own * mix[..., 1]).to(x.dtype) @ self.constants.to(x.dtype)


def example() -> Example:
    """Four feed-forward experts of six units, and six sequences of four tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(6, 4, 8)
    return Example(layer, x, torch.arange(6) % 2, {"experts": 4, "constant": 1})


def _expert(layer: MoEPlusPlus, e: int, x: Tensor) -> Tensor:
    """Output of expert e for every token ``[T, D]``."""
    if e < len(layer.up):
        h = x @ layer.up[e].T if layer.up_bias is None else x @ layer.up[e].T + layer.up_bias[e]
        y = layer.act(h) @ layer.down[e].T
        return y if layer.down_bias is None else y + layer.down_bias[e]
    if layer.mix is not None and layer.constants is not None and (c := e - len(layer.up)) < layer.constant:
        shares = (x @ layer.mix[c].T).softmax(1)
        return shares[:, :1] * x + shares[:, 1:] * layer.constants[c]
    return x if e < len(layer.up) + layer.constant + layer.copy else 0 * x


@claim(
    "with top-1 routing and gates renormalised over the chosen experts, tokens routed to the zero or copy expert "
    "return exactly 0 or the input, and FFN-expert multiplications, those of the router and of constant experts "
    "excluded, fall below vanilla MoE's by exactly the fraction of slots sent to zero-computation experts",
    row=211,
    mutants={
        "gates are probabilities": ("renormalise: bool = True", "renormalise: bool = False"),
        "the copy expert halves": ("share = direct.sum(1, keepdim=True)", "share = direct.sum(1, keepdim=True) / 2"),
        "constants copy": ("own, direct = gates.split([self.constant", "direct, own = gates.split([self.constant"),
        "all tokens computed": ("sorted_slots(served,", "sorted_slots(served.clamp(max=len(self.up) - 1),"),
        "smallest score": (".topk(active, -1)", ".topk(active, -1, largest=False)", "weft.ops.routing"),
    },
)  # fmt: skip
def nothing_computed(seed: int) -> list[Check]:
    """Float32; the routes are read off the scores, which are checked besides."""
    draw = torch.Generator().manual_seed(seed)
    d, hidden, experts = 6 + seed % 5, 3 + seed % 3, 2 + seed % 4
    x = torch.randn(400, d, generator=draw)
    sizes: dict[str, Any] = {"experts": experts, "active": 1, "seed": seed}
    layer = MoEPlusPlus(d, hidden, constant=1, **sizes).eval()
    vanilla = MoEPlusPlus(d, hidden, zero=0, copy=0, constant=0, **sizes).eval()
    counted = operations(lambda: layer(x))["by_operator"], operations(lambda: vanilla(x))["by_operator"]
    ours, theirs = (sum(n for name, n in found.items() if "grouped_linear" in name) for found in counted)
    outside = [sum(found.values()) - n for found, n in zip(counted, (ours, theirs), strict=True)]
    gating = 2 * 400 * d * (experts + 3), 2 * 400 * d * experts
    route = (x @ layer.router.T).argmax(1)
    out, last = layer(x).detach(), experts + 2
    free = int((route >= experts).sum())
    plain = torch.stack([_expert(layer, int(e), row[None])[0] for e, row in zip(route, x, strict=True)]).detach()
    return [
        Check(int((out[route == last] != 0).sum() + (out[route == last - 1] != x[route == last - 1]).sum()), 0, "=="),
        Check(float((out - plain).abs().max()), 1e-5, what="the chosen expert's output"),
        Check(ours * 400, theirs * (400 - free), "==", "multiplications of FFN experts"),
        Check(theirs, 400 * 4 * d * hidden, "==", "those of vanilla MoE"),
        Check(outside[0] - gating[0] - 3 * 2 * 400 * d, 0, "==", "router, and constant experts: 3 d a token"),
        Check(outside[1] - gating[1], 0, "==", "vanilla MoE's router"),
    ]


@claim(
    "outputs, the balance loss and all gradients of two layers on a pathway are those of the equations over every "
    "expert, with tokens above an expert's capacity dropped and the balance loss in the objective, to 1e-9 in float64",
    row=211,
    mutants={
        "probabilities on the pathway": ("leave(self.place, scores)", "leave(self.place, scores.softmax(1))"),
        "the pathway is cut": ("F.linear(previous.to(wide)", "F.linear(previous.detach().to(wide)"),
        "no pathway": ("scores = scores + F.linear(previous", "scores = scores + 0 * F.linear(previous"),
        "zero experts in the sum": ("gates.masked_fill(chosen >= last, 0)", "gates.clone()"),
        "one eta": ("- len(self.up),), self.tau)", "- len(self.up),), 1.0)"),
        "capacities exchanged": ("[math.ceil(unit * self.tau)]", "[math.ceil(unit / self.tau)]"),
        "no capacity": ("self.training and self.capacity is not None", "False"),
        "last tokens kept": ("number < capacity[of]", "number >= sizes[of] - capacity[of]", "weft.ops.routing"),
        "loss is not added": ("out = add_loss(out, self.balance * loss)", "pass"),
        "loss per chosen": ("/ tokens\n    return (share", "/ chosen.numel()\n    return (share", "weft.ops.routing"),
        "shares of v swapped": ("mix[..., 1]).to", "mix[..., 0]).to"),
        "bias without gate": ("bias=down_bias, scale=gates", "bias=down_bias", "weft.ffn.mixture"),
    },
)  # fmt: skip
def every_expert(seed: int) -> list[Check]:
    """The reference computes all experts for all tokens and masks; tanh, so that derivatives are smooth."""
    draw = torch.Generator().manual_seed(seed)
    pathway, tokens, d = Pathway(), 24, 5
    layers = [
        MoEPlusPlus(d, 3, experts=3, constant=2, balance=0.5, capacity=0.9, activation=nn.Tanh, pathway=pathway, seed=s)
        for s in (seed, seed + 7)
    ]
    model = nn.Sequential(*layers).double()
    x, errors = (torch.randn(tokens, d, generator=draw, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *model.parameters()]
    h, scores, losses = x, None, list[Any]()
    for layer in layers:
        own = h @ layer.router.T
        scores = own if scores is None or layer.residual is None else own + scores @ layer.residual.T
        p, count = scores.softmax(1), scores.shape[1]
        gates = torch.zeros_like(p)
        room = [math.ceil(0.9 * 2 * tokens * (0.75 if e < 3 else 1) / (0.75 * 3 + count - 3)) for e in range(count)]
        shares = [0.0] * count
        for t in range(tokens):
            best = p[t].sort(descending=True).indices[:2].tolist()
            total = sum(p[t, e] for e in best if e < count - 1)
            for e in best:
                shares[e] += 1 / tokens
                room[e] -= 1
                if room[e] >= 0 and e < count - 1:
                    gates[t, e] = p[t, e] / total
        losses.append(sum((1 if e < 3 else 0.75) * shares[e] * p[:, e].mean() for e in range(count)))
        h = sum((gates[:, e, None] * _expert(layer, e, h) for e in range(count)), torch.zeros_like(h))
    wanted = torch.autograd.grad((h * errors).sum() + 0.5 * sum(losses), leaves)
    out = model(x)
    found = torch.autograd.grad((out * errors).sum(), leaves)
    worst = max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(found, wanted, strict=True))
    said = [layer.balance_loss.detach() if layer.balance else 0 for layer in layers]  # type: ignore[union-attr]
    told = max(abs(float(a) - float(b.detach())) for a, b in zip(said, losses, strict=True))
    errors_by = {"output": float((out - h).detach().abs().max()), "gradients": worst, "balance_loss": told}
    return [Check(value, 1e-9, what=what) for what, value in errors_by.items()]


@claim(
    "cut from a feed-forward layer, the experts of all hidden units with gates of one add up to its output",
    mutants={
        "a bias for each expert": ("second.bias / experts", "second.bias", "weft.ffn.mixture"),
        "rows of the second weight": ("second.weight.chunk(", "second.weight.flip(1).chunk(", "weft.ffn.mixture"),
        "not put back": ("for w in self.down], 1)", "for w in self.down][::-1], 1)", "weft.ffn.mixture"),
    },
)  # fmt: skip
def cut_and_put_back(seed: int) -> list[Check]:
    """With top-E of E alike experts' scores, gates are 1 / E; and `to_dense`."""
    torch.manual_seed(seed)
    experts, checks = 2 + seed % 3, list[Check]()
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        dense: Any = nn.Sequential(nn.Linear(37, 20 * experts), nn.GELU(), nn.Linear(20 * experts, 35)).to(dtype)
        layer = MoEPlusPlus.from_dense(dense, experts=experts, active=experts, zero=0, copy=0, constant=0).eval()
        layer.router.data.zero_()
        x, error = torch.randn(9, 37, dtype=dtype, requires_grad=True), torch.randn(9, 35, dtype=dtype)
        out, wanted = experts * layer(x), dense(x)
        mine = torch.autograd.grad(out, [x, layer.up_bias, layer.down_bias, *layer.up], error)
        right = wanted, wanted, *torch.autograd.grad(wanted, [x, dense[0].bias, dense[2].bias, dense[0].weight], error)
        found = out, layer.to_dense()(x), mine[0], mine[1].flatten(), mine[2].sum(0) / experts, torch.cat(mine[3:])
        apart = [(p - q).detach().abs().max() for p, q in zip(found, right, strict=True)]
        checks.append(Check(float(torch.stack(apart).max()), bound, what=str(dtype)))  # Python's max loses a nan
    return checks
