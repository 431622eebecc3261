"""Discovery: cards are read from source, and say what the imported decorator is told."""

import importlib.util
import inspect
import sys

import pytest

import weft
from weft import cards, claim, method
from weft.errors import UsageError, WeftError

CARD = '''"""Say what it changes.

Paper: "A Paper: of One", Ann Author, Bob Ørsted, 2001, arXiv:0101.00001.
"""
{head}

@method("{name}", contract="{contract}", family="rules", papers={papers}, tags={{"local"}})
class {cls}:
    def __init__(self, model, *, gain: float = 1.0, loss=None, seed=0):
        pass


def example():
    return None
'''
HEAD = "from weft.method import method"


def source(name="third-party", cls="ThirdParty", contract="rule", papers="[7]", head=HEAD):
    return CARD.format(name=name, cls=cls, contract=contract, papers=papers, head=head)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with these files on the path, with an entry point, as an installed one has it."""
    monkeypatch.syspath_prepend(tmp_path)
    packages = []

    def put(package, value=None, **files):
        folder = tmp_path / package
        folder.mkdir()
        for name, text in {"__init__": "", **files}.items():
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[weft.methods]\n{package} = {value or package}\n")
        packages.append(package)
        method.refresh()

    yield put
    for name in [m for m in sys.modules if m.split(".")[0] in packages]:
        del sys.modules[name]
    method.refresh()


def test_cards_are_what_the_decorators_are_told(monkeypatch):
    told: dict[str, dict] = {}
    claimed: dict[tuple, dict] = {}

    def fake_method(name, **arguments):
        told[name] = arguments
        return lambda obj: obj

    def fake_claim(statement, **arguments):
        def mark(function):
            claimed[function.__module__, function.__name__] = {"statement": statement, **arguments}
            return function

        return mark

    monkeypatch.setattr(method, "method", fake_method)
    monkeypatch.setattr(claim, "claim", fake_claim)
    found = weft.methods()
    for now in sorted({one.module for one in found}):
        path = next(one.path for one in found if one.module == now)
        spec = importlib.util.spec_from_file_location(now, path)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, now, made)  # dataclasses look their module up
        spec.loader.exec_module(made)
    mains = {one.name: one for one in found if one.variant_of is None}
    assert set(told) == set(mains)
    for name, arguments in told.items():
        one = mains[name]
        assert (one.contract, one.family, list(one.papers)) == tuple(
            arguments[k] for k in ("contract", "family", "papers")
        )
        assert one.tags == frozenset(arguments.get("tags") or ())
        assert one.defaults == (arguments.get("defaults") or {})
        assert one.variants == tuple(arguments.get("variants") or ())
        for variant, data in (arguments.get("variants") or {}).items():
            card = weft.card(variant)
            assert card.variant_of == name and card.preset == data.get("options", {})
    read = {(one.module, c.function): c for one in found for c in one.claims}
    assert set(read) == set(claimed)
    for key, arguments in claimed.items():
        assert read[key].statement == arguments["statement"]
        assert read[key].row == arguments.get("row")
        assert read[key].mutants == tuple(arguments.get("mutants") or ())


def test_cards_have_the_options_of_what_they_build():
    """An option that a class inherits is in no card, and --convert, --rule and recipes refuse it."""
    for one in method.methods():
        parameters = inspect.signature(one.load()).parameters.values()
        given = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        assert {o.name for o in one.options} == given - {"loss", "at", "seed"}, one.name


def test_names_are_sorted_and_unique():
    found = [(one.family, one.name) for one in weft.methods()]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert {one.family for one in weft.methods("rules")} == {"rules"}
    assert {one.contract for one in weft.methods(contract="rule")} == {"rule"}


def test_family_package_exports_every_method():
    for one in weft.methods("rules"):
        assert one.export in dir(weft.rules)
        assert callable(getattr(weft.rules, one.export))
    with pytest.raises(AttributeError, match="Nothing"):
        weft.rules.Nothing  # noqa: B018


def test_unknown_method_names_the_nearest():
    with pytest.raises(UsageError, match="mono-forward"):
        weft.card("mono-foward")


def test_unknown_option_names_the_nearest():
    with pytest.raises(UsageError, match="backward"):
        weft.create("mono-forward", None, backwards="stage")


def test_third_party_package(install):
    install("other_package", first=source(), second=source("second-one", "SecondOne"))
    one = weft.card("third-party")
    assert one.module == "other_package.first" and "other_package.first" not in sys.modules
    assert one.papers == (7,) and one.tags == {"local"} and one.has_example
    assert [(o.name, o.annotation, o.default) for o in one.options] == [("gain", "float", "1.0")]
    assert one.load().__name__ == "ThirdParty"
    assert weft.card("second-one").export == "SecondOne"
    assert "third-party" in weft.papers()[6]["methods"]


def test_third_party_module(install):
    install("single", value="single.only", only=source())
    assert weft.card("third-party").module == "single.only"


def test_citation(install):
    install("cited", one=source())
    (citation,) = weft.card("third-party").citations
    assert citation == {
        "title": "A Paper: of One",
        "authors": "Ann Author, Bob Ørsted",
        "year": "2001",
        "where": "arXiv:0101.00001",
    }
    assert "author = {Ann Author and Bob Ørsted}" in weft.card("third-party").bibtex


def test_entry_point_that_names_nothing_warns(install):
    install("empty_one", value="no_such_module_anywhere")
    with pytest.warns(UserWarning, match="no_such_module_anywhere"):
        assert weft.methods()


def test_argument_that_is_no_literal(install):
    install("computed", one=source(papers="list(range(3))"))
    with pytest.raises(WeftError, match=r"one\.py:\d+: the arguments of @method must be literals"):
        weft.methods()


def test_name_that_is_taken(install):
    install("doubled", one=source("mono-forward"))
    with pytest.raises(WeftError, match="two methods are called 'mono-forward'"):
        weft.methods()


def test_unknown_contract(install):
    install("odd", one=source(contract="rulez"))
    with pytest.raises(WeftError, match="has contract 'rulez'"):
        weft.methods()


def test_missing_argument(install):
    install("short", one=HEAD + '\n\n@method("short", contract="rule", papers=[])\nclass Short:\n    pass\n')
    with pytest.raises(WeftError, match=r"lacks \['family'\]"):
        weft.methods()


def test_unknown_key_of_a_variant(install):
    text = source().replace('tags={"local"})', 'variants={"v": {"optins": {}}})')
    install("keyed", one=text)
    with pytest.raises(WeftError, match=r"unknown keys \['optins'\]"):
        weft.methods()


def test_files_without_cards_are_not_parsed(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text("this is no python")
    assert cards.read_cards("odd", path) == []


def test_to_dict_is_plain_data():
    import json

    for one in weft.methods():
        assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["name"] == one.name
