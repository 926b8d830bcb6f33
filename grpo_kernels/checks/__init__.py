"""Checks of arguments: names, numbers, tensors, and tensor values in debug mode. They import only torch."""
