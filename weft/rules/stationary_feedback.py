"""Send gradients back through time by a fixed diagonal matrix in place of the recurrence's Jacobian.

    delta_t = e_t + A delta_{t+1},   A = diag(linspace(0, 1, S)),   dL/dW = sum_t (df(x_t, h_{t-1}) / dW)^T delta_t

e_t is what arrives at the state h_t [B, S] from above. The forward pass is the ordinary one, without a graph; each step
is then computed once more from the detached state before it, all T steps as one batch, and only those steps are
differentiated. As A is constant, delta is a scan of about log2(T) stages in place of T steps. For an LSTM the state is
(h, c), S = 2H; nothing arrives at c but at the last step, so that the error travels by A's first half. As in the
authors' code, each layer has the same A and the initial state gets no gradient. A = 0 truncates after one step.

Paper: "Fast Training of Recurrent Neural Networks with Stationary State Feedbacks", Paul Caillon, Erwan Fagnou,
Alexandre Allauzen, 2025, arXiv:2503.23104.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.claim import Check, claim
from weft.convert import Convertible
from weft.errors import DataError, Unsupported, UsageError
from weft.method import method
from weft.ops.scan import LinearFeedback, linear_scan
from weft.testing.example import Example

WHOLE = {"RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "GRU": torch.gru}
CELLS = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell, "GRU": torch.gru_cell}


def gated_steps(mode: str, x: Tensor, start: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A recurrence without a cell: its states ``[B, T, S]``, from detached states before, and bare.

    Args:
        mode: as torch's layers have it, but for LSTM.
        x: inputs ``[B, T, D]``.
        start: the initial state ``[B, S]``.
        weights: of one layer in one direction, in torch's order.
    """
    with torch.no_grad():
        bare = [w.detach() for w in weights]
        found = WHOLE[mode](x.detach(), start[None], bare, len(weights) == 4, 1, 0.0, False, False, True)[0]
        before = torch.cat([start[:, None], found[:, :-1]], 1)
    return CELLS[mode](x.flatten(0, 1), before.flatten(0, 1), *weights).view_as(found), found


