"""The runner of claims: what happens to those that hold, fail, raise, die and hang, and to their mutants."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

import weft.claim
from weft import method
from weft.claim import Check, check_claims, passed, select
from weft.errors import UsageError

TOY = '''"""A toy method."""

import math
import os
import signal
import sys
import time

from weft.claim import Check, claim
from weft.method import method


def double(x):
    return 2 * x


@method("toy", contract="function", family="toys", papers=[7],
        variants={"toy-again": {"options": {}, "papers": [8]}})
def toy(x):
    return double(x)


def example():
    return None


@claim("doubling doubles", row=7, mutants={"three": ("return 2 * x", "return 3 * x")})
def holds(seed):
    return Check(double(seed), 2 * seed, "==")


@claim("false", row=[7, 8])
def fails(seed):
    return [Check(1, 2, what="first"), Check(3, 2, what="second"), Check(0, 1, what="third")]


@claim("raises")
def raises(seed):
    raise ZeroDivisionError("on purpose")


@claim("leaves")
def leaves(seed):
    sys.exit(5)


@claim("killed")
def killed(seed):
    os.kill(os.getpid(), signal.SIGKILL)


@claim("hangs", budget=0.1)
def hangs(seed):
    time.sleep(600)


@claim("not a number")
def nan(seed):
    return Check(math.nan, 1.0)


@claim("infinite")
def infinite(seed):
    return Check(math.inf, 1.0, ">")


@claim("unbounded")
def unbounded(seed):
    return Check(1.0, math.inf)


@claim("no check at all")
def number(seed):
    return 3.0


@claim("nothing checked")
def nothing(seed):
    return []


@claim("prints")
def prints(seed):
    print("on stdout")
    return Check(0, 0)


@claim("of the variant", method="toy-again", row=8, mutants={
    "absent": ("no such text", "x"),
    "twice": ("import ", "import  "),
    "harmless": ('"""A toy method."""', '"""Another."""'),
    "breaks": ("return 2 * x", "raise ValueError('mutant')"),
    "syntax": ("return 2 * x", "return 2 *"),
    "fine": ("return 2 * x", "return 2 * x + 1"),
})
def varied(seed):
    return Check(double(1), 2, "==")


@claim("slow", tier="slow", row=9)
def slow(seed):
    return Check(0, 0)
'''


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The toy method as an installed third party's."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "toy_claims.py").write_text(TOY)
    info = tmp_path / "toy_claims-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-claims\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[weft.methods]\ntoy = toy_claims\n")
    method.refresh()
    yield
    sys.modules.pop("toy_claims", None)
    method.refresh()


@pytest.fixture
def only(monkeypatch):
    """Restrict the selection to some of the toy's claims."""

    def restrict(*functions):
        chosen = [pair for pair in select(["toy", "toy-again"], slow=True) if pair[1].function in functions]
        monkeypatch.setattr(weft.claim, "select", lambda *args, **options: chosen)

    return restrict


def run(**options):
    """Records by function; each is JSON without NaN."""
    records = check_claims(["toy", "toy-again"], **options)
    json.dumps(records, allow_nan=False)
    return {record["function"]: record for record in records}


def test_records(only):
    only("holds", "fails")
    seen = []
    found = run(seed=3, on_record=seen.append)
    holds, fails = found["holds"], found["fails"]
    expected = {
        "row": 7,
        "method": "toy",
        "family": "toys",
        "statement": "doubling doubles",
        "measured": 6.0,
        "bound": 6.0,
        "relation": "==",
        "holds": True,
        "status": "ok",
        "error": None,
        "tier": "fast",
        "mutants": [],
    }
    assert {key: holds[key] for key in expected} == expected
    assert 0 <= holds["seconds"] < 5
    assert fails["row"] == [7, 8] and fails["status"] == "ok" and not fails["holds"]
    assert (fails["what"], fails["measured"], fails["bound"]) == ("second", 3.0, 2.0)
    assert passed(holds) and not passed(fails)
    assert sorted(record["function"] for record in seen) == ["fails", "holds"]


