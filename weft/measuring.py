"""One training step of a named model on named data, taken apart; how well a gradient agrees with the exact one."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import data as data_sets
from weft import measure, models
from weft.cards import Card
from weft.convert import restore_
from weft.errors import StageError, UsageError, WeftError
from weft.method import card
from weft.session import Tape
from weft.specs import apply_conversions, read_conversion, read_tape

MODULES = 30  # of which a record says the kept bytes
OTHERS = "(others)"


def measure_step(
    model: str = "mlp",
    data: str = "digits",
    rule: str | None = None,
    *,
    tape: str | None = None,
    convert: str | Sequence[str | Mapping[str, Any]] = (),
    data_dir: str | Path | None = None,
    at: Sequence[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Any]:
    """Time, bytes kept by module, peak bytes and operations of one step, as plain data.

    Args:
        model, data, data_dir, at: as in :func:`weft.compare`.
        rule: a rule's name; plain backpropagation without Weft where None.
        tape: what packs the tensors kept between the passes: ``"quantise:bits=2"``, ``"quantise:bits=4 | offload"``.
        convert: layers to swap, one after another: ``"few-bit-activation:bits=3"``, ``"compact:rank=0.25,where=0.*"``.
        batch_size: rows of the step.
        seed: of weights, batch and rule.
        threads: of torch, while this function runs.

    Returns:
        The fields of :class:`weft.measure.StepReport` with ``settings`` and ``environment``. With a tape or swapped
        layers, they are those of the step so changed, ``plain`` has those of the step without, and ``change`` compares
        the two: ``swapped`` (names of layers), ``kept_ratio`` and ``peak_ratio`` (plain to changed),
        ``peak_without_gradients_ratio``, ``time`` (:class:`weft.measure.Ratio`, changed to plain), ``loss`` (of both)
        and ``gradient``: ``{"whole": {"cosine", "relative_error"}, "layers": {name: ...}}``, the changed step's
        against the plain one's, at the same weights, batch and dropout masks; ``untrained``: parameters that get no
        gradient of their own any more; ``inference``, with swapped layers: see `compare_inference`.

    Raises:
        UsageError, DataError, Unsupported: for names that do not exist and combinations that cannot work.
    """
    if batch_size < 1 or threads < 1:
        raise UsageError("batch_size and threads are at least 1")
    found = None if rule is None else card(rule)
    if found is not None and found.contract != "rule":
        raise UsageError(f"{rule!r} is a {found.contract}, not a rule")
    packs = None if tape is None else read_tape(tape)
    swaps = conversions_of(convert)
    loaded = data_sets.load(data, data_dir=data_dir)
    net = models.build(model, **loaded.form, seed=seed)
    index = next(loaded.batches(batch_size, seed=seed, epoch=0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        try:
            batch = loaded.x_train[index], loaded.y_train[index]
            built = None if found is None else build(found, net, seed, at)
            report = measure.take_apart(net, *batch, rule=built).to_dict()
            if packs is not None or swaps:
                changed = copy.deepcopy(net)
                names = {id(p): name for name, p in changed.named_parameters()}
                swapped = apply_conversions(changed, swaps)
                other = None if found is None else build(found, changed, seed, at)
                plain, report = report, measure.take_apart(changed, *batch, rule=other, tape=packs).to_dict()
                pair = (net, built, None), (changed, other, packs)
                report |= {"plain": plain, "change": {"swapped": swapped, **compare_steps(*pair, batch, names)}}
                for key in ("kept", "peak"):
                    report["change"][f"{key}_ratio"] = _over(plain[f"{key}_bytes"], report[f"{key}_bytes"])
                key = "peak_bytes_without_gradients"
                report["change"]["peak_without_gradients_ratio"] = _over(plain[key], report[key])
                report["change"]["inference"] = compare_inference(net, changed, batch[0]) if swaps else {}
        except WeftError:
            raise
        except (Exception, SystemExit) as error:
            raise WeftError(f"{model} failed in a step: {type(error).__name__}: {error}") from error
        settings: dict[str, Any] = {"model": model, "data": data, "rule": rule, "batch_size": len(index), "seed": seed}
        settings |= {"threads": threads, "tape": tape, "convert": swaps}
        return {**report, "settings": settings, "environment": measure.environment()}
    finally:
        torch.set_num_threads(before)


Step = tuple[nn.Module, Any, Tape | None]  # a model, a rule or None, a tape or None


def conversions_of(given: str | Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Conversions as plain data; ``+`` stands between several in one text.

    Raises:
        UsageError: for layers and options that do not exist.
    """
    parts = given.split("+") if isinstance(given, str) else given
    return [read_conversion(part) for part in parts if part]


