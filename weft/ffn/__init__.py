"""Feed-forward layers of which each token uses a part: trees, experts, key-value memories."""

from weft.method import exports

BASES = {
    "Pathway": "weft.ops.pathway",
    "loss_scale": "weft.ops.auxiliary",
}
__getattr__, __dir__ = exports(__name__, BASES)
