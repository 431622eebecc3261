"""Why a plan is as it is, in a few sentences (private to `weft.plan`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.planning import Plan


def sentences(made: Plan, whole: bool, error: float | None, slowdown: float | None) -> list[str]:
    """What a plan chose, why, and whether a step bore it out; what binds where nothing fits.

    Args:
        made: the plan.
        whole: whether the batch cannot be cut into micro-batches.
        error, slowdown: the limits that were given.
    """
    used: dict[str, int] = {}
    for way in made.blocks.values():
        used[way] = used.get(way, 0) + 1
    told = ", ".join(f"{way} for {count} of {len(made.blocks)} blocks" for way, count in used.items())
    cut = f" in {made.accumulate} micro-batches" if made.accumulate > 1 else ""
    first = (
        f"A plain step of {made.batch_size} rows needs about {_size(made.plain['memory_bytes'])}, "
        f"{_size(made.fixed_bytes)} of it for weights and optimizer state; the budget is {_size(made.memory)}."
    )
    ratio = made.predicted["step_seconds"] / max(1e-9, made.plain["step_seconds"])
    off = made.measured["gradient_error"]
    if made.fits:
        second = (
            f"Of all choices that fit, the fastest is {told}{cut}: {ratio:.2f} of the plain step's time by prediction, "
            f"{'gradients exact' if off < 1e-5 else f'the gradient off by {100 * off:.2g} %'}."
        )
    else:
        second = f"Nothing fits; nearest comes {told}{cut}."
    third = (
        f"Run once, the step needed {_size(made.measured['memory_bytes'])} and {made.measured['step_seconds']:.3g} s, "
        f"where {_size(made.predicted['memory_bytes'])} and {made.predicted['step_seconds']:.3g} s were predicted."
    )
    told_all = [first, second, third]
    return told_all if made.fits else [*told_all, _what_binds(made, whole, error, slowdown)]


def _what_binds(made: Plan, whole: bool, error: float | None, slowdown: float | None) -> str:
    step = made.measured["peak_bytes"]
    if made.fixed_bytes + 0.0 >= made.memory:
        needed = _size(made.fixed_bytes)
        return (
            f"Weights and optimizer state alone need {needed}: take an optimizer with less state, or a smaller model."
        )
    limits = [f"max_gradient_error={error}" for _ in "x" if error is not None]
    limits += [f"max_slowdown={slowdown}" for _ in "x" if slowdown is not None]
    limits += ["BatchNorm, which keeps the batch in one part" for _ in "x" if whole]
    kept = made.measured["kept_bytes"]
    what = f"{_size(kept)} are kept between the passes, {_size(step - kept)} are gradients and working memory"
    return f"Of the step's {_size(step)}, {what}" + (f"; {' and '.join(limits)} rule out more." if limits else ".")


def _size(value: float) -> str:
    amount = float(value)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
