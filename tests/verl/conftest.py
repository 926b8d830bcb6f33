"""Fixtures of the tests with verl.

The imports of verl are inside the fixtures, so that the tests are skipped if verl is missing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


@pytest.fixture(scope="module")
def integration() -> Iterator[ModuleType]:
    """The integration, imported as verl's workers import it. verl is restored after the module's tests."""
    from verl.utils.import_utils import import_external_libs
    from verl_imported import MODULE, restore_verl

    import_external_libs(MODULE)
    yield sys.modules[MODULE]
    restore_verl()


@pytest.fixture
def warned(integration: ModuleType, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Records the warnings, including those that are given once per process."""
    from grpo_kernels import log

    log.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="grpo_kernels")
    return caplog


@pytest.fixture
def calls(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the hidden states in each call of `linear_logps`."""
    from verl_imported import verl_logps

    shapes: list[tuple[int, ...]] = []
    linear_logps = verl_logps().linear_logps

    def spy(hidden: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(hidden.shape))
        return linear_logps(hidden, *args, **options)

    monkeypatch.setattr(verl_logps(), "linear_logps", spy)
    return shapes
