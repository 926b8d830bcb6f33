"""FusedGRPOTrainer compares its loss with TRL's, and uses TRL's loss if they differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import (
    TRAINER_MARKS,
    B,
    Folders,
    T,
    V,
    assert_close,
    assert_same_gradients,
    assert_same_runs,
    batch,
    grpo,
    loss_and_gradients,
    messages,
    new_trainer,
)

pytest.importorskip("trl", minversion="1.16")

import trl

from grpo_kernels.integrations.trl import FusedGRPOTrainer, forward_loss
from grpo_kernels.integrations.trl import settings as trl_settings
from grpo_kernels.integrations.trl import trainer as fused_trl

pytestmark = TRAINER_MARKS


def ratio(logps: Tensor, old: Tensor | None) -> Tensor:
    return torch.exp(logps - (logps.detach() if old is None else old))


def gradient_lost(logps: Tensor, old: Tensor | None, ref: None, advantages: Tensor, mask: Tensor) -> Tensor:
    """A loss with the right value and no gradient."""
    return -advantages * ratio(logps, old).detach() + 0 * logps


def constant_added(logps: Tensor, old: Tensor | None, ref: None, advantages: Tensor, mask: Tensor) -> Tensor:
    """A loss with the right gradient and a wrong value."""
    return -advantages * ratio(logps, old) + 0.1


MISTAKES = {
    "scale": {"trl_normalizer": lambda trainer, spec, inputs: inputs["num_items_in_batch"] * 3.0},
    "gradient": {"surrogate_of_settings": lambda trainer: gradient_lost},
    "value": {"surrogate_of_settings": lambda trainer: constant_added},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_loss_is_replaced_by_trls(
    mistake: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong loss gives one warning, and the whole run equals TRL's, from the same micro-batch on."""
    config = {"loss_type": "dapo", "epsilon": 100.0}
    wanted = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, **config)
    for name, wrong in MISTAKES[mistake].items():
        monkeypatch.setattr(trl_settings, name, wrong)
    got = grpo(FusedGRPOTrainer, folders("llama"), tmp_path, **config)
    (warning,) = messages(caplog, logging.WARNING)
    assert "our loss is" in warning and "TRL's" in warning
    assert_same_runs(got, wanted)


def test_zero_gradients_are_no_check(folders: Folders, tmp_path: Path) -> None:
    """A comparison of gradients that are all zero does not count as a check."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    inputs = batch()
    for advantages, left in ((torch.zeros(B), fused_trl.GRADIENT_CHECKS), (inputs["advantages"], 7)):
        trainer._compute_loss(trainer.model, {**inputs, "advantages": advantages})
        assert trainer._gradient_checks == left


def test_every_rank_uses_trls_loss(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the losses differ on one rank, all ranks use TRL's loss.

    All ranks have to call the model equally often.
    """
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)

    def gather(self: Any, x: Tensor) -> Tensor:
        return torch.stack([x, ~x]) if x.dtype == torch.bool else x

    monkeypatch.setattr(type(trainer.accelerator), "gather", gather)
    trainer._compute_loss(trainer.model, batch())
    assert len(messages(caplog, logging.WARNING)) == 1
    monkeypatch.setattr(forward_loss, "linear_grpo_loss", None)
    trainer._compute_loss(trainer.model, batch())


def test_infinite_ratio_without_advantage_is_no_difference(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An infinite ratio of a token without advantage does not make us use TRL's loss.

    TRL's loss is NaN there, because it multiplies the ratio by 0.
    """
    inputs = batch()
    inputs["old_per_token_logps"][2] -= 200  # its advantage is 0
    theirs = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), inputs)
    ours = loss_and_gradients(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path), inputs)
    without = loss_and_gradients(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path), batch())
    assert theirs[0].isnan()
    assert_close("loss", ours[0], without[0], 1e-6)
    assert_same_gradients(ours[1], without[1])
    assert messages(caplog, logging.WARNING) == []


def test_log_probabilities_of_tools(folders: Folders, tmp_path: Path) -> None:
    """A token of a tool may have any log-probability.

    TRL computes its ratio, which is infinite if our log-probability is 0, and masks it later.
    """
    inputs = batch()
    inputs["completion_ids"] %= V - 1
    inputs["completion_ids"][0, 2] = V - 1
    inputs["tool_mask"] = (inputs["completion_ids"] != V - 1).long()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    found = []
    for trainer_class in (trl.GRPOTrainer, FusedGRPOTrainer):
        trainer = new_trainer(trainer_class, folders("bias"), tmp_path, beta=0.04)
        with torch.no_grad():
            trainer.model.lm_head.bias[V - 1] = -200
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), T
            )
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            inputs[name][0, 2] = logps[0, 2]
        found.append((loss_and_gradients(trainer, inputs), dict(trainer._metrics["train"])))
    (wanted, wanted_metrics), (got, got_metrics) = found
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert got_metrics == {name: pytest.approx(values, rel=1e-5) for name, values in wanted_metrics.items()}
