"""Prints the resources of the split kernel on three GPUs, compiled without one.

    python -m benchmarks.experiments.split_rows

KiB are those of the logits that the resident blocks of a multiprocessor hold.
"""

from __future__ import annotations

from .resources import print_resources

if __name__ == "__main__":
    print_resources()
