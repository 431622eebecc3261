"""The numbers that a layer computes with: binary weights, products of bits, exponentials."""

from weft.method import exports

__getattr__, __dir__ = exports(__name__)
