"""Measurements that the documentation quotes: ``python -m benchmarks`` runs them and writes ``benchmarks/results``."""
