"""A vocabulary split over 2 and 4 ranks: the cases of distributed/vocab_shard.py, and what needs no rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import vocab_shard
from distributed.launch import run_workers, session_folder

from grpo_kernels import VocabShard, grpo_loss, linear_logps, selective_logps


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.long)], ids="{} ranks".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    thin = request.config.getoption("--pairwise")
    folder = session_folder(tmp_path_factory)
    return run_workers(Path(vocab_shard.__file__), request.param, folder, pairwise=thin)


@pytest.mark.parametrize("name", vocab_shard.cases.params())
def test_vocab_shard(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "ok", outcomes[name]


@pytest.mark.parametrize(
    ("start", "stop", "error"),
    [(-1, 4, ValueError), (5, 4, ValueError), (0.0, 4, TypeError), (0, True, TypeError)],
)
def test_bounds(start: Any, stop: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"VocabShard\.st"):
        VocabShard(start, stop)


def test_columns_must_be_the_shards() -> None:
    shard = VocabShard(3, 10)
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"shard is 3:10, but there are 5 columns of logits"):
        selective_logps(torch.randn(2, 5), ids, shard=shard)
    with pytest.raises(ValueError, match=r"shard is 3:10, but there are 5 rows of lm_head_weight"):
        linear_logps(torch.randn(2, 4), torch.randn(5, 4), ids, shard=shard)
    with pytest.raises(TypeError, match=r"shard must be a VocabShard or None"):
        grpo_loss(torch.randn(1, 2, 7), ids[None], torch.ones(1), shard=(3, 10))


def test_of_a_plain_tensor() -> None:
    with pytest.raises(ValueError, match=r"VocabShard\.of needs a DTensor"):
        VocabShard.of(torch.randn(4, 3))
