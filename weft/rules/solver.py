"""The contract of a solver: what finds a network's weights from the whole training set in one call, without steps."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import DataError, Unsupported
from weft.rules.batch import IGNORED, NO_LABEL, check_batch, check_dtype

__all__ = ["Report", "Solver"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a solver did.

    Attributes:
        loss: the mean loss of its predictions for the rows that it was given.
        steps: how many rounds it took: iterations, stages or programs, as the method counts them.
        history: its objective after each round.
    """

    loss: float
    steps: int
    history: tuple[float, ...] = ()


class Solver(nn.Module):
    """A way of finding all weights at once: ``solver.fit(x, y)``, then ``solver(x)``.

    A subclass implements :meth:`fit` and :meth:`forward`. Every ``fit`` is checked on the way in, begins anew, and
    leaves torch's global generator alone.

    Args:
        model: the user's model: a pattern for the network that is found, or, where the card is not tagged
            ``own-model``, what is given the weights.
        seed: of everything random that the solver draws.

    Raises:
        Unsupported: when the solver cannot find the weights of such a model.
    """

    updates: ClassVar[str] = "self"
    method_name: str = ""

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.seed = int(seed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fit" in cls.__dict__:
            cls.fit = _guarded(cls.__dict__["fit"])  # type: ignore[method-assign]

    def fit(self, x: Tensor, y: Tensor) -> Report:
        """Find the weights.

        Args:
            x: all inputs ``[N, ...]``, in floating point.
            y: their classes ``[N]``, int64; rows labelled -100 are left out.

        Raises:
            DataError: for labels or inputs that do not fit.
        """
        raise Unsupported(f"{type(self).__name__} implements no fit")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[B, K]``; without side effect."""
        raise Unsupported(f"{type(self).__name__} implements no forward")

    def rng(self, *tags: Any) -> torch.Generator:
        """A private generator, seeded by (seed, tags)."""
        digest = hashlib.blake2b(repr((self.seed, tags)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)

    def structure(self) -> dict[str, Any]:
        """JSON data, enough to :meth:`rebuild` a solver that has found its weights before ``load_state_dict``."""
        return {}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Make room for what :meth:`structure` describes."""
        if structure:
            raise Unsupported(f"{type(self).__name__} has no structure to rebuild")


def _guarded(fit: Callable[..., Report]) -> Callable[..., Report]:
    @functools.wraps(fit)
    def guarded(self: Solver, x: Tensor, y: Tensor) -> Report:
        check_batch(x, y)
        check_dtype(self.model, x)
        if y.ndim != 1 or y.dtype != torch.int64:
            raise DataError(f"labels are class indices [N] of dtype torch.int64, not {tuple(y.shape)} of {y.dtype}")
        if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.isfinite(x).all():
            raise DataError("inputs are one tensor of finite numbers in floating point")
        used = y != IGNORED
        if not used.any():
            raise DataError(NO_LABEL)
        if int(y[used].min()) < 0:
            raise DataError(f"labels run from {int(y[used].min())}; classes are counted from 0")
        return fit(self, x[used], y[used])

    return guarded
