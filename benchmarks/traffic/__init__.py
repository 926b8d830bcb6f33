"""Bytes and operations, counted without a GPU: `python -m benchmarks.traffic --help`."""
