"""A vocabulary split over 2 and 4 ranks gives the results of the whole vocabulary.

The cases that run on the ranks are in vocab_logits.py, vocab_hidden.py and vocab_options.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from distributed import vocab_hidden, vocab_logits, vocab_options
from distributed.launch import run_workers, session_folder
from grpo_kernels import VocabShard, grpo_loss, linear_logps, selective_logps


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.long)], ids="{} ranks".format)
def on_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ModuleType], dict[str, str]]:
    """Run a worker script on 2 or 4 ranks and return the outcome of each of its cases."""
    thin = request.config.getoption("--pairwise")
    folder = session_folder(tmp_path_factory)
    return lambda script: run_workers(Path(str(script.__file__)), request.param, folder, pairwise=thin)


@pytest.mark.parametrize("name", vocab_logits.cases.params())
def test_from_logits(on_ranks: Callable[[ModuleType], dict[str, str]], name: str) -> None:
    outcome = on_ranks(vocab_logits)[name]
    assert outcome == "ok", outcome


@pytest.mark.parametrize("name", vocab_hidden.cases.params())
def test_from_hidden_states(on_ranks: Callable[[ModuleType], dict[str, str]], name: str) -> None:
    outcome = on_ranks(vocab_hidden)[name]
    assert outcome == "ok", outcome


@pytest.mark.parametrize("name", vocab_options.cases.params())
def test_sampling_masks_and_several_tokens(
    on_ranks: Callable[[ModuleType], dict[str, str]], name: str
) -> None:
    outcome = on_ranks(vocab_options)[name]
    assert outcome == "ok", outcome


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
