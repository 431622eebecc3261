"""Swap layers of a model in place, and back: `convert_` and `restore_`.

A layer that can stand in for an ordinary one implements the class method ``from_dense(layer, **options)`` and says in
``converts`` which types it takes. Weights are shared with the ordinary layer wherever the method keeps them as they
are, so that an optimizer, a checkpoint and whatever else holds the model's parameters go on working.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from torch import nn

from weft.errors import Unsupported, UsageError, unknown

__all__ = ["Conversion", "Convertible", "convert_", "restore_"]

_LISTS = (nn.ModuleList, nn.ModuleDict)  # they are not called
_ORIGINAL = "_weft_original"  # in a swapped layer's __dict__, not among its modules: it has no parameters of its own


class Conversion:
    """A layer's class with options: called with an ordinary layer, it gives the one that stands in for it."""

    def __init__(self, layer: type[Convertible], options: Mapping[str, Any]) -> None:
        self.layer, self.options = layer, dict(options)

    def __call__(self, dense: nn.Module) -> nn.Module:
        return self.layer.from_dense(dense, **self.options)

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.layer.__name__}.options({given})"


class Convertible(nn.Module):
    """A layer that can stand in for an ordinary one.

    Attributes:
        converts: types of the ordinary layers, subclasses not included (they may mean something else by ``weight``).
        rebuilds: whether `to_dense` makes the ordinary layer from this one alone, so that the given one need not live.
    """

    converts: ClassVar[tuple[type[nn.Module], ...]] = ()
    rebuilds: ClassVar[bool] = False

    @classmethod
    def from_dense(cls, layer: nn.Module, **options: Any) -> Self:
        """The layer that stands in for ``layer``.

        Raises:
            Unsupported: for a layer that it cannot stand in for.
            UsageError: for options that do not exist or do not fit.
        """
        raise NotImplementedError

    @classmethod
    def options(cls, **options: Any) -> Conversion:
        """This class with options, as `convert_` takes it."""
        return Conversion(cls, options)

    def to_dense(self) -> nn.Module | None:
        """The ordinary layer with this one's weights, for `restore_`; None: the one that was given still has them."""
        return None


def convert_(
    model: nn.Module,
    swaps: Mapping[type[nn.Module], Callable[[nn.Module], nn.Module]]
    | Conversion
    | type[Convertible]
    | Iterable[Conversion | type[Convertible]],
    where: str | Iterable[str] | None = None,
) -> list[str]:
    """Swap layers of ``model`` in place.

    >>> weft.convert_(model, {nn.Linear: weft.tape.CompAct.options(rank=32)}, where="blocks.*")  # doctest: +SKIP

    Args:
        model: its own layers are swapped, not the model itself. A layer that stands in two places is swapped once.
        swaps: from a type of layer (exactly that, no subclass; ``nn.Module`` is any) to what makes the layer that
            takes its place; or a class of Weft's, with options or without, or several, for the types that each stands
            in for.
        where: glob or globs on the layers' names (``"blocks.*.mlp.*"``); None for everywhere.

    Returns:
        Names of the layers that were swapped.

    Raises:
        UsageError: where nothing would be swapped, or a glob matches no module.
        Unsupported: from the layer that cannot be swapped; the model is then as it was.
    """
    table = _table(swaps)
    globs = None if where is None else [where] if isinstance(where, str) else list(where)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in globs or ():
        if not fnmatch.filter(names, pattern):
            raise UsageError(unknown("where", pattern, names, f"of {type(model).__name__}"))
    done: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[int, nn.Module] = {}
    swapped: list[str] = []
    try:
        for name, parent, key, child in _places(model):
            factory = table.get(type(child)) or (None if isinstance(child, _LISTS) else table.get(nn.Module))
            if factory is None or (globs is not None and not any(fnmatch.fnmatchcase(name, g) for g in globs)):
                continue
            if any(name.startswith(f"{outer}.") for outer in swapped):
                continue  # it is part of what was swapped
            if id(child) not in made:
                made[id(child)] = _made(factory, child, name)
            done.append((parent, key, child))
            setattr(parent, key, made[id(child)])
            swapped.append(name)
    except BaseException:
        for parent, key, child in done:
            _back(getattr(parent, key))  # gives back what it took, a parameter that it had frozen, say
            setattr(parent, key, child)
        raise
    if not swapped:
        wanted = ", ".join(sorted(kind.__name__ for kind in table)) or "nothing"
        place = "" if globs is None else f" at {', '.join(globs)}"
        own = " (the model itself is one: give one that has it inside, as nn.Sequential(model) has)"
        own = own if type(model) in table else ""
        found = sorted({type(m).__name__ for m in model.modules()})
        raise UsageError(f"{type(model).__name__} has no {wanted} to swap{place}{own}; it has: {', '.join(found)}")
    return swapped


