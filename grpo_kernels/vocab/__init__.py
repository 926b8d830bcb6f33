"""Computations on rows of logits `[B, T, V]`: statistics, gradients, backends, shards of a vocabulary."""
