"""Terms that subclasses add to the loss, and other classes in the method resolution order."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import (
    TRAINER_MARKS,
    Folders,
    LogRatioTrainer,
    T,
    assert_close,
    assert_same_gradients,
    batch,
    loss_and_gradients,
    messages,
    new_trainer,
)

pytest.importorskip("trl", minversion="1.16")

import trl

from grpo_kernels.integrations.trl import FusedGRPOTrainer

pytestmark = TRAINER_MARKS


class KeepsScores:
    """Adds a term that is computed from the scores of the loss: log-probabilities (0) or entropies (1)."""

    which = 0

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        return self.scores

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return loss + 0.1 * self.scores[self.which].square().mean()


class ScoresAgain:
    """Adds the same term, computed from another call."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        ids, mask = (
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, T)  # type: ignore[attr-defined]
        return loss + 0.1 * logps.square().mean()


@pytest.mark.parametrize("old", [True, False], ids=["old", "on-policy"])
@pytest.mark.parametrize("which", [0, 1], ids=["logps", "entropy"])
def test_term_from_the_scores_of_our_loss(which: int, old: bool, folders: Folders, tmp_path: Path) -> None:
    """A term that is computed from the scores of our loss raises in its backward.

    Its gradient would end at the scores, and the term would be lost without a message.
    """
    cls = type("Keeps", (KeepsScores, FusedGRPOTrainer), {"which": which})
    trainer = new_trainer(cls, folders("llama"), tmp_path)
    inputs = batch()
    if not old:
        del inputs["old_per_token_logps"]
    for _ in range(10):  # also after the steps whose gradients are compared
        loss = trainer._compute_loss(trainer.model, inputs)
        with pytest.raises(RuntimeError, match=r"does not reach the model.*another call"):
            loss.backward()
    # If the loss is TRL's, the term has its gradient.
    loss_and_gradients(new_trainer(cls, folders("llama"), tmp_path, top_entropy_quantile=0.5), inputs)


def test_term_from_another_call(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A term that is computed from another call has its gradient, as the error message advises."""
    got, wanted = (
        loss_and_gradients(new_trainer(type("A", (mixin, parent), {}), folders("llama"), tmp_path), batch())
        for mixin, parent in ((ScoresAgain, FusedGRPOTrainer), (KeepsScores, trl.GRPOTrainer))
    )
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert messages(caplog, logging.WARNING) == []


class SmallTerm(trl.GRPOTrainer):
    """Adds a term that is too small to compare, and that does not depend on log-probabilities."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        norm = sum(p.square().sum() for p in model.parameters())
        return super()._compute_loss(model, inputs) + 1e-6 * norm


def test_another_class_adds_to_the_loss(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A class that adds to the loss keeps its term before or after ours. A custom spec is refused."""
    wanted = loss_and_gradients(new_trainer(SmallTerm, folders("llama"), tmp_path), batch())
    without = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), batch())
    with pytest.raises(AssertionError):
        assert_same_gradients(wanted[1], without[1])

    below = type("Below", (SmallTerm, FusedGRPOTrainer), {})
    above = type("Above", (FusedGRPOTrainer, SmallTerm), {})
    for cls, warnings in ((below, 0), (above, 1)):
        caplog.clear()
        got = loss_and_gradients(new_trainer(cls, folders("llama"), tmp_path), batch())
        assert_close("loss", got[0], wanted[0], 1e-6)
        assert_same_gradients(got[1], wanted[1])
        found = messages(caplog, logging.WARNING)
        assert len(found) == warnings and all("SmallTerm._compute_loss" in text for text in found)
    with pytest.raises(ValueError, match=r"SmallTerm\._compute_loss"):
        new_trainer(type("Own", (LogRatioTrainer, SmallTerm), {}), folders("llama"), tmp_path, beta=0.04)


def test_class_that_trl_does_not_reach(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A class after GRPOTrainer adds nothing, as in TRL, whose method does not call `super()`."""
    behind = type("Behind", (), {"_compute_loss": None})
    new_trainer(type("Fused", (FusedGRPOTrainer, behind), {}), folders("llama"), tmp_path)
    assert messages(caplog, logging.WARNING) == []


def test_compute_loss_around_ours(folders: Folders, tmp_path: Path) -> None:
    """Overrides of methods that call `_compute_loss` keep working in every class."""

    class Doubled(trl.GRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().compute_loss(*args, **kwargs)

    trainer = new_trainer(type("Fused", (FusedGRPOTrainer, Doubled), {}), folders("llama"), tmp_path)
    stock = new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path)
    wanted = 2 * stock.compute_loss(stock.model, batch())
    assert_close("loss", trainer.compute_loss(trainer.model, batch()), wanted, 1e-6)


def test_other_weights_of_vespo(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If `get_gamma_weights` is overridden, the loss is TRL's."""

    class Weights:
        @staticmethod
        def get_gamma_weights(*args: Any, **kwargs: Any) -> Tensor:
            return trl.GRPOTrainer.get_gamma_weights(*args, **kwargs) * 1.0001

    got, wanted = (
        loss_and_gradients(
            new_trainer(type("W", (Weights, c), {}), folders("llama"), tmp_path, loss_type="vespo"), batch()
        )
        for c in (FusedGRPOTrainer, trl.GRPOTrainer)
    )
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert any("because get_gamma_weights is overridden" in text for text in messages(caplog, logging.INFO))
