"""A fixture that forbids reading the logits."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the logits were read")

    for name in ("row_stats", "fused_loss"):
        monkeypatch.setattr(f"grpo_kernels.vocab.dispatch.{name}", refuse)
