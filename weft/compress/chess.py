"""Zero activations of feed-forward layers below a threshold for each channel, and skip the weights that these need.

    a = act(W_gate x),  u = W_up x,  y = W_down ([a]_t * u),     [a_i]_t = 0 where |a_i| < t_i
    t_i = q / m_i,   m_i = E|u_i|,   q = the quantile of m_i |a_i| over channels and tokens at the share s

What a zeroed gate takes from the product is a_i u_i; before u is computed its size is expected to be m_i |a_i|, and of
these the smallest are dropped; s is the option ``sparsity``. One threshold for all channels of a layer, the quantile of
|a_i|, is CATS (Lee et al., 2024), here the variant ``cats``. With ``attention``, inputs of query and output projections
get one threshold each, the quantile of their sizes; keys and values see the whole input, as errors there stay for all
later tokens.

Paper: "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification", Junhui He, Shangyu
Wu, Weidong Wen, Chun Jason Xue, Qingan Li, 2024, arXiv:2409.01366. The authors' code takes quantiles and means text by
text, and averages them; here they are those of all tokens together (of every second, fourth ... token where a layer
has more than 2^22 activations). The objective takes the columns of W_down as equally long; ``column_norms`` multiplies
m_i by their lengths. Feed-forward layers without a gate have u = 1, for which the equations give one threshold, CATS's;
there only the second product is sparse, so that at most half of the layer is skipped. GELU and SiLU leave negative
inputs at small values that are alike, not at zero: with ``centre``, an addition to the paper, such a layer drops the
deviations ``a_i - c_i`` below the threshold, ``W c`` being added to its bias, where c_i is the mean of what is dropped.

A token that comes alone costs a CPU about 1 - s of the products that are skipped; where a dense product of the same
zeros is expected to be faster (`weft.kernels.row_skipping.worth_skipping`: small layers, many tokens), that is done.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import data
from weft.claim import Check, claim
from weft.compress import base
from weft.compress.base import Compressor, Report, Seen, Site
from weft.convert import restore_
from weft.errors import UsageError
from weft.method import method
from weft.ops.thresholded import ThresholdedGate, ThresholdedLinear, centres, gated, quantile_threshold
from weft.testing.example import Example
from weft.testing.gated import Gated, clear, gate_and_up, masked, trained, uneven


def channel_thresholds(a: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """t ``[H]`` for activations ``a [N, H]`` whose errors count ``sizes [H]`` times."""
    q = quantile_threshold(a.abs() * sizes, sparsity)
    return torch.where(q > 0, q / sizes, torch.zeros_like(sizes))


@method(
    "chess",
    contract="compress",
    family="compress",
    papers=[181],
    variants={
        "cats": {
            "options": {"per_channel": False},
            "summary": "Zero activations of feed-forward layers below one threshold a layer, and skip their weights.",
        }
    },
)
class Chess(Compressor):
    """Thresholds on the activations of every feed-forward layer, found on calibration data.

    Args:
        sparsity: the share of activations to be zero on the calibration data, from 0 to below 1.
        per_channel: False for one threshold in a layer.
        attention: thresholds for the inputs of query and output projections too.
        column_norms: weigh channels by the lengths of the down projection's columns too.
        centre: layers without a gate drop deviations from a centre, not activations.

    Raises:
        UsageError: for a sparsity that is no such share.
    """

    def __init__(
        self, *, sparsity: float = 0.5, per_channel: bool = True, attention: bool = False, column_norms: bool = False,
        centre: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise UsageError(f"sparsity={sparsity!r}; it is a share from 0 to below 1, as 0.5")
        if column_norms and not per_channel:
            raise UsageError("column_norms are different for each channel: leave per_channel on")
        self.sparsity, self.per_channel = float(sparsity), per_channel
        self.attention, self.column_norms, self.centre = attention, column_norms, centre

    def compress_(self, model: nn.Module, calibration: Iterable[Any]) -> Report:
        """Swaps feed-forward layers for ones with thresholds; see `weft.compress.base.Compressor`."""
        inputs, feeds = base.batches(calibration), base.feed_forward(model)
        base.require(feeds, model)
        taken = {site.layer for site in feeds}
        sites = [*feeds, *(site for site in base.attention(model) if self.attention and site.layer not in taken)]
        found = base.collected(model, sites, inputs).items()
        options = {layer: self._options(site, seen, layer in taken) for layer, (site, seen) in found}

        def made(layer: nn.Module) -> nn.Module:
            kind = ThresholdedGate if gated(layer) else ThresholdedLinear
            return kind.from_dense(layer, **options[layer])

        with base.swapped(model, sites, made) as layers:
            return base.measured(model, layers, inputs)

    def _options(self, site: Site, seen: Seen, feeds: bool) -> dict[str, Any]:
        """Of the layer that stands in for the site's."""
        layer: Any = site.layer
        a = seen.activations(site.name)
        sizes, found = a.new_ones(a.shape[1]), dict[str, Any]()
        if feeds and self.per_channel and seen.up is not None:
            sizes = (seen.up / seen.tokens).to(sizes)
        if feeds and self.column_norms:
            sizes = sizes * (layer.down_proj if gated(layer) else layer).weight.detach().norm(dim=0).to(sizes)
        if feeds and self.centre and self.sparsity and not gated(layer):
            found["centre"] = centres(a, sizes, self.sparsity)
            a = a - found["centre"]
        threshold = channel_thresholds(a, sizes, self.sparsity)
        zeros = float(((a.abs() < threshold) | (a == 0)).double().mean())
        return {**found, "threshold": threshold if bool((sizes != 1).any()) else threshold[:1], "zeros": zeros}


