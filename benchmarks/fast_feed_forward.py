"""Hard inference of fast feed-forward layers against dense ones of the same width, and their accuracy on MNIST."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from benchmarks.ratios import ratio
from weft.ffn import FastFeedForward, MasterLeafFeedForward
from weft.ops.tree import leaf_outputs

Say = Callable[[str], object]
FEATURES = 768
SHORTEST = 0.02  # seconds of a measurement: a dense layer empties all caches, which fill again in the first calls
CASES = [  # depth, leaf width, batch
    *((7, 32, 1), (11, 8, 1), (11, 8, 64), (7, 32, 64), (5, 32, 1), (5, 32, 64)),
    *((3, 8, 1), (3, 8, 64), (3, 32, 1), (3, 32, 64), (1, 32, 64)),  # where little is skipped
]


def run(say: Say) -> list[dict[str, Any]]:
    """Input and output 768, GELU, one thread; inputs rotate through 1,024 rows, so that a row's leaf is cold.

    Each row: times of a call in seconds, and ratios to the dense layers in float32 and bfloat16, and to the same tree
    in plain torch; of one row at a time also those of ``frozen()``, whose function is called without a module and, in
    ``frozen_out``, writes into a tensor that is there.
    """
    found = []
    for depth, leaf, batch in CASES:
        width = leaf << depth
        dense = nn.Sequential(nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, FEATURES)).eval()
        tree = FastFeedForward(FEATURES, FEATURES, depth=depth, leaf_width=leaf).eval()
        rows = [torch.randn(batch, FEATURES) for _ in range(max(16, 1024 // batch))]
        with torch.inference_mode():
            by = {"fp32": _timed(dense, tree, rows), "torch": _timed(_plainly(tree), tree, rows)}
            by["bf16"] = _timed(dense.bfloat16(), tree, rows, torch.bfloat16)
        row = {"depth": depth, "leaf_width": leaf, "width": width, "batch": batch, "seconds": by["fp32"]["seconds"]}
        for name, one in by.items():
            row |= {f"{name}_seconds": one["plain_seconds"], f"{name}_ratio": one["ratio"]}
            row |= {f"{name}_low": one["low"], f"{name}_high": one["high"]}
        told = ""
        if batch == 1:
            with torch.inference_mode():
                row |= _frozen(dense.float(), tree, rows)
            told = f"; frozen {row['frozen_ratio']:6.1f}, into a given tensor {row['frozen_out_ratio']:6.1f}"
        found.append(row)
        say(
            f"depth {depth:2} x {leaf:2} ({width}), batch {batch:2}: {row['seconds'] * 1e6:7.1f} us, faster than dense "
            f"{row['fp32_ratio']:6.1f} (bf16 {row['bf16_ratio']:6.1f}), than plain torch {row['torch_ratio']:6.1f}"
            f"{told}"
        )
    return found


def _frozen(dense: nn.Module, tree: FastFeedForward, rows: list[Tensor]) -> dict[str, float]:
    run, out, found = tree.frozen(), torch.empty_like(rows[0]), {}
    ways: dict[str, Callable[[Tensor], Tensor]] = {"frozen": run, "frozen_out": lambda x: run(x, out=out)}
    for name, way in ways.items():
        one = _timed(dense, way, rows)
        found |= {f"{name}_seconds": one["seconds"], f"{name}_ratio": one["ratio"]}
        found |= {f"{name}_low": one["low"], f"{name}_high": one["high"]}
    return found


def _timed(
    plain: Callable[[Tensor], Tensor], mine: Callable[[Tensor], Tensor], rows: list[Tensor],
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:  # fmt: skip
    others, n = [x.to(dtype) for x in rows], len(rows)
    return ratio(lambda i: plain(others[i % n]), lambda i: mine(rows[i % n]), rounds=9, shortest=SHORTEST)


def _plainly(tree: FastFeedForward) -> Callable[[Tensor], Tensor]:
    from weft.kernels.tree import leaves_of

    parts = tree.up_weight, tree.up_bias, tree.down_weight, tree.down_bias
    return lambda x: leaf_outputs(x, leaves_of(x, tree.node_weight, tree.node_bias), *parts, tree.activation)


RECIPES: dict[str, dict[str, Any]] = {
    "public example": {
        "hardening": 0.1,
        "balance": 0.0,
        "straight_through": False,
        "lr": 1e-3,
        "epochs": 5,
        "constant": True,
    },
    "hardening 3, balance 1": {"hardening": 3.0, "balance": 1.0, "straight_through": False},
    "defaults": {},
}
RECIPES["master leaf"] = {"master_width": 64}
TREES = [  # depth, leaf width, recipes
    (3, 16, ["public example", "hardening 3, balance 1", "defaults"]),
    (3, 8, ["master leaf"]),
    (2, 64, ["hardening 3, balance 1", "defaults"]),
    (2, 128, ["hardening 3, balance 1", "defaults"]),
    (3, 64, ["hardening 3, balance 1", "defaults"]),
]


def mnist(say: Say, *, seeds: int = 3, epochs: int = 10, data_dir: str | None = None) -> list[dict[str, Any]]:
    """Test accuracy of 784-W-10 networks: dense, and a tree of W hidden units in all, by hard inference.

    ReLU, batches of 128, Adam at 0.003 with a cosine to zero, ten epochs on the training part: chosen on validation
    data.
    """
    data, found = weft.data.load("mnist", data_dir=data_dir), []
    for depth, leaf, recipes in TREES:
        width = (leaf << depth) + sum(RECIPES[name].get("master_width", 0) for name in recipes)
        plain = [_accuracy(_dense(width, seed), data, seed, epochs=epochs)[0] for seed in range(seeds)]
        say(f"dense 784-{width}-10: {statistics.mean(plain):.2f}")
        for name in recipes:
            given = {"epochs": epochs, **RECIPES[name]}
            how = {key: given.pop(key) for key in ("lr", "epochs", "constant") if key in given}
            scores = []
            for seed in range(seeds):
                options = {"depth": depth, "leaf_width": leaf, "activation": nn.ReLU(), "seed": seed, **given}
                kind = MasterLeafFeedForward if "master_width" in given else FastFeedForward
                scores.append(_accuracy(kind(784, 10, **options), data, seed, **how))
            hard, soft, used = (statistics.mean(column) for column in zip(*scores, strict=True))
            row = {"depth": depth, "leaf_width": leaf, "width": width, "recipe": name, "dense": statistics.mean(plain)}
            found.append({**row, "hard": hard, "mixture": soft, "leaves": used, "seeds": seeds})
            say(
                f"depth {depth} x {leaf}, {name}: {hard:.2f} by one leaf, {soft:.2f} by the mixture, "
                f"{hard - row['dense']:+.2f} to dense, {used:.1f} leaves in use"
            )
    return found


def _dense(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def _accuracy(
    net: nn.Module, data: Any, seed: int, *, lr: float = 3e-3, epochs: int = 10, constant: bool = False
) -> tuple[float, float, float]:
    """Trains; percent right on the test set in eval and in training mode, and exp of the entropy of the leaves' use."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    x, y = data.x_train.flatten(1), data.y_train
    steps = epochs * len(list(_batches(data, seed, 0)))
    indices: Iterator[Tensor] = itertools.chain.from_iterable(_batches(data, seed, e) for e in range(epochs))
    for step, index in enumerate(indices):
        for group in optimizer.param_groups:
            group["lr"] = lr if constant else lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    test, labels, used = data.x_test.flatten(1), data.y_test, 1.0
    with torch.no_grad():
        right = [100 * float((net.train(m)(test).argmax(1) == labels).float().mean()) for m in (False, True)]
        if isinstance(net, FastFeedForward):
            from weft.kernels.tree import leaves_of

            share = leaves_of(test, net.node_weight, net.node_bias).bincount() / len(test)
            used = float(torch.special.entr(share).sum().exp())
    return right[0], right[1], used


def _batches(data: Any, seed: int, epoch: int) -> Iterator[Tensor]:
    found: Iterator[Tensor] = data.batches(128, seed=seed, epoch=epoch)
    return found