def test_whatever_goes_wrong_is_an_error_and_the_others_finish(only):
    only("raises", "leaves", "killed", "number", "nothing", "holds")
    found = run(workers=3)
    for name in ("raises", "leaves", "killed", "number", "nothing"):
        assert found[name]["status"] == "error" and not found[name]["holds"] and not passed(found[name]), name
    assert found["raises"]["error"] == "ZeroDivisionError: on purpose"
    assert "in raises" in found["raises"]["traceback"]
    assert "exit code 5" in found["leaves"]["error"]
    assert "exit code -9" in found["killed"]["error"]
    assert "returns Check" in found["number"]["error"]
    assert found["holds"]["holds"]


def test_timeout(only, monkeypatch):
    only("hangs", "holds")
    fast = SimpleNamespace(monotonic=lambda: 20 * time.monotonic(), process_time=time.process_time)
    monkeypatch.setattr(weft.claim, "time", fast)  # a minute passes in three seconds
    found = run(workers=2)
    assert found["hangs"]["status"] == "error" and "twenty times its budget" in found["hangs"]["error"]
    assert found["holds"]["holds"]


@pytest.mark.parametrize("name", ["nan", "infinite"])
def test_what_is_not_finite_never_holds_and_is_null(only, name):
    only(name)
    found = run()[name]
    assert found["measured"] is None and not found["holds"]
    assert "measured" in found["error"]


def test_an_infinite_bound_never_holds_and_is_null(only):
    only("unbounded")
    found = run()["unbounded"]
    assert found["bound"] is None and not found["holds"] and found["measured"] == 1.0


def test_mutants(only):
    only("holds", "varied")
    found = run(mutants=True)
    assert [(m["name"], m["caught"]) for m in found["holds"]["mutants"]] == [("three", False)]  # 2 * 0 == 3 * 0
    mutants = {mutant["name"]: mutant for mutant in found["varied"]["mutants"]}
    assert list(mutants) == ["absent", "twice", "harmless", "breaks", "syntax", "fine"]
    assert {name for name, mutant in mutants.items() if mutant["caught"]} == {"fine"}
    for name, text in (("absent", "occurs 0 times"), ("twice", "times in"), ("breaks", "mutant"), ("syntax", "Syntax")):
        assert mutants[name]["status"] == "error" and text in mutants[name]["error"], name
    assert mutants["harmless"]["holds"]
    assert found["varied"]["holds"] and not passed(found["varied"])


def test_mutant_is_caught_at_a_seed_that_shows_it(only):
    only("holds")
    assert passed(run(mutants=True, seed=1)["holds"])
    assert "toy_claims" not in sys.modules  # all of it happened in children


def test_stdout_of_a_claim_does_not_disturb(only):
    only("prints")
    assert run()["prints"]["holds"]


def functions(**options):
    return [one.function for _, one in select(**options)]


def test_selection():
    every = functions(names=["toy", "toy-again"])
    assert "slow" not in every and "holds" in every and len(every) == len(set(every)) == 13
    assert functions(names=["toy"]) == [name for name in every if name != "varied"]
    assert functions(names=["toy-again"]) == every  # those that speak of it, and those that speak of no card
    assert functions(family="toys") == every
    assert functions(family="toys", slow=True) == [*every, "slow"]
    assert functions(family="toys", row=7) == ["holds", "fails"]
    assert functions(family="toys", row=8) == ["fails", "varied"]
    assert functions(family="toys", row=9) == []
    assert functions(names=["toy"], family="rules") == []


def test_a_claim_is_listed_under_the_variant_that_it_speaks_of():
    owners = {one.function: owner.name for owner, one in select(["toy-again"])}
    assert owners["varied"] == "toy-again"


def test_unknown_name():
    with pytest.raises(UsageError, match="did you mean toy"):
        check_claims(["toi"])


@pytest.mark.parametrize(("relation", "holds"), [("<=", True), ("<", False), (">=", True), (">", False), ("==", True)])
def test_relations(relation, holds):
    assert Check(1.0, 1.0, relation).holds is holds


def test_unknown_relation():
    with pytest.raises(UsageError, match="relation"):
        Check(1.0, 1.0, "=")
