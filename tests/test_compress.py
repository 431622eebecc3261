"""Methods that compress a trained model: checks that can fail, where layers are found, runs and commands."""

import copy
import json

import pytest
import torch
from torch import nn

import weft
from weft import cli
from weft.compress import base
from weft.compress.chess import Chess
from weft.compressing import read_compressor
from weft.errors import DataError, Unsupported, UsageError, WeftError
from weft.ops.thresholded import ThresholdedGate, ThresholdedLinear
from weft.testing import compress as checks
from weft.testing.gated import Gated

SOURCE = '''
"""To be broken.

    y = w x
"""

import torch
from torch import nn

from weft.compress import base
from weft.compress.base import Compressor
from weft.method import method
from weft.ops.thresholded import ThresholdedLinear, quantile_threshold
from weft.testing.example import Example

CALLS = []


def nothing(*args):
    return None


def broken(model, when):
    return model


@method("broken-compressor", contract="compress", family="broken", papers=[])
class Broken(Compressor):
    """One threshold for the inputs of second layers."""

    def __init__(self, *, sparsity=0.5):
        self.sparsity = sparsity

    def compress_(self, model, calibration):
        inputs, sites = base.batches(calibration), base.feed_forward(model)
        base.require(sites, model)
        found = base.collected(model, sites, inputs)
        made = {}
        for layer, (site, seen) in found.items():
            made[layer] = quantile_threshold(seen.activations(site.name).abs(), self.sparsity)[None]

        def swap(layer):
            return ThresholdedLinear(layer, threshold=made[layer])

        with base.swapped(model, sites, swap) as layers:
            report = base.measured(model, layers, inputs)
        return report


def example():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        feed = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 6))
        inputs = [torch.randn(n, 6) for n in (4, 3)]
        return Example(nn.Sequential(feed, nn.LayerNorm(6), nn.Linear(6, 3)), inputs, torch.arange(3))
'''
RETURN, BEGIN = "        return report\n", "        inputs, sites = base.batches"
FOUND = "        found = base.collected(model, sites, inputs)\n"


def before(line):
    """A line in front of what ``compress_`` does."""
    return BEGIN, f"        {line}\n{BEGIN}"


def after(line):
    """A line before the report is returned."""
    return RETURN, f"        {line}\n{RETURN}"


def changed_layers(**values):
    """A report whose first layer has other values."""
    given = ", ".join(f"{key}={value}" for key, value in values.items())
    return after(
        "import dataclasses; report = dataclasses.replace(report, layers=(dataclasses.replace(report.layers[0], "
        f"{given}), *report.layers[1:]))"
    )