def restore_(model: nn.Module) -> list[str]:
    """Undo every `convert_`, with the weights as they are now.

    Returns:
        Names of the layers that were put back; an empty list where none had been swapped.

    Raises:
        Unsupported: when a layer has no ordinary form any more; the model is then as it was.
    """
    done: list[tuple[str, nn.Module, str, nn.Module]] = []
    try:
        while found := [place for place in _places(model) if _ORIGINAL in vars(place[3])]:
            back: dict[int, nn.Module] = {}
            for _, _, _, child in found:
                if id(child) not in back:
                    back[id(child)] = _back(child)
            for name, parent, key, child in found:
                setattr(parent, key, back[id(child)])
                done.append((name, parent, key, child))  # what was swapped inside of it comes in the next round
    except BaseException:
        for _, parent, key, child in reversed(done):
            setattr(parent, key, child)
        raise
    return list(dict.fromkeys(name for name, *_ in done))


def _back(swapped: nn.Module) -> nn.Module:
    """The ordinary layer of a swapped one."""
    if _ORIGINAL not in vars(swapped):
        return swapped
    dense = swapped.to_dense() if isinstance(swapped, Convertible) else None
    found = vars(swapped)[_ORIGINAL] if dense is None else dense
    return found.train(swapped.training)


def _places(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """(name, parent, attribute, child) of every module below ``model``, not of those inside a swapped one."""
    places, waiting, seen = list[tuple[str, nn.Module, str, nn.Module]](), [("", model)], {id(model)}
    while waiting:
        prefix, parent = waiting.pop(0)
        for key, child in parent._modules.items():
            if child is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            places.append((name, parent, key, child))
            if id(child) not in seen and _ORIGINAL not in vars(child):
                seen.add(id(child))
                waiting.append((name, child))
    return places


def _made(factory: Callable[[nn.Module], nn.Module], child: nn.Module, name: str) -> nn.Module:
    try:
        made = factory(child)
    except Unsupported as error:
        raise Unsupported(f"{name}: {error.reason}", error.instead) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{name}: {factory!r} gave a {type(made).__name__}; it gives a module")
    made.train(child.training)
    vars(made)[_ORIGINAL] = None if isinstance(made, Convertible) and made.rebuilds else child
    return made


def _table(swaps: Any) -> dict[type[nn.Module], Callable[[nn.Module], nn.Module]]:
    if isinstance(swaps, Mapping):
        for kind, factory in swaps.items():
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or not callable(factory):
                raise UsageError(f"{kind!r}: {factory!r}; give a type of layer and what is called with such a layer")
        return {kind: _factory(factory) for kind, factory in swaps.items()}
    table: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {}
    for one in [swaps] if isinstance(swaps, Conversion | type) else swaps:
        layer = one.layer if isinstance(one, Conversion) else one
        if not (isinstance(layer, type) and issubclass(layer, Convertible) and layer.converts):
            raise UsageError(f"{one!r} does not say which layers it stands in for; give {{type of layer: {one!r}}}")
        table.update(dict.fromkeys(layer.converts, _factory(one)))
    return table


def _factory(given: Any) -> Callable[[nn.Module], nn.Module]:
    """A class of Weft's stands for its ``from_dense``."""
    return given.from_dense if isinstance(given, type) and hasattr(given, "from_dense") else given
