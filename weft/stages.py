"""Stages: a model cut by name into consecutive parts, by forward hooks inside its own forward.

Nothing is traced: the model runs as it is, at any batch size, with its extra inputs and masks, and at each boundary the
next stage sees a detached alias of what the stage gave. Credit crosses a boundary only where a method carries it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.boundaries import BlackBox, channels, default_cuts, reached
from weft.errors import StageError, Unsupported, unknown

__all__ = ["Alias", "BlackBox", "Cut", "cut", "frozen_statistics"]

Boundary = Callable[[int, Tensor], Tensor | None]


class Alias(torch.autograd.Function):
    """The identity, detached: what changes its output in place leaves the graph of its input as it is."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]


class Cut:
    """A model cut behind each module of ``at``; made by :func:`cut`.

    Attributes:
        model: the model, unchanged; hooks exist only while :meth:`run` runs.
        at: names of the modules whose output ends a stage; the last stage ends with the model's own output.
    """

    def __init__(self, model: nn.Module, at: Sequence[str]) -> None:
        self.model = model
        self.at = tuple(at)
        self._owners: list[list[str]] = []
        self._trained: tuple[bool, ...] = ()
        self._unshared: list[list[str]] = []
        self._entries: dict[int, Tensor] = {}
        self._changed: set[int] = set()
        self._seen_modes: set[bool] = set()

    def __len__(self) -> int:
        return len(self.at) + 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entries": {}}

    def run(self, x: Any, boundary: Boundary | None = None, *, signals: bool = False) -> Any:
        """Run the model, each next stage on a detached alias.

        Args:
            x: a tensor, or a tuple that is passed as ``model(*x)``.
            boundary: called with ``(k, h)`` when stage ``k`` has given ``h``, its graph still attached, before the next
                stage runs; a tensor that it returns is what the next stage gets instead of ``h``. Called for the
                last stage too, with the model's output.
            signals: let gradients arrive at each boundary, to be read with :meth:`signal`.

        Returns:
            The model's output, attached to the graph of the last stage alone.

        Raises:
            StageError: when a boundary is passed twice, out of order or not at all, or gives no tensor (a tuple's
                first entry is what is cut; the others go on as they are).
        """
        self._entries = {}
        passed: list[int] = []
        watched: list[tuple[int, Tensor, int]] = []  # the last alias alone, so that none outlives its stage
        mode = self.model.training
        trained = tuple(p.requires_grad for p in self.model.parameters())
        discovering = torch.is_grad_enabled() and (len(self._owners) != len(self) or trained != self._trained)
        if discovering:
            self._owners, self._trained = [], trained
        names = {id(p): n for n, p in self.model.named_parameters()} if discovering else {}

        def ended(k: int, h: Any) -> Tensor | None:
            if not isinstance(h, Tensor):
                what = f"{type(h).__name__}" if k == len(self.at) else f"{type(h).__name__} from {self.at[k]!r}"
                raise StageError(f"stage {k} gives a {what}, not a tensor; cut behind a module that gives one tensor")
            while watched:
                before, alias, version = watched.pop()
                if alias._version != version:
                    self._changed.add(before)
                del alias
            if discovering:
                self._owners.append(reached(h, names))
            return boundary(k, h) if boundary else None

        def hook(k: int) -> Callable[[nn.Module, Any, Any], Any]:
            def behind(module: nn.Module, args: Any, whole: Any) -> Any:
                if k in passed:
                    raise StageError(f"module {self.at[k]!r} is used twice in one forward; cut elsewhere")
                if passed != list(range(k)):
                    raise StageError(f"boundaries are passed in the order {[self.at[i] for i in [*passed, k]]}")
                passed.append(k)
                # Blocks of some libraries give a tuple: hidden states first, then caches or attention weights.
                rest = whole[1:] if type(whole) is tuple and whole and isinstance(whole[0], Tensor) else None
                out = whole if rest is None else whole[0]
                given = ended(k, out)
                h = (out if given is None else given).detach()
                # A copy until it is known that the next stage does not change its input in place, which would
                # change what this stage keeps for its own backward.
                if mode not in self._seen_modes or k in self._changed:
                    h = h.clone()
                if signals and torch.is_grad_enabled():
                    h = h.requires_grad_()
                    self._entries[k] = h
                    h = Alias.apply(h)
                watched.append((k, h, h._version))
                return h if rest is None else (h, *rest)

            return behind

        handles = [self.model.get_submodule(name).register_forward_hook(hook(k)) for k, name in enumerate(self.at)]
        try:
            out = self.model(*x) if isinstance(x, tuple) else self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        if len(passed) != len(self.at):
            left = [name for k, name in enumerate(self.at) if k not in passed]
            raise StageError(f"the model's forward did not pass {left}; cut behind modules that every forward uses")
        ended(len(self.at), out)
        self._seen_modes.add(mode)
        return out

    def signal(self, k: int) -> Tensor | None:
        """The gradient that arrived at the boundary behind stage ``k`` in the last run, None where none did."""
        entry = self._entries.get(k)
        return None if entry is None else entry.grad

    def entry(self, k: int) -> Tensor:
        """The leaf at which gradients arrive behind stage ``k``, after ``run(..., signals=True)``."""
        return self._entries[k]

    def names(self, k: int) -> list[str]:
        """Names of the parameters in the graph of stage ``k``, as the first run with gradients found them."""
        if k >= len(self._owners):
            raise StageError("the parameters of stages are known once a run with gradients enabled has passed them")
        return self._owners[k]

    def parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters that require gradients in the graph of stage ``k``; known after the first run."""
        return [self.model.get_parameter(name) for name in self.names(k)]

    def shared(self) -> dict[str, list[int]]:
        """Parameters that more than one stage uses, by tied weights or a skip across a boundary: name -> stages."""
        stages: dict[str, list[int]] = {}
        for k, names in enumerate(self._owners):
            for name in names:
                stages.setdefault(name, []).append(k)
        return {name: ks for name, ks in stages.items() if len(ks) > 1}

    def require_unshared(self, who: str) -> None:
        """Raise StageError where a parameter belongs to several stages, as a local rule must."""
        if self._unshared == self._owners:
            return
        if shared := self.shared():
            listed = ", ".join(f"{name} (stages {', '.join(map(str, ks))})" for name, ks in shared.items())
            raise StageError(
                f"{who} trains each stage on its own, but these parameters are in several: {listed}. "
                "Untie them, or cut so that a skip does not cross a boundary (at=[...])"
            )
        self._unshared = list(self._owners)

    def width(self, k: int) -> int:
        """Channels of what stage ``k`` gives, from the last sized module before the boundary, without a forward.

        Raises:
            StageError: when no module up to the boundary tells.
        """
        return self._channels(k)[0]

    def channels_last(self, k: int) -> bool:
        """Whether the channels of what stage ``k`` gives are its last dimension (``[B, T, D]``), not its second."""
        return self._channels(k)[1]

    def _channels(self, k: int) -> tuple[int, bool]:
        boundary = self.at[k] if k < len(self.at) else ""
        last: tuple[int, bool] | None = None
        inside = False
        for name, module in self.model.named_modules():
            belongs = not boundary or name == boundary or name.startswith(f"{boundary}.")
            if inside and not belongs:
                break
            inside |= belongs
            last = channels(module) or last
        if last is None:
            raise StageError(f"cannot tell how wide the output of {boundary or 'the model'!r} is; cut behind a layer")
        return last

    @property
    def stages(self) -> list[nn.Module]:
        """The stages as modules that can be called on their own: ``cut.stages[k](h)``.

        Raises:
            Unsupported: when the model is not an ``nn.Sequential`` cut behind its own children.
        """
        children = [name for name, _ in self.model.named_children()]
        if not isinstance(self.model, nn.Sequential) or not set(self.at) <= set(children):
            raise Unsupported(
                "stages that can be called on their own exist only for an nn.Sequential cut behind its children",
                "an nn.Sequential of blocks",
            )
        ends = [children.index(name) + 1 for name in self.at] + [len(children)]
        starts = [0, *ends[:-1]]
        return [self.model[start:end] for start, end in zip(starts, ends, strict=True)]


def cut(model: nn.Module, at: Sequence[str] | None = None) -> Cut:
    """Cut a model behind named modules, e.g. ``cut(model, at=["layer1", "layer2.0"])``.

    Args:
        model: any module; it is not changed.
        at: names as in ``model.named_modules()``, in the order in which the forward passes them. By default the
            children of an ``nn.Sequential``, each stage with parameters of its own, or the blocks of Hugging Face
            BERT-, GPT-2- and Llama-like models, or ``layer1``, ``layer2`` ... of a ResNet.

    Raises:
        StageError: for a name that the model does not have, one given twice, or a model without default cuts.
    """
    names = list(dict(model.named_modules()))
    if at is None:
        at = default_cuts(model)
    for name in at:
        if name not in names or not name:
            raise StageError(unknown("module", name, [n for n in names if n], "to cut behind"))
    if len(set(at)) != len(at):
        raise StageError(f"a module is named twice in at={list(at)}")
    return Cut(model, at)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, forwards in training mode use batch statistics as usual, but the model's buffers end as they were."""
    found = [
        (module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in found:
        setattr(module, name, buffer.detach().clone())
    try:
        yield
    finally:
        for module, name, buffer in found:
            setattr(module, name, buffer)
