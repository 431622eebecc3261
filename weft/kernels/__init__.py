"""Hot loops: each a `torch.library` operator with a plain-torch reference, Numba on CPUs and Triton on CUDA.

What to call is in the files `bits`, `groups` and `step_lookup`; `weft.kernels.cpu` and `weft.kernels.cuda` hold the
loops and are imported at the first use on such a device. Every other device runs the reference.
"""
