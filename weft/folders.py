"""What lies in the folder of a run, and how it is written so that a kill at any moment leaves whole files behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weft.errors import UsageError, WeftError

RECIPE, CHECKPOINT, RESULT, WEIGHTS = "recipe.yaml", "checkpoint.safetensors", "result.json", "model.safetensors"
PREFIX = ".weft-"  # of files that are being written


def begin(folder: Path, recipe: str) -> None:
    """Make the folder of a new run, with its recipe as text.

    Raises:
        UsageError: when it holds a run already.
        WeftError: when it cannot be made or written.
    """
    if (folder / RECIPE).exists():
        raise UsageError(f"{folder} holds a run already; go on with it by resume, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeftError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error
    write(folder / RECIPE, recipe.encode())


def sweep(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for left in folder.glob(f"{PREFIX}*"):
        left.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the plain data of a folder's checkpoint; None where the run was ended before its first.

    Raises:
        WeftError: when the file is something else, or damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["weft"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeftError(f"{path} is no checkpoint of Weft's: {error}; start the run anew in another folder") from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Replace a folder's checkpoint by tensors and plain data, which :func:`read_checkpoint` gives back."""
    text = {"weft": json.dumps(plain, allow_nan=False)}
    write(folder / CHECKPOINT, save(_apart(tensors), metadata=text))


def write_result(folder: Path, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
    """End a run's folder with its weights and its result."""
    write(folder / WEIGHTS, save(_apart(weights)))
    write(folder / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no storage, as safetensors wants them."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: after a kill or a full disk it is the old one or the new one, whole.

    Raises:
        WeftError: when it cannot be written; the old file stays.
    """
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PREFIX)
        os.chmod(name, 0o644)  # it is made for its owner alone
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            full = "; free some space" if error.errno == errno.ENOSPC else ""
            raise WeftError(f"cannot write {path}: {error.strerror}{full}; what was saved before is intact") from error
        raise
