"""Compiles kernels without a GPU and reads their code. The command is `python -m benchmarks.compiled`."""
