"""The experiments of docs/tuning.md: `python -m benchmarks.experiments --help`."""