TOTALS = (
    "    def compress_(self",
    "    def _report(self, report, key, value):\n        class Other(type(report)):\n            def to_dict(self):\n"
    "                found = super().to_dict()\n                found['total'][key] = value\n"
    "                return found\n"
    "        return Other(report.layers, report.tokens)\n\n    def compress_(self",
)
BROKEN = {  # what is replaced, by what, the check that fails, and what it says; or two such replacements
    "another shape": (*after("model.append(nn.Unflatten(1, (3, 1)))"), "keeps_form", "the output was"),
    "another dtype": (
        *after("model.register_forward_hook(lambda m, a, out: out.double())"), "keeps_form", "the output was",
    ),
    "not finite": (*after("model[1].weight.data.fill_(float('inf'))"), "keeps_form", "not finite"),
    "no layers": (*after("report = base.Report((), 7)"), "keeps_form", "names no layer"),
    "other names": (*changed_layers(name="'nowhere'"), "keeps_form", "which the model has not"),
    "more than all zeros": (*changed_layers(zeros=1.5), "keeps_form", "share of 1.5"),
    "more operations": (*changed_layers(operations_after=1e9), "keeps_form", "more operations"),
    "more bytes": (*changed_layers(bytes_after=1e9), "keeps_form", "more bytes"),
    "sums do not add up": (*after("report = self._report(report, 'bytes_before', 1e9)"), "keeps_form", "add up"),
    "leaves a mode": (*after("model.eval()"), "keeps_modes", "mode of"),
    "calibrates with dropout": (
        FOUND, "        seen = base.Seen()\n"
        "        with torch.no_grad():\n            for x in inputs:\n                for part in model[0][:3]:\n"
        "                    x = (part(*x),)\n                seen.add(x[0], None)\n"
        "        found = {site.layer: (site, seen) for site in sites}\n",
        "keeps_modes", "calibration depends",
    ),
    "a report of its calls": (
        *after("CALLS.append(1); report = base.Report(report.layers, len(CALLS))"), "deterministic", "another report",
    ),
    "an unseeded draw": (
        *after("g = torch.Generator(); g.seed(); model[1].weight.data.mul_(1 + torch.rand((), generator=g))"),
        "deterministic", "another model",
    ),
    "global generator": (*after("torch.rand(1)"), "deterministic", "global generator"),
    "leaves a hook": (*after("model.register_forward_hook(nothing)"), "restores", "hook is left"),
    "leaves a gradient": (*after("model(*inputs[0]).sum().backward()"), "restores", "gradient is left"),
    "cannot be undone": (
        *after("model[0][3] = nn.Sequential(model[0][3])[0]; del model[0][3].__dict__['_weft_original']"),
        "restores", "puts back other",
    ),
    "changes weights": (*after("model[1].weight.data.mul_(1.5)"), "restores", "another output"),
    "other parameters": (
        *after("model[1].weight = nn.Parameter(model[1].weight.detach().clone())"), "restores", "parameters of",
    ),
    "depends on its past": (
        *after("self.calls = getattr(self, 'calls', 0) + 1; report = base.Report(report.layers, self.calls)"),
        "restores", "compressed again",
    ),
    "stays after an interruption": (
        "with base.swapped(model, sites, swap) as layers:\n            report = base.measured(model, layers, inputs)",
        "import weft\n        weft.convert_(model[0], {nn.Linear: swap}, where='3')\n"
        "        layers = [base.Site(s.name, model[0][3]) for s in sites]\n"
        "        report = base.measured(model, layers, inputs)",
        "undoes_what_failed", "types of the model",
    ),
    "another output after an interruption": (
        *before("model[1].weight.data.mul_(1.5)"), "undoes_what_failed", "another output",
    ),
    "a copy forgets": (
        *after(
            "model[0][3].__class__ = type('Forgetful', (ThresholdedLinear,), {'__deepcopy__': lambda s, memo: "
            "ThresholdedLinear(nn.Linear(24, 6), threshold=torch.ones(1))})"
        ),
        "copies", "deep copy",
    ),
    "state left out": (
        *after("t = model[0][3].threshold; del model[0][3].threshold; model[0][3].threshold = t"),
        "copies", "state loaded",
    ),
    "any model": (
        "        base.require(sites, model)\n", "        if not sites:\n            return base.Report((), 0)\n",
        "other_models", "Unsupported",
    ),
    "a word for a message": (
        "        base.require(sites, model)\n",
        "        from weft.errors import Unsupported\n        if not sites:\n            raise Unsupported('no')\n",
        "other_models", "too little",
    ),
    "no data": (
        *before("calibration = calibration if calibration is None or len(calibration) else [torch.ones(1, 6)]"),
        "bad_calibration", "DataError",
    ),
    "a single tensor": (
        *before("calibration = [calibration] if isinstance(calibration, torch.Tensor) else calibration"),
        "bad_calibration", "UsageError",
    ),
    "not a number": (
        *before("calibration = [tuple(t.nan_to_num() for t in x) if isinstance(x, tuple) else x for x in calibration] "
                "if isinstance(calibration, list) else calibration"),
        "bad_calibration", "DataError",
    ),
    "zeros always": ("self.sparsity)[None]", "0.5)[None]", "exact_without_sparsity", "sparsity=0"),
}  # fmt: skip
USES = {"sums do not add up": TOTALS}


@pytest.fixture
def outcomes(said_of):
    """From changes of the source to what each check says: None where it passes."""
    return lambda *changes: said_of(SOURCE, checks.compress_checks, *changes)


def test_what_is_to_be_broken_is_good(outcomes):
    said = outcomes()
    assert len(said) == 9 and not any(said.values()), said


