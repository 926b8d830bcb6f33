"""Computations from hidden states: chunks of logits, passes over them, gradients of the LM head."""
