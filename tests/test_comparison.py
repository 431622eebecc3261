"""Training loops and comparisons: the promises of ``weft.fit``, ``weft.compare`` and ``weft.measure_step``."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft import NonFinite, Unsupported, UsageError, WeftError, comparison, data, models, training
from weft.rules.base import Rule

FIGURES = ("accuracy", "validation_accuracy", "loss", "seconds_per_epoch", "step_ratio", "kept_bytes", "peak_bytes")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    events = []
    made = weft.compare(
        rules="backprop,mono-forward,noprop", epochs=2, seeds=2, seed=3, out=folder, on_event=events.append
    )
    return made, events, folder


def test_records(document):
    made, events, folder = document
    assert [(r["rule"], r["seed"]) for r in made["runs"]] == [
        (rule, seed) for rule in ("backprop", "mono-forward", "noprop") for seed in (3, 4)
    ]
    for run in made["runs"]:
        assert run["status"] == "ok" and run["error"] is None
        assert all(isinstance(run[key], int | float) and math.isfinite(run[key]) for key in FIGURES)
        assert 0 <= run["accuracy"] <= 1 and run["parameters"] == 64 * 256 + 256 + 256 * 256 + 256 + 2570
        assert set(run["defaults"]) >= {"optimizer", "lr", "schedule"} and len(run["curve"]) == 2
    exact, local, own = (made["runs"][i] for i in (0, 2, 4))
    assert exact["cosine_to_exact"]["first"] == pytest.approx(1) and exact["extra_parameters"] == 0
    assert exact["initial_weights"] == "shared" and exact["kept_bytes"] == 128 * (64 + 2 * 256 + 12) * 4 + 4
    assert local["cosine_to_exact"]["last"] < 1 and local["extra_parameters"] == 2 * 10 * 256
    assert own["cosine_to_exact"] is None and "own" in own["why"]["cosine_to_exact"]
    assert own["initial_weights"] == "own" and own["alignment"] == [] and "own" in own["why"]["alignment"]
    assert [entry["epoch"] for entry in local["alignment"]] == [1, 2]
    assert set(local["alignment"][0]["layers"]) == {"1", "3", "5"} and local["modules"]["model.3"] == "Linear"
    assert len(own["kept_by_module"]) <= 30
    assert all(sum(run["kept_by_module"].values()) == run["kept_bytes"] for run in made["runs"])
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert json.loads((folder / "compare.json").read_text()) == made
    recipes = [f"{rule}-seed{seed}.yaml" for rule in ("backprop", "mono-forward", "noprop") for seed in (3, 4)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["compare.json", "report.html", *recipes])
    assert {e["event"] for e in events} == {"run", "step", "epoch", "done", "report"}
    assert events[-1] == {"event": "report", "path": str(folder / "report.html"), "error": None}
    assert made["environment"]["torch"] == torch.__version__


def test_a_rule_among_others_gives_what_it_gives_alone(document):
    alone = weft.compare(rules=["mono-forward"], epochs=2, seed=4)["runs"][0]
    among = document[0]["runs"][3]
    for key in ("accuracy", "loss", "cosine_to_exact", "alignment", "curve", "kept_bytes", "peak_bytes"):
        assert alone[key] == among[key], key


@pytest.mark.parametrize("number", [1, 3, 5])
def test_the_recipe_of_a_run_gives_its_figures(document, number):
    made, _, folder = document
    run = made["runs"][number]
    again = weft.run(folder / f"{run['rule']}-seed{run['seed']}.yaml")
    for key in ("accuracy", "validation_accuracy", "loss"):
        assert again[key] == run[key], key


def test_one_failing_rule_leaves_its_error_and_the_others_finish(monkeypatch):
    def broken(self, x, y, *, scale=1.0, ready=None):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(weft.rules.MonoForward, "step", broken)
    made = weft.compare(rules="mono-forward,backprop", epochs=1)
    failed, fine = made["runs"]
    assert failed["status"] == "error" and failed["error"] == "RuntimeError: out of luck"
    assert failed["accuracy"] is None and failed["why"]["accuracy"] == failed["error"]
    assert fine["status"] == "ok"


def test_a_model_that_cannot_take_the_data():
    with pytest.raises(Unsupported):
        weft.compare("char-transformer", "digits", "backprop", epochs=1)


def test_users_files_without_a_test_part(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    x = rng.normal(size=(120, 6)) + y[:, None]
    np.savez(tmp_path / "my.npz", x_train=x, y_train=y)
    (tmp_path / "my.py").write_text(
        "from torch import nn\n\n\ndef net(input_shape, classes):\n"
        "    return nn.Sequential(nn.Linear(input_shape[0], 16), nn.LSTM(16, 16), nn.Linear(16, classes))\n\n\n"
        "def plain():\n    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    made = weft.compare(f"{tmp_path}/my.py:plain", str(tmp_path / "my.npz"), "backprop,pepita", epochs=3)
    for run in made["runs"]:
        assert run["status"] == "ok", run["error"]
        assert run["accuracy"] is None and "no test part" in run["why"]["accuracy"]
        assert run["validation_accuracy"] is not None
    made = weft.compare(f"{tmp_path}/my.py:net", str(tmp_path / "my.npz"), "forward-gradient", epochs=1)
    assert made["runs"][0]["status"] == "unsupported" and "GRU" in made["runs"][0]["error"]


def test_optimizers():
    rules = ["forward-forward", "counter-current"]
    ways = ({}, {"same_optimizer": True}, {"optimizer": "adamw"}, {"lr": 0.5})
    made = [weft.compare(rules=rules, epochs=1, **how)["runs"] for how in ways]
    own, same, other, faster = ([run["defaults"] for run in runs] for runs in made)
    assert own == [{"clip": None, **weft.card(name).defaults} for name in rules] and own[1]["clip"] == 1.0
    assert same == [{"clip": None, **weft.card("backprop").defaults}] * 2
    assert [one["optimizer"] for one in other] == ["adamw"] * 2 and [one["clip"] for one in other] == [None] * 2
    assert faster[1] == {**own[1], "lr": 0.5}
    recipe = weft.comparison.recipe_of(made[0][1], {**weft.compare(rules=rules, epochs=1)["settings"]})
    assert recipe.settings(recipe.rules[0]) == own[1]


def test_a_cards_clip_is_applied():
    digits = weft.data.load("digits")
    rule = weft.create("counter-current", weft.models.build("mlp:16", **digits.form))
    assert weft.training.Trainer(rule, digits).stepper.clip == 1.0
    assert weft.training.Trainer(rule, digits, clip=float("inf")).stepper.clip is None
    recipe = weft.Recipe.of({"model": "mlp:16", "data": "digits", "rule": "tagi", "clip": 1.0, "epochs": 1})
    with pytest.raises(weft.UsageError, match="leave clip"):
        weft.run(recipe)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rules": "bakprop"}, "did you mean backprop"),
        ({"rules": ""}, "no rule"),
        ({"epochs": 0}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
        ({"optimizer": "addam"}, "did you mean adam"),
        ({"lr": -1.0}, "positive"),
        ({"lr": float("nan")}, "positive"),
    ],
)
def test_wrong_usage(how, message):
    with pytest.raises(UsageError, match=message):
        weft.compare(**how)


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(WeftError, match="--out"):
        weft.compare(rules="backprop", epochs=1, out=blocked / "inside")


def test_all_names_every_rule_with_backprop_first():
    names = [c.name for c in comparison.select("all")]
    assert names[0] == "backprop" and set(names) == {c.name for c in weft.methods() if c.contract in ("rule", "solver")}
    assert [c.name for c in comparison.select(None)] == list(comparison.RULES)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weft.compare(rules="backprop", epochs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_fit_is_an_ordinary_loop():
    digits = data.load("digits")
    model = models.build("mlp:32", input_shape=(1, 8, 8), classes=10, seed=1)
    twin = copy.deepcopy(model)
    history = weft.fit(weft.rules.Backprop(model), digits, epochs=2, batch_size=64, optimizer="sgd", lr=0.1, seed=5)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    total, done = 2 * math.ceil(len(digits.y_train) / 64), 0
    for epoch in range(2):
        for index in data.batches(len(digits.y_train), 64, seed=5, epoch=epoch):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * done / total))
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(digits.x_train[index]), digits.y_train[index]).backward()
            optimizer.step()
            done += 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [e.epoch for e in history] == [1, 2] and history[1].loss < history[0].loss
    right = (twin(digits.x_validation).argmax(1) == digits.y_validation).double().mean()
    assert history[1].validation_accuracy == pytest.approx(float(right))


class Growing(Rule):
    """Adds a layer after the first epoch."""

    def __init__(self, model):
        super().__init__(model)
        self.grown = nn.ParameterList()

    def step(self, x, y, *, scale=1.0, ready=None):
        scores = self.model(x)
        for p in self.grown:
            scores = scores + p
        loss = self.criterion(scores, y)
        self.descend([loss], self.trainable(), scale=scale, ready=ready)
        return loss

    def grow(self, epoch):
        if epoch == 0:
            self.grown.append(nn.Parameter(torch.zeros(10)))
        return epoch == 0


def test_the_optimizer_follows_growth_and_a_stale_one_is_refused(monkeypatch):
    digits = data.load("digits")
    rule = Growing(models.build("mlp:16", input_shape=(1, 8, 8), classes=10))
    weft.fit(rule, digits, epochs=3)
    assert float(rule.grown[0].detach().abs().max()) > 0, "the new parameter was not trained"
    rule = Growing(models.build("mlp:16", input_shape=(1, 8, 8), classes=10))
    monkeypatch.setattr(Growing, "grow", lambda self, epoch: self.grown.append(nn.Parameter(torch.zeros(10))) and False)
    with pytest.raises(WeftError, match="trainable"):
        weft.fit(rule, digits, epochs=2)


def test_a_loss_that_is_not_finite_stops_training():
    digits = data.load("digits")
    model = models.build("mlp:16", input_shape=(1, 8, 8), classes=10)
    with pytest.raises(NonFinite, match="learning rate"):
        weft.fit(weft.rules.Backprop(model), digits, epochs=60, optimizer="sgd", lr=1e20)


def test_evaluate_counts_labels_that_are_not_ignored():
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    y = torch.tensor([0, -100, 1])
    assert training.evaluate(nn.Identity(), scores, y, batch_size=2) == 0.5
    model = nn.Identity().train()
    training.evaluate(model, scores, y)
    assert model.training


def test_measure_step():
    plain = weft.measure_step(batch_size=64)
    assert plain["kept_bytes"] == 64 * (64 + 2 * 256 + 12) * 4 + 4
    assert plain["forward_seconds"] > 0 and plain["backward_seconds"] > 0
    assert plain["operations"]["forward"] == 2 * 64 * (64 * 256 + 256 * 256 + 2560)
    ruled = weft.measure_step(rule="direct-feedback-alignment", batch_size=64)
    assert ruled["forward_seconds"] is None and ruled["why"]["forward_seconds"]
    with pytest.raises(UsageError, match="did you mean"):
        weft.measure_step(rule="mono-foward")


USERS = """
import sys

