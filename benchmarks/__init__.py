"""Benchmarks against other implementations. docs/benchmarks.md explains what is measured.

The folders, in the order of their imports (each imports only folders above it):

    tables/         CSVs of results and Markdown tables
    work/           workloads, random batches, and the providers that compute the loss
    speed/          time and memory of each provider           python -m benchmarks
    training_step/  whole training steps of a model            python -m benchmarks.training_step
    machine_code/   the kernels' machine code, without a GPU   python -m benchmarks.compiled
    traffic/        bytes and FLOPs, counted without a GPU     python -m benchmarks.traffic
    experiments/    the experiments of docs/dev/tuning.md      python -m benchmarks.experiments
    gpu/            all of it, for a GPU that is there for minutes    make gpu

`python -m benchmarks.plot` draws the figures of the docs, `python -m benchmarks.report` writes their tables.
"""
