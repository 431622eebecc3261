"""The contract checks of solvers and layers can fail: each broken promise is caught by the check that is about it."""

import pytest

from weft.testing.layer import layer_checks
from weft.testing.solver import solver_checks

HEAD = '''
"""To be broken.

    y = w x
"""

import torch
from torch import nn
from torch.nn import functional as F

from weft.claim import Check, claim
from weft.errors import DataError, Unsupported
from weft.method import method
from weft.rules.solver import Report, Solver
from weft.testing.example import Example, classification


def fresh():
    """A generator that no seed gives."""
    generator = torch.Generator()
    generator.seed()
    return torch.rand((), generator=generator)


def nothing(*args):
    return None

'''
SOLVER = '''
@method("broken-solver", contract="solver", family="broken", papers=[], tags={"own-model"})
class Broken(Solver):
    """Sums of each class's inputs."""

    def __init__(self, model, **common):
        super().__init__(model, **common)
        self.register_buffer("weight", torch.zeros(0, 0))

    def fit(self, x, y):
        wanted = F.one_hot(y, self.model[-1].out_features).to(x)
        self.weight = x.T @ wanted
        return Report(float((x @ self.weight - wanted).square().mean()), 1, (0.5,))

    def forward(self, x):
        return x @ self.weight

    def structure(self):
        return {"shape": list(self.weight.shape)}

    def rebuild(self, structure):
        self.weight = torch.zeros(structure["shape"])


def example():
    return classification()
'''
LAYER = '''
@method("broken-layer", contract="layer", family="broken", papers=[], tags={"same-forward"})
class Broken(nn.Module):
    """The layer itself."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    @classmethod
    def from_dense(cls, layer):
        if not isinstance(layer, nn.Linear):
            raise Unsupported("it is not linear", "nn.Linear")
        return cls(layer)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def example():
    made = classification()
    return Example(made.model[0], made.x, made.y)
'''
FIT, SCORES, FOUND = "wanted = F.one", "        return x @ self.weight", "self.weight = x.T @ wanted"
MADE, OUT = "return cls(layer)", "return F.linear(x, self.weight, self.bias)"


def copying(given, change):
    """A ``__deepcopy__`` in front of ``forward``, whose copy is made from ``given`` and then changed."""
    return (
        "    def forward(self",
        f"    def __deepcopy__(self, memo):\n        made = type(self)({given})\n        {change}\n"
        "        return made\n\n"
        "    def forward(self",
    )


def accepting(when, what="return Report(0.0, 1)"):
    """Data of one kind get past the checks that every ``fit`` begins with."""
    return (
        "\n\ndef example",
        f"\n\nchecked = Broken.fit\n\n\ndef fit(self, x, y):\n    if {when}:\n        {what}\n"
        "    return checked(self, x, y)\n\n\nBroken.fit = fit\n\n\ndef example",
    )