def example() -> Example:
    """A gated and a plain feed-forward layer, and three batches of sequences for calibration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 16))
        model, inputs = (
            nn.Sequential(Gated(16, 40), nn.LayerNorm(16), plain),
            [torch.randn(n, 5, 16) for n in (4, 1, 2)],
        )
    return Example(model, inputs, torch.arange(3))


@claim(
    "exactly floor(s N) of N calibration activations are zeroed, those with the smallest E|u_i| |a_i|; outputs are "
    "the equation's with these gates at zero, of one token by the kernel and of many, to 1e-5",
    row=181,
    mutants={
        "one more": ("sparsity * scores.numel()", "sparsity * scores.numel() + 1", "weft.ops.thresholded"),
        "one less": ("sparsity * scores.numel()", "sparsity * scores.numel() - 1", "weft.ops.thresholded"),
        "mean without sizes": ("total = up.abs().sum(0, ", "total = up.sum(0, ", "weft.compress.base"),
        "not by channel": ("if feeds and self.per_channel and seen.up is not None:", "if False:"),
        "of the last batch": ("total if self.up is None else self.up + total", "total", "weft.compress.base"),
        "thresholds multiplied": ("q / sizes, torch.zeros_like(sizes)", "q * sizes, torch.zeros_like(sizes)"),
        "up projection without bias": (
            "wanted_rows(x, gate, self.up_proj.weight, self.up_proj.bias,",
            "wanted_rows(x, gate, self.up_proj.weight, None,",
            "weft.ops.thresholded",
        ),
    },
)
def smallest_products(seed: int) -> list[Check]:
    """Counts in float64, at a share drawn by the seed; the largest relative error of outputs in float32."""
    model, x = uneven(seed, 24, 80), torch.randn(61, 24, generator=torch.Generator().manual_seed(seed))
    sparsity, exact = 0.3 + 0.05 * (seed % 9), copy.deepcopy(model).double()
    for one in (model, exact):
        Chess(sparsity=sparsity).compress_(one, [part.to(one[0].gate_proj.weight) for part in x.split([20, 1, 40])])
    a, u = gate_and_up(exact[0], x)
    scores, layer = a.abs() * sum(row.abs() for row in u) / len(u), model[0]
    number = math.floor(sparsity * scores.numel())
    keep = scores >= scores.flatten().sort().values[number]
    zeroed = a.abs() < exact[0].threshold
    off = (layer.threshold - exact[0].threshold).abs() / exact[0].threshold
    near, worst = clear(a.abs(), layer.threshold), 0.0
    wanted = masked(layer, x, a.abs() >= layer.threshold.double())
    with torch.no_grad():
        for tokens in (1, 3, 20, 61):
            layer.always = tokens < 61
            found = torch.cat([model(part) for part in x.split(tokens)])
            worst = max(worst, float((found - wanted)[near].abs().max() / wanted.abs().max()))
    return [
        Check(int(zeroed.sum()), number, "==", "activations at zero"),
        Check(int((zeroed == keep).sum()), 0, "==", "activations that are zeroed and should not be, or the reverse"),
        Check(float(off.max()), 0.05, what="thresholds in float32"),
        Check(worst, 1e-5, what="outputs"),
    ]


@claim(
    "a report counts operations, bytes and zeros exactly: those of a loop over tokens that skips what is zero; rows of "
    "up and down projections that it does not count are not read",
    row=181,
    mutants={
        "gate projection left out": (
            "self.gate_proj.weight.numel() + share * sparse",
            "share * sparse",
            "weft.ops.thresholded",
        ),
        "zeros for the rest": (
            "LayerReport(site.name, 1 - share",
            "LayerReport(site.name, share",
            "weft.compress.base",
        ),
        "dense model counted": ("layer.kept(x)", "x.numel()", "weft.compress.base"),
        "all rows of the up projection": (
            "self.up_proj.bias, self.threshold)",
            "self.up_proj.bias)",
            "weft.ops.thresholded",
        ),
    },
)
def counted(seed: int) -> list[Check]:
    """Differences to a count by loops, in float64; outputs with nan in every row that is to be skipped, in float32."""
    model, x = uneven(seed, 16, 48), torch.randn(61, 16, generator=torch.Generator().manual_seed(seed))
    exact = copy.deepcopy(model).double()
    row = Chess(sparsity=0.7).compress_(exact, [x[:30].double(), x[30:].double()]).layers[0]
    Chess(sparsity=0.7).compress_(model, [x])
    layer, elements, wrong, sizes = model[0], 0, 0, gate_and_up(exact[0], x)[0].abs()
    near, layer.always = clear(sizes, layer.threshold), True
    for token, a, judged in zip(x, sizes, near, strict=True):
        elements += 16 * 48 + sum(2 * 16 for j in range(48) if float(a[j]) >= float(exact[0].threshold[j]))
        gate = copy.deepcopy(layer)
        skipped = a < layer.threshold
        with torch.no_grad():
            gate.up_proj.weight[skipped], gate.down_proj.weight.T[skipped] = torch.nan, torch.nan
            wrong += int(bool(judged) and not torch.equal(gate(token[None]), layer(token[None])))
    zeros = 1 - (elements / 61 - 16 * 48) / (2 * 16 * 48)
    off = abs(row.operations_after - 2 * elements / 61) + abs(row.bytes_after - 8 * elements / 61)
    off += abs(row.zeros - zeros) + abs(row.operations_before - 6 * 16 * 48) + abs(row.bytes_before - 24 * 16 * 48)
    return [Check(off, 1e-6, what="counts"), Check(wrong, 0, "==", "tokens that read a row which is not counted")]


@claim(
    "at 50 % zeros in a trained gated transformer the error of the feed-forward output by thresholds for each channel "
    "is at most 0.94 of that by one threshold for the layer",
    row=181,
    mutants={
        "not by channel": ("if feeds and self.per_channel and seen.up is not None:", "if False:"),
        "thresholds multiplied": ("q / sizes, torch.zeros_like(sizes)", "q * sizes, torch.zeros_like(sizes)"),
        "inverse means": ("(seen.up / seen.tokens)", "(seen.tokens / seen.up)"),
    },
)
def less_error_than_one_threshold(seed: int) -> Check:
    """Relative errors on test inputs, the same ones for both; mean of the ratio over two models."""
    digits, ratios = data.load("digits"), list[float]()
    assert digits.x_test is not None
    for model in (trained(2 * seed + k, digits.x_train, digits.y_train) for k in range(2)):
        inputs: list[Any] = []
        handle = model.feed.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.extend(args))
        model(digits.x_test)
        handle.remove()
        x = inputs[0].detach().flatten(0, 1)
        exact = masked(model.feed, x, torch.ones(1))
        errors = []
        for options in ({}, {"per_channel": False}):
            Chess(sparsity=0.5, **options).compress_(model, [digits.x_train[:300]])
            errors.append(float((model.feed(x) - exact).norm().detach()))
            restore_(model)
        ratios.append(errors[0] / errors[1])
    return Check(sum(ratios) / len(ratios), 0.94, what="error by channel to that by layer")


@claim(
    "a layer without a gate has the outputs of W (c + [a - c]_t) + b, by rows and densely, to 1e-5; in each turn for "
    "c the sum of squares of what is dropped does not grow, and the output's error is at most 0.8 of that with c = 0",
    mutants={
        "centre not added": ("self._offset(), self.threshold)", "self.bias, self.threshold)", "weft.ops.thresholded"),
        "zero for what is dropped": ("self.centre.to(x.dtype), x)", "0 * self.centre, x)", "weft.ops.thresholded"),
        "thresholds of the activations": ('a = a - found["centre"]', "pass"),
        "mean of all": (
            "torch.where(count > 0, (a * dropped).sum(0) / count.clamp(min=1), c)",
            "a.mean(0)",
            "weft.ops.thresholded",
        ),
        "offset of other weights": ("or state != made[1]", "", "weft.ops.thresholded"),
    },
)
def centred(seed: int) -> list[Check]:
    """Outputs before and after the weights are changed, of few tokens and many; GELU's activations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)), 2 * torch.randn(200, 24)
    w = [p.detach().double() for p in model.parameters()]
    h, worst, outputs = F.gelu(x.double() @ w[0].T + w[1]), 0.0, []
    for centre in (False, True):
        restore_(model)
        Chess(centre=centre).compress_(model, [x])
        outputs.append(model(x).detach().double())
    plain, mine = (float((out - h @ w[2].T - w[3]).norm()) for out in outputs)
    layer: Any = model[2]
    dropped = (h - layer.centre.double()).abs() < layer.threshold.double()
    near = clear((h - layer.centre.double()).abs(), layer.threshold)
    with torch.no_grad():
        for rows, tokens, scale in ((True, 1, 1.0), (False, 200, 1.0), (True, 1, 0.5)):
            layer.always = rows
            layer.weight.copy_(scale * w[2])
            wanted = torch.where(dropped, layer.centre.double(), h) @ (scale * w[2]).T + w[3]
            found = torch.cat([model(part) for part in x.split(tokens)])
            worst = max(worst, float((found - wanted)[near].abs().max() / wanted.abs().max()))
    turns = [(h - centres(h, torch.ones_like(h[0]), 0.5, rounds)).square().flatten() for rounds in range(5)]
    sums = [float(squares.sort().values[: len(squares) // 2].sum()) for squares in turns]
    return [
        Check(worst, 1e-5, what="outputs"),
        Check(abs(int(dropped.sum()) - dropped.numel() // 2), 3, what="deviations dropped, from half"),
        Check(max(b / a for a, b in itertools.pairwise(sums)), 1 + 1e-9, what="squares dropped, to the turn before"),
        Check(mine / plain, 0.8, what="error of the output, to that with c = 0"),
    ]