@pytest.mark.parametrize("name", BROKEN)
def test_broken_promise_is_caught(outcomes, name):
    old, new, check, message = BROKEN[name]
    said = outcomes((old, new), *([USES[name]] if name in USES else []))
    assert said[check] is not None, f"{check} let it pass; the others said {said}"
    assert said[check].startswith("AssertionError") and message in said[check], said[check]


def test_every_check_is_broken_once():
    made = {check.__name__ for check in (*checks.EVERY, checks.exact_without_sparsity)}
    assert made == {check for _, _, check, _ in BROKEN.values()}


def feed(width=8, hidden=32):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def test_feed_forward_layers_are_found():
    model = nn.ModuleDict({
        "plain": feed(),
        "chain": nn.Sequential(nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2)),
        "none": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)),
        "gated": Gated(8, 16),
    })  # fmt: skip
    assert [site.name for site in base.feed_forward(model)] == ["plain.2", "chain.3", "chain.5", "gated"]


def test_a_layer_in_two_places_is_one():
    block = feed()
    model = nn.Sequential(block, nn.LayerNorm(8), block)
    x = torch.randn(20, 8)
    before = model(x)
    report = Chess(sparsity=0.5).compress_(model, [x])
    assert report.names == ["0.2"] or report.names == ["0.2", "2.2"]
    assert model[0][2] is model[2][2] and type(model[0][2]) is ThresholdedLinear
    weft.restore_(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**small, vocab_size=50))
        feeds, queries = ThresholdedLinear, "self.query"
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**small, vocab_size=50, num_key_value_heads=2))
        feeds, queries = ThresholdedGate, "q_proj"
    model.eval()
    ids = [torch.randint(0, 50, (3, 11)), torch.randint(0, 50, (1, 7))]
    with torch.no_grad():
        before = model(ids[0]).last_hidden_state
        report = Chess(sparsity=0.4, attention=True, centre=True).compress_(model, ids)
        after = model(ids[0]).last_hidden_state
        weft.restore_(model)
        assert torch.equal(model(ids[0]).last_hidden_state, before)
    assert 0 < float((after - before).norm() / before.norm()) < 0.7
    assert len(report.layers) == 6 and sum(queries in name for name in report.names) == 2
    assert sum(row.operations_before > 2 * 32 * 32 for row in report.layers) == 2
    assert all(abs(row.zeros - 0.4) < 0.15 for row in report.layers)
    Chess().compress_(model, ids)
    assert sum(type(module) is feeds for module in model.modules()) == 2


def test_a_gated_layer_that_computes_something_else_is_refused():
    class Other(Gated):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = nn.Sequential(Other(8, 16))
    with pytest.raises(Unsupported, match="something else"):
        Chess().compress_(model, [torch.randn(5, 8)])
    assert type(model[0]) is Other
    with pytest.raises(Unsupported, match="itself"):
        Chess().compress_(Gated(8, 16), [torch.randn(5, 8)])


@pytest.mark.parametrize("kind", [feed, lambda: Gated(8, 16)])
def test_a_model_is_compressed_once(kind):
    model, x = nn.Sequential(kind(), nn.LayerNorm(8), feed()), [torch.randn(5, 8)]
    Chess().compress_(model, x)
    with pytest.raises(Unsupported, match="compressed already"):
        Chess().compress_(model, x)
    weft.restore_(model)
    assert len(Chess().compress_(model, x).layers) == 2


