"""A row split over blocks, the kernel of experiment 4: `python -m benchmarks.experiments.split_rows`."""
