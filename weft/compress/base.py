"""What methods that compress a trained model share: where its feed-forward layers are, calibration, and the report."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.convert import convert_, restore_
from weft.errors import DataError, Unsupported, UsageError
from weft.ops.thresholded import ThresholdedGate, ThresholdedLinear, gated
from weft.ops.token_layers import POINTWISE

PAIRS = (("intermediate.dense", "output.dense"), ("fc1", "fc2"), ("lin1", "lin2"))  # BERT; OPT and ViT; DistilBERT
ATTENTION = ("q_proj", "query", "q_lin", "o_proj", "out_proj", "out_lin", "attention.output.dense", "project")
LIMIT = 1 << 22  # activations of a layer that are kept for quantiles
BETWEEN = (*POINTWISE, nn.Dropout)  # what may stand between two linear layers


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One compressed layer. Operations and bytes are those of its matrix products, for one token, in the mean.

    Attributes:
        name: in the model.
        zeros: share of activations that are zero, measured with the compressed model on the calibration data.
        operations_before, operations_after: floating-point operations.
        bytes_before, bytes_after: of weights that are read for a token that comes alone.
    """

    name: str
    zeros: float
    operations_before: float
    operations_after: float
    bytes_before: float
    bytes_after: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        layers: a `LayerReport` for each layer that was swapped, in the model's order.
        tokens: how many of them the calibration data brought to a layer, at most.
    """

    layers: tuple[LayerReport, ...]
    tokens: int

    @property
    def names(self) -> list[str]:
        """Names of the layers that were swapped."""
        return [layer.name for layer in self.layers]

    def total(self, key: str) -> float:
        """The sum of an attribute over the layers: ``report.total("bytes_after")``."""
        found: float = sum(getattr(layer, key) for layer in self.layers)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with ``total`` over the layers and the mean share of zeros."""
        keys = [field.name for field in dataclasses.fields(LayerReport)][2:]
        total: dict[str, float] = {key: self.total(key) for key in keys}
        total["zeros"] = self.total("zeros") / max(1, len(self.layers))
        return {"layers": [dataclasses.asdict(layer) for layer in self.layers], "tokens": self.tokens, "total": total}


class Compressor(abc.ABC):
    """Makes a trained model smaller or faster: ``report = Method(...).compress_(model, calibration)``."""

    @abc.abstractmethod
    def compress_(self, model: nn.Module, calibration: Iterable[Any]) -> Report:
        """Change a trained model in place; ``weft.restore_(model)`` undoes it.

        After an error or an interruption the model is as it was. Its mode stays; calibration runs in evaluation mode.

        Args:
            model: any module that has layers for the method.
            calibration: inputs, each a tensor or a tuple, called as ``model(*x)``.

        Raises:
            Unsupported: for a model without such layers, or one that is compressed already.
            DataError: for calibration data that are empty or not finite.
            UsageError: for what is no iterable of inputs.
        """


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be swapped: the product of activations with a weight, or a gated feed-forward layer."""

    name: str
    layer: nn.Module


def feed_forward(model: nn.Module) -> list[Site]:
    """Where activations of feed-forward layers are multiplied by a weight.

    Gated layers as a whole (`weft.ops.thresholded.gated`); the second ``nn.Linear`` of each
    ``nn.Linear, activation, nn.Linear`` in an ``nn.Sequential`` (dropout may follow the activation), and of the pairs
    in Hugging Face models for which `PAIRS` has names.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if name and gated(module):
            found[name] = module
        if type(module) is nn.Sequential:
            found |= {f"{prefix}{key}": layer for key, layer in _seconds(module)}
        for first, second in PAIRS:
            one, two = _at(module, first), _at(module, second)
            if type(one) is type(two) is nn.Linear and one.out_features == two.in_features:
                found[f"{prefix}{second}"] = two
    return [Site(name, layer) for name, layer in found.items()]


