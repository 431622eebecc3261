"""The checks of every contract, by the contract that a card names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from weft.cards import Card
from weft.errors import WeftError
from weft.testing.compress import compress_checks
from weft.testing.conversion import conversion_checks
from weft.testing.function import function_checks
from weft.testing.layer import layer_checks
from weft.testing.rule import rule_checks
from weft.testing.solver import solver_checks
from weft.testing.tape import tape_checks
from weft.testing.tools import run_all


def _layer_checks(card: Card) -> Iterator[tuple[str, Callable[[Card], None]]]:
    yield from layer_checks(card)
    yield from conversion_checks(card)


CHECKS: dict[str, Callable[[Card], Iterator[tuple[str, Callable[[Card], None]]]]] = {
    "rule": rule_checks,
    "solver": solver_checks,
    "layer": _layer_checks,
    "tape": tape_checks,
    "function": function_checks,
    "compress": compress_checks,
}


def contract_checks(card: Card) -> Iterator[tuple[str, Callable[[Card], None]]]:
    """Every check that applies to a method, with its name.

    Raises:
        WeftError: for a contract that nothing checks.
    """
    if card.contract not in CHECKS:
        raise WeftError(f"no check is written for the contract {card.contract!r} of {card.name}")
    yield from CHECKS[card.contract](card)


def check_method(name: str | Card) -> list[str]:
    """Run every check of its contract on one method.

    Args:
        name: a method's name or its card.

    Returns:
        Names of the checks that ran.

    Raises:
        AssertionError: by the first promise that is not kept.
    """
    return run_all(name, contract_checks)
