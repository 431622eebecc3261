"""What a page says in sentences and tables: what was compared, what was found, what was chosen how."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from weft.cards import trained_with
from weft.report.parts import Table, count, many, number, percent, seeds, several, size, spread
from weft.report.reading import Run, Source
from weft.report.series import BASELINE, Chapter, Series, Spread

NEAR = 0.05  # accuracies and times that count as being about the same
STATES = {"error": "failed"}
ENVIRONMENT = ("weft", "commit", "torch", "numpy", "python", "platform", "cpu", "cores", "threads", "cuda")


def title(chapter: Chapter) -> str:
    """What was compared, in a few words."""
    labels = list(dict.fromkeys(run.rule for source in chapter.sources for run in source.runs))
    noun = "training" if any("→" in label for label in labels) else "rule"
    names = several(labels) if 0 < len(labels) <= 3 else many(len(labels), noun)
    return f"{names} on {Path(chapter.data).name}"


def facts(chapter: Chapter) -> list[tuple[str, str]]:
    """The settings that all share, or all values where they differ."""
    found: dict[str, list[str]] = {"model": [chapter.model], "data": [_rows(chapter)]}
    for source in chapter.sources:
        how = source.settings
        for key, noun in (("epochs", "epoch"), ("batch_size", ""), ("threads", "thread")):
            if isinstance(how.get(key), int):
                found.setdefault(key, []).append(many(how[key], noun) if noun else f"{how[key]:,}")
    found["seeds"] = sorted({str(run.seed) for source in chapter.sources for run in source.runs}, key=int)
    names = {"batch_size": "batch", "epochs": "trained for", "threads": "run on"}
    names["seeds"] = "seed" if len(found["seeds"]) == 1 else "seeds"
    return [(names.get(key, key), ", ".join(dict.fromkeys(values))) for key, values in found.items() if values]


def _rows(chapter: Chapter) -> str:
    for source in chapter.sources:
        rows = source.settings.get("rows")
        if isinstance(rows, dict):
            parts = [f"{count(int(rows.get(key) or 0))} {key}" for key in ("train", "validation", "test")]
            return f"{chapter.data}: {', '.join(parts)} rows"
    return chapter.data


def findings(chapter: Chapter) -> list[str]:
    """What the figures say, and no more: the first sentence is of accuracy, the others of costs and of doubts."""
    reached = [(one, found) for one in chapter.series if (found := chapter.accuracy(one)) is not None]
    without = list(dict.fromkeys(label for label, run in chapter.troubled if run.status != "unfinished"))
    if not reached:
        ended = "; the reasons are below" if without else " yet"
        return [f"No run has come to its end{ended}, so there is no accuracy to report."]
    reached.sort(key=lambda entry: -entry[1].mean)
    made = [_accuracy(chapter, reached), *_costs(chapter, reached), *_doubt(chapter, reached)]
    if without:
        made.append(f"No figures from {several(without)}; the reasons are below.")
    if not chapter.tested:
        made.append("The data has no test part, so accuracies are those of the validation part.")
    return made


def _accuracy(chapter: Chapter, reached: list[tuple[Series, Spread]]) -> str:
    (best, most), rest = reached[0], reached[1:]
    what = f"{chapter.part} accuracy after the last epoch"
    if not rest:
        return f"{best.label} reaches {_with_range(most)} {what}."
    second, next_most = rest[0]
    if percent(most.mean) == percent(next_most.mean):
        return f"{best.label} and {second.label} reach the same {what}, {percent(most.mean)}."
    text = f"{best.label} reaches the highest {what}, {_with_range(most)}; {second.label} follows with "
    text += _with_range(next_most)
    if min(len(most.values), len(next_most.values)) > 1:
        if most.low > max(found.high for _, found in rest):
            text += f"; the worst seed of {best.label} is above the best of every other"
        elif most.low <= next_most.high:
            text += "; their ranges over seeds overlap"
    return text + "."


def _with_range(found: Spread) -> str:
    if len(found.values) == 1:
        return percent(found.mean)
    low, high = percent(found.low).removesuffix("\N{NO-BREAK SPACE}%"), percent(found.high)
    return f"{percent(found.mean)} on average ({low} to {high} over {many(len(found.values), 'seed')})"


def _costs(chapter: Chapter, reached: list[tuple[Series, Spread]]) -> list[str]:
    """Which of the rules that come near to the best accuracy is the cheapest."""
    near = [one for one, found in reached if reached[0][1].mean - found.mean <= NEAR]
    if len(near) < 2:
        return []
    itself = chapter.baseline.runs[0].step_ratio if chapter.baseline is not None else None
    doubt = max(NEAR, 2 * abs((itself or 1.0) - 1))  # as far as backprop's time is from itself
    said: dict[str, list[str]] = {}
    for key, what, write in (
        ("kept_bytes", "the fewest bytes kept for the way back", size),
        ("peak_bytes", "the lowest peak of memory", size),
        ("step_ratio", "the fastest step", lambda v: f"{number(v)} of backprop's time"),
    ):
        found = [(value, one) for one in near if (value := getattr(one.runs[0], key)) is not None]
        if len(found) < 2:
            continue
        least = min(value for value, _ in found)
        tied = [one for value, one in found if value <= least * (1 + (doubt if key == "step_ratio" else 0))]
        if len(tied) < len(found):
            figure = "" if key == "step_ratio" and chapter.baseline in tied else f" ({write(least)})"
            subject = f"{several([one.label for one in tied])} {'has' if len(tied) == 1 else 'have'}"
            said.setdefault(subject, []).append(what + figure)
    if not said:
        return []
    parts = [f"{subject} {several(things)}" for subject, things in said.items()]
    return [f"Of the {len(near)} rules within {100 * NEAR:.0f} points of the best, {'; '.join(parts)}."]


def _doubt(chapter: Chapter, reached: list[tuple[Series, Spread]]) -> list[str]:
    """How far apart two accuracies of one seed have to be to mean something."""
    if len(reached) < 2 or any(len(found.values) > 1 for _, found in reached):
        return []
    rows = next((s.settings.get("rows") for s in chapter.sources if isinstance(s.settings.get("rows"), dict)), None)
    amount = int((rows or {}).get(chapter.part) or 0)
    share = reached[0][1].mean
    if not amount or not 0 < share < 1:
        return ["Each rule ran with one seed: small differences may be chance."]
    apart = 100 * 2 * math.sqrt(2 * share * (1 - share) / amount)
    return [
        f"Each rule ran with one seed: on {many(amount, f'{chapter.part} row')}, "
        f"differences below about {apart:.1f} points may be chance."
    ]


def figures(chapter: Chapter) -> Table | None:
    """The table of all figures."""
    rows = []
    for one in chapter.series:
        first = one.runs[0]
        ends = [one.over(lambda run, i=i: run.aligned[i].whole if run.aligned else None) for i in (0, -1)]  # type: ignore[misc]
        cosine = [number(found.mean) for found in ends if found is not None]
        times = number(first.step_ratio) if first.step_ratio is not None else "–"
        state = [] if all(run.status == "ok" for run in one.runs) else ["unfinished"]
        label = " · ".join([one.label, *state])
        rows.append([label, spread(chapter.accuracy(one)), times, size(first.kept_bytes), size(first.peak_bytes)])
        rows[-1] += [" → ".join(dict.fromkeys(cosine)) or "–", count(first.extra_parameters)]
        rows[-1] += [*_passes(first), count(first.independent_stages)]
    if not rows:
        return None
    columns = ["rule", f"{chapter.part} accuracy", "step time", "kept bytes", "peak bytes", "cosine", "own numbers"]
    columns += ["passes", "transposed products", "stages apart"]
    notes = {
        "step time": "Step time: to backprop's, without the optimizer.",
        "peak bytes": "Peak bytes: of a step, gradients included.",
        "cosine": "Cosine: of the whole gradient with the exact one, after the first and the last epoch.",
        "own numbers": "Own numbers: that the rule holds beside the model.",
        "passes": "Passes: forward and backward through a layer in one step, in whole batches.",
        "transposed products": "Transposed products: with a weight that enters the other way round than forward.",
        "stages apart": "Stages apart: trained without waiting for each other, so that they could run in parallel.",
    }
    shown = [i for i in range(len(columns)) if i < 2 or any(row[i] != "–" for row in rows)]
    several_seeds = ", mean (smallest to largest) over seeds" * any(len(one.runs) > 1 for one in chapter.series)
    said = [
        f"Accuracy after the last epoch{several_seeds}.",
        *(notes[columns[i]] for i in shown if columns[i] in notes),
    ]
    if any(one.source.kind == "run" for one in chapter.series):
        said.append("Time, bytes and agreement are measured by weft compare, not in a run of a recipe.")
    cells = [[row[i] for i in shown] for row in rows]
    return Table("All figures by rule", [columns[i] for i in shown], cells, range(1, len(shown)), " ".join(said))


def choices(chapter: Chapter) -> tuple[list[str], Table | None]:
    """Optimizers, cuts and initial weights, and who chose them."""
    rows = []
    for one in chapter.series:
        first = one.runs[0]
        trained = [trained_with(vars(phase)) or "changes weights itself" for phase in first.phases]
        at = "none" if first.at is None else ", ".join(name or "(itself)" for name in first.at)
        weights = {"own": "own", "shared": "shared"}.get(first.initial_weights or "", "by seed")
        rows.append([one.label, " → ".join(trained), _origin(one.source), at, weights, seeds(one)])
        rows[-1].append(count(first.parameters))
    said = [
        "Settings from a method's card were chosen on validation data (the last sixth of the training set), never on "
        "test data; the accuracies are those after the last epoch, not of the best one."
    ]
    own = [one.label for one in chapter.series if one.runs[0].initial_weights == "own"]
    shared = [one for one in chapter.series if one.runs[0].initial_weights == "shared"]
    if len(shared) > 1:
        said.append("Rules with shared initial weights start each seed from the same ones, and see the same batches.")
    if own:
        said.append(f"{several(own)} {'trains a model of its' if len(own) == 1 else 'train models of their'} own.")
    columns = ["rule", "trained with", "chosen by", "cut behind", "initial weights", "seeds", "model's parameters"]
    return said, Table("What each rule was trained with", columns, rows, [6]) if rows else None


def _origin(source: Source) -> str:
    how = source.settings
    if source.kind == "run":
        return "recipe, else card"
    given = [key for key in ("optimizer", "lr") if how.get(key) is not None]
    base = f"{BASELINE}'s card" if how.get("same_optimizer") else "the rule's card"
    return base if not given else f"user ({', '.join(given)}), else {base}"


def _passes(run: Run) -> list[str]:
    """Passes forward and backward, and products with a transposed weight."""
    if run.passes is None:
        return ["–", "–"]
    return [f"{run.passes['forward']:.3g} + {run.passes['backward']:.3g}", f"{run.passes['transposed']:.0f}"]


def doubts(chapter: Chapter) -> Table | None:
    """What runs say against themselves."""
    gathered: dict[tuple[str, str], list[str]] = {}
    for one in chapter.series:
        for run in one.runs:
            for concern in run.concerns:
                gathered.setdefault((one.label, concern), []).append(str(run.seed))
    rows = [[label, ", ".join(of), concern] for (label, concern), of in gathered.items()]
    return Table("Reasons for doubt, and what to try", ["rule", "seeds", "what was seen"], rows) if rows else None


def troubles(chapter: Chapter) -> Table | None:
    """Runs without figures, and why."""
    gathered: dict[tuple[str, str, str], list[str]] = {}
    for label, run in chapter.troubled:
        key = (label, STATES.get(run.status, run.status), run.error or "no reason is recorded")
        gathered.setdefault(key, []).append(str(run.seed))
    rows = [[label, ", ".join(of), state, reason] for (label, state, reason), of in gathered.items()]
    for source in chapter.sources:
        missing = source.planned - len(source.runs)
        if missing > 0:
            rows.append(["all others", "", "not run", f"{source.folder} was ended before {many(missing, 'more run')}"])
    return Table("Runs without figures", ["rule", "seeds", "state", "reason"], rows) if rows else None


def environment(sources: tuple[Source, ...]) -> list[Table]:
    """Versions and machine, once for all folders that agree."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for source in sources:
        same = next((names for found, names in groups if found == source.environment), None)
        if same is None:
            groups.append((source.environment, [source.folder]))
        else:
            same.append(source.folder)
    made = []
    for found, folders in groups:
        keys = [key for key in ENVIRONMENT if found.get(key) is not None]
        rows = [[key, _short(key, str(found[key]))] for key in keys] or [["environment", "not recorded"]]
        made.append(Table(f"Measured in {several(folders)}", ["what", "value"], rows))
    return made


def _short(key: str, value: str) -> str:
    """A commit's name as people write it, with the mark that says that files were changed."""
    return value if key != "commit" or len(value) < 40 else value[:12] + value[40:]
