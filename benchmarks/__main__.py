"""``python -m benchmarks [PART...]``: by default steps, memory, loop, keeping, and the layers that skip work.

The other parts train: ``tapes``, ``mnist``, ``cifar``, ``sparse_mnist`` and ``fast_feed_forward_mnist``; ``peers`` runs
others' code.
Every file of results holds the figures with the environment (commit, machine, versions) that they were measured in.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import (
    accuracy,
    binary,
    experts,
    fast_feed_forward,
    keeping,
    loop,
    memory,
    peers,
    row_skipping,
    softmax,
    sparse,
    sparse_mnist,
    steps,
    tapes,
)
from weft import measure

PARTS = {"steps": steps.run, "memory": memory.run, "loop": loop.run, "peers": peers.run, "keeping": keeping.run}
PARTS |= {"mnist": accuracy.mnist, "cifar": accuracy.cifar, "tapes": tapes.run}
SPEED = {"sparse": sparse.run, "fast_feed_forward": fast_feed_forward.run, "binary": binary.run}
SPEED |= {"row_skipping": row_skipping.run, "experts": experts.run, "softmax": softmax.run}
PARTS |= {**SPEED, "sparse_mnist": sparse_mnist.run, "fast_feed_forward_mnist": fast_feed_forward.mnist}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the parts asked for, one after another, on one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], metavar="PART", help=", ".join(PARTS))
    chosen = parser.parse_args().parts or ["steps", "memory", "loop", "keeping", *SPEED]
    torch.set_num_threads(1)
    for name in chosen:
        rows = PARTS[name](lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        document = {"rows": rows, "environment": measure.environment()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _show(name, rows)


def _show(name: str, rows: list[dict[str, object]]) -> None:
    keys = [key for key in rows[0] if not isinstance(rows[0][key], dict | list)]
    lines = [f"\n{name}", " | ".join(keys)]
    for row in rows:
        lines.append(" | ".join(f"{v:.4g}" if isinstance(v := row.get(key), float) else str(v) for key in keys))
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
