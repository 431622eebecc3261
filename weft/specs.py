"""Tapes, conversions and sizes as text, for the command line and recipes: ``quantise:bits=2 | offload``, ``512MiB``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import nn

from weft.cards import Card
from weft.convert import convert_
from weft.errors import UsageError, unknown
from weft.method import card, methods
from weft.session import Routed, Tape

__all__ = ["apply_conversions", "parse", "read_bytes", "read_conversion", "read_tape"]


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value,key=value`` as a name and options, values in YAML (``rank=8``, ``folder=/tmp``, ``seed=null``).

    Raises:
        UsageError: for text of another form.
    """
    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for pair in [p for p in rest.split(",") if p.strip()]:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip().isidentifier():
            raise UsageError(f"{text.strip()!r}: write a name, or name:key=value,key=value")
        if key.strip() in options:
            raise UsageError(f"{text.strip()!r}: {key.strip()} is given twice")
        try:  # globs are text: to YAML a star is an alias
            options[key.strip()] = value.strip() if key.strip() == "where" else _value(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{text.strip()!r}: {value!r} is not a value ({error})") from error
    return name.strip(), options


def _value(text: str) -> Any:
    """YAML's, and what it takes for text: 1e-3, and None as Python writes it."""
    found = yaml.safe_load(text)
    if not isinstance(found, str):
        return found
    if found == "None":
        return None
    try:
        return float(found)
    except ValueError:
        return found


def read_tape(text: str) -> Tape:
    """A tape, or a composition, from ``quantise:bits=4 | offload:folder=/scratch``.

    With ``where=``, globs with spaces between, what follows packs in those modules alone, and ``;`` stands between
    tapes for different modules: ``quantise:bits=2,where=blocks.0 blocks.1; offload:where=blocks.2``.

    Raises:
        UsageError: for a name that is no tape, and options that it does not have.
    """
    routes: list[tuple[list[str], Tape]] = []
    for route in text.split(";"):
        globs, made = list[str](), list[Tape]()
        for part in route.split("|"):
            found, options = _find(part, "tape")
            globs += str(options.pop("where", "")).split()
            made.append(found.build(**_known(found, options)))
        routes.append((globs, functools.reduce(operator.or_, made)))
    if len(routes) == 1 and not routes[0][0]:
        return routes[0][1]
    for globs, tape in routes:
        if not globs:
            raise UsageError(f"{text!r}: {tape} stands beside others and needs where=, the modules that it is for")
    return Routed(routes)


def read_bytes(given: int | str) -> int:
    """``"512MiB"`` as a number of bytes.

    Raises:
        UsageError: for text of another form and what is not positive.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(given).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        found = int(float(number) * units[text[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        raise UsageError(f"memory={given!r}; give a number of bytes, or 512MiB, 2GB and the like") from None
    if found < 1:
        raise UsageError(f"memory={given!r}; it is a positive number")
    return found


def read_conversion(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """A conversion as ``{"layer", "options", "where"}`` from ``compact:rank=32,where=blocks.*`` or such a mapping.

    Raises:
        UsageError: for a name that is no layer, options that it does not have, and keys that are none of the three.
    """
    if isinstance(given, str):
        name, options = parse(given)
        data: dict[str, Any] = {"layer": name, "where": options.pop("where", None), "options": options}
    else:
        data = {"options": {}, "where": None, **given}
        for key in data:
            if key not in ("layer", "options", "where"):
                raise UsageError(unknown("key", str(key), ["layer", "options", "where"], "of a conversion"))
        if not isinstance(data.get("layer"), str) or not isinstance(data["options"], Mapping):
            raise UsageError("a conversion has layer (a method's name), options (a mapping) and where (globs)")
    found, _ = _find(data["layer"], "layer")
    return {"layer": found.name, "options": dict(_known(found, data["options"])), "where": data["where"]}


def apply_conversions(model: nn.Module, conversions: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """`weft.convert_` for each of them, in their order; names of the layers that were swapped.

    Raises:
        UsageError, Unsupported: as `read_conversion` and `weft.convert_` do.
    """
    swapped = []
    for given in conversions:
        one = read_conversion(given)
        found = card(one["layer"])
        layer, options = found.load(), {**found.preset, **one["options"]}
        if not getattr(layer, "converts", ()):
            raise UsageError(f"{found.name} does not say which layers it stands in for; build it in Python")
        swapped += convert_(model, layer.options(**options), where=one["where"])
    return swapped


def _find(text: str, contract: str) -> tuple[Card, dict[str, Any]]:
    name, options = parse(text)
    valid = [c.name for c in methods() if c.contract == contract]
    if name not in valid:
        raise UsageError(unknown(contract, name, valid, "(weft methods lists all)"))
    return card(name), options


def _known(found: Card, options: Mapping[str, Any]) -> Mapping[str, Any]:
    wanted = {option.name: option.annotation for option in found.options}
    options = {k: None if v == "none" and "None" in wanted.get(k, "") else v for k, v in options.items()}
    for given, value in options.items():
        if given not in wanted:
            raise UsageError(unknown("option", str(given), list(wanted), f"of {found.name!r}"))
        if not _fits(value, wanted[given]):
            raise UsageError(f"{given}={value!r} of {found.name!r}: give {wanted[given].replace(' | ', ' or ')}")
    return options


def _fits(value: Any, annotation: str) -> bool:
    """Whether it is one of what an option takes, as far as plain words say that."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not annotation or not set(kinds) <= {"bool", "int", "float", "str", "None"}:
        return True
    if isinstance(value, bool) or value is None:
        return ("bool" if value is not None else "None") in kinds
    if isinstance(value, int | float):
        return "float" in kinds or ("int" in kinds and isinstance(value, int))
    return type(value).__name__ in kinds
