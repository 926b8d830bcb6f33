"""Whole training steps of a real model: `python -m benchmarks.training_step --help`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