def compare_steps(plain: Step, changed: Step, batch: tuple[Any, Tensor], names: Mapping[int, str]) -> dict[str, Any]:
    """The ``time``, ``loss``, ``gradient`` and ``untrained`` of `measure_step`'s ``change``.

    Args:
        plain, changed: models with equal weights, each perhaps with a rule and a tape. Gradients and buffers change.
        batch: inputs and labels.
        names: of the changed model's parameters, by their ``id``, as the plain model names them.
    """

    def runner(of: Step) -> Callable[[], Tensor]:
        model, rule, tape = of

        def run() -> Tensor:
            for p in model.parameters():
                p.grad = None
            with contextlib.nullcontext() if tape is None else tape.on(model if rule is None else rule):
                if rule is not None:
                    return rule.step(*batch)
                loss = measure.scored_loss(model, *batch, F.cross_entropy)
                loss.backward()
            return loss.detach()

        return run

    with torch.random.fork_rng(devices=[]):
        state, losses = torch.get_rng_state(), []
        for of in (plain, changed):
            torch.set_rng_state(state)  # the same dropout masks
            losses.append(float(runner(of)()))
        wanted = {name: p.grad for name, p in plain[0].named_parameters() if p.grad is not None}
        found = {names[id(p)]: p.grad for p in changed[0].parameters() if p.grad is not None and id(p) in names}
        common = [name for name in wanted if name in found]
        layers: dict[str, list[str]] = {}
        for name in common:
            layers.setdefault(name.rpartition(".")[0], []).append(name)

        def error(of: list[str]) -> dict[str, float | None]:
            pairs = [(found[n].detach(), wanted[n].detach()) for n in of]
            size = sum(float(b.double().square().sum()) for _, b in pairs)
            off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
            both = ([a for a, _ in pairs], [b for _, b in pairs])
            return {"cosine": measure.cosine(*both), "relative_error": (off / size) ** 0.5 if size else None}

        gradient = {"whole": error(common), "layers": {layer: error(of) for layer, of in layers.items()}}
        time = measure.step_ratio(runner(changed), runner(plain), rounds=9).to_dict()
    untrained = sorted(set(wanted) - set(found))
    return {"time": time, "loss": dict(zip(("plain", "changed"), losses, strict=True)), "gradient": gradient} | {
        "untrained": untrained
    }


def compare_inference(
    plain: nn.Module, changed: nn.Module, x: Any, sizes: Iterable[int] | None = None, rounds: int = 15
) -> dict[str, Any]:
    """Inference of batches of several sizes, in eval mode and without gradients.

    Args:
        plain, changed: models, which stay as they are.
        x: rows, of which up to 16 batches are taken in turn; or a graph's inputs, which are taken whole.
        sizes: rows of a batch; by default one and all. Where there are fewer, all.
        rounds: pairs of interleaved timings for each size.

    Returns:
        By size, as text: ``operations`` (``plain`` and ``changed``, of both models' forward passes) and ``time``
        (:class:`weft.measure.Ratio`, changed to plain, CPU seconds).
    """
    pair = {"plain": copy.deepcopy(plain).eval(), "changed": copy.deepcopy(changed).eval()}
    if isinstance(x, Tensor):
        chosen = {1, len(x)} if sizes is None else set(sizes)
        inputs = {n: [(part,) for part in x.split(n)[:16] if len(part) == n] or [(x,)] for n in sorted(chosen)}
    else:
        inputs = {len(x[0]): [x]}
    found: dict[str, Any] = {}
    for size, parts in inputs.items():
        with torch.inference_mode():
            spent = {name: measure.operations(functools.partial(one, *parts[0]))["total"] for name, one in pair.items()}
            time = measure.step_ratio(pair["changed"], pair["plain"], rounds=rounds, inputs=parts)
        found[str(size)] = {"operations": spent, "time": time.to_dict()}
    return found


