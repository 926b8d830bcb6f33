"""The experiments of docs/tuning.md. The command is `python -m benchmarks.experiments`."""
