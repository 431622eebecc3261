"""Loops for CUDA, in Triton; imported at their first use."""