def _over(plain: int, changed: int) -> float | None:
    return plain / changed if changed else None


def build(one: Card, model: nn.Module, seed: int, at: Sequence[str] | None) -> Any:
    """A rule, cut as asked where it needs stages.

    Raises:
        Unsupported, StageError: when the rule cannot train the model so.
    """
    try:
        rule = one.build(model, seed=seed)
    except StageError:
        if at is None:
            raise
        return one.build(model, seed=seed, at=at)
    return rule if at is None or rule.cut is None else one.build(model, seed=seed, at=at)


def alignment(
    one: Card, rule: Any, x: Any, y: Tensor, tape: Tape | None = None
) -> tuple[dict[str, Any] | None, str | None]:
    """How well a rule's gradient agrees with that of the cross-entropy of the model's own scores.

    Taken over the parameters that the model owns, at the same weights and batch; on a copy, so that nothing changes.
    Swapped layers are put back for the exact gradient, and ``tape`` packs what the rule's step keeps.

    Returns:
        ``{"whole": c, "layers": {name: c}}``: the cosine over all parameters and over those that each module owns
        itself, by the module's name in the model (None where one of the two gradients is zero there); and a reason:
        why there is no such thing (then instead of it), or why ``whole`` is None.
    """
    if "own-model" in one.tags:
        return None, "the rule trains a model of its own"
    if rule.updates == "self":
        return None, "the rule changes the weights itself and has no gradient"
    mine = copy.deepcopy(rule)
    mine.train()
    mine.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        drawn = torch.get_rng_state()
        with contextlib.nullcontext() if tape is None else copy.deepcopy(tape).on(mine):
            mine.step(x, y)
        found = {id(p): p.grad for p in mine.model.parameters()}
        swapped = restore_(mine.model)
        torch.set_rng_state(drawn)  # so that dropout draws the same masks
        exact = measure.exact_gradient(mine.model, x, y)
    layers: dict[str, list[str]] = {}
    for name, parameter in mine.model.named_parameters():
        if parameter.requires_grad and not (swapped and found.get(id(parameter)) is None):
            layers.setdefault(name.rpartition(".")[0], []).append(name)

    def agreement(names: list[str]) -> float | None:
        return measure.cosine([found.get(id(mine.model.get_parameter(n))) for n in names], [exact[n] for n in names])

    whole = agreement([name for names in layers.values() for name in names])
    result = {"whole": whole, "layers": {layer: agreement(names) for layer, names in layers.items()}}
    return result, None if whole is not None else "one of the gradients is zero"


def by_module(kept: Mapping[str, int], most: int = MODULES) -> dict[str, int]:
    """Bytes by module for at most ``most`` modules, with the same sum.

    Where there are more, modules are summed into those that hold them, the deepest first, down to the children of a
    block (``model.layer.3``); of what is still too many, the smallest are summed under ``OTHERS``.
    """
    found = dict(kept)
    depth = max((name.count(".") for name in found), default=0)
    while len(found) > most and depth > 1:
        merged: dict[str, int] = {}
        for name, size in found.items():
            key = name.rpartition(".")[0] if name.count(".") == depth else name
            merged[key] = merged.get(key, 0) + size
        found, depth = merged, depth - 1
    if len(found) <= most:
        return found
    largest = set(sorted(found, key=lambda name: -found[name])[: most - 1])
    rest = sum(size for name, size in found.items() if name not in largest)
    return {**{name: size for name, size in found.items() if name in largest}, OTHERS: rest}
