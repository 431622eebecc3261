"""Many processes share a run: the weights of one process, ends that are not hidden, folders to go on from."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import weft
from weft import Unsupported, UsageError, processes, runs

RULES = [
    card.name
    for card in weft.methods(contract="rule")
    if "additive" in card.tags and not card.name.startswith(("graph", "highway"))  # they need other models than an MLP
]
WORKER = """
import json, sys
import weft
from weft import processes

folder, recipes = sys.argv[1], json.loads(sys.argv[2])
with processes.joined() as group:
    for name, recipe in recipes.items():
        try:
            weft.run(recipe, out=f"{folder}/{name}")
        except weft.Unsupported as error:
            print(name, error)
"""
SMALL = {"model": "mlp:32x32", "epochs": 1, "batch_size": 100}  # 1,199 rows: the last batch is cut into 50 and 49
NOISY = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(32),
                         nn.Linear(32, 10))
"""


def start(command, size=2, **how):
    """One process for each rank, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **how,
        )
        for rank in range(size)
    ]


def finish(started):
    """Exit statuses, stdout and stderr of all; none outlives the test."""
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], [out for out, _ in said], [err for _, err in said]


def worst(one, two):
    """The largest difference, relative to a tensor's largest entry where that is above 1."""
    a, b = load_file(one / runs.WEIGHTS), load_file(two / runs.WEIGHTS)
    assert set(a) == set(b)
    return max(float((a[k].double() - b[k].double()).abs().max() / max(1.0, b[k].abs().max())) for k in a)


def fit(*arguments):
    return ["-m", "weft", "fit", *map(str, arguments)]


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_two_processes_give_the_weights_of_one(tmp_path):
    """Every rule, those that draw noise too; with clipping and micro-batches; sharded."""
    # Adam divides by the size of a gradient, and so turns rounding of the smallest into steps of full size.
    plain = {"optimizer": "sgd", "lr": 1e-4}
    recipes = {
        rule: {**SMALL, "rule": rule, **({} if "deterministic" in weft.card(rule).tags else plain)} for rule in RULES
    }
    recipes["clipped"] = {**SMALL, "rule": "backprop", "clip": 0.05, "accumulate": 3}
    sharded = {f"sharded-{rule}": {**SMALL, "rule": rule, "shard": True} for rule in ("backprop", "mono-forward")}
    sharded["sharded-clipped"] = {**recipes["clipped"], "shard": True}
    started = start(["-c", WORKER, str(tmp_path / "two"), json.dumps({**recipes, **sharded})])
    for name, recipe in recipes.items():
        with contextlib.suppress(Unsupported):
            weft.run(recipe, out=tmp_path / "one" / name)
    statuses, _, errors = finish(started)
    assert statuses == [0, 0], errors
    checked = 0
    for name in [*recipes, *sharded]:
        if (tmp_path / "two" / name / runs.WEIGHTS).exists():
            assert worst(tmp_path / "one" / name.removeprefix("sharded-"), tmp_path / "two" / name) <= 1e-6, name
            checked += 1
    assert checked >= len(RULES) + 1 + len(sharded), "every rule is shared"
    one, two = ((tmp_path / kind / "backprop" / runs.RESULT).read_text() for kind in ("one", "two"))
    for key in ("accuracy", "validation_accuracy"):
        assert json.loads(one)[key] == json.loads(two)[key]
    assert json.loads(one)["loss"] == pytest.approx(json.loads(two)["loss"], rel=1e-6)


