"""From raw arrays to a ``Dataset``: checks, channels first, the validation part, standardisation.

Every error names the key or file, what was found in it, what is expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.data.dataset import Dataset, Kind
from weft.data.files import Array
from weft.errors import DataError

_CHUNK = 2048  # examples converted at once, so that no second copy of the whole set in float64 is made
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Raw:
    """Inputs and labels as they were stored, with the names by which errors call them.

    Attributes:
        x: [N, ...] numbers.
        y: [N] labels.
        x_name: key or file of ``x``.
        y_name: key or file of ``y``.
    """

    x: Array
    y: Array
    x_name: str
    y_name: str


def permutation(n: int) -> Array:
    """The fixed order [n] used wherever a stored set is mixed: numpy's frozen ``RandomState``, seed 0."""
    return np.random.RandomState(0).permutation(n)


def sixth(n: int) -> int:
    """How many of n training examples are the validation part: the last sixth, at least one."""
    return max(1, n // 6)


def assemble(name: str, where: str, train: Raw, test: Raw | None, *, may_mix: bool) -> Dataset:
    """Check raw arrays and make a ``Dataset`` of them.

    x of shape [N, D] is kind ``vector``; [N, H, W], [N, C, H, W] and [N, H, W, C] are kind ``image`` and come out as
    [N, C, H, W]. Four dimensions are taken as channels last where the last is 1, 3 or 4 and the second is not; where
    both are, the two that are equal are height and width (channels first when that does not tell). Everything is
    standardised with one scalar mean and standard deviation (population), those of the training part without the
    validation part; where that is constant, the deviation is taken as 1.

    Args:
        name: for the ``Dataset``.
        where: file or folder, for errors.
        train: the training set, of which the last sixth becomes the validation part.
        test: the test set, or None.
        may_mix: apply ``permutation`` to the training set first where the two parts would not hold the same classes.

    Raises:
        DataError: wrong dimensions, lengths, types, values or labels (see ``weft.data.load``).
    """
    images = _inputs(train, where)
    labels = _labels(train, where)
    test_images = test_labels = None
    if test is not None:
        test_images, test_labels = _inputs(test, where), _labels(test, where)
        if test_images.shape[1:] != images.shape[1:]:
            raise DataError(
                f"{where}: {test.x_name} has examples of shape {test_images.shape[1:]}, {train.x_name} of shape "
                f"{images.shape[1:]}; expected the same: store both alike"
            )
    classes = _classes(labels, test_labels, train, test, where)
    kind: Kind = "vector" if images.ndim == 2 else "image"

    cut = len(images) - sixth(len(images))
    if may_mix and set(labels[:cut].tolist()) != set(labels[cut:].tolist()):
        order = permutation(len(images))
        images, labels = images[order], labels[order]
    parts = [_channels_first(images[:cut]), _channels_first(images[cut:])]
    if test_images is not None:
        parts.append(_channels_first(test_images))
    inputs = _standardise(parts, where)
    return Dataset(
        name=name,
        x_train=inputs[0],
        y_train=torch.from_numpy(labels[:cut].copy()),
        x_validation=inputs[1],
        y_validation=torch.from_numpy(labels[cut:].copy()),
        x_test=inputs[2] if test is not None else None,
        y_test=torch.from_numpy(test_labels) if test_labels is not None else None,
        classes=classes,
        kind=kind,
    )


def _inputs(raw: Raw, where: str) -> Array:
    x, name = raw.x, raw.x_name
    if x.dtype.kind not in "biuf":
        raise DataError(f"{where}: {name} has dtype {x.dtype}; expected numbers: integers, floats or booleans")
    if x.ndim not in (2, 3, 4):
        more = f"; reshape it, say {name}.reshape(len({name}), -1)" if x.ndim else ""
        raise DataError(
            f"{where}: {name} has shape {x.shape}; expected [N, D], [N, H, W], [N, C, H, W] or [N, H, W, C]{more}"
        )
    if x.size == 0:
        advice = "leave out both test keys if there is no test part" if "test" in name else "give at least 2 examples"
        raise DataError(f"{where}: {name} is empty, of shape {x.shape}: {advice}")
    limit = np.float64(np.finfo(np.float32).max)  # not a Python float, which numpy would cast to float16
    for start, chunk in _chunks(x) if x.dtype.kind == "f" else ():
        bad = ~(np.abs(chunk) <= limit)
        if bad.any():
            rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
            value = chunk[bad].flat[0]
            raise DataError(
                f"{where}: {name} holds {value} in example {start + int(rows[0])}; expected finite values of float32: "
                "remove such examples, or replace the values"
            )
    return x


def _labels(raw: Raw, where: str) -> Array:
    y, name = raw.y, raw.y_name
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: {name} has dtype {y.dtype}; expected integers 0..K-1: number the classes, say with "
            f"numpy.unique({name}, return_inverse=True)[1]"
        )
    if y.ndim != 1:
        hint = f": for one-hot rows store {name}.argmax(1)" if y.ndim == 2 else ""
        raise DataError(f"{where}: {name} has shape {raw.y.shape}; expected [N], one class number an example{hint}")
    if len(y) != len(raw.x):
        raise DataError(
            f"{where}: {name} holds {len(y)} labels for {len(raw.x)} examples in {raw.x_name}; expected as many: store "
            "them together"
        )
    if y.dtype.kind == "f":
        whole = np.isfinite(y) & (np.trunc(y) == y)
        if not whole.all():
            index = int(np.flatnonzero(~whole)[0])
            raise DataError(
                f"{where}: {name} holds {y[index]} at {index}; expected class numbers 0..K-1 (whole numbers): Weft's "
                "data sets are for classification"
            )
    if int(y.min()) < 0:
        index = int(np.flatnonzero(y < 0)[0])
        raise DataError(
            f"{where}: {name} holds {int(y[index])} at {index}; expected class numbers 0..K-1: renumber them"
        )
    if int(y.max()) >= 2**31:
        raise DataError(f"{where}: {name} holds {int(y.max())}; expected class numbers 0..K-1: renumber them")
    return np.ascontiguousarray(y).astype(np.int64)