SOLVERS = {  # what is replaced, by what, the check that fails, and what it says
    "loss is not finite": ("Report(float((x", "Report(float('nan') * float((x", "finds_weights", "report is not"),
    "history is not finite": ("(0.5,)", "(float('inf'),)", "finds_weights", "report is not"),
    "no steps": ("mean()), 1,", "mean()), 0,", "finds_weights", "0 steps"),
    "scores of one dimension": (SCORES, f"{SCORES}[:, 0]", "finds_weights", "for 6 inputs"),
    "scores for some": (SCORES, "        return (x @ self.weight)[:-1]", "finds_weights", "for 6 inputs"),
    "scores are not finite": (SCORES, f"{SCORES} / 0", "finds_weights", "not finite"),
    "no better than a constant": (SCORES, f"{SCORES} * 0", "finds_weights", "most frequent class"),
    "predictions differ": (SCORES, f"{SCORES} * (1 + fresh())", "finds_weights", "two predictions differ"),
    "an unseeded draw": (FOUND, f"{FOUND} * (1 + fresh())", "begins_anew", "equal seeds"),
    "goes on": (FOUND, f"{FOUND} + (self.weight if len(self.weight) else 0)", "begins_anew", "went on"),
    "global generator": (FIT, f"torch.rand(1); {FIT}", "leaves_the_rest_alone", "global generator"),
    "global generator in scores": (
        SCORES,
        f"        torch.rand(1)\n{SCORES}",
        "leaves_the_rest_alone",
        "global generator",
    ),
    "leaves a hook": (
        FIT,
        f"self.model.register_forward_hook(nothing); {FIT}",
        "leaves_the_rest_alone",
        "hooks of the model",
    ),
    "leaves a mode": (FIT, f"self.model.eval(); {FIT}", "leaves_the_rest_alone", "modes of the model"),
    "changes the model": (
        FIT,
        f"self.model[0].weight.data.mul_(2); {FIT}",
        "leaves_the_rest_alone",
        "model was changed",
    ),
    "leaves a gradient": (FIT, f"self.model(x).sum().backward(); {FIT}", "leaves_the_rest_alone", "gradient was left"),
    "ignored rows count": (*accepting("(y == -100).any()", "y = y.clamp(0)"), "ignored_rows", "have a part"),
    "state left out": (
        '"weight", torch.zeros(0, 0)',
        '"weight", torch.zeros(0, 0), persistent=False',
        "round_trips",
        "rebuilt, it",
    ),
    "a copy forgets": (*copying("self.model", "made.weight = 0 * self.weight"), "round_trips", "deep copy"),
    "empty data": (*accepting("len(x) == 0"), "bad_input", "DataError"),
    "other lengths": (*accepting("len(x) != len(y)"), "bad_input", "DataError"),
    "other labels": (*accepting("y.ndim == 2"), "bad_input", "DataError"),
    "labels in floating point": (*accepting("y.is_floating_point()"), "bad_input", "DataError"),
    "negative labels": (*accepting("len(y) and int(y.min()) == -1"), "bad_input", "DataError"),
    "nothing but ignored": (*accepting("len(y) and bool((y == -100).all())"), "bad_input", "DataError"),
    "not a number": (*accepting("x.isnan().any()"), "bad_input", "DataError"),
    "a word for a message": (*accepting("x.isnan().any()", "raise DataError('bad')"), "bad_input", "too little"),
    "any option": ("model, **common):", "model, *, no_such_option=0, **common):", "bad_input", "UsageError"),
}
LAYERS = {
    "a parameter unused": (OUT, "return F.linear(x, self.weight)", "trains", "got no gradient"),
    "a gradient that is not finite": (OUT, f"{OUT} + (0 * self.bias).sqrt()", "trains", "parameter's gradient"),
    "the input's is not": (OUT, f"{OUT} + (0 * x).sqrt().sum()", "trains", "gradient of the input"),
    "nothing learns": (OUT, f"{OUT} * 0", "trains", "every gradient is zero"),
    "an unseeded draw": (OUT, f"{OUT} * (1 + fresh())", "trains", "other gradients"),
    "global generator": (OUT, f"torch.rand(1); {OUT}", "trains", "global generator"),
    "global generator when made": (MADE, f"torch.rand(1); {MADE}", "trains", "global generator"),
    "leaves a hook when made": (MADE, f"layer.register_forward_hook(nothing); {MADE}", "trains", "a hook was left"),
    "leaves a hook when used": (
        "= layer.weight, layer.bias",
        "= layer.weight, layer.bias\n        self.given = [layer]",
        "trains",
        "a hook was left",
    ),
    "a copy forgets": (*copying("self", "made.bias = nn.Parameter(2 * self.bias)"), "copies", "deep copy"),
    "state left out": (
        "= layer.weight, layer.bias",
        "= layer.weight, layer.bias\n        self.more = fresh()",
        "copies",
        "state loaded",
    ),
    "takes any layer": ('raise Unsupported("it is not linear", "nn.Linear")', "return layer", "other_layers", "Unsupp"),
    "another output": (OUT, f"{OUT} * 1.01", "same_forward", "output is another"),
    "another shape": (OUT, f"{OUT}[None]", "same_forward", "output is another"),
    "copies of parameters": (
        "= layer.weight, layer.bias",
        "= nn.Parameter(layer.weight.detach().clone()), layer.bias",
        "same_forward",
        "are copies",
    ),
}
USES = {  # with what is replaced, what makes use of it
    ("layer", "leaves a hook when used"): (OUT, f"self.given[0].register_forward_hook(nothing); {OUT}"),
    ("layer", "state left out"): (OUT, f"{OUT} * (1 + self.more)"),
}
CASES = [
    pytest.param(kind, name, id=f"{kind}: {name}")
    for kind, breaks in (("solver", SOLVERS), ("layer", LAYERS))
    for name in breaks
]


@pytest.fixture
def outcomes(said_of):
    """From a kind and a change of its source to what each check of the contract says."""
    sources = {"solver": (SOLVER, solver_checks), "layer": (LAYER, layer_checks)}
    return lambda kind, *changes: said_of(HEAD + sources[kind][0], sources[kind][1], *changes)


@pytest.mark.parametrize("kind", ["solver", "layer"])
def test_what_is_to_be_broken_is_good(outcomes, kind):
    said = outcomes(kind)
    assert len(said) == {"solver": 6, "layer": 4}[kind] and not any(said.values()), said


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_broken_promise_is_caught(outcomes, kind, name):
    old, new, check, message = {"solver": SOLVERS, "layer": LAYERS}[kind][name]
    changes = [(old, new), *([USES[kind, name]] if (kind, name) in USES else [])]
    said = outcomes(kind, *changes)
    assert said[check] is not None, f"{check} let it pass; the others said {said}"
    assert said[check].startswith("AssertionError") and message in said[check], said[check]


def test_every_check_is_broken_once():
    """What is added to a contract needs a case here."""
    from weft.testing import layer, solver

    assert {check.__name__ for check in solver.EVERY} == {check for _, _, check, _ in SOLVERS.values()}
    assert {check.__name__ for check in (*layer.EVERY, layer.same_forward)} == {c for _, _, c, _ in LAYERS.values()}


def test_a_solver_may_change_a_model_that_is_the_users(outcomes):
    """Only what is tagged ``own-model`` leaves the weights as they were."""
    change = (FIT, f"self.model[0].weight.data.mul_(2); {FIT}")
    assert not any(outcomes("solver", change, ('tags={"own-model"}', "tags=set()")).values())


def test_same_forward_is_checked_where_it_is_declared(outcomes):
    said = outcomes("layer", (OUT, f"{OUT} * 1.01"), ('tags={"same-forward"}', "tags=set()"))
    assert set(said) == {"trains", "copies", "other_layers"} and not any(said.values())
