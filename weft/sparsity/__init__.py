"""Which weights and gradients exist: sparse layers, and updates of a part of the weights."""

from weft.method import exports

BASES = {
    "SparseLayer": "weft.sparsity.sparse",
    "cosine_fraction": "weft.ops.sparse_masks",
    "cubic_density": "weft.ops.sparse_masks",
    "dense_gradients": "weft.sparsity.sparse",
    "magnitude_mask": "weft.ops.sparse_masks",
    "random_mask": "weft.ops.sparse_masks",
    "rigl_mask": "weft.ops.sparse_masks",
}
__getattr__, __dir__ = exports(__name__, BASES)
