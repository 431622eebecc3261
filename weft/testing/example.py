"""What a method's ``example()`` returns: the smallest instance on which its contract can be checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Example:
    """A model, a batch for it, and the options that the method is built with.

    Attributes:
        model: a module that the method can train; checks work on deep copies of it.
        x: inputs ``[B, ...]`` or a tuple of them.
        y: labels ``[B]`` or ``[B, T]``.
        options: keyword arguments of the method.
    """

    model: Any
    x: Any
    y: Tensor
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def classification(
    *,
    features: int = 8,
    hidden: Sequence[int] = (12, 10),
    classes: int = 3,
    batch: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    smooth: bool = False,
    **options: Any,
) -> Example:
    """An MLP ``features - hidden... - classes`` and a batch of normal inputs with labels of every class.

    Args:
        features: D, the inputs are ``[B, D]``.
        hidden: widths of the hidden layers.
        classes: K.
        batch: B.
        seed: of weights, inputs and labels; torch's global generator is not touched.
        dtype: of weights and inputs.
        smooth: tanh in place of ReLU, for checks that need derivatives.
        options: become the example's options.
    """
    widths = [features, *hidden, classes]
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(n_in, n_out))
            if i < len(hidden):
                layers.append(nn.Tanh() if smooth else nn.ReLU())
    x = torch.randn(batch, features, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(batch) % classes
    return Example(nn.Sequential(*layers).to(dtype), x, y[torch.randperm(batch, generator=generator)], options)
