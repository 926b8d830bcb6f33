"""Checks of what a caller gives: names, numbers, tensors. Imports torch only."""
