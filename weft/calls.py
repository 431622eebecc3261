"""Interception of operations as they are called, through ``TorchFunctionMode``: functional calls and shared modules
are seen, and nothing is left on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from weft.errors import Unsupported

Handler = Callable[..., Any]

# They move no gradient through a weight's values: a look-up, sums.
ALLOWED = (F.embedding, torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.add_)


class Calls(TorchFunctionMode):
    """Inside, each call of a function in ``handlers`` goes to its handler, which gets the call's own arguments.

    Args:
        handlers: from a torch function, e.g. ``torch.nn.functional.linear``, to what is called in its place.
        strict: raise Unsupported for other functions that take a weight (a Parameter of two or more dimensions, or
            one of ``weights``), so that nothing falls back to the plain operation unseen.
        allow: functions that ``strict`` lets pass.
    """

    def __init__(
        self, handlers: Mapping[Any, Handler], *, strict: bool = False, allow: tuple[Any, ...] = ALLOWED
    ) -> None:
        super().__init__()
        self.handlers = dict(handlers)
        self.strict = strict
        self.allow = allow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every function inside the mode."""
        kwargs = kwargs or {}
        if func in self.handlers:
            return self.handlers[func](*args, **kwargs)
        if self.strict and func not in self.allow and _holds_weight([*args, *kwargs.values()]):
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            if not name.endswith((".__get__", ".__set__", "size", "dim", "register_hook", "requires_grad_")):
                known = ", ".join(sorted(getattr(f, "__name__", str(f)) for f in self.handlers))
                raise Unsupported(f"{name} takes a weight and is not handled here (handled: {known})")
        return func(*args, **kwargs)


def _holds_weight(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_weight(part) for part in value)
    return isinstance(value, nn.Parameter) and value.ndim >= 2
