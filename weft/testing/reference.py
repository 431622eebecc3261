"""Slow references: equations written out in numpy, without the methods' own code."""

from __future__ import annotations

from typing import Any

from weft.testing.example import Example


def feedback_mlp(kind: str, gain: float, made: Example, drawn: Any) -> list[Any]:
    """Gradients of a 3-layer ReLU MLP in numpy; ``drawn(shape, tag...)`` gives the standard normal matrices."""
    import numpy as np

    weights = [p.detach().numpy() for p in made.model.parameters()]
    w, b, x, n = weights[0::2], weights[1::2], made.x.numpy(), len(made.y)
    h1 = np.maximum(0, x @ w[0].T + b[0])
    h2 = np.maximum(0, h1 @ w[1].T + b[1])
    scores = h2 @ w[2].T + b[2]
    e = np.exp(scores - scores.max(1, keepdims=True))
    e = (e / e.sum(1, keepdims=True) - np.eye(scores.shape[1])[made.y.numpy()]) / n
    if kind == "chain":
        d2 = (h2 > 0) * (e @ drawn(w[2].shape, "4.weight") / np.sqrt(3 * w[2].shape[1]))
        d1 = (h1 > 0) * (d2 @ drawn(w[1].shape, "2.weight") / np.sqrt(3 * w[1].shape[1]))
    else:
        d1, d2 = (
            (h > 0) * (e @ drawn((e.shape[1], h.shape[1]), "direct", k)) * gain / np.sqrt(h.shape[1])
            for k, h in enumerate((h1, h2))
        )
    return [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), e.T @ h2, e.sum(0)]
