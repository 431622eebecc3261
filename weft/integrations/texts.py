"""Texts from plain files as token ids, for `weft.integrations.huggingface`, which has these names too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.data.arrays import permutation, sixth
from weft.data.dataset import batches
from weft.errors import DataError, UsageError, WeftError

PARTS = ("train", "validation", "test")


def transformers_library() -> Any:
    """The module transformers.

    Raises:
        WeftError: when it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise WeftError(f"this needs transformers ({error}): pip install 'weft[huggingface]'") from error
    return transformers


@dataclass(frozen=True, eq=False, repr=False)
class TextData:
    """Texts with a class each, as token ids in memory; made by `text_classification`.

    Every x is a tuple ``(input_ids, attention_mask)`` of int64 tensors ``[N, T]``, every y is ``[N]`` int64.

    Attributes:
        labels: names of the classes, in the order of their numbers in y.
        x_train, y_train: the training part.
        x_validation, y_validation: the last sixth of the mixed training texts.
        x_test, y_test: the test part, or None both.
    """

    labels: tuple[str, ...]
    x_train: tuple[Tensor, Tensor]
    y_train: Tensor
    x_validation: tuple[Tensor, Tensor]
    y_validation: Tensor
    x_test: tuple[Tensor, Tensor] | None = None
    y_test: Tensor | None = None

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return len(self.labels)

    def batches(self, batch_size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
        """The training batches of one epoch as indices, as :func:`weft.data.batches`."""
        return batches(len(self.y_train), batch_size, seed=seed, epoch=epoch)

    def first(self, count: int) -> TextData:
        """The same with the first ``count`` training texts alone.

        Raises:
            UsageError: for a number below 1.
        """
        if count < 1:
            raise UsageError(f"count={count}; at least 1 text is kept")
        x, y = self.part("train", slice(count))
        return replace(self, x_train=x, y_train=y)

    def part(self, name: str, index: Tensor | slice | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """``(input_ids, attention_mask), y`` of a part: all of it, or the rows ``index``.

        Raises:
            UsageError: for a part that there is not.
        """
        if name not in PARTS or (name == "test" and self.y_test is None):
            there = PARTS if self.y_test is not None else PARTS[:2]
            raise UsageError(f"there is no part {name!r}; there are {', '.join(there)}")
        (ids, mask), y = getattr(self, f"x_{name}"), getattr(self, f"y_{name}")
        rows = slice(None) if index is None else index
        return (ids[rows], mask[rows]), y[rows]

    def examples(self, name: str = "train") -> list[dict[str, Tensor]]:
        """A part as transformers' ``Trainer`` takes data sets: ``input_ids``, ``attention_mask``, ``labels`` by row."""
        (ids, mask), y = self.part(name)
        keys = ("input_ids", "attention_mask", "labels")
        return [dict(zip(keys, row, strict=True)) for row in zip(ids, mask, y, strict=True)]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={len(getattr(self, f'y_{name}'))}" for name in PARTS[:2])
        tested = "" if self.y_test is None else f", test={len(self.y_test)}"
        return f"TextData(labels={self.labels}, length={self.x_train[0].shape[1]}, {sizes}{tested})"


def text_classification(
    train: str | Path | Mapping[str, str | Path],
    tokenizer: Any,
    *,
    length: int = 128,
    test: str | Path | Mapping[str, str | Path] | None = None,
    encoding: str = "utf-8",
) -> TextData:
    """Texts from plain files, mixed in a fixed order, the last sixth for validation, as token ids ``[N, length]``.

    Args:
        train: a file of lines ``label<TAB>text``; or a file of texts, one to a line, for each class, by label:
            ``{"negative": "rt-polarity.neg", "positive": "rt-polarity.pos"}``. Empty lines are left out.
        tokenizer: of transformers, or a folder that holds one.
        length: tokens that a text is cut or padded to.
        test: a test part in one of these forms, with labels that the training texts have.
        encoding: of the files; old collections are often ``"latin-1"``.

    Raises:
        DataError: a file that cannot be read, a line without a label, fewer than two classes, unknown labels in test.
        UsageError: a tokenizer without a padding token, a folder without a tokenizer, ``length`` below 1.
        WeftError: transformers is not installed, for a folder.
    """
    if length < 1:
        raise UsageError(f"length={length}; it is at least 1")
    named = _texts(train, encoding)
    order = permutation(len(named)).tolist()
    found = {label for label, _ in named}
    labels = [str(label) for label in train] if isinstance(train, Mapping) else sorted(found, key=_numbers_first)
    if len(found) < 2 or len(order) < 2:
        raise DataError(
            f"{_said(train)}: {len(order)} texts of the classes {sorted(found)}; expected two classes at least"
        )
    turned = _tokenizer(tokenizer)
    x, y = _encoded([named[i] for i in order], labels, turned, length, _said(train))
    held = len(y) - sixth(len(y))
    kept, left = (x[0][:held], x[1][:held]), (x[0][held:], x[1][held:])
    tested = (None, None) if test is None else _encoded(_texts(test, encoding), labels, turned, length, _said(test))
    return TextData(tuple(labels), kept, y[:held], left, y[held:], *tested)


def _texts(given: str | Path | Mapping[str, str | Path], encoding: str) -> list[tuple[str, str]]:
    """(label, text) of every line that is not empty."""
    if isinstance(given, Mapping):
        return [(str(label), line) for label, path in given.items() for _, line in _lines(Path(path), encoding)]
    pairs = []
    for number, line in _lines(Path(given), encoding):
        label, tab, text = line.partition("\t")
        if not tab or not label.strip() or not text.strip():
            raise DataError(f"{given}, line {number}: {line[:60]!r}; expected a label, a tab and a text")
        pairs.append((label.strip(), text))
    return pairs


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding=encoding)
    except (OSError, LookupError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding} ({error}): give its encoding, e.g. encoding='latin-1'") from error
    for number, line in enumerate(content.split("\n"), start=1):  # latin-1 texts have other line ends inside
        if line.strip():
            yield number, line.strip()


def _numbers_first(label: str) -> tuple[bool, int, str]:
    number = label.isdecimal()
    return not number, int(label) if number else 0, label


def _said(given: str | Path | Mapping[str, str | Path]) -> str:
    return ", ".join(map(str, given.values())) if isinstance(given, Mapping) else str(given)


def _tokenizer(given: Any) -> Any:
    if isinstance(given, str | Path):
        if not Path(given).is_dir():
            raise UsageError(f"{given} is no folder; nothing is fetched from the Hub here")
        try:
            given = transformers_library().AutoTokenizer.from_pretrained(str(given), local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{given} holds no tokenizer that transformers can load: {error}") from error
    if getattr(given, "pad_token_id", None) is None:
        raise UsageError(
            f"{type(given).__name__} has no padding token: set one, tokenizer.pad_token = tokenizer.eos_token"
        )
    return given


def _encoded(
    named: list[tuple[str, str]], labels: list[str], tokenizer: Any, length: int, where: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    number = {label: i for i, label in enumerate(labels)}
    if strange := sorted({label for label, _ in named} - set(number)):
        raise DataError(f"{where}: labels {strange} are not among those of the training texts, {labels}")
    texts = [text for _, text in named]
    made = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    y = torch.tensor([number[label] for label, _ in named])
    return (made["input_ids"].long(), made["attention_mask"].long()), y
