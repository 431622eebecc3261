"""Which weights and gradients exist: sparse layers, and updates of a part of the weights."""

from weft.method import exports

__getattr__, __dir__ = exports(__name__)
