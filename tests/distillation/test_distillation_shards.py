"""A vocabulary split over 2 and 4 ranks gives the distillation losses of the whole vocabulary.

The cases that run on the ranks are in distillation_shards.py.
"""

from __future__ import annotations

from pathlib import Path

import distillation_shards
import pytest
from distributed.launch import run_workers, session_folder


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.long)], ids="{} ranks".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    thin = request.config.getoption("--pairwise")
    folder = session_folder(tmp_path_factory)
    return run_workers(Path(distillation_shards.__file__), request.param, folder, pairwise=thin)


@pytest.mark.parametrize("name", distillation_shards.cases.params())
def test_on_ranks(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]
