"""What rules ask of a batch: inputs as a tuple, scores beside labels, and clear errors where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import DataError, NonFinite

IGNORED = -100
NO_LABEL = "every label of the batch is -100 (ignored); leave such batches out"


def inputs(x: Any) -> tuple[Any, ...]:
    """Inputs as the tuple that ``model(*x)`` takes."""
    return x if isinstance(x, tuple) else (x,)


def flat(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``[B, T, K]`` with labels ``[B, T]`` as ``[BT, K]`` and ``[BT]``; others as they are."""
    if scores.ndim == 3 and y.ndim == 2 and scores.shape[:2] == y.shape:
        return scores.flatten(0, 1), y.flatten()
    return scores, y


def rows_used(y: Tensor) -> int:
    """How many rows of labels ``[B, ...]`` have one that is not -100."""
    return int((y != IGNORED).flatten(1).any(1).sum()) if y.ndim > 1 else int((y != IGNORED).sum())


def check_labels(scores: Tensor, y: Tensor) -> None:
    """Raise DataError where labels are no class indices for scores ``[N, K, ...]``."""
    shape = (scores.shape[0], *scores.shape[2:])
    if scores.ndim < 2 or y.shape != shape:
        raise DataError(f"labels of shape {tuple(y.shape)} do not fit scores of shape {tuple(scores.shape)}")
    low, high = (int(v) for v in y.aminmax())
    if low >= 0 and high < scores.shape[1]:
        return
    used = y[y != IGNORED]
    if used.numel() == 0:
        raise DataError(NO_LABEL)
    low, high = (int(v) for v in used.aminmax())
    if low < 0 or high >= scores.shape[1]:
        raise DataError(
            f"labels run from {low} to {high}; for {scores.shape[1]} scores they must be 0 to K - 1, or -100"
        )


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of scores ``[N, K, ...]``, or DataError where labels are no class indices for them.

    On a CPU torch finds such labels itself, so that they are looked at only to say what is wrong with them; on a GPU
    they would end the process.
    """
    if not y.is_cpu:
        check_labels(scores, y)
    try:
        return F.cross_entropy(scores, y)
    except (IndexError, RuntimeError, ValueError):
        check_labels(scores, y)
        raise


def labelled(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` ``[B, ...]`` and ``y`` ``[B]`` that have a label; DataError where labels are no classes."""
    check_labels(x.new_empty(len(x), classes), y)
    used = y != IGNORED
    return (x, y) if used.all() else (x[used], y[used])


def check_finite(losses: Iterable[Tensor]) -> None:
    """Raise NonFinite where a loss is infinite or not a number."""
    for loss in losses:
        value = loss.item()
        if not math.isfinite(value):
            raise NonFinite(
                f"the loss is {value}; nothing was added to any gradient. Lower the learning rate, "
                "clip gradients, or look for such values in the data"
            )


def check_batch(x: Any, y: Any) -> None:
    """Raise DataError where a batch is empty or its parts differ in length."""
    first = inputs(x)[0]
    if not isinstance(first, Tensor) or not isinstance(y, Tensor):
        raise DataError(f"a batch is two tensors, not {type(first).__name__} and {type(y).__name__}")
    if first.ndim == 0 or y.ndim == 0 or first.shape[0] == 0:
        raise DataError(f"the batch is empty: x {tuple(first.shape)}, y {tuple(y.shape)}")
    if first.shape[0] != y.shape[0]:
        raise DataError(f"x has {first.shape[0]} rows and y has {y.shape[0]}")


def check_dtype(model: nn.Module, x: Any) -> None:
    """Raise DataError where inputs in floating point are not of the model's dtype, outside of autocast."""
    first = inputs(x)[0]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    mixed = weight is not None and first.is_floating_point() and first.dtype != weight.dtype
    if weight is not None and mixed and not torch.is_autocast_enabled(first.device.type):
        raise DataError(f"x is {first.dtype} and the model {weight.dtype}; convert one of them")


def explain(model: nn.Module, x: Any, y: Tensor) -> None:
    """Raise DataError where a step failed because of its batch: a dtype that is not the model's, or no label at all."""
    check_dtype(model, x)
    if bool((y == IGNORED).all()):
        raise DataError(NO_LABEL)
