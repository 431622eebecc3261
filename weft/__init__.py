"""Weft: both passes of a neural network are yours to choose, on PyTorch, each choice with its paper's claim as a check.

Importing this package imports neither torch nor numpy: everything is loaded when it is used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft import (
        claim,
        compress,
        convert,
        data,
        diagnosis,
        ffn,
        measure,
        method,
        models,
        precision,
        processes,
        rules,
        session,
        sparsity,
        stages,
        tape,
        testing,
    )
    from weft.claim import Check, check_claims
    from weft.comparison import compare
    from weft.compressing import compress_run, load_run
    from weft.convert import convert_, restore_
    from weft.errors import DataError, NonFinite, RecipeError, StageError, Unsupported, UsageError, WeftError
    from weft.literature import papers
    from weft.measuring import measure_step
    from weft.method import card, create, methods
    from weft.planning import plan, plan_step
    from weft.recipe import Recipe
    from weft.report import write_report
    from weft.runs import run
    from weft.training import Trainer, fit

__version__ = "0.1.0"

_HERE = Path(__file__).parent

_WHERE = {
    "Check": "weft.claim",
    "DataError": "weft.errors",
    "NonFinite": "weft.errors",
    "Recipe": "weft.recipe",
    "RecipeError": "weft.errors",
    "StageError": "weft.errors",
    "Trainer": "weft.training",
    "Unsupported": "weft.errors",
    "UsageError": "weft.errors",
    "WeftError": "weft.errors",
    "card": "weft.method",
    "check_claims": "weft.claim",
    "compare": "weft.comparison",
    "compress_run": "weft.compressing",
    "convert_": "weft.convert",
    "create": "weft.method",
    "fit": "weft.training",
    "load_run": "weft.compressing",
    "measure_step": "weft.measuring",
    "methods": "weft.method",
    "papers": "weft.literature",
    "plan": "weft.planning",
    "plan_step": "weft.planning",
    "restore_": "weft.convert",
    "run": "weft.runs",
    "write_report": "weft.report",
}
__all__ = [
    "Check",
    "DataError",
    "NonFinite",
    "Recipe",
    "RecipeError",
    "StageError",
    "Trainer",
    "Unsupported",
    "UsageError",
    "WeftError",
    "card",
    "check_claims",
    "claim",
    "compare",
    "compress",
    "compress_run",
    "convert",
    "convert_",
    "create",
    "data",
    "diagnosis",
    "ffn",
    "fit",
    "load_run",
    "measure",
    "measure_step",
    "method",
    "methods",
    "models",
    "papers",
    "plan",
    "plan_step",
    "precision",
    "processes",
    "restore_",
    "rules",
    "run",
    "session",
    "sparsity",
    "stages",
    "tape",
    "testing",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if not name.startswith("_") and any((_HERE / found).exists() for found in (f"{name}.py", f"{name}/__init__.py")):
        return importlib.import_module(f"weft.{name}")
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
