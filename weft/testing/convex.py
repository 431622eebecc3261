"""Slow references for convex training of two-layer ReLU networks: problems, objectives and lower bounds, in numpy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.testing.example import Example, classification


def problem(seed: int, rows: int, features: int, classes: int = 2) -> Example:
    """Normal inputs, in two dimensions with angles apart; a model without biases, in float64."""
    made = classification(features=features, hidden=(16,), classes=classes, batch=rows, seed=seed, dtype=torch.float64)
    made.model[0] = nn.utils.skip_init(nn.Linear, features, 16, bias=False, dtype=torch.float64)
    if features > 2:
        return made
    drawn = torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angle = (torch.arange(rows) + 0.4 * drawn[:, 0]) * math.pi / rows + math.pi * (torch.arange(rows) % 3 == 0)
    x = (0.5 + drawn[:, 1:]) * torch.stack([angle.cos(), angle.sin()], 1)
    return dataclasses.replace(made, x=x)


def error(made: Example, y: Any, weights: Any, out: Any, beta: float) -> tuple[Any, float]:
    """What a network leaves of ``y`` ``[N, K]``, and its objective, in numpy."""
    left = y - np.maximum(0, made.x.numpy() @ weights.T) @ out.T
    return left, 0.5 * (left**2).sum() + 0.5 * beta * ((weights**2).sum() + (out**2).sum())


def dual_bound(x: Any, left: Any, y: Any, beta: float, patterns: Any) -> float:
    """A lower bound on the optimum over ``patterns`` ``[N, P]``, for one output, by the program's dual.

    Any q with |q'D_i X u| <= beta for all unit u of each cone gives q'y - |q|^2 / 2; the most in a cone is the length
    of the projection of X'D_i q onto it, by nonnegative least squares.
    """
    from scipy.optimize import nnls

    most = 1e-9
    for pattern in np.unique(patterns, axis=1).T * 1.0:
        towards, cone = x.T @ (left * pattern), ((2 * pattern - 1)[:, None] * x).T
        for c in (towards, -towards):
            most = max(most, float(np.linalg.norm(c + cone @ nnls(cone, -c)[0])))
    q = left * min(1.0, beta / most)
    return float(q @ y - 0.5 * q @ q)


def patterns_around(x: Any) -> Any:
    """Patterns of two-dimensional rows in 4000 directions."""
    angles = np.arange(4000) * np.pi / 2000 + 1e-4
    return x @ np.stack([np.cos(angles), np.sin(angles)]) >= 0
