"""Times whole training steps of a model. The command is `python -m benchmarks.training_step`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported
