"""Time and memory of every provider: `python -m benchmarks --help`."""
