"""Benchmarks against the peers: `python -m benchmarks --help`. docs/benchmarks.md says what is measured."""
