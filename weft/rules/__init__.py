"""How a parameter's gradient is found. Every rule replaces ``loss.backward()`` by ``rule.step(x, y)``."""

from typing import Any

from weft.method import exports

_lookup, __dir__ = exports(__name__)


def __getattr__(name: str) -> Any:
    if name == "Rule":
        from weft.rules.base import Rule

        return Rule
    return _lookup(name)
