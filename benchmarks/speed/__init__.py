"""Measures time and memory of every provider. The command is `python -m benchmarks`."""
