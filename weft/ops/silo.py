"""Levels of a pyramid that exchange what they know, coupled so that the exchange can be undone: see `Silo`.

Source of the coupling: V. Chiley et al., "RevBiFPN: the fully reversible bidirectional feature pyramid network", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from weft.errors import DataError, UsageError

__all__ = ["Half", "Silo", "Transform", "enlarge", "shrink"]

Transform = Callable[[Tensor], Tensor]
Half = Sequence[tuple[int, int, Transform]]
Factory = Callable[[int, int, int], nn.Module]


def shrink(before: int, after: int, factor: int) -> nn.Module:
    """The default F: channels mixed, each filtered with a stride of ``factor``, mixed into the coarser level's."""
    return nn.Sequential(
        nn.Conv2d(before, before, 1, bias=False),
        nn.BatchNorm2d(before),
        nn.Hardswish(),
        nn.Conv2d(before, before, 2 * factor - 1, factor, factor - 1, groups=before, bias=False),
        nn.BatchNorm2d(before),
        nn.Hardswish(),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
    )


def enlarge(before: int, after: int, factor: int) -> nn.Module:
    """The default G: the same at the coarser level with a 3 x 3 filter, then interpolated."""
    inner = shrink(before, after, 1)
    assert isinstance(inner, nn.Sequential)
    inner[3] = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
    return inner.append(nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=False))


class Silo(nn.Module):
    """Levels that exchange what they know: called as a module it is the plain computation, with autograd's memory.

    Args:
        channels: of each level of the output, the finest first; at least two.
        inputs: how many levels it takes: as many, or one less.
        down, up: called with the channels before and after and the factor between the sides of two levels; each
            returns a module that maps one level to the shape of another.

    Raises:
        UsageError: for other numbers of levels.
    """

    def __init__(
        self, channels: Sequence[int], *, inputs: int | None = None, down: Factory = shrink, up: Factory = enlarge
    ) -> None:
        super().__init__()
        n = len(channels)
        self.levels, self.inputs = n, n if inputs is None else inputs
        if n < 2 or self.inputs not in (n - 1, n):
            raise UsageError(
                f"channels={tuple(channels)!r}, inputs={inputs!r}; a silo has 2 levels or more and adds one"
            )
        self.pairs = (
            [(i, j) for i in range(self.inputs) for j in range(i + 1, n)],
            [(i, j) for i in reversed(range(n)) for j in range(i)],
        )
        self.down = nn.ModuleList(down(channels[i], channels[j], 2 ** (j - i)) for i, j in self.pairs[0])
        self.up = nn.ModuleList(up(channels[i], channels[j], 2 ** (i - j)) for i, j in self.pairs[1])

    def halves(self) -> list[list[tuple[int, int, nn.Module]]]:
        """Down, then up: from which level to which, by which transform; in the order in which they are undone."""
        both = zip(self.pairs, (self.down, self.up), strict=True)
        return [[(i, j, f) for (i, j), f in zip(pairs, half, strict=True)] for pairs, half in both]

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """The levels of the output, of maps ``[B, C_i, H / 2^i, W / 2^i]``.

        Raises:
            DataError: where a transform does not give the shape of the level that it is added to.
        """
        return tuple(self.through(levels, self.halves()))

    def through(self, levels: Sequence[Tensor], halves: Sequence[Half]) -> list[Tensor]:
        """The output, by transforms in place of this silo's own; each reads the levels as its half was given them."""
        if len(levels) != self.inputs:
            raise DataError(f"{len(levels)} levels for a silo that takes {self.inputs}")
        out = list(levels)
        for half in halves:
            given = list(out)
            for i, j, f in half:
                change = f(given[i])
                if j == len(out):
                    out.append(change)
                elif change.shape != out[j].shape:
                    found = f"{tuple(change.shape)} from level {i} of {tuple(given[i].shape)}"
                    raise DataError(f"level {j} has the shape {tuple(out[j].shape)} and gets {found}")
                else:
                    out[j] = out[j] + change.to(out[j].dtype)
        return out

    def inverse(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """What the silo was given for this output, without gradients; what draws random numbers cannot be undone."""
        values = list(levels)
        with torch.no_grad():
            for half in reversed(self.halves()):
                for i, j, f in half:
                    values[j] = values[j] - f(values[i]).to(values[j].dtype)
        return tuple(values[: self.inputs])
