"""The cases of verl_ranks.py pass on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import verl_ranks
from distributed.launch import run_workers, session_folder


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_workers(Path(verl_ranks.__file__), 2, session_folder(tmp_path_factory))


@pytest.mark.parametrize("name", verl_ranks.cases)
def test_ranks(outcomes: dict[str, str], name: str) -> None:
    """The case passes on both ranks."""
    assert outcomes[name] == "ok", outcomes[name]
