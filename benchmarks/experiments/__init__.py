"""The experiments of docs/dev/tuning.md. The command is `python -m benchmarks.experiments`."""
