"""Type stubs that are written from the cards."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import weft
from weft.stubs import write_stubs

ROOT = Path(weft.__file__).parent

METHOD = '''"""A ninth rule."""

from weft.method import method
from weft.rules.base import Rule


@method("ninth", contract="rule", family="rules", papers=[], variants={"ninth-again": {"options": {}}})
class Ninth(Rule):
    """One more."""
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of the package without stubs."""
    folder = tmp_path / "weft"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    return folder


def names(path):
    tree = ast.parse(path.read_text())
    imported = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (listed,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert listed == sorted(listed) and set(listed) == imported
    return imported


def test_every_method_is_exported(copy):
    written = write_stubs(copy)
    assert copy / "rules" / "__init__.pyi" in written
    for path in written:
        family = path.parent.name
        expected = {card.export for card in weft.methods(family)}
        package = importlib.import_module(f"weft.{family}")
        bases = getattr(package, "BASES", {})
        assert names(path) == expected | set(bases) and set(bases) <= set(dir(package))
        assert all(getattr(package, name).__module__.startswith("weft.") for name in bases)


def test_written_only_when_changed(copy):
    assert write_stubs(copy)
    assert write_stubs(copy) == []
    (copy / "rules" / "ninth.py").write_text(METHOD)
    assert write_stubs(copy) == [copy / "rules" / "__init__.pyi"]
    assert {"Ninth", "NinthAgain"} <= names(copy / "rules" / "__init__.pyi")
    (copy / "rules" / "ninth.py").unlink()
    assert write_stubs(copy) == [copy / "rules" / "__init__.pyi"]
    assert "Ninth" not in names(copy / "rules" / "__init__.pyi")
    assert list(copy.rglob("*.tmp")) == []


def test_packages_without_methods_get_none(copy):
    write_stubs(copy)
    assert not (copy / "models" / "__init__.pyi").exists()
    assert not (copy / "cli" / "__init__.pyi").exists()


def test_command_without_torch(copy):
    code = (
        "import runpy, sys\n"
        "runpy.run_module('weft.stubs', run_name='__main__')\n"
        "assert not {'torch', 'numpy', 'typer'} & set(sys.modules), sorted(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=copy.parent)
    assert ran.returncode == 0, ran.stderr
    assert str(copy / "rules" / "__init__.pyi") in ran.stdout


def test_setup_needs_setuptools_alone():
    setup = ast.parse((ROOT.parent / "setup.py").read_text())
    roots = {a.name.split(".")[0] for n in ast.walk(setup) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.split(".")[0] for n in ast.walk(setup) if isinstance(n, ast.ImportFrom)}
    assert roots <= {"sys", "pathlib", "setuptools", "weft"}


def test_type_checker_sees_the_methods(copy, tmp_path, monkeypatch):
    """The stub's names through mypy, the modules behind them not followed (that would check torch)."""
    api = pytest.importorskip("mypy.api")
    write_stubs(copy)
    user = tmp_path / "user.py"
    user.write_text("from weft.rules import MonoForward, DirectFeedbackAlignment, Rule, Nothing\n")
    monkeypatch.chdir(tmp_path)
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}"]
    out, err, _ = api.run([*options, str(user), str(copy / "rules" / "__init__.pyi")])
    assert 'no attribute "Nothing"' in out, out + err
    assert "Found 1 error" in out, out
