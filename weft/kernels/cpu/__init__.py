"""Loops for CPUs, in Numba; imported at their first use."""