def _classes(train_labels: Array, test_labels: Array | None, train: Raw, test: Raw | None, where: str) -> int:
    present = np.unique(train_labels)
    if test is not None and test_labels is not None:
        only = np.setdiff1d(test_labels, present)
        if only.size:
            raise DataError(
                f"{where}: {test.y_name} holds the label {int(only[0])}, which {train.y_name} does not: a class that "
                "is never trained cannot be tested; remove these examples, or add some for training"
            )
    classes = int(present[-1]) + 1
    if len(present) != classes:
        missing = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise DataError(
            f"{where}: {train.y_name} holds {len(present)} different labels up to {classes - 1}, but never {missing}; "
            f"expected each of 0..K-1: renumber them, say with numpy.unique({train.y_name}, return_inverse=True)[1]"
        )
    if classes < 2:
        raise DataError(f"{where}: {train.y_name} holds the label 0 alone; expected at least 2 classes to tell apart")
    return classes


def _channels_first(x: Array) -> Array:
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return x[:, None]
    _, second, third, last = x.shape
    if last not in _CHANNELS:
        return x
    if second in _CHANNELS and (third == last or second != third):
        return x
    return np.moveaxis(x, 3, 1)


def _chunks(x: Array) -> Iterator[tuple[int, Array]]:
    return ((start, x[start : start + _CHUNK]) for start in range(0, len(x), _CHUNK))


def _standardise(parts: list[Array], where: str) -> list[Tensor]:
    first = parts[0]
    low, high = first.min(), first.max()
    if low == high:
        mean, deviation = float(low), 1.0
    else:
        mean = sum(float(chunk.sum(dtype=np.float64)) for _, chunk in _chunks(first)) / first.size
        squares = sum(float(np.square(chunk.astype(np.float64) - mean).sum()) for _, chunk in _chunks(first))
        deviation = (squares / first.size) ** 0.5 or 1.0
    result = []
    for part in parts:
        out = np.empty(part.shape, np.float32)
        with np.errstate(over="ignore"):
            for start, chunk in _chunks(part):
                out[start : start + _CHUNK] = (chunk.astype(np.float64) - mean) / deviation
        if not np.isfinite(out).all():
            raise DataError(
                f"{where}: standardised with mean {mean:g} and deviation {deviation:g}, some inputs are beyond "
                "float32; expected training, validation and test inputs of one scale: rescale them"
            )
        result.append(torch.from_numpy(out))
    return result
