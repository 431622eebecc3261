"""Imports point downwards only, heavy packages are loaded late, and files of methods stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weft

ROOT = Path(weft.__file__).parent
FAMILIES = {init.parent.name for init in ROOT.glob("*/__init__.py") if "exports(__name__" in init.read_text()}
LAYERS = [  # each may import those above it in this list, and its own
    {"errors"},
    {"kernels"},
    {"cards"},
    {"method"},
    {"claim", "mutants"},
    {"boundaries", "calls", "session", "_ledger", "_keeping", "_tapes", "_composed"},
    {"stages", "convert"},
    {"measure", "_profile", "_passes", "_reports", "ops", "models", "data", "specs"},
    {"testing"},
    FAMILIES,
    {"recipe", "runs", "folders", "training", "stepping", "evaluation", "optimizers", "processes", "curves"}
    | {"literature", "measuring", "diagnosis", "comparison", "_runner", "report", "stubs", "integrations"}
    | {"planning", "compressing", "_probes", "_choices", "_ways", "_explaining"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = ("torch", "numpy", "sklearn", "pydantic", "numba")
TYPER = ("typer", "rich")  # for the command line alone
LIMIT = 300
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(module):
    """The layer's name of ``weft.rules.base``: ``rules``."""
    return module.split(".")[1]


def imported(path):
    """Every module of weft that a file imports, in functions too; what is for type checkers alone is left out."""
    package = ["weft", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("weft."))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            module = base if node.level else node.module or ""
            if module == "weft":
                yield from (f"weft.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            elif module.startswith("weft."):
                yield module


def test_every_module_has_a_layer():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts <= set(LEVEL), f"say in LAYERS where these belong: {sorted(parts - set(LEVEL))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported(path):
        other = part(module)
        assert {own, other} <= set(LEVEL), (
            f"imports {module}, which is in no layer (import from the module, not from the package)"
        )
        assert LEVEL[other] <= LEVEL[own], f"imports {module}, which is above it"
        if own in FAMILIES and other in FAMILIES:
            assert own == other, f"a method of {own} imports {module}, of another family"


def test_the_walk_sees_imports_in_functions_and_relative_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "rules").mkdir()
    path = tmp_path / "rules" / "one.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom weft import stages, __version__\n"
        "if TYPE_CHECKING:\n    from weft.comparison import compare\n"
        "def f():\n    import weft.training\n    from .base import Rule\n    from ..tape import x\n"
    )
    assert set(imported(path)) == {"weft.stages", "weft.training", "weft.rules.base", "weft.tape"}


def loaded(code):
    """Which of the packages a fresh process has imported after running this."""
    program = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write('\\n' + ' '.join(name for name in {HEAVY + TYPER!r} if name in sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stderr.rpartition("\n")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import weft; dir(weft)",
        "import weft.models, weft.data; weft.models.names(); weft.data.names()",
        "import weft; weft.methods(); weft.papers(); weft.card('mono-forward').bibtex",
    ],
)
def test_the_library_imports_nothing_heavy(code):
    assert loaded(code) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    assert loaded(f"from weft.cli import main; main({arguments!r})") <= set(TYPER)


@pytest.mark.parametrize(
    "arguments",
    [
        ["claims", "--help"],
        ["methods"],
        ["methods", "mono-forward", "--json"],
        ["papers", "--family", "rules"],
        ["claims"],
        ["claims", "no-such-method"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments):
    """Newer versions of typer read the options of every command by pydantic themselves."""
    assert loaded(f"from weft.cli import main; main({arguments!r})") <= {*TYPER, "pydantic"}


@pytest.mark.parametrize("path", sorted({card.path for card in weft.methods()}), ids=lambda path: path.name)
def test_files_with_a_card_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LIMIT, f"{path} has {lines} lines; a method has at most {LIMIT}: share code in weft/ops"
