"""Data sets by name or from a user's npz file, and the order of their batches.

``names`` needs neither torch nor numpy; everything else is imported when it is first asked for (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.data.sources import names

if TYPE_CHECKING:
    from weft.data.dataset import Dataset, batch_count, batches
    from weft.data.loading import load

__all__ = ["Dataset", "batch_count", "batches", "load", "names"]

if not TYPE_CHECKING:
    _HOME = {
        "Dataset": "weft.data.dataset",
        "batch_count": "weft.data.dataset",
        "batches": "weft.data.dataset",
        "load": "weft.data.loading",
    }

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
