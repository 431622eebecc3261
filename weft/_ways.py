"""The ways to keep less that a plan chooses among, block by block, and their spelling (private to `weft.plan`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from weft.specs import parse


@dataclasses.dataclass(frozen=True)
class Spec:
    """A way to keep less as text: a tape, layers to swap inside each block, or the block itself; whether exact."""

    tape: str | None = None
    inside: tuple[str, ...] = ()
    block: str | None = None
    exact: bool = False


WAYS: dict[str, Spec] = {
    "plain": Spec(exact=True),
    "8 bits": Spec("quantise:bits=8"),
    "4 bits": Spec("quantise:bits=4"),
    "2 bits": Spec("quantise:bits=2"),
    "few-bit activations": Spec(inside=("few-bit-activation:bits=3",)),
    "few-bit activations, 4 bits": Spec("quantise:bits=4", ("few-bit-activation:bits=3",)),
    "offload": Spec("offload:queue_bytes={queue}", exact=True),
    "4 bits, offload": Spec("quantise:bits=4 | offload:queue_bytes={queue}"),
    "checkpoint": Spec(block="checkpoint", exact=True),
}
QUEUE = 2**24


def spelled(
    choice: Mapping[str, str], leaves: Container[str], queue: int = QUEUE
) -> tuple[str | None, list[dict[str, Any]]]:
    """The tape, as text, and the conversions of a way for each block; ``leaves`` are the blocks without parts."""
    by_tape: dict[str, list[str]] = {}
    conversions: list[dict[str, Any]] = []
    for block, name in choice.items():
        spec = WAYS[name]
        if spec.tape is not None:
            by_tape.setdefault(spec.tape.format(queue=queue), []).append(block)
        where = block if block in leaves else f"{block}.*"
        for layer, options in map(parse, spec.inside):
            conversions.append({"layer": layer, "options": options, "where": where})
        if spec.block is not None:
            conversions.append({"layer": spec.block, "options": {}, "where": block})
    routes = []
    for tape, blocks in by_tape.items():
        first, *rest = tape.split(" | ")
        routes.append(" | ".join([f"{first}{',' if ':' in first else ':'}where={' '.join(blocks)}", *rest]))
    return "; ".join(routes) or None, conversions
