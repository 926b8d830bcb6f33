"""FusedGRPOTrainer under DeepSpeed ZeRO-3, in which the head is whole only during the forward."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from trl_runs import TRAINER_MARKS, Folders, messages, new_trainer, step_and_score

from grpo_kernels import LossSpec

pytest.importorskip("trl", minversion="1.16")

import trl

from grpo_kernels.integrations.trl import FusedGRPOTrainer, fuse_trl_logps

pytestmark = TRAINER_MARKS


def test_sharded_head(
    sharded: list[bool], folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fused loss computes its gradient in the forward, so it does not need the head in the backward."""
    step_and_score(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path))
    assert sharded == [] == messages(caplog, logging.WARNING)


class GSPOTrainer(FusedGRPOTrainer):
    """A trainer with a custom spec at sequence level."""

    def loss_spec(self) -> LossSpec:
        return LossSpec.preset("gspo")


def test_sharded_head_and_own_spec(sharded: list[bool], folders: Folders, tmp_path: Path) -> None:
    """A spec that needs the head in the backward is refused, because TRL's loss would be a different one."""
    with pytest.raises(
        ValueError, match=r"the forward has to compute the gradient of your own loss_spec\(\)"
    ):
        new_trainer(GSPOTrainer, folders("llama"), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.4},
        {"model_init_kwargs": {"dtype": "float16"}},
    ],
)
def test_sharded_head_in_the_backward(
    config: dict[str, Any],
    sharded: list[bool],
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loss that needs the head in the backward is TRL's, and so are all log-probabilities.

    All log-probabilities are then rounded alike.
    """
    step_and_score(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path, loss_type="grpo", **config))
    assert sharded == [True, False]
    (warning,) = messages(caplog, logging.WARNING)
    assert "ZeRO-3" in warning


def test_sharded_head_of_other_trainers(
    sharded: list[bool], folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After `fuse_trl_logps`, TRL's trainers keep their own log-probabilities under ZeRO-3."""
    fuse_trl_logps()
    step_and_score(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path))
    assert sharded == [True, False]
    (warning,) = messages(caplog, logging.WARNING)
    assert "ZeRO-3" in warning
