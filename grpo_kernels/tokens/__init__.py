"""Computations on tokens `[N]`, without the vocabulary: batch, sequences, loss, derivatives, metrics."""
