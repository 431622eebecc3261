"""The documentation builds strictly, lacks no public name and needs no network; what it shows as code runs."""

import html
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

import weft

ROOT = Path(weft.__file__).parents[1]
DOCS = ROOT / "docs"
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -e '.[docs]'")
MODULES = {name: found for name in weft.__all__ if isinstance(found := getattr(weft, name), ModuleType)}
CARDS = [card for card in weft.methods() if card.module.startswith("weft.")]


def run(*command, cwd=ROOT, **env):
    """A command in a process of its own that must succeed; what it printed."""
    kept = {key: value for key, value in os.environ.items() if key != "WEFT_DATA"}
    env = {**kept, "OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", **env}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The folder of the built pages; one build for all processes of a run of the tests."""
    base = tmp_path_factory.getbasetemp()
    built = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{built}.lock"):
        if not (built / "index.html").exists():
            run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built))
    return built


@pytest.fixture
def generators(monkeypatch):
    """The modules that make pages."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generators")


def pages(site):
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}


def shown(page):
    """The text of a page, without marks and with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def public(name, module):
    """Public names: what a module lists, else the classes and functions that it defines."""
    listed = getattr(module, "__all__", None) or getattr(module, "_WHERE", None)
    if module is weft:
        return {key: getattr(weft, key) for key in listed if key not in MODULES}
    if name == "rules":
        return {"Rule": module.Rule, **{card.export: card.load() for card in CARDS if card.family == name}}
    if listed:
        return {key: getattr(module, key) for key in listed}
    defined = {key: obj for key, obj in vars(module).items() if getattr(obj, "__module__", "") == module.__name__}
    return {key: obj for key, obj in defined.items() if not key.startswith("_") and callable(obj)}


NAMES = {
    f"{'weft' if module is weft else f'weft.{name}'}.{key}": obj
    for name, module in {"weft": weft, **MODULES}.items()
    for key, obj in public(name, module).items()
}


def members(cls):
    """The public methods and properties that a class defines."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name


def test_every_public_name_has_a_docstring():
    lacking = [f"weft.{name}" for name, module in MODULES.items() if not (module.__doc__ or "").strip()]
    for name, obj in NAMES.items():
        if inspect.isclass(obj):
            lacking += [name] * (not (vars(obj).get("__doc__") or "").strip())
            lacking += [f"{name}.{key}" for key in members(obj) if not inspect.getdoc(getattr(obj, key))]
        elif inspect.isroutine(obj):
            lacking += [name] * (not (obj.__doc__ or "").strip())
    assert not lacking, f"without a docstring: {lacking}"


def test_the_walk_sees_names_and_members():
    assert {"weft.Check", "weft.fit", "weft.rules.Rule", "weft.rules.MonoForward", "weft.stages.cut"} <= set(NAMES)
    assert {"weft.testing.check_rule", "weft.measure.kept_bytes", "weft.session.Tape", "weft.claim.claim"} <= set(NAMES)
    assert {"step", "trainable"} <= set(members(weft.rules.Rule))
    assert set(MODULES) >= {"claim", "measure", "rules", "session", "stages", "testing"}


@needs_mkdocs
def test_a_public_name_without_a_docstring_fails_the_build(generators):
    from generators import api
    from mkdocs.exceptions import PluginError

    class Bare(weft.rules.Rule):
        pass

    for obj in (Bare, lambda: None):
        with pytest.raises(PluginError, match=r"weft\.rules\.bare is public and has no docstring"):
            api.entry("weft.rules", "bare", obj)


@needs_mkdocs
def test_every_public_name_is_on_a_page(site):
    anchors = {anchor for page in pages(site).values() for anchor in re.findall(r'id="(weft\.[\w.]+)"', page)}
    wanted = {*NAMES, *(f"weft.{name}" for name in MODULES if name != "rules")}
    families = {f"weft.{card.family}.{card.export}" for card in CARDS if card.variant_of is not None}
    assert wanted - families <= anchors, f"on no page: {sorted(wanted - families - anchors)}"
    own = {f"weft.rules.base.Rule.{name}" for name in members(weft.rules.Rule)}
    assert own <= anchors, f"on no page: {sorted(own - anchors)}"


@needs_mkdocs
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_method_has_a_page(card, site):
    page = shown((site / "methods" / f"{card.name}.html").read_text(encoding="utf-8"))
    equations = [line for line in card.doc.splitlines() if line.startswith("    ")]
    facts = [card.summary, *equations, *card.tags, *(option.name for option in card.options)]
    facts += [str(value) for value in card.defaults.values()]
    facts += [claim.statement for claim in card.claims if claim.method in (None, card.name)]
    facts += [name for claim in card.claims if claim.method in (None, card.name) for name in claim.mutants]
    facts += [cite["title"] for cite in card.citations] + card.bibtex.splitlines()[:1]
    for fact in facts:
        assert " ".join(fact.replace("``", "").split()) in page, fact
    assert f"methods/{card.name}.html" in (site / "index.html").read_text(encoding="utf-8"), "not in the navigation"