from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.c(self.drop(self.b(self.a(x).relu())).relu())


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Exits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        sys.exit(0)
"""


@pytest.fixture
def users(tmp_path):
    (tmp_path / "m.py").write_text(USERS)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 155)
    np.savez(tmp_path / "d.npz", x_train=rng.normal(size=(155, 6)) + y[:, None], y_train=y)
    return tmp_path


def test_dropout_repeats_and_backprop_agrees_with_itself(users):
    names = ["backprop", "mono-forward"]
    how = {"at": ["a", "b"], "epochs": 2, "batch_size": 32}
    made = weft.compare(f"{users}/m.py:Plain", str(users / "d.npz"), names, **how)
    assert [run["status"] for run in made["runs"]] == ["ok", "ok"]
    assert made["runs"][0]["cosine_to_exact"]["last"] == pytest.approx(1)
    assert made["runs"][1]["at"] == ["a", "b"]
    alone = weft.compare(f"{users}/m.py:Plain", str(users / "d.npz"), names[1:], **how)
    assert alone["runs"][0]["curve"] == made["runs"][1]["curve"]


def test_a_model_without_cuts_is_listed_and_the_others_run(users):
    made = weft.compare(f"{users}/m.py:Plain", str(users / "d.npz"), "mono-forward,backprop", epochs=1)
    assert [run["status"] for run in made["runs"]] == ["unsupported", "ok"]
    assert "at=" in made["runs"][0]["error"]


def test_a_last_batch_of_one_row_and_batch_statistics(users):
    made = weft.compare(f"{users}/m.py:normed", str(users / "d.npz"), "backprop", epochs=1, batch_size=128)
    assert made["runs"][0]["status"] == "ok", made["runs"][0]["error"]


def test_a_model_that_exits(users):
    made = weft.compare(f"{users}/m.py:Exits", str(users / "d.npz"), "backprop", epochs=1)
    assert made["runs"][0]["status"] == "error" and "SystemExit" in made["runs"][0]["error"]
    with pytest.raises(WeftError, match="SystemExit"):
        weft.measure_step(f"{users}/m.py:Exits", str(users / "d.npz"))
