"""Prints what the split kernel takes on three GPUs."""

from __future__ import annotations

from .resources import print_resources

if __name__ == "__main__":
    print_resources()