def attention(model: nn.Module) -> list[Site]:
    """Linear layers by whose names queries and outputs of attention are computed; not keys and values."""
    return [
        Site(name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if type(layer) is nn.Linear and any(f".{name}".endswith(f".{end}") for end in ATTENTION)
    ]


def _seconds(chain: nn.Sequential) -> Iterator[tuple[str, nn.Linear]]:
    before, between = False, 0
    for key, layer in chain.named_children():
        if type(layer) is nn.Linear:
            if before and between:
                yield key, layer
            before, between = True, 0
        elif type(layer) in BETWEEN:
            between += type(layer) not in (nn.Dropout, nn.Identity)
        else:
            before = False


def _at(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def batches(calibration: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Calibration inputs as tuples.

    Raises:
        UsageError: for what is no iterable of inputs.
        DataError: where there are none.
    """
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise UsageError(f"calibration is a {type(calibration).__name__}: give a list of inputs, [x] for a single one")
    found = [x if isinstance(x, tuple) else (x,) for x in calibration]
    if not any(isinstance(t, Tensor) and t.numel() for x in found for t in x):
        raise DataError(f"calibration has {len(found)} inputs, none with values: give inputs as the model will get")
    return found


def require(sites: Sequence[Site], model: nn.Module) -> None:
    """Raise Unsupported where there is nothing to swap, or some of it is swapped already."""
    if gated(model):
        raise Unsupported(f"{type(model).__name__} is itself the layer to be swapped", "an nn.Sequential around it")
    if any(isinstance(module, ThresholdedLinear | ThresholdedGate) for module in model.modules()):
        raise Unsupported(f"{type(model).__name__} is compressed already", "weft.restore_(model) first")
    if not sites:
        raise Unsupported(
            f"{type(model).__name__} has no feed-forward layer whose activations are known",
            "a model with nn.Sequential(nn.Linear, activation, nn.Linear) inside, or gate_proj, up_proj, down_proj",
        )


@torch.no_grad()
def observe(
    model: nn.Module, sites: Iterable[Site], inputs: Sequence[tuple[Any, ...]], see: Callable[[Site, Tensor], None]
) -> None:
    """Runs the model in evaluation mode, and shows each site's input ``[N, D]`` to ``see``; leaves nothing behind."""
    modes, draws = {m: m.training for m in model.modules()}, torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_rng_state, draws)
        stack.callback(_back_to, modes)
        hooked: dict[nn.Module, Site] = {}
        for site in sites:
            hooked.setdefault(site.layer, site)  # a layer in two places is one layer
        for layer, site in hooked.items():

            def shown(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], site: Site = site) -> None:
                x = [*args, *named.values()][0]
                see(site, x.reshape(-1, x.shape[-1]))

            stack.callback(layer.register_forward_pre_hook(shown, with_kwargs=True).remove)
        model.eval()
        for x in inputs:
            model(*x)


def _back_to(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


@contextlib.contextmanager
def swapped(model: nn.Module, sites: Sequence[Site], factory: Callable[[nn.Module], nn.Module]) -> Iterator[list[Site]]:
    """Swaps the sites' layers for what ``factory`` makes of each; undoes that, and only that, after an error inside."""
    places = [(model.get_submodule(site.name.rpartition(".")[0]), site.name.rpartition(".")[2]) for site in sites]
    names = {site.name for site in sites}
    convert_(model, {nn.Module: factory}, where=sorted(names))
    made = [Site(site.name, getattr(parent, key)) for site, (parent, key) in zip(sites, places, strict=True)]
    try:
        yield made
    except BaseException:
        for site, (parent, key) in zip(made, places, strict=True):
            holder = nn.ModuleDict({"layer": site.layer})
            restore_(holder)
            setattr(parent, key, holder["layer"])
        raise


def measured(model: nn.Module, sites: Sequence[Site], inputs: Sequence[tuple[Any, ...]]) -> Report:
    """The report of a model whose ``sites`` are layers of `weft.ops.thresholded`."""
    kept: dict[nn.Module, int] = {}
    tokens: dict[nn.Module, int] = {}
    width: dict[nn.Module, int] = {}

    def see(site: Site, x: Tensor) -> None:
        layer: Any = site.layer
        kept[layer] = kept.get(layer, 0) + layer.kept(x)
        tokens[layer] = tokens.get(layer, 0) + len(x)
        width[layer] = layer.sparse().shape[1]

    observe(model, sites, inputs, see)
    rows = []
    for site in sites:
        layer: Any = site.layer
        total = tokens.get(layer, 0) * width.get(layer, 0)
        share = kept[layer] / total if total else 1.0
        before, after, size = layer.elements(1.0), layer.elements(share), layer.sparse().element_size()
        rows.append(LayerReport(site.name, 1 - share, 2 * before, 2 * after, size * before, size * after))
    return Report(tuple(rows), max(tokens.values(), default=0))


class Seen:
    """A layer's activations, and sums of the sizes of those of the up projection."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.tokens, self.step = 0, 1
        self.up: Tensor | None = None

    def add(self, a: Tensor, up: Tensor | None) -> None:
        wide = torch.promote_types(a.dtype, torch.float32)
        self.rows.append(a[-self.tokens % self.step :: self.step].to(wide, copy=True))
        self.tokens += len(a)
        while sum(map(Tensor.numel, self.rows)) > LIMIT and sum(map(len, self.rows)) > 1:
            self.rows, self.step = [torch.cat(self.rows)[::2].clone()], 2 * self.step
        if up is not None:
            total = up.abs().sum(0, dtype=torch.float64)
            self.up = total if self.up is None else self.up + total

    def activations(self, name: str) -> Tensor:
        """Those that are kept, ``[N, H]``.

        Raises:
            DataError: where there are none, or some are not finite.
        """
        if not self.tokens:
            raise DataError(f"{name} gets no input from the calibration data: give inputs that reach every layer")
        found = torch.cat(self.rows)
        if not all(bool(torch.isfinite(t).all()) for t in (found, self.up) if t is not None):
            raise DataError(f"{name} has activations that are not finite on the calibration data: check its inputs")
        return found


def activations(site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is to be thresholded, and what it is multiplied by."""
    layer: Any = site.layer
    if not gated(layer):
        return x, None
    a, up = layer.act_fn(layer.gate_proj(x)), layer.up_proj(x)
    if not torch.allclose(layer.forward(x[:4]), layer.down_proj(a[:4] * up[:4]), rtol=1e-2, atol=1e-3, equal_nan=True):
        raise Unsupported(f"{site.name} computes something else than down_proj(act_fn(gate_proj(x)) * up_proj(x))")
    return a, up


def collected(
    model: nn.Module, sites: Sequence[Site], inputs: Sequence[tuple[Any, ...]]
) -> dict[nn.Module, tuple[Site, Seen]]:
    """Activations of every layer of the sites, once for a layer in several places."""
    found = {site.layer: (site, Seen()) for site in sites}
    observe(model, sites, inputs, lambda site, x: found[site.layer][1].add(*activations(site, x)))
    return found
