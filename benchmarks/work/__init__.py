"""What is computed, and by whom: workloads, batches and providers."""
