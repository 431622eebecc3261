"""What is kept between the passes: tapes pack what autograd saves, layers keep less from the start."""

from weft.method import exports

BASES = {
    "Kept": "weft.session",
    "Reference": "weft.session",
    "Saved": "weft.session",
    "Tape": "weft.session",
}
__getattr__, __dir__ = exports(__name__, BASES)
