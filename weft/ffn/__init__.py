"""Feed-forward layers of which each token uses a part: trees, experts, key-value memories."""

from weft.method import exports

__getattr__, __dir__ = exports(__name__)