@needs_mkdocs
def test_every_command_and_option_is_on_the_page(site):
    import typer

    from weft.cli import app

    page = shown((site / "commands.html").read_text(encoding="utf-8"))
    for name, command in typer.main.get_command(app()).commands.items():
        assert f"weft {name}" in page and command.help.split("\n")[0] in page
        for param in command.params:
            assert (param.help or "") in page, param.name
            for option in param.opts if param.param_type_name == "option" else []:
                assert option in page, option


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere(site):
    for name, page in pages(site).items():
        tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*>", page)
        away = [tag for tag in tags if re.search(r"""(?:src|href|data)=["']?(?:https?:)?//""", tag)]
        assert not away, f"{name}: {away}"
    for path in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import )["']?(?:https?:)?//""", path.read_text(encoding="utf-8")), path


@needs_mkdocs
def test_neither_roles_nor_markers_are_left(site):
    for name, page in pages(site).items():
        assert not re.search(r":(?:func|class|meth|mod):", page), name
        assert not re.search(r"<!-- (?:readme|results|made):", page), name
    assert not list(site.rglob("*.py")), "the generators are published"


@needs_mkdocs
def test_figures_come_from_files_alone(generators, tmp_path, monkeypatch):
    from generators import methods, results

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert all(results.section(name) == "" for name in results.SHOWN) and results.claims() == {}
    card = weft.card("backprop")
    assert "measured" not in methods.page(card, results.claims()).partition("## Claims")[2]
    record = {"method": card.name, "function": card.claims[0].function, "measured": 0.125, "bound": 0.5}
    document = {"claims": [{**record, "relation": "<=", "holds": True}]}
    (tmp_path / "claims.json").write_text(json.dumps(document), encoding="utf-8")
    assert "measured 0.125, to be at most 0.5" in methods.page(card, results.claims())
    row = {"rule": card.name, "backward": "", "ready": True, "stages_4": 1_500_000}
    (tmp_path / "memory.json").write_text(json.dumps({"rows": [row]}), encoding="utf-8")
    assert "1.5 MB" in results.section("memory")


def blocks(page, language="python"):
    """The blocks of code of a page: (title or None, code)."""
    found = re.findall(rf'^```{language}(?: title="([^"]+)")?\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    return [(title or None, code) for title, code in found]


def test_the_training_loops_of_page_and_readme_run():
    page = (DOCS / "training-loop.md").read_text(encoding="utf-8")
    snippets = [code for _, code in blocks(page)]
    assert len(snippets) >= 7 and page.count("```python") == len(snippets)
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    (short,) = [code for _, code in found if "for x, y in loader" in code]
    program = "\n".join([*snippets, "assert accuracy > 0.8, accuracy", "assert len(history) == 2"])
    batches = "loader = [(torch.randn(8, 64), torch.arange(8))]"
    assert "LSTM" in run("-W", "error", "-c", f"{program}\n{batches}\n{short}")


@pytest.mark.parametrize("name", ["memory.md", "speed.md"])
def test_the_snippets_of_a_page_are_one_program(name):
    snippets = [code for _, code in blocks((DOCS / name).read_text(encoding="utf-8"))]
    assert len(snippets) >= 2
    run("-W", "error", "-c", "\n".join(snippets))


def test_a_method_of_your_own(tmp_path):
    page = (DOCS / "your-own-method.md").read_text(encoding="utf-8")
    files = {title: code for title, code in blocks(page) + blocks(page, "toml") if title}
    assert set(files) >= {"pyproject.toml", "my_rules/__init__.py", "tests/test_my_rules.py"} and len(files) == 4
    if not MISSING:
        files["tests/test_page.py"] = PAGE
    for name, code in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = tmp_path / "my_rules-0.1.0.dist-info"  # what installing the project writes
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["weft.methods"].items())
    info.joinpath("entry_points.txt").write_text(f"[weft.methods]\n{points}")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(DOCS)])
    printed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path, PYTHONPATH=path)
    assert f"{3 if not MISSING else 2} passed" in printed


PAGE = """
import weft
from generators import methods


def test_page():
    made = methods.page(weft.card("noisy-backprop"), {})
    for fact in ("g_t = dL/dW + N(0, s_t^2)", "the noise's variance at the first step", "unbiased", "neelakantan2015"):
        assert fact in made, made
"""
