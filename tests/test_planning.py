"""Plans: optimal choices, peaks as predicted on models that the code does not know, recipes that carry them out."""

import random

import pytest
import torch
from torch import nn

import weft
from weft import measure
from weft._choices import Costs, Line, Way, enumerated, fastest
from weft.errors import DataError, UsageError
from weft.specs import read_bytes


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def drawn(seed, blocks, ways):
    draw = random.Random(seed)

    def lines(low, high):
        return tuple(Line(draw.uniform(0, 50), draw.uniform(low, high)) for _ in range(blocks))

    made = [
        Way(
            str(o),
            lines(0.1, 9 / (o + 1)),
            lines(0, 3) if o == 2 else tuple(Line() for _ in range(blocks)),
            tuple(Line() for _ in range(blocks)) if o == 0 else lines(0, 1),
            (0.0,) * blocks if o in (0, 2) else tuple(draw.uniform(0, 0.1) for _ in range(blocks)),
            Line(draw.uniform(-20, 40), draw.uniform(0, 1)),
            Line(draw.uniform(-20, 40), draw.uniform(0, 1)),
            tuple(o == 0 or draw.random() < 0.8 for _ in range(blocks)),
        )
        for o in range(ways)
    ]
    gradients = tuple(draw.uniform(0, 90) for _ in range(blocks + 1))
    return Costs(gradients, Line(5, 0.2), Line(1, 0.5), tuple(made), tuple(g / 2 for g in gradients[:-1]))


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_optimum_of_all(seed):
    costs, rows = drawn(seed, 4, 4), 20
    full = costs.peak([0] * 4, rows)
    for share in (0.5, 0.7, 0.9, 1.1):
        for limits in ({}, {"error": 0.25}, {"seconds": 1.5 * costs.seconds.at(rows)}, {"parts": 2}):
            found, best = (f(costs, rows, share * full, **limits) for f in (fastest, enumerated))
            assert (found is None) == (best is None), (share, limits)
            if found is not None:
                assert costs.peak(found, rows, limits.get("parts", 1)) <= share * full * (1 + 1e-6)
                slower = costs.time(found, rows) - costs.time(best, rows)
                lossy = sum(costs.ways[o].errors[g] > 0 for g, o in enumerate(best)) / 4
                assert slower <= 0.03 * costs.seconds.at(rows) * lossy + 1e-5 * costs.seconds.at(rows)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 48, batch_first=True), nn.Linear(48, 7)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def cases():
    mlp = nn.Sequential(nn.Linear(80, 200), nn.ReLU(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 7))
    conv = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(12, 20, 3), nn.ReLU())
    conv.extend([nn.Flatten(), nn.Linear(720, 7)])
    blocks = nn.Sequential(nn.Linear(24, 64), *[Residual(64) for _ in range(3)], nn.Flatten(), nn.Linear(640, 7))
    return {
        "mlp": (mlp, torch.randn(400, 80)),
        "conv": (conv, torch.randn(48, 3, 16, 16)),
        "lstm": (Recurrent(), torch.randn(40, 30, 16)),
        "residual": (blocks, torch.randn(64, 10, 24)),
    }


@pytest.mark.parametrize(
    ("name", "share"), [("mlp", 0.45), ("conv", 2.0), ("conv", 0.6), ("lstm", 0.45), ("residual", 0.45)]
)
def test_the_peak_is_as_predicted_and_the_plan_fits(name, share):
    model, x = cases()[name]
    y = torch.arange(len(x)) % 7
    weights = {n: p.clone() for n, p in model.named_parameters()}
    loss = nn.functional.cross_entropy
    fixed = 3 * sum(p.numel() * 4 for p in model.parameters())
    step = measure.peak_bytes(lambda: loss(model(x), y).backward(), parameters=list(model.parameters()))
    found = weft.plan(model, (x, y), memory=int(fixed + share * step))
    assert found.fixed_bytes == fixed
    assert found.predicted["peak_bytes"] == pytest.approx(found.measured["peak_bytes"], rel=0.1)
    assert found.fits and found.measured["memory_bytes"] <= found.memory
    assert (found.tape, found.conversions, found.accumulate) == (None, [], 1) if share > 1 else found.accumulate >= 1
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters()) and len(found.sentences) == 3
    tape = found.apply(model)
    assert tape is None or found.tape


def test_limits_are_kept_and_what_binds_is_said():
    model, x = cases()["residual"]
    batch = x, torch.arange(len(x)) % 7
    exact = weft.plan(model, batch, memory="1500kB", optimizer="sgd", max_gradient_error=0.0)
    assert exact.measured["gradient_error"] < 1e-5 and exact.fits
    nothing = weft.plan(model, batch, memory=1000)
    assert not nothing.fits and "Weights and optimizer state alone need" in nothing.sentences[-1]
    nearly = weft.plan(model, batch, memory=nothing.fixed_bytes + 1000)
    assert not nearly.fits and "are kept between the passes" in nearly.sentences[-1]
    assert nearly.measured["peak_bytes"] < 0.5 * exact.plain["peak_bytes"]


def test_sizes_as_text():
    assert [read_bytes(t) for t in (12, "512MiB", "2 GB", "1.5kB", "7")] == [12, 2**29, 2 * 10**9, 1500, 7]
    for bad in ("", "many", "-3MiB", "5 miles", 0):
        with pytest.raises(UsageError, match="memory="):
            read_bytes(bad)


def test_bad_input():
    model, x = cases()["mlp"]
    for how, text in (
        ({"optimizer": "adamax"}, "optimizer='adamax'"),
        ({"max_slowdown": 0.5}, "max_slowdown at least 1"),
        ({"max_gradient_error": -1.0}, "at least 0"),
    ):
        with pytest.raises(UsageError, match=text):
            weft.plan(model, (x, torch.zeros(400, dtype=torch.long)), memory="1GB", **how)
    with pytest.raises(DataError, match="400 inputs and 3 labels"):
        weft.plan(model, (x, torch.zeros(3, dtype=torch.long)), memory="1GB")


def test_the_recipe_is_carried_out(tmp_path):
    found = weft.plan_step("mlp", batch_size=256, memory="1700kB", out=tmp_path / "recipe.yaml")
    result = weft.run(tmp_path / "recipe.yaml")
    assert result["recipe"]["tape"] == found["tape"] and result["recipe"]["accumulate"] == found["accumulate"]
    assert result["accuracy"] > 0.85 and found["settings"]["model"] == "mlp"


def test_tapes_for_some_blocks_are_recipes_too():
    how = {"model": "mlp", "rule": "backprop", "epochs": 2, "seed": 1, "tape": "quantise:bits=2,where=2 1"}
    losses = [weft.run(how | {"tape": tape})["loss"] for tape in (how["tape"], None)]
    assert losses[0] != losses[1]
    with pytest.raises(UsageError, match=r"where='9' matches no module of Backprop; nearest: .*'0'"):
        weft.run(how | {"tape": "quantise:bits=2,where=9"})
