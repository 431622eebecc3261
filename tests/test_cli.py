"""The command line: what goes to stdout, what to stderr, and the exit status."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import weft
import weft.claim
import weft.literature
from weft import cli
from weft.cli import output
from weft.errors import UsageError, WeftError

WEFT = [sys.executable, "-m", "weft"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def record(**changes):
    """A record as ``check_claims`` gives it."""
    base = {
        "row": 140,
        "method": "mono-forward",
        "family": "rules",
        "statement": "a statement [with brackets] that is long enough to be wrapped in a narrow terminal",
        "function": "local",
        "tier": "fast",
        "budget": 5.0,
        "measured": 1e-9,
        "bound": 1e-6,
        "relation": "<=",
        "what": None,
        "holds": True,
        "status": "ok",
        "seconds": 0.25,
        "error": None,
        "traceback": None,
        "mutants": [],
    }
    return {**base, **changes}


@pytest.fixture
def records(monkeypatch):
    """Let ``weft claims`` find these records without running anything."""

    def give(*given):
        asked = {}

        def check_claims(names, **options):
            asked.update(names=names, **options)
            for one in given:
                options["on_record"](one)
            return list(given)

        monkeypatch.setattr(weft.claim, "check_claims", check_claims)
        return asked

    return give


def test_help_lists_every_command_that_exists(run):
    status, out, err = run("--help")
    assert status == 0 and err == ""
    for name in cli.COMMANDS:
        assert (f" {name} " in out) == Path(cli.__file__).with_name(f"{name}.py").exists()


def test_version(run):
    assert run("--version") == (0, f"weft {weft.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nope"],
        ["nope"],
        ["methods", "--nope"],
        ["methods", "no-such-method"],
        ["methods", "--family", "nope"],
        ["methods", "no-such-method", "--json"],
        ["papers", "--family", "nope"],
        ["papers", ""],
        ["claims"],
        ["claims", "--mutants", "--slow"],
        ["claims", "no-such-method"],
        ["claims", "--family", "nope"],
        ["claims", "--row", "x"],
        ["claims", "--row", "100000"],
        ["claims", "--all", "--seed", "-1"],
        ["claims", "--all", "--workers", "0"],
    ],
)
def test_wrong_usage(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert err and "Traceback" not in err


def test_wrong_usage_says_what_is_right(run):
    assert "mono-forward" in run("methods", "mono-foward")[2]
    assert "rules" in run("methods", "--family", "ruless-")[2]
    assert "--all" in run("claims")[2]


def test_methods(run):
    status, out, err = run("methods")
    assert status == 0 and err == ""
    for card in weft.methods():
        assert card.name in out


def test_methods_json(run):
    status, out, err = run("methods", "--family", "rule", "--json")
    assert status == 0 and err == ""
    assert json.loads(out) == {"methods": [card.to_dict() for card in weft.methods("rules")]}


def test_one_card(run):
    status, out, err = run("methods", "direct-feedback-alignment")
    card = weft.card("direct-feedback-alignment")
    assert status == 0 and err == ""
    for text in ("dh_k     = e B_k", "139", "adam", "gain", "variant of", "@misc{", "weft.create", str(card.path)):
        assert text in out.replace("\n", "") or text in out, text
    for claim in card.claims:
        assert claim.statement.split()[0] in out
        for mutant in claim.mutants:
            assert mutant in out


def test_one_card_json(run):
    status, out, _ = run("methods", "mono-forward", "--json")
    assert status == 0 and json.loads(out) == {"methods": [weft.card("mono-forward").to_dict()]}


def test_every_card_can_be_shown(run):
    for card in weft.methods():
        assert run("methods", card.name)[0] == 0


def test_papers(run):
    status, out, err = run("papers")
    assert status == 0 and err == "" and "428 papers" in out
    assert json.loads(run("papers", "--json")[1]) == {"papers": weft.papers()}


def test_papers_with_options(run):
    _, out, _ = run("papers", "feedback alignment", "--family", "rules", "--missing", "--json")
    assert json.loads(out) == {"papers": weft.papers("feedback alignment", family="rules", missing=True)}
    assert "photonic" not in run("papers", "feedback alignment", "--family", "lens")[1].lower()


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("arguments", [["methods"], ["papers", "forward"], ["methods", "mono-forward"]])
def test_output_fits_and_holds_no_markup(run, monkeypatch, columns, arguments):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(*arguments)
    table = out.partition("@misc")[0]  # BibTeX is to be copied, and not wrapped
    assert max(len(line) for line in table.splitlines()) <= columns
    assert "\x1b" not in out and "[/" not in out


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_claims_table(run, records, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    caught = {"name": "one", "caught": True, "traceback": None, "error": None}
    records(record(), record(function="other", mutants=[caught, {**caught, "name": "two"}]))
    status, out, err = run("claims", "mono-forward")
    assert status == 0
    assert "[with brackets]" in " ".join(out.split()) and "yes" in out and "1e-09 <= 1e-06" in out and "2/2" in out
    assert "2 of 2 claims hold, 2 of 2 mutants caught" in out
    assert max(len(line) for line in out.splitlines()) <= max(columns, 70)
    assert [line.partition("] ")[2] for line in err.splitlines()] == [
        "ok mono-forward: local",
        "ok mono-forward: other",
    ]


def test_claims_passes_everything_on(run, records):
    asked = records(record())
    options = ["--family", "rule", "--row", "140", "--slow", "--mutants", "--seed", "7", "--workers", "3", "--json"]
    status, out, _ = run("claims", "mono-forward", *options)
    asked.pop("on_record")
    wanted = {"family": "rules", "row": 140, "slow": True, "mutants": True, "seed": 7, "workers": 3}
    assert status == 0 and asked == {"names": ["mono-forward"], **wanted}
    document = json.loads(out)
    assert document["claims"] == [record()]
    assert document["settings"] == {"names": ["mono-forward"], "all": False, **wanted}
    assert set(document) == {"claims", "settings", "environment"}


def test_claim_that_does_not_hold(run, records):
    records(record(holds=False, measured=2.0, what="the ratio"), record())
    status, out, err = run("claims", "--all")
    assert status == 1
    assert "NO" in out and "1 of 2 claims hold" in out
    assert "2.0 is not <= 1e-06 (the ratio)" in err


def test_claim_that_raises(run, records):
    error = {"measured": None, "bound": None, "relation": None, "holds": False, "status": "error"}
    records(
        record(**error, error="ValueError: on purpose", traceback="Traceback\n  all of it\nValueError: on purpose\n")
    )
    status, out, err = run("claims", "--all")
    assert status == 1 and "ERROR" in out and "all of it" in err


def test_mutant_that_is_not_caught(run, records):
    missed = {"name": "sign", "caught": False, "traceback": None, "error": None}
    records(record(mutants=[missed]))
    status, out, err = run("claims", "--all", "--mutants")
    assert status == 1 and "0/1" in out
    assert "mutant 'sign' is not caught: the claim still holds" in err


def test_json_of_a_failed_claim(run, records):
    records(record(holds=False, measured=math.nan))
    status, out, _ = run("claims", "--all", "--json")
    assert status == 1 and json.loads(out)["claims"][0]["measured"] is None and "NaN" not in out


def test_real_claims_as_json():
    ran = subprocess.run([*WEFT, "claims", "backprop", "--mutants", "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["settings"]["names"] == ["backprop"]
    assert all(weft.claim.passed(one) for one in document["claims"])
    assert "[1/1] ok backprop" in ran.stderr


def test_selection_that_is_empty(run):
    status, _, err = run("claims", "backprop", "--row", "140")
    assert status == 2 and "no claim is selected" in err


@pytest.mark.parametrize(("error", "status"), [(UsageError("wrong"), 2), (WeftError("broken"), 1)])
def test_errors_from_anywhere(run, monkeypatch, error, status):
    def papers(*args, **options):
        raise error

    monkeypatch.setattr(weft.literature, "papers", papers)
    assert run("papers", "--json") == (status, "", f"weft: {error}\n")


def test_interrupt(run, monkeypatch):
    def papers(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(weft.literature, "papers", papers)
    assert run("papers") == (130, "", "weft: interrupted\n")


def test_control_c_while_claims_run():
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*WEFT, "claims", "--all"], start_new_session=True, **streams) as ran:
        ran.stderr.readline()  # the first claim is done, others run
        os.killpg(ran.pid, signal.SIGINT)
        out, err = ran.communicate(timeout=20)
    assert ran.returncode == 130 and out == ""
    assert err.endswith("weft: interrupted\n") and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["papers"], ["papers", "--json"], ["methods", "mono-forward"]])
def test_reader_that_goes_away(arguments):
    with subprocess.Popen([*WEFT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        ran.stdout.close()
        assert ran.stderr.read() == b""
    assert ran.returncode == 0


def test_terminal_without_unicode():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([*WEFT, "methods", "feedback-alignment"], capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert b"N?kland" in ran.stdout
    ran = subprocess.run([*WEFT, "methods", "feedback-alignment", "--json"], capture_output=True, env=environment)
    assert "Nøkland" in json.loads(ran.stdout)["methods"][0]["bibtex"]


def test_json_is_plain(capsys):
    output.print_json({"a": math.nan, "b": [math.inf, 1.5, None], "c": {3, 1}, "d": Path("x"), "e": (True, "[b]")})
    given = json.loads(capsys.readouterr().out)
    assert given == {"a": None, "b": [None, 1.5, None], "c": [1, 3], "d": "x", "e": [True, "[b]"]}


def test_quiet_stdout():
    code = (
        "import os, subprocess\nfrom weft.cli.output import quiet_stdout\n"
        "with quiet_stdout():\n    print('python')\n    os.write(1, b'descriptor ')\n"
        "    subprocess.run(['echo', 'child'])\nprint('after')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "after\n"
    assert {"python", "descriptor", "child"} <= set(ran.stderr.split())


def test_progress_runs_no_thread(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    before = threading.active_count()
    with output.Steps(2, "working") as steps:
        for line in ("one", "two"):
            steps.advance(line)
            assert threading.active_count() == before
    captured = capsys.readouterr()
    assert "two" in captured.err and captured.out == ""


def test_module_entry():
    ran = subprocess.run([*WEFT, "--version"], capture_output=True, text=True)
    assert ran.stdout == f"weft {weft.__version__}\n"
