"""The kernels' machine code, without a GPU: `python -m benchmarks.compiled --help`."""
