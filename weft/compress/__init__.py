"""A trained network, made smaller or faster."""

from weft.method import exports

__getattr__, __dir__ = exports(__name__)