def test_what_the_user_has_swapped_before_stays_after_an_error(monkeypatch):
    model = nn.Sequential(feed(), nn.Linear(8, 3))
    weft.convert_(model, weft.card("velora").load().options(length=4), where="1")
    swapped = model[1]
    monkeypatch.setattr(base, "measured", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Chess().compress_(model, [torch.randn(5, 8)])
    assert model[1] is swapped and type(model[0][2]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "share"),
        ({"sparsity": "half"}, "share"),
        ({"per_channel": False, "column_norms": True}, "leave"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        Chess(**options)


def test_layers_that_get_no_input_are_named():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = feed(), feed()

        def forward(self, x):
            return self.used(x)

    with pytest.raises(DataError, match=r"unused\.2"):
        Chess().compress_(Skipping(), [torch.randn(5, 8)])


def test_more_activations_than_are_kept_give_nearly_the_same_quantile(monkeypatch):
    monkeypatch.setattr(base, "LIMIT", 2000)
    seen, all_rows = base.Seen(), []
    for k in range(30):
        rows = torch.randn(17 + k, 8)
        all_rows.append(rows)
        seen.add(rows, rows)
    every = torch.cat(all_rows)
    kept = seen.activations("x")
    assert kept.numel() <= 2000 and torch.equal(kept, every[:: seen.step])
    assert seen.tokens == len(every) and torch.allclose(seen.up.float(), every.abs().sum(0))


def test_column_norms_weigh_channels():
    model, x = feed(), torch.randn(300, 8)
    with torch.no_grad():
        model[2].weight[:, 0] *= 1000
        model[2].weight[:, 1] /= 1000
    Chess(column_norms=True).compress_(model, [x])
    threshold = model[2].threshold
    assert threshold[0] < 0.01 * threshold[2:].min() and threshold[1] > 100 * threshold[2:].max()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    weft.run({"model": "mlp:64x64", "data": "digits", "rules": [{"rule": "backprop", "epochs": 2}]}, out=folder)
    return folder


def test_a_run_is_loaded_as_it_was_saved(run):
    from weft import data
    from weft.evaluation import evaluate

    model, digits = weft.load_run(run), data.load("digits")
    result = json.loads((run / "result.json").read_text())
    assert not model.training
    assert evaluate(model, digits.x_test, digits.y_test) == result["accuracy"]


def test_compress_run(run):
    found = weft.compress_run(run, "chess:sparsity=0.6", calibration=300, rounds=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["accuracy"]["after"] > found["accuracy"]["before"] - 0.1
    assert found["operations"]["before"] == 2 * (64 * 64 + 64 * 64 + 64 * 10)
    saved = sum(row["operations_before"] - row["operations_after"] for row in found["report"]["layers"])
    assert found["operations"]["after"] == pytest.approx(found["operations"]["before"] - saved)
    assert found["bytes"]["before"] > found["bytes"]["after"] > 0 and set(found["time"]) == {"1", "64"}
    with pytest.raises(UsageError, match="at least 1"):
        weft.compress_run(run, rounds=0)


def test_what_cannot_be_compressed(run, tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        weft.load_run(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    with pytest.raises(WeftError, match="not finished"):
        weft.load_run(broken)
    for name in ("result.json", "model.safetensors"):
        (broken / name).write_bytes((run / name).read_bytes())
    text = (run / "recipe.yaml").read_text()
    (broken / "recipe.yaml").write_text(text.replace("mlp:64x64", "mlp:32"))
    with pytest.raises(WeftError, match="do not fit"):
        weft.load_run(broken)
    (broken / "recipe.yaml").write_text(text)
    (broken / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeftError, match="cannot be read"):
        weft.load_run(broken)
    (broken / "recipe.yaml").write_text(text.replace("backprop", "noprop"))
    with pytest.raises(Unsupported, match="network of its own"):
        weft.load_run(broken)


def test_methods_by_text():
    found, options = read_compressor("chess:sparsity=0.5,attention=true")
    assert found.name == "chess" and options == {"sparsity": 0.5, "attention": True}
    with pytest.raises(UsageError, match="did you mean chess"):
        read_compressor("ches")
    with pytest.raises(UsageError, match="sparsity"):
        read_compressor("cats:sparsty=0.5")


def test_command(run, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compress", str(run), "--method", "cats:sparsity=0.5", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["settings"]["method"] == "cats:sparsity=0.5"
    with pytest.raises(SystemExit) as ended:
        cli.main(["compress", str(run), "--calibration", "200"])
    shown = capsys.readouterr().out
    assert not ended.value.code and "test accuracy" in shown and "64 rows" in shown
    with pytest.raises(SystemExit) as ended:
        cli.main(["compress", str(run.parent)])
    assert ended.value.code == 2


def test_a_compressed_model_copies_and_saves(tmp_path):
    model, x = nn.Sequential(feed(), Gated(8, 24)), [torch.randn(30, 8)]
    Chess(centre=True).compress_(model, x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(x[0])
        for p in other.parameters():
            p.zero_()
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(x[0]), wanted)
        assert torch.allclose(other(x[0][:1]), wanted[:1], atol=1e-5)
