"""Run a call once more, as it ran before: the same random numbers, the same autocast, buffers changed once.

Methods that compute activations again on the way back need the second run to be the first one: a dropout mask drawn
anew gives a gradient at other activations, and a BatchNorm that runs twice counts a batch twice. Only torch's own
generators are recorded; random numbers from Python, numpy or a private `torch.Generator` are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH_NORMS", "Replay", "devices_of", "version"]

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def devices_of(tensors: Iterable[Any]) -> list[torch.device]:
    """The devices whose generators a call on these tensors may draw from: the CPU, and every CUDA device among them."""
    return [torch.device("cpu"), *{t.device for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}]


def version(tensor: Tensor) -> int | None:
    """What grows with every change in place; None for tensors of inference mode, which have none."""
    return None if tensor.is_inference() else tensor._version


def _counts(module: nn.Module) -> bool:
    """Whether it adds to statistics that it does not read; torch's kernels do so without a new version number."""
    return module.training and getattr(module, "track_running_stats", False)


def _state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state.cpu())
    else:
        torch.cuda.set_rng_state(state.cpu(), device)


def _autocast(devices: Iterable[torch.device]) -> list[tuple[str, bool, torch.dtype]]:
    kinds = dict.fromkeys(device.type for device in devices)
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@contextlib.contextmanager
def _as_it_was(autocast: Iterable[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as recorded, without its cache.

    In older torch, a copy of a weight that is cached under ``no_grad`` has no graph; later uses in the same region
    would take it, and the weight would get no gradient.
    """
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


class Replay:
    """What a call depends on beside its arguments, recorded as it runs.

    >>> run = Replay(module.modules(), devices_of([x]))  # doctest: +SKIP
    >>> with torch.no_grad(), run.recorded():  # doctest: +SKIP
    ...     y = module(x)
    >>> with torch.enable_grad(), run.again(run.tensors):  # doctest: +SKIP
    ...     y = module(x)

    Attributes:
        tensors: states of the generators that were drawn from and former values of the buffers that were changed,
            but for running statistics, which normalisation in training does not read; nothing where the call
            did neither. An autograd Function keeps them by ``save_for_backward`` and empties the list.
        count: how many they are.
    """

    def __init__(self, modules: Iterable[nn.Module], devices: list[torch.device]) -> None:
        self.modules, self.devices = list(modules), devices
        self.tensors: list[Tensor] = []
        self.count = 0

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """The first run; autocast stays as it is, without its cache."""
        self._casts = _autocast(self.devices)
        states = [(device, _state(device)) for device in self.devices]
        buffers = [
            (module, name, buffer, version(buffer), None if _counts(module) else buffer.clone())
            for module in self.modules
            for name, buffer in module.named_buffers(recurse=False)
        ]
        with _as_it_was(self._casts):
            yield
        drawn = [(device, state) for device, state in states if not torch.equal(state, _state(device))]
        changed = [
            (module, name, old)
            for module, name, buffer, before, old in buffers
            if old is None or before is None or getattr(module, name) is not buffer or version(buffer) != before
        ]
        self._drawn = [device for device, _ in drawn]
        self._read = [(module, name) for module, name, old in changed if old is not None]
        self._written = [(module, name) for module, name, old in changed if old is None]
        self.tensors = [state for _, state in drawn] + [old for *_, old in changed if old is not None]
        self.count = len(self.tensors)

    @contextlib.contextmanager
    def again(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """A later run, given ``self.tensors`` as they were; afterwards generators and buffers are as before it."""
        given = list(tensors)
        states, values = given[: len(self._drawn)], given[len(self._drawn) :]
        now = [_state(device) for device in self._drawn]
        places = self._read + self._written
        buffers = [getattr(module, name) for module, name in places]
        values += [buffer.detach() for buffer in buffers[len(values) :]]
        try:
            for device, state in zip(self._drawn, states, strict=True):
                _set_state(device, state)
            for (module, name), value in zip(places, values, strict=True):
                setattr(module, name, value.clone())  # the run works on copies; the buffers are not touched
            with _as_it_was(self._casts):
                yield
        finally:
            for (module, name), buffer in zip(places, buffers, strict=True):
                setattr(module, name, buffer)
            for device, state in zip(self._drawn, now, strict=True):
                _set_state(device, state)
