"""A rule added as one new file, in a copy of the project, is everywhere without another edit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

RULE = '''
"""Take the sign of the gradient, times its mean size.

    g = sign(dL/dW) mean |dL/dW|

Paper: "A rule that nobody published", Nobody Atall, 2026.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.claim import Check, claim
from weft.method import method
from weft.rules.base import Ready, Rule, Scale, inputs
from weft.testing.example import Example, classification


@method("ninth-rule", contract="rule", family="rules", papers=[], tags={"deterministic"}, defaults={"lr": 1e-3})
class NinthRule(Rule):
    """The sign of the gradient."""

    def step(self, x: Any, y: Tensor, *, scale: Scale = 1.0, ready: Ready | None = None) -> Tensor:
        """One forward and one backward pass."""
        loss = self.criterion(self.model(*inputs(x)), y)
        parameters = self.trainable()
        loss.item()
        if torch.isfinite(loss):
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                signed = g.sign() * g.abs().mean() * scale
                p.grad = signed if p.grad is None else p.grad + signed
                if ready is not None:
                    ready(p)
        return loss


def example() -> Example:
    """A small MLP."""
    return classification()


@claim("every entry of a gradient has the same size", mutants={"plain": ("g.sign() * g.abs().mean()", "g")})
def one_size(seed: int) -> Check:
    """The largest spread of sizes within a gradient, relative to its mean."""
    made = classification(seed=seed, hidden=(7,), batch=32)
    NinthRule(made.model).step(made.x, made.y)
    sizes = [p.grad.abs()[p.grad != 0] for p in made.model.parameters() if p.grad is not None]
    return Check(max(float((s.max() - s.min()) / s.mean()) for s in sizes), 1e-5)
'''


def test_one_new_file_is_enough(tmp_path):
    shutil.copytree(ROOT / "weft", tmp_path / "weft", ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_contracts.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "weft" / "rules" / "ninth_rule.py").write_text(RULE.lstrip(), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    listed = json.loads(run("-m", "weft", "methods", "--json"))["methods"]
    (card,) = [m for m in listed if m["name"] == "ninth-rule"]
    assert card["export"] == "weft.rules.NinthRule"
    assert "Nobody Atall" in card["bibtex"]
    runs = json.loads(run("-m", "weft", "compare", "--rules", "ninth-rule,backprop", "--epochs", "1", "--json"))["runs"]
    assert [(r["rule"], r["status"]) for r in runs] == [("ninth-rule", "ok"), ("backprop", "ok")]
    run("-m", "weft.stubs")
    assert "NinthRule" in (tmp_path / "weft" / "rules" / "__init__.pyi").read_text(encoding="utf-8")
    claims = json.loads(run("-m", "weft", "claims", "ninth-rule", "--mutants", "--json"))["claims"]
    assert claims[0]["holds"] and claims[0]["mutants"][0]["caught"]
    tested = run("-m", "pytest", "-q", "-k", "ninth", "-p", "no:cacheprovider", "tests/test_contracts.py")
    assert " passed" in tested
