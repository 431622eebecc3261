"""How a parameter's gradient is found. Every rule replaces ``loss.backward()`` by ``rule.step(x, y)``."""

from weft.method import exports

BASES = {
    "Report": "weft.rules.solver",
    "Rule": "weft.rules.base",
    "Solver": "weft.rules.solver",
}
__getattr__, __dir__ = exports(__name__, BASES)
