"""Sequences that are split over 2 and 3 ranks give the results of whole sequences (context_slices.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import context_slices
from distributed.launch import run_workers, session_folder
from grpo_kernels import grpo_loss


@pytest.fixture(scope="session", params=[2, pytest.param(3, marks=pytest.mark.long)], ids="{} ranks".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    thin = request.config.getoption("--pairwise")
    folder = session_folder(tmp_path_factory)
    return run_workers(Path(str(context_slices.__file__)), request.param, folder, pairwise=thin)


@pytest.mark.parametrize("name", context_slices.cases.params())
def test_context_slices(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]


@pytest.mark.parametrize("group", [0, "world", [0, 1]])
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(TypeError, match=r"context_group must be a torch\.distributed process group or None"):
        grpo_loss(torch.randn(1, 2, 5), torch.zeros(1, 2).long(), torch.ones(1), context_group=group)
