"""Workloads, their random batches, and the providers that compute the loss."""
