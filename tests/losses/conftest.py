"""A fixture that runs a test on every backend, in one step and in two."""

from __future__ import annotations

import pytest
from hard_cases import Options


@pytest.fixture(params=[False, True], ids=["two steps", "in place"])
def path(request: pytest.FixtureRequest, backend: str) -> Options:
    """Options of `grpo_loss`: the backend, and whether the gradient overwrites the logits."""
    return {"backend": backend, "inplace": request.param}
