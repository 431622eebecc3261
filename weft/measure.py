"""What a training step costs: bytes kept and allocated, operations, time, and how good its gradient is.

Functions that take a ``step`` call it and nothing else: whatever it does to a model (gradients, weights, statistics,
random numbers) it does. Functions that take a model leave it as it was. Bytes are exact; times are CPU seconds.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft._passes import passes
from weft._profile import count_operations, cpu_peak, cuda_peak, settled, steady, step_ratio
from weft._reports import KeptReport, Ratio, StepReport, environment
from weft.errors import WeftError
from weft.session import Tape, kept

__all__ = [
    "KeptReport",
    "Ratio",
    "StepReport",
    "cosine",
    "environment",
    "exact_gradient",
    "kept_bytes",
    "operations",
    "passes",
    "peak_bytes",
    "scored_loss",
    "settled",
    "step_ratio",
    "take_apart",
]

Loss = Callable[[Tensor, Tensor], Tensor]


class Rule(Protocol):
    """What `take_apart` needs of a training rule; see `weft.rules`."""

    def step(self, x: Any, y: Tensor) -> Tensor: ...

    def trainable(self) -> list[nn.Parameter]: ...


def kept_bytes(step: Callable[[], object], model: nn.Module) -> KeptReport:
    """Counts what ``step`` keeps between its passes, exactly and without changing it.

    A step of several passes (a local rule) releases each pass's tensors with its graph; the maximum counts. A tape's
    session inside the step is counted with what the tape keeps. Runs the step once.

    Raises:
        WeftError: inside another session.
    """
    with kept(model) as count:
        step()
    return KeptReport(count.peak_bytes, count.peak_by_module, count.weight_copy_bytes, count.total_bytes)


def peak_bytes(
    step: Callable[[], object],
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    gradients: bool = True,
    device: torch.device | str | None = None,
) -> int:
    """Most bytes that ``step`` has allocated at once, above the level at its start. Runs it twice: once to warm up.

    On CPU from the profiler's trace, exact and repeatable; blocks that are older than the step do not count, even if
    it frees them. On CUDA from `torch.cuda.max_memory_allocated`. Memory that is not torch's (numpy) is not seen.
    Optimizer state is outside if the step makes it on its first call and keeps it.

    Args:
        step: one training step, without arguments.
        parameters: whose ``.grad`` is set before each run and put back at the end.
        gradients: True: ``.grad`` is None at the start, so the gradients' memory is inside. False: ``.grad`` is
            allocated and zero at the start, so the step adds to it in place and only temporary memory is inside.
        device: where to measure; default: where the first parameter is, else the CPU.

    Raises:
        WeftError: inside another call. (A profiler of the caller's own cannot be seen; it would be ended silently.)
    """
    weights = list(parameters) if parameters is not None else []
    place = torch.device(device) if device is not None else weights[0].device if weights else torch.device("cpu")
    before = [weight.grad for weight in weights]

    def prepare() -> None:
        for weight in weights:
            weight.grad = None if gradients or not weight.requires_grad else torch.zeros_like(weight)

    try:
        prepare()
        step()
        prepare()
        return cuda_peak(step, place) if place.type == "cuda" else cpu_peak(step)
    finally:
        for weight, grad in zip(weights, before, strict=True):
            weight.grad = grad


def operations(step: Callable[[], object], model: nn.Module | None = None) -> dict[str, Any]:
    """Floating-point operations of one ``step`` by torch's own counter: matrix products, convolutions, attention.

    Operators that the counter has no formula for (elementwise ones, the CPU's fused LSTM) count nothing.

    Returns:
        ``total``; ``by_operator``, such as ``{"aten.addmm": 1024}``; and, with a ``model``, ``forward`` (inside the
        model's forward, recomputation included), ``rest`` (the backward pass, mostly) and ``forward_by_module``
        (without what its children did, so that it adds up to ``forward``); without one, None, None and ``{}``.
    """
    return count_operations(step, model)


def cosine(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float | None:
    """Cosine of two lists of tensors, each taken as one long vector, in float64. None counts as zeros.

    Returns:
        A number in [-1, 1], or None where one side is zero or not finite.

    Raises:
        WeftError: the lists differ in length or a pair in shape.
    """
    if len(a) != len(b):
        raise WeftError(f"cosine needs two lists of one length, got {len(a)} and {len(b)} tensors")
    dot = left = right = 0.0
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        if p is not None and q is not None and p.shape != q.shape:
            raise WeftError(f"cosine needs equal shapes, got {list(p.shape)} and {list(q.shape)} at position {i}")
        u, v = (None if t is None else t.detach().double().flatten().cpu() for t in (p, q))
        dot += float(u @ v) if u is not None and v is not None else 0.0
        left += float(u @ u) if u is not None else 0.0
        right += float(v @ v) if v is not None else 0.0
    value = dot / (left**0.5 * right**0.5) if left > 0 and right > 0 else math.nan
    return max(-1.0, min(1.0, value)) if math.isfinite(value) else None


def exact_gradient(model: nn.Module, x: Any, y: Tensor, loss: Loss = F.cross_entropy) -> dict[str, Tensor]:
    """The gradient of the loss of the model's own scores, for all its floating parameters, frozen ones too.

    The model runs once, in the mode that it is in and from the current state of the global generator (so its dropout
    masks are those of a step that starts here). Afterwards ``.grad``, ``requires_grad``, buffers and the global
    generators are as before.

    Args:
        model: gives scores ``[B, K]``, or ``[B, T, K]`` for labels ``[B, T]`` (then both are flattened).
        x: a tensor, or a tuple that is passed as ``model(*x)``.
        y: labels; for the default loss, -100 is ignored.
        loss: of scores and labels; a scalar.

    Returns:
        Gradients by name; zeros for a parameter that the loss does not depend on.

    Raises:
        WeftError: the model does not return a tensor, or the loss depends on no parameter.
    """
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    frozen = [p for p in named.values() if not p.requires_grad]
    with _as_found(model), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            value = scored_loss(model, x, y, loss)
            if not value.requires_grad:
                raise WeftError(f"the loss depends on no parameter of {type(model).__name__}; is its output detached?")
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        finally:
            for p in frozen:
                p.requires_grad_(False)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def take_apart(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Loss = F.cross_entropy,
    *,
    rule: Rule | None = None,
    tape: Tape | None = None,
    rounds: int = 9,
    warmup: int = 2,
    clock: Callable[[], float] = time.thread_time,
) -> StepReport:
    """One training step without its optimizer, taken apart: time, bytes kept and allocated, operations.

    Everything runs on a deep copy of the model (and of the rule, together), in the modes that they are in: weights,
    gradients, buffers, hooks and global generators stay as they are. Needs the memory of a second model. Hooks of the
    caller's own are copied and run.

    Args:
        model, x, y, loss: as in `exact_gradient`; the step is plain backpropagation.
        rule: its ``step(x, y)`` is measured instead; names of modules are then those inside the rule.
        tape: what packs the tensors kept between the passes.
        rounds, warmup, clock: as in `step_ratio`.

    Raises:
        WeftError: the model cannot be copied, or a figure cannot be taken here (inside a session or a measurement).
    """
    try:
        twin, twin_rule = copy.deepcopy((model, rule))  # together: the rule's model stays this one
    except (RuntimeError, TypeError) as error:
        raise WeftError(
            f"measuring works on a copy of {type(model).__name__}, and it cannot be copied: {error}"
        ) from error
    x = tuple(part.detach() for part in x) if isinstance(x, tuple) else x.detach()  # no gradients on the caller's batch
    trained = (
        list(twin_rule.trainable()) if twin_rule is not None else [p for p in twin.parameters() if p.requires_grad]
    )
    watched = twin_rule if isinstance(twin_rule, nn.Module) else twin
    forward_times: list[float] = []
    times: list[float] = []

    def step() -> None:
        start = clock()
        with contextlib.nullcontext() if tape is None else tape.on(watched):
            if twin_rule is not None:
                twin_rule.step(x, y)
            else:
                value = scored_loss(twin, x, y, loss)
                forward_times.append(clock() - start)
                value.backward()
        times.append(clock() - start)

    with _as_found(twin), torch.enable_grad():
        with steady():
            for _ in range(warmup + rounds):
                for parameter in trained:
                    parameter.grad = None
                step()
        forward, total = forward_times[warmup:], times[warmup:]
        held = kept_bytes(step, watched)
        counts = operations(step, watched)
        own = twin if any(p in set(twin.parameters()) for p in trained) or twin_rule is None else watched
        walked = passes(step, lambda: own(*x) if isinstance(x, tuple) and own is twin else own(x), own, len(y))
        inside = peak_bytes(step, parameters=trained)
        inside += 0 if tape is None else tape.outside_bytes
        outside = peak_bytes(step, parameters=trained, gradients=False)
        outside += 0 if tape is None else tape.outside_bytes
    plain = twin_rule is None
    reason = "a rule's step does not divide into one forward and one backward pass"
    return StepReport(
        forward_seconds=statistics.median(forward) if plain else None,
        backward_seconds=statistics.median(b - a for a, b in zip(forward, total, strict=True)) if plain else None,
        step_seconds=statistics.median(total),
        kept_bytes=held.peak_bytes,
        kept_by_module=held.by_module,
        weight_copy_bytes=held.weight_copy_bytes,
        peak_bytes=inside,
        peak_bytes_without_gradients=outside,
        operations=counts,
        passes=walked,
        parameters=sum(parameter.numel() for parameter in trained),
        why={} if plain else dict.fromkeys(("forward_seconds", "backward_seconds"), reason),
    )


def scored_loss(model: nn.Module, x: Any, y: Tensor, loss: Loss) -> Tensor:
    """The loss of a model's scores; scores ``[B, T, K]`` and labels ``[B, T]`` are flattened first."""
    scores = model(*x) if isinstance(x, tuple) else model(x)
    if not isinstance(scores, Tensor):
        raise WeftError(f"{type(model).__name__} returned a {type(scores).__name__}; its class scores are needed")
    if scores.ndim > 2 and y.shape == scores.shape[:-1]:  # one label for each of T tokens
        scores, y = scores.reshape(-1, scores.shape[-1]), y.reshape(-1)
    return loss(scores, y)


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers of ``model`` and the global generators."""
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, name, buffer, version, value in buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            if buffer._version != version or not torch.equal(buffer, value):  # left alone where nothing changed it
                with torch.no_grad():
                    buffer.copy_(value)
