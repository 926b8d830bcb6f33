"""Subclasses and mixins that override TRL's scoring get our loss or TRL's, and no other one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl_runs import (
    KL,
    TRAINER_MARKS,
    B,
    Folders,
    LogRatioTrainer,
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

from grpo_kernels.integrations.trl import FusedGRPOTrainer

pytestmark = TRAINER_MARKS


class OneByOne:
    """Calls the model several times per loss."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **{**kwargs, "batch_size": 1})  # type: ignore


class InHalves:
    """Calls the method several times per loss."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, **kwargs: Any
    ) -> Any:
        score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        pairs = zip(input_ids.chunk(2), attention_mask.chunk(2), strict=True)
        parts = [score(model, ids, mask, keep, **kwargs) for ids, mask in pairs]
        logps, entropies, _ = zip(*parts, strict=True)
        return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies), None


class FromLogits:
    """Makes no call that could compute a loss."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, **_: Any
    ) -> Any:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -keep - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)  # type: ignore[attr-defined]
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[:, -keep:, None]).squeeze(-1), entropy, None


class FromLogitsByPosition:
    """Passes the arguments of the model by position."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, **_: Any
    ) -> Any:
        logits = model(input_ids, attention_mask).logits[:, -keep - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)  # type: ignore[attr-defined]
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, input_ids[:, -keep:, None]).squeeze(-1), entropy, None


class Twice:
    """Averages two passes, as with dropout."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        (a, entropy, aux), (b, _, _) = score(*args, **kwargs), score(*args, **kwargs)
        return (a + 3 * b) / 4, entropy, aux


class Sorted:
    """Scores the same sequences in another order."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, **kwargs: Any
    ) -> Any:
        order = attention_mask.sum(1).argsort(stable=True).flip(0).roll(1)
        back = order.argsort()
        logps, entropy, aux = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
            model, input_ids[order], attention_mask[order], keep, **kwargs
        )
        return logps[back], None if entropy is None else entropy[back], aux


class Rescaled:
    """Returns log-probabilities that differ from those of our loss."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        logps, entropy, aux = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        return 0.5 * logps, entropy, aux


class ThroughAFunction:
    """Passes a function in place of the model."""

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        def call(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
            return model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True
            )

        return super()._get_per_token_logps_and_entropies(call, *args, **kwargs)  # type: ignore[misc]


OVERRIDES = {
    "one by one": (OneByOne, "the model was called 8 times for one loss"),
    "in halves": (InHalves, "the model was called 2 times for one loss"),
    "from logits": (FromLogits, "the model was not called with the loss"),
    "by position": (FromLogitsByPosition, "the model was not called with the loss"),
    "twice": (Twice, "the model was called 2 times for one loss"),
    "sorted": (Sorted, "the model was called with other tokens"),
    "through a function": (ThroughAFunction, "the model was not called with the loss"),
    "rescaled": (Rescaled, "our loss is"),
}