def lstm_steps(x: Tensor, start: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same for an LSTM, states (h, c): torch tells h alone, and c is a linear scan once the gates are known."""
    h0, c0 = (part.contiguous() for part in start[:, None].chunk(2, 2))
    with torch.no_grad():
        bare, first = [w.detach() for w in weights], (h0.transpose(0, 1), c0.transpose(0, 1))
        h = torch.lstm(x.detach(), first, bare, len(weights) == 4, 1, 0.0, False, False, True)[0]
    into, across = weights[2:] or (None, None)
    gates = F.linear(x, weights[0], into) + F.linear(torch.cat([h0, h[:, :-1]], 1), weights[1], across)
    admit, keep, new, out = gates.chunk(4, 2)
    admit, keep, out, new = admit.sigmoid(), keep.sigmoid(), out.sigmoid(), new.tanh()
    with torch.no_grad():
        kept, added = keep.detach(), admit.detach() * new.detach()
        c = linear_scan(torch.cat([added[:, :1] + kept[:, :1] * c0, added[:, 1:]], 1), kept, dim=1)
    steps = keep * torch.cat([c0, c[:, :-1]], 1) + admit * new
    return torch.cat([out * steps.tanh(), steps], 2), torch.cat([h, c], 2)


@method("stationary-feedback", contract="layer", family="rules", papers=[134], tags={"same-forward"})
class StationaryFeedback(Convertible):
    """An ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` whose backward pass takes log2(T) stages; called as the layer itself.

    Where the recurrence forgets faster than A (a saturated tanh, say), A adds up errors that have no effect, and
    ``decay=(0, 0)`` may be nearer to the true gradient. In ``eval()`` and under ``no_grad`` the layer runs as it is.

    Args:
        layer: batch first or not, of any number of layers and directions; it is used, not copied.
        decay: the ends of A's diagonal, or the whole diagonal ``[S]``; entries of 1 add up the errors of all steps.

    Raises:
        Unsupported: for other layers, and an LSTM with projections.
        UsageError: for a decay that does not fit.
    """

    converts = (nn.RNN, nn.GRU, nn.LSTM)
    decay: Tensor

    def __init__(self, layer: nn.Module, *, decay: Sequence[float] | Tensor = (0.0, 1.0)) -> None:
        super().__init__()
        if not isinstance(layer, nn.RNN | nn.GRU | nn.LSTM):
            raise Unsupported(f"{type(layer).__name__} is no recurrent layer of torch", "nn.RNN, nn.GRU or nn.LSTM")
        if layer.proj_size:
            raise Unsupported("an LSTM with proj_size has a state of another size than its cell", "proj_size=0")
        size = layer.hidden_size * (2 if layer.mode == "LSTM" else 1)
        if not isinstance(decay, Tensor):
            if len(decay) != 2:
                raise UsageError(f"decay={decay!r}; give the two ends of a range, or a tensor of {size} numbers")
            decay = torch.linspace(float(decay[0]), float(decay[1]), size, dtype=torch.float64)
        if decay.shape != (size,) or not bool((decay.abs() <= 1).all()):
            raise UsageError(f"the decay is {size} numbers from -1 to 1, not {tuple(decay.shape)} up to {decay.max()}")
        self.layer = layer
        self.register_buffer("decay", decay.detach().to(layer.get_parameter("weight_hh_l0")))

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> StationaryFeedback:
        """The layer with another backward pass, on the same parameters."""
        return cls(layer, **options)

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """The outputs and last states, as the layer gives them.

        Args:
            x: ``[B, T, D]``, or ``[T, B, D]`` unless the layer is batch first, or ``[T, D]``.
            hx: initial states as the layer takes them, without gradients; zeros where None.

        Raises:
            Unsupported: for a packed sequence, or initial states that require gradients.
            DataError: for inputs or states of another shape.
        """
        layer, lstm = self.layer, self.layer.mode == "LSTM"
        if not isinstance(x, Tensor):
            raise Unsupported(
                f"inputs are a {type(x).__name__}", "a padded tensor, and a loss that leaves the padding out"
            )
        if not torch.is_grad_enabled() and not self.training:
            return layer(x, hx)
        single = x.ndim == 2
        h = x[None] if single else x if layer.batch_first else x.transpose(0, 1)
        if x.ndim not in (2, 3) or h.shape[1] == 0 or h.shape[2] != layer.input_size:
            raise DataError(f"inputs of shape {tuple(x.shape)}; expected T steps of {layer.input_size} features")
        starts = self._starts(h, hx, single)
        ends: list[Tensor] = []
        for number in range(layer.num_layers):
            if number and layer.dropout:
                h = F.dropout(h, layer.dropout, self.training)
            sides = []
            for suffix in ("", "_reverse") if layer.bidirectional else ("",):
                kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()))
                weights = [getattr(layer, f"{kind}_l{number}{suffix}") for kind in kinds]
                states = self._states(h.flip(1) if suffix else h, starts[len(ends)], weights)
                ends.append(states[:, -1])
                out = states[..., : layer.hidden_size]
                sides.append(out.flip(1) if suffix else out)
            h = torch.cat(sides, 2) if len(sides) > 1 else sides[0]
        last = torch.stack(ends)
        last = last[:, 0] if single else last
        out = h[0] if single else h if layer.batch_first else h.transpose(0, 1)
        return out, tuple(last.chunk(2, -1)) if lstm else last

    def _states(self, x: Tensor, start: Tensor, weights: list[Tensor]) -> Tensor:
        """States ``[B, T, S]`` of one layer in one direction, with the feedback as their derivative."""
        mode = self.layer.mode
        steps, found = lstm_steps(x, start, weights) if mode == "LSTM" else gated_steps(mode, x, start, weights)
        return LinearFeedback.apply(steps, found, self.decay)

    def _starts(self, h: Tensor, hx: Any, single: bool) -> Tensor:
        """Initial states ``[layers x directions, B, S]``."""
        layer = self.layer
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        if hx is None:
            return h.new_zeros(count, len(h), self.decay.numel())
        parts = list(hx) if isinstance(hx, tuple) else [hx]
        if any(part.requires_grad for part in parts):
            raise Unsupported("stationary feedback gives no gradient to an initial state", "hx.detach()")
        start = torch.cat([part[:, None] if single else part for part in parts], -1)
        if start.shape != (count, len(h), self.decay.numel()):
            raise DataError(f"initial states of shape {[tuple(part.shape) for part in parts]} do not fit the layer")
        return start


def example() -> Example:
    """Two layers of gated units and four sequences for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, x = nn.GRU(5, 6, num_layers=2, batch_first=True), torch.randn(4, 9, 5)
    return Example(layer, x, torch.arange(4) % 2)


@claim(
    "where the recurrence is linear and its transition is the feedback matrix, every gradient is BPTT's to 1e-9",
    row=134,
    mutants={
        "truncated": ("LinearFeedback.apply(steps, found, self.decay)", "steps"),
        "forward in time": ("grads[0], decay, dim=1, reverse=True", "grads[0], decay, dim=1", "weft.ops.scan"),
        "decay of one step": ("decay = decay * decay", "decay = decay", "weft.ops.scan"),
        "other range": ("torch.linspace(float(decay[0]), float(decay[1])", "torch.linspace(0.5, float(decay[1])"),
        "errors of one step lost": ("moved = torch.addcmul(", "moved = 0 * torch.addcmul(", "weft.ops.scan"),
    },
)
def linear_recurrence(seed: int) -> Check:
    """Largest relative error in float64: a ReLU recurrence whose weights and inputs are positive is linear."""
    generator, size = torch.Generator().manual_seed(seed), 4 + seed % 5
    layer = nn.RNN(3, size, nonlinearity="relu", batch_first=True).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0, 0.5, generator=generator)
        layer.get_parameter("weight_hh_l0").copy_(torch.diag(torch.linspace(0, 1, size, dtype=torch.float64)))
    x = torch.rand(5, 20 + seed % 7, 3, generator=generator).double().requires_grad_()
    errors = torch.randn(5, x.shape[1], size, generator=generator).double()
    wanted = torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], errors)
    found = torch.autograd.grad(StationaryFeedback.from_dense(layer)(x)[0], [x, *layer.parameters()], errors)
    return Check(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)), 1e-9)


@claim(
    "from the errors of T steps to the gradient of the first input the backward pass has ceil(log2 T) stages in a row",
    row=134,
    mutants={
        "a step at a time": ("shift *= 2", "shift += 1", "weft.ops.scan"),
        "not to the end": ("while shift < length", "while 2 * shift < length", "weft.ops.scan"),
        "none": ("LinearFeedback.apply(steps, found, self.decay)", "steps"),
    },
)
def sequential_stages(seed: int) -> list[Check]:
    """Additions of later errors on the longest path through the graph of the backward pass, for three lengths."""
    layer = StationaryFeedback.from_dense(nn.RNN(2, 3, batch_first=True))

    def longest(node: Any, known: dict[Any, int]) -> int:
        if node not in known:
            further = [longest(parent, known) for parent, _ in node.next_functions if parent is not None]
            known[node] = max(further, default=0) + node.name().startswith("Addcmul")
        return known[node]

    checks = []
    for length in (1 + seed % 100, 64, 65 + seed % 60):
        x = torch.rand(1, length, 2).requires_grad_()
        errors = torch.ones(1, length, 3, requires_grad=True)
        (found,) = torch.autograd.grad(layer(x)[0], x, errors, create_graph=True)
        stages = longest(found[0, 0].sum().grad_fn, {})
        checks.append(Check(stages, (length - 1).bit_length(), "==", f"stages for T={length}"))
    return checks


@claim(
    "gradients of tanh, ReLU, gated and LSTM layers, two of each in both directions, are those of the equation step by "
    "step, to 1e-9, and the output is the layer's own",
    row=134,
    mutants={
        "truncated": ("LinearFeedback.apply(steps, found, self.decay)", "steps"),
        "state of the same step": ("torch.cat([start[:, None], found[:, :-1]], 1)", "found"),
        "cell of the same step": ("keep * torch.cat([c0, c[:, :-1]], 1)", "keep * c"),
        "no initial cell": ("added[:, :1] + kept[:, :1] * c0", "added[:, :1]"),
        "directions not turned": ("h.flip(1) if suffix else h, starts", "h, starts"),
        "cell untrained through its gate": ("steps = keep * torch.cat", "steps = kept * torch.cat"),
    },
)
def step_by_step(seed: int) -> list[Check]:
    """Largest relative error of gradients, and of outputs; A and h_0 are random, all in float64.

    By autograd, step by step: s_t = f(x_t, s_{t-1} detached) + A (s_{t-1} - s_{t-1} detached).
    """
    generator, worst, off = torch.Generator().manual_seed(seed), 0.0, 0.0
    kinds = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
    for kind, one in kinds.items():
        how = {"nonlinearity": kind} if one is nn.RNNCell else {}
        layer = getattr(nn, "RNN" if how else kind)(3, 4, 2, bidirectional=True, **how).double()
        for p in layer.parameters():
            nn.init.uniform_(p, -0.6, 0.6, generator=generator)
        size = 8 if kind == "LSTM" else 4
        x, h0 = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 2, 3), (4, 2, size)))
        x.requires_grad_()
        decay = torch.rand(size, generator=generator, dtype=torch.float64)
        hx = h0.chunk(2, -1) if kind == "LSTM" else h0
        out, last = StationaryFeedback.from_dense(layer, decay=decay)(x, hx)
        plain, plain_last = layer(x, hx)
        ends = [torch.cat(t, -1) if kind == "LSTM" else t for t in (last, plain_last)]
        off = max(off, *(float((a - b).detach().abs().max()) for a, b in ((out, plain), ends)))
        errors = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (out, ends[0])]
        targets = [x, *layer.parameters()]
        found = torch.autograd.grad([out, ends[0]], targets, errors)
        h, finals, sides = x, list[Tensor](), list[Tensor]()
        for k in range(4):
            tail = f"_l{k // 2}" + ("_reverse" if k % 2 else "")
            cells = one(h.shape[2], 4, **how).double()
            parts = {n.removesuffix(tail): p for n, p in layer.named_parameters() if n.endswith(tail)}
            sides = sides if k % 2 else []
            state, steps = h0[k], {}
            for t in range(6, -1, -1) if k % 2 else range(7):
                bare = state.detach()
                given = tuple(bare.chunk(2, 1)) if kind == "LSTM" else bare
                made = torch.func.functional_call(cells, parts, (h[t], given))
                state = steps[t] = (torch.cat(made, 1) if kind == "LSTM" else made) + decay * (state - bare)
            finals.append(state)
            sides.append(torch.stack([steps[t][:, :4] for t in range(7)]))
            h = torch.cat(sides, 2) if k % 2 else h
        wanted = torch.autograd.grad([h, torch.stack(finals)], targets, errors)
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)))
    return [Check(worst, 1e-9, what="gradients"), Check(off, 1e-9, what="outputs")]
