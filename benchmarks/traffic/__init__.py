"""Counts bytes and FLOPs without a GPU. The command is `python -m benchmarks.traffic`."""
