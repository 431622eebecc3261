"""A method's source with one change made to it, run in place of the true one: what shows that a claim can fail."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path

from weft.cards import Card, ClaimCard
from weft.errors import WeftError


def mutated(owner: Card, one: ClaimCard, mutant: str) -> types.ModuleType:
    """The method's module with one mutant applied, in place of the true one in this process's ``sys.modules``.

    Raises:
        WeftError: when the mutant's text does not occur exactly once outside the file's claims.
    """
    tree = ast.parse(owner.path.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == one.function)
    literal = next(k for d in node.decorator_list if isinstance(d, ast.Call) for k in d.keywords if k.arg == "mutants")
    old, new, *elsewhere = ast.literal_eval(literal.value)[mutant]
    if not elsewhere:
        return _replaced(owner.module, owner.path, old, new)
    spec = importlib.util.find_spec(elsewhere[0])
    if spec is None or spec.origin is None:
        raise WeftError(f"mutant {mutant!r} of {one.function} names no module: {elsewhere[0]!r}")
    untouched = {"weft.errors", "weft.cards", "weft.method", "weft.mutants", "weft.claim"}
    untouched.add("weft.kernels.compiled")  # it knows which operators torch has
    for loaded in [n for n in sys.modules if n.startswith("weft.") and n not in untouched]:
        del sys.modules[loaded]  # before the change is run: a class that both import must be one class
    sys.modules.pop(owner.module, None)
    _replaced(elsewhere[0], Path(spec.origin), old, new)
    return importlib.import_module(owner.module)


def _replaced(name: str, path: Path, old: str, new: str) -> types.ModuleType:
    """A module run from its source with ``old`` replaced by ``new``, which must occur once outside its claims."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    claims = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and _is_claim(n)]
    protected = {i for n in claims for i in range(n.decorator_list[0].lineno - 1, n.end_lineno or 0)}
    body = "".join("\0\n" if i in protected else line for i, line in enumerate(lines))
    if body.count(old) != 1:
        raise WeftError(f"the text {old!r} of a mutant occurs {body.count(old)} times in {path}, not once")
    held = iter([line for i, line in enumerate(lines) if i in protected])
    text = "".join(next(held) if x == "\0\n" else x for x in body.replace(old, new).splitlines(keepends=True))
    module = types.ModuleType(name)
    module.__file__ = str(path)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    if module.__package__:
        setattr(importlib.import_module(module.__package__), name.rpartition(".")[2], module)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def _is_claim(node: ast.FunctionDef) -> bool:
    return any(
        isinstance(d, ast.Call) and ast.unparse(d.func).rpartition(".")[2] == "claim" for d in node.decorator_list
    )
