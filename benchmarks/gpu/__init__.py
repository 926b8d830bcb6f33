"""What a GPU is asked for when there is one: tests, benchmarks and experiments, the most telling first."""
