"""Hot loops: each a `torch.library` operator with a plain-torch reference, Numba on CPUs and Triton on CUDA.

What to call is in the files beside this one, of which `compiled` makes operators and machine code; `weft.kernels.cpu`
and `weft.kernels.cuda` hold the loops and are imported at the first use on such a device. Where there is no loop for a
device, the reference runs.
"""