def test_killed_and_resumed(tmp_path):
    """kill -9 of one process ends the other within seconds; both go on to the weights of an uninterrupted run."""
    (tmp_path / "my.py").write_text(NOISY)
    (tmp_path / "r.yaml").write_text(
        f"model: {tmp_path}/my.py:net\nrule: backprop\nepochs: 10\nbatch_size: 32\ncheckpoint_seconds: 0.02\n"
    )
    straight = start(fit(tmp_path / "r.yaml", "--out", tmp_path / "straight"))
    assert finish(straight)[0] == [0, 0]
    for killed in (1, 0):
        arguments = ("--resume", tmp_path / "cut") if killed == 0 else (tmp_path / "r.yaml", "--out", tmp_path / "cut")
        started = start(fit(*arguments))
        wait_for(tmp_path / "cut" / runs.CHECKPOINT, started[0])
        before = (tmp_path / "cut" / runs.CHECKPOINT).stat().st_mtime_ns
        while (tmp_path / "cut" / runs.CHECKPOINT).stat().st_mtime_ns == before and started[0].poll() is None:
            time.sleep(0.01)
        started[killed].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert started[1 - killed].wait(timeout=20) == 1, "the other process went on"
        assert time.monotonic() - begun < 20
        assert "has ended or does not answer" in started[1 - killed].communicate()[1]
        finish(started)
    assert finish(start(fit("--resume", tmp_path / "cut")))[0] == [0, 0]
    assert worst(tmp_path / "straight", tmp_path / "cut") == 0.0
    assert not list((tmp_path / "cut").glob(f"{runs.PREFIX}*"))


def test_a_run_of_two_goes_on_alone(tmp_path):
    (tmp_path / "r.yaml").write_text("model: mlp:32\nrule: mono-forward\nepochs: 500\nbatch_size: 100\n")
    started = start(fit(tmp_path / "r.yaml", "--out", tmp_path / "a"))
    wait_for(tmp_path / "a" / runs.CHECKPOINT, started[0])
    for process in started:
        process.kill()
    finish(started)
    recipe = (tmp_path / "a" / runs.RECIPE).read_text()
    saved = json.loads(safe_open(tmp_path / "a" / runs.CHECKPOINT, framework="pt").metadata()["weft"])
    epochs = len(saved["history"]) + 1
    (tmp_path / "a" / runs.RECIPE).write_text(recipe.replace("epochs: 500", f"epochs: {epochs}"))
    assert weft.run(resume=tmp_path / "a")["phases"][0]["curve"][-1]["epoch"] == epochs


def test_torchrun_and_what_it_cannot_do(tmp_path):
    (tmp_path / "r.yaml").write_text("model: mlp:16\nrule: backprop\nepochs: 1\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "weft", "fit"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "r.yaml"), "--json", "--out", str(tmp_path / "a")],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["model"] == "mlp:16", "one document, of the first process"
    with pytest.raises(UsageError, match="several processes"):
        weft.run({"shard": True})
    with pytest.raises(Unsupported, match="sharded"):
        weft.run({"shard": True, "rule": "noprop"})


def test_a_process_that_fails_ends_all(tmp_path):
    """Not a number in one process's part of the data alone: both end, each with a message."""
    (tmp_path / "my.py").write_text(
        "import os\nimport torch\nfrom torch import nn\n\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        bad = os.environ['RANK'] == '1' and self.training\n"
        "        return super().forward(x.flatten(1)) * (float('nan') if bad else 1.0)\n\n\n"
        "def net():\n    return Net(64, 10)\n"
    )
    (tmp_path / "r.yaml").write_text(f"model: {tmp_path}/my.py:net\nepochs: 1\n")
    statuses, _, errors = finish(start(fit(tmp_path / "r.yaml", "--out", tmp_path / "a")))
    assert statuses == [1, 1]
    assert "another process of this run has failed in this step" in errors[0] and "the loss is nan" in errors[1]


def test_alone_every_exchange_gives_back_what_it_was_given():
    group = processes.Group()
    tensor = torch.arange(3.0)
    group.add([tensor])
    group.mean([tensor], 0.5)
    assert torch.equal(tensor, torch.arange(3.0)) and group.total([1, 2.5]) == [1, 2.5]
    assert group.gather(tensor) == [tensor]
    assert group.norm([torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0


def test_environment_that_is_incomplete(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2"), processes.joined():
        pass
