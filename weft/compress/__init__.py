"""A trained network, made smaller or faster."""

from weft.method import exports

BASES = {
    "Compressor": "weft.compress.base",
    "Report": "weft.compress.base",
}
__getattr__, __dir__ = exports(__name__, BASES)