@pytest.mark.parametrize("place", ["below", pytest.param("above", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", OVERRIDES)
def test_scores_overridden(
    name: str,
    place: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning says why, and the run equals TRL's with the same override."""
    mixin, why = OVERRIDES[name]
    stock = type("Stock", (mixin, trl.GRPOTrainer), {})
    if place == "below":
        fused = type("Fused", (mixin, FusedGRPOTrainer), {})
    else:  # between FusedGRPOTrainer and GRPOTrainer
        fused = type("Fused", (FusedGRPOTrainer, stock), {})
    config = {
        "loss_type": "grpo",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 3,
        **KL,
    }
    wanted = grpo(stock, folders("llama"), tmp_path, **config)
    got = grpo(fused, folders("llama"), tmp_path, **config)
    found = messages(caplog, logging.WARNING)
    if (name, place) == ("through a function", "above"):
        assert found == []  # our method is called with the function, which passes the loss on
    else:
        (warning,) = found
        assert why in warning
    if found and name != "rescaled":
        assert f"{mixin.__name__}._get_per_token_logps_and_entropies" in warning
    assert_same_runs(got, wanted)


def test_controller_moves_once(folders: Folders, tmp_path: Path) -> None:
    """A micro-batch that is computed twice updates TRL's entropy controller once and is logged once."""
    config = {"entropy_coef": 0.05, "use_adaptive_entropy": True, "entropy_target": 2.9}
    found = []
    for parent in (trl.GRPOTrainer, FusedGRPOTrainer):
        trainer = new_trainer(type("Mean", (Twice, parent), {}), folders("llama"), tmp_path, **config)
        trainer._compute_loss(trainer.model, batch())
        found.append((trainer.entropy_coef, dict(trainer._metrics["train"])))
    (wanted_coef, wanted), (coef, got) = found
    assert coef == wanted_coef
    assert got == {name: pytest.approx(values, rel=1e-5) for name, values in wanted.items()}


def test_scores_overridden_under_zero3(
    sharded: list[bool],
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log-probabilities are TRL's as well, because our backward would find the head sharded."""
    trainer = new_trainer(type("Z", (OneByOne, FusedGRPOTrainer), {}), folders("llama"), tmp_path)
    for step in (1, 2):
        trainer._compute_loss(trainer.model, batch()).backward()
        assert sharded == [True] * B * step
    (warning,) = messages(caplog, logging.WARNING)
    assert "the model was called 4 times for one loss" in warning


@pytest.mark.parametrize("flags, again", [((False, True), False), ((True, False), True)])
def test_another_rank_calls_the_model_differently(
    flags: tuple[bool, bool],
    again: bool,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks switch to TRL's loss, and all or none compute a micro-batch again."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)

    def gather(self: Any, x: Tensor) -> Tensor:
        return torch.cat([x, torch.tensor([flags])]) if x.dtype == torch.bool else x

    monkeypatch.setattr(type(trainer.accelerator), "gather", gather)
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for expected in (2 if again else 1, 1):
        calls.clear()
        got = loss_and_gradients(trainer, batch())
        assert len(calls) == expected
        wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), batch())
        assert_close("loss", got[0], wanted[0], 1e-6)
        assert_same_gradients(got[1], wanted[1])
    assert len(messages(caplog, logging.WARNING)) == 1


class Logged:
    """Changes nothing, and reads attributes of the model."""

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        assert model.config.vocab_size == V
        with torch.no_grad():
            # Calls of other models and calls without gradients are not part of the loss.
            for other in (model, self.ref_model):  # type: ignore[attr-defined]
                super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                    other, *args, **{**kwargs, "compute_entropy": False}
                )
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # type: ignore[misc]


@pytest.mark.parametrize("place", ["below", "above"])
def test_harmless_override_stays_fused(
    place: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An override that only reads keeps the fused loss, without a warning."""
    stock = type("Stock", (Logged, trl.GRPOTrainer), {})
    bases = (Logged, FusedGRPOTrainer) if place == "below" else (FusedGRPOTrainer, stock)
    trainer = new_trainer(type("Fused", bases, {}), folders("llama"), tmp_path, beta=0.04)
    got = loss_and_gradients(trainer, batch())
    wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path, beta=0.04), batch())
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert messages(caplog, logging.WARNING) == []
    assert any("in the model's forward" in text for text in messages(caplog, logging.INFO))


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name != "rescaled"])
def test_scores_overridden_with_own_spec(name: str, folders: Folders, tmp_path: Path) -> None:
    """With a custom spec, an override raises, because TRL's loss cannot replace that of the spec."""
    mixin, why = OVERRIDES[name]
    trainer = new_trainer(type("Own", (mixin, LogRatioTrainer), {}), folders("llama"), tmp_path, beta=0.04)
    with pytest.raises(ValueError, match=why.replace("8", str(B)) + ".*TRL's loss cannot replace it"):
        trainer._compute_loss(trainer.model, batch())


@pytest.mark.parametrize("rows", [B // 2, 2 * B])
def test_wrapper_splits_the_batch(rows: int, folders: Folders, tmp_path: Path) -> None:
    """A model that splits the batch inside its forward has TRL's loss.

    The trainer does not see the split. With these long prompts the shapes would fit.
    """
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    inputs = batch()
    prompts = torch.randint(2, V, (B, 3 * T), generator=torch.Generator().manual_seed(2))
    inputs |= {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts)}

    class Wrapper(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, **kwargs: Any) -> Any:
            def take(x: Any) -> Any:
                return torch.cat([x, x])[:rows] if isinstance(x, Tensor) else x

            first = self.model(**{k: take(x) for k, x in kwargs.items()})
            if rows > B:
                first.log_probs, first.entropy = first.log_probs[:B], first.entropy[:B]
                return first
            second = self.model(**{k: x[rows:] if isinstance(x, Tensor) else x for k, x in kwargs.items()})
            first.log_probs = torch.cat([first.log_probs, second.log_probs])
            first.entropy = torch.cat([first.entropy, second.entropy])
            return first

    got = loss_and_gradients(trainer, inputs, Wrapper(trainer.model))
    wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), inputs)
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])


def test_compiled_model(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model under torch.compile keeps the fused loss. Its trace counts the calls of the forward."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), batch())
    compiled = torch.compile(trainer.model, backend="eager")
    for _ in range(2):
        got = loss_and_gradients(trainer, batch(), compiled)
        assert_close("loss", got[0], wanted[0], 1e-6)
        assert_same_gradients(got[1], wanted[1])
    assert messages(caplog, logging.WARNING) == []
