"""Routing scores on their way from one layer to the next, past the modules of a model that do not know of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.errors import UsageError

__all__ = ["Pathway"]


class Pathway:
    """Carries routing scores from one layer to the next, within one pass of the model.

    Layers that are made with the same pathway are its first, second, ... in that order, and have to run in it, each
    once in a pass. ``weft.convert_(model, MoEPlusPlus.options(pathway=Pathway()))`` makes them in the order in
    which the model holds them. Copies of a model have a pathway of their own. Activation checkpointing has to be of
    the kind with ``use_reentrant=False`` (the other kind cuts the scores' gradient), and then a pass's backward comes
    before the next forward. Where that does not fit, give each layer the scores of the one before as an argument.
    """

    def __init__(self) -> None:
        self.layers, self._scores = 0, dict[int, Tensor]()

    def join(self) -> int:
        """Counts one more layer; its place."""
        self.layers += 1
        return self.layers - 1

    def previous(self, place: int, tokens: int) -> Tensor | None:
        """Scores ``[T, N]`` of the layer before the one at ``place``; None for the first."""
        if place == 0:
            return None
        found = self._scores.get(place - 1)
        if found is None or len(found) != tokens:
            had = "has not run" if found is None else f"had {len(found)} tokens, this one has {tokens}"
            raise UsageError(
                f"layer {place} of a pathway: the one before it {had} in this pass; layers run in the order in which "
                "they were made, or take the scores as an argument: layer(x, previous=scores)"
            )
        return found

    def leave(self, place: int, scores: Tensor) -> None:
        """Takes the scores of the layer at ``place``; those of the pass before go with the first layer's."""
        if place == 0:
            self._scores.clear()
        self._scores[place] = scores

    def __deepcopy__(self, memo: dict[int, Any]) -> Pathway:
        made = Pathway()
        made.layers = self.layers
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_scores": {}}
