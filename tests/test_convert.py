"""Swapping layers in place and back, and conversions and tapes as text."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import weft
from weft.convert import Convertible
from weft.errors import Unsupported, UsageError
from weft.session import Kept, Tape
from weft.specs import parse, read_conversion, read_tape


class Scaled(Convertible):
    converts = (nn.Linear,)

    def __init__(self, layer, factor):
        super().__init__()
        self.layer, self.factor = layer, factor

    @classmethod
    def from_dense(cls, layer, *, factor=1.0):
        if layer.out_features == 13:
            raise Unsupported("13 features bring bad luck", "12")
        return cls(layer, factor)

    def forward(self, x):
        return self.factor * self.layer(x)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3))


def test_all_of_a_type_or_those_that_a_glob_names():
    net, x = model(), torch.randn(5, 4)
    plain, weights = net(x), [p.data_ptr() for p in net.parameters()]
    assert weft.convert_(net, {nn.Linear: Scaled.options(factor=2.0)}, where="2.*") == ["2.0"]
    assert isinstance(net[2][0], Scaled) and isinstance(net[0], nn.Linear) and not torch.equal(net(x), plain)
    assert weft.convert_(net, Scaled) == ["0", "3"], "what is swapped already stays"
    assert [p.data_ptr() for p in net.parameters()] == weights
    assert sorted(weft.restore_(net)) == ["0", "2.0", "3"] and torch.equal(net(x), plain)
    assert weft.restore_(net) == []


def test_a_layer_in_two_places_is_swapped_once():
    net = nn.ModuleDict({"a": nn.Linear(3, 3)})
    net["b"] = net["a"]
    assert weft.convert_(net, [Scaled]) == ["a", "b"] and net["a"] is net["b"]
    assert weft.restore_(net) == ["a", "b"] and net["a"] is net["b"] and isinstance(net["a"], nn.Linear)


def test_what_stands_inside_a_swapped_layer_stays_with_it():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))

    def wrapped(inner):
        return nn.Sequential(inner, nn.Identity())

    assert weft.convert_(net, {nn.Sequential: wrapped, nn.Linear: Scaled}) == ["0", "1"]
    assert isinstance(net[0][0][0], nn.Linear)


def test_a_refused_layer_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 13))
    with pytest.raises(Unsupported, match="1: 13 features"):
        weft.convert_(net, Scaled)
    assert all(type(layer) is nn.Linear for layer in net)


def test_subclasses_modes_copies_and_state():
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(3, 3), Own(3, 3)).eval()
    assert weft.convert_(net, Scaled) == ["0"] and not net[0].training
    twin = copy.deepcopy(net)
    assert weft.restore_(twin) == ["0"] and type(twin[0]) is nn.Linear and not twin[0].training
    assert twin[0].weight is not net[0].layer.weight
    with torch.no_grad():
        net[0].layer.weight.fill_(2.0)
    weft.restore_(net)
    assert (net[0].weight == 2).all(), "restored with the weights as they are now"


def test_errors_say_what_to_do():
    net = model()
    for call, text in (
        (lambda: weft.convert_(net, {nn.Conv2d: Scaled}), "has no Conv2d to swap; it has: Linear"),
        (lambda: weft.convert_(net, Scaled, where="layer*"), "unknown where 'layer"),
        (lambda: weft.convert_(nn.Linear(2, 2), Scaled), "give one that has it inside"),
        (lambda: weft.convert_(net, {nn.Linear: 3}), "give a type of layer"),
        (lambda: weft.convert_(net, Convertible), "does not say which layers"),
        (lambda: weft.convert_(net, {nn.Linear: lambda layer: None}), "it gives a module"),
        (lambda: read_tape("quantize:bits=2"), "did you mean quantise"),
        (lambda: read_tape("quantise:bit=2"), "did you mean bits"),
        (lambda: read_tape("quantise:bits"), "name:key=value"),
        (lambda: read_tape("mono-forward"), "unknown tape"),
        (lambda: read_conversion("offload"), "unknown layer"),
        (lambda: read_conversion({"layer": "stationary-feedback", "at": "x"}), "did you mean|valid"),
        (lambda: read_conversion({"options": {}}), "a conversion has layer"),
        (lambda: read_conversion("sparse-linear:density=abc"), "density='abc' of 'sparse-linear': give float"),
        (lambda: read_conversion("binary-linear:binary_inputs=maybe"), "give bool"),
        (lambda: read_conversion("moe-plus-plus:experts=2.5"), "give int"),
        (lambda: read_conversion("moe-plus-plus:experts=null"), "experts=None"),
        (lambda: read_conversion("sparse-linear:density=0.1,density=0.2"), "density is given twice"),
    ):
        with pytest.raises(UsageError, match=text):
            call()
    assert all(type(m) is not Scaled for m in net.modules())


def test_text():
    assert parse(" a:b=1,c=some/folder,d=null,e=0.5 ") == ("a", {"b": 1, "c": "some/folder", "d": None, "e": 0.5})
    tape = read_tape("quantise:bits=2 | offload:queue_bytes=100000")
    assert str(tape) == "Quantise(bits=2) | Offload" and tape.right.queue_bytes == 100000
    assert read_tape("quantise-stochastic").rounding == "stochastic"
    assert parse("a:b=1e-1,c=None,d=none,e=nano")[1] == {"b": 0.1, "c": None, "d": "none", "e": "nano"}
    assert read_conversion("moe-plus-plus:capacity=none,balance=1,zero=0")["options"]["capacity"] is None
    given = read_conversion("stationary-feedback:where=a.*")
    assert given == {"layer": "stationary-feedback", "options": {}, "where": "a.*"} == read_conversion(given)


def test_measure_compares_with_the_plain_step():
    found = weft.measure_step(tape="quantise:bits=2", batch_size=256)
    change = found["change"]
    assert change["kept_ratio"] > 3 and found["plain"]["kept_bytes"] == round(
        change["kept_ratio"] * found["kept_bytes"]
    )
    assert 0.01 < change["gradient"]["whole"]["relative_error"] < 0.7 and change["gradient"]["whole"]["cosine"] > 0.8
    assert change["loss"]["plain"] == change["loss"]["changed"] and set(change["gradient"]["layers"]) == {"1", "3", "5"}
    exact = weft.measure_step(rule="mono-forward", tape="offload", batch_size=256)["change"]["gradient"]
    assert exact["whole"]["relative_error"] == 0


def test_compare_runs_each_rule_plainly_and_changed(tmp_path):
    found = weft.compare(rules="backprop", epochs=1, tape="quantise:bits=2", out=tmp_path)
    plain, packed = found["runs"]
    assert (plain["rule"], packed["rule"]) == ("backprop", "backprop | quantise:bits=2")
    assert plain["kept_bytes"] > 3 * packed["kept_bytes"] and packed["cosine_to_exact"]["first"] < 0.9999
    (recipe,) = tmp_path.glob("*quantise*.yaml")
    assert weft.run(recipe)["accuracy"] == packed["accuracy"] != plain["accuracy"]
    assert "quantise" in (tmp_path / "report.html").read_text()


def test_recipes_name_tapes_and_conversions():
    made = weft.Recipe.of({"model": "mlp", "tape": "quantise:bits=2", "conversions": ["stationary-feedback"]})
    assert weft.Recipe.of(made.model_dump()) == made and made.conversions[0]["layer"] == "stationary-feedback"
    for given, text in (
        ({"tape": "quantize"}, "tape: unknown tape 'quantize'"),
        ({"conversions": ["nothing"]}, "conversions: unknown layer 'nothing'"),
        ({"conversions": "stationary-feedback"}, "conversions: a list of layers"),
    ):
        with pytest.raises(weft.RecipeError, match=text):
            weft.Recipe.of(given)


def test_a_run_with_a_tape_that_draws_resumes_bit_for_bit(tmp_path):
    given = {"epochs": 2, "tape": "quantise-stochastic:bits=2", "accumulate": 2, "checkpoint_seconds": 0.0}
    whole = weft.run(given, out=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(event):
        if event["event"] == "step" and event["done"] == 17:
            raise Stop

    with pytest.raises(Stop):
        weft.run(given, out=tmp_path / "cut", on_event=stop)
    again = weft.run(resume=tmp_path / "cut")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert again["loss"] == whole["loss"]


class Broken(Tape):
    def pack(self, tensor, saved):
        return Kept.of(tensor, tensor.to(torch.float16))

    def unpack(self, kept):
        return kept.tensors[0].to(kept.dtype)

    def bytes(self, shape, dtype):
        return 2 * shape.numel()


def test_a_session_enters_and_leaves_its_tape():
    class Watched(Broken):
        inside = 0

        def enter(self, hold):
            self.inside += 1
            self.hold = hold

        def leave(self):
            self.inside -= 1

    class Refuses(Watched):
        def enter(self, hold):
            raise weft.WeftError("not now")

    first, second, net = Watched(), Watched(), model()
    with (first | second).on(net) as session:
        assert first.inside == second.inside == 1
        release = first.hold(torch.zeros(100), "0")
        assert session.total_bytes == 400 and session.by_module == {"0": 400}
        release()
        release()
        assert session.total_bytes == 0
    assert first.inside == second.inside == 0
    with pytest.raises(weft.WeftError, match="not now"), (first | Refuses()).on(net):
        pass
    assert first.inside == 0 and not any(m._forward_hooks for m in net.modules())


def test_tapes_for_different_modules():
    net, x = model(), torch.randn(900, 4)
    wanted = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    tape = read_tape("quantise:bits=8,where=0 3; offload:least_bytes=0,where=2")
    assert not tape.exact and str(tape) == "Quantise(bits=8) in 0 3; Offload in 2"
    with tape.on(net) as session:
        loss = net(x).square().mean()
        held = session.by_module
        found = torch.autograd.grad(loss, list(net.parameters()))
    assert held["1"] == 900 * 6 * 4, "what no route matches is kept as it is"
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
    with pytest.raises(UsageError, match="where='9' matches no module"), read_tape("offload:where=9").on(net):
        pass
    with pytest.raises(UsageError, match="needs where="):
        read_tape("quantise; offload:where=0")


def test_swaps_inside_of_swapped_layers_are_undone_too():
    net, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 2)), torch.randn(3, 4)
    plain = net(x)
    weft.convert_(net, Scaled.options(factor=3.0), where="0.*")
    weft.convert_(net, weft.tape.Checkpoint, where="0")
    assert not torch.equal(net(x), plain)
    assert sorted(weft.restore_(net)) == ["0", "0.0"] and torch.equal(net(x), plain)
    assert not any(isinstance(m, Convertible) for m in net.modules())


def test_a_swap_that_cannot_be_undone_leaves_the_model_as_it_was():
    class Stuck(Scaled):
        def to_dense(self):
            raise Unsupported("it has no ordinary form", "nothing")

    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 2))
    weft.convert_(net, Stuck.options(factor=3.0), where="0.*")
    weft.convert_(net, weft.tape.Checkpoint, where="0")
    before = list(net.modules())
    with pytest.raises(Unsupported, match="no ordinary form"):
        weft.restore_(net)
    assert list(map(id, net.modules())) == list(map(id, before))


def test_globs_are_text():
    assert parse("checkpoint:where=*.mlp") == ("checkpoint", {"where": "*.mlp"})


def test_what_can_be_made_again_is_let_go():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    kept = weakref.ref(net[0].weight)
    weft.convert_(net, weft.sparsity.SparseLinear.options(density=0.1), where="0")
    gc.collect()
    assert kept() is None
    assert weft.restore_(net) == ["0"] and int((net[0].weight != 0).sum()) == round(0.1 * 64 * 64)
