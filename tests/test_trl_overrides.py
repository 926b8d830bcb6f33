# ruff: noqa: F811 - fixtures are imported
"""Subclasses and mixins that override methods of TRL's trainer get our loss or TRL's, and no other one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trl_trainers import (
    KL,
    B,
    LogRatioTrainer,
    T,
    V,
    assert_close,
    assert_same_gradients,
    assert_same_runs,
    batch,
    folders,  # noqa: F401
    grpo,
    loss_and_gradients,
    messages,
    new_trainer,
    one_message_per_test,  # noqa: F401
    sharded,  # noqa: F401
)
from torch import Tensor, nn

trl = pytest.importorskip("trl", minversion="1.16")


from grpo_kernels.integrations.trl import FusedGRPOTrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
]

Folders = Callable[[str], str]


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
    """Arguments of the model by position."""

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
    """Returns other log-probabilities than those of our loss."""

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
    """A micro-batch that is computed again updates TRL's entropy controller once, and is logged once."""
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
    """The log-probabilities are TRL's, too, because the backward of ours would find the head sharded."""
    trainer = new_trainer(type("Z", (OneByOne, FusedGRPOTrainer), {}), folders("llama"), tmp_path)
    for step in (1, 2):
        trainer._compute_loss(trainer.model, batch()).backward()
        assert sharded == [True] * B * step
    (warning,) = messages(caplog, logging.WARNING)
    assert "the model was called 4 times for one loss" in warning


@pytest.mark.parametrize("flags, again", [((False, True), False), ((True, False), True)])
def test_another_rank_calls_the_model_otherwise(
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
            # Passes of other models, or without gradients, are not part of the loss.
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
    """TRL's loss would not be the loss of `loss_spec()`."""
    mixin, why = OVERRIDES[name]
    trainer = new_trainer(type("Own", (mixin, LogRatioTrainer), {}), folders("llama"), tmp_path, beta=0.04)
    with pytest.raises(ValueError, match=why.replace("8", str(B)) + ".*TRL's loss cannot replace it"):
        trainer._compute_loss(trainer.model, batch())


@pytest.mark.parametrize("rows", [B // 2, 2 * B])
def test_wrapper_splits_the_batch(rows: int, folders: Folders, tmp_path: Path) -> None:
    """The trainer does not see a split inside the model. With these long prompts the shapes would fit."""
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
    """torch.compile traces the forward, which counts its calls."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), batch())
    compiled = torch.compile(trainer.model, backend="eager")
    for _ in range(2):
        got = loss_and_gradients(trainer, batch(), compiled)
        assert_close("loss", got[0], wanted[0], 1e-6)
        assert_same_gradients(got[1], wanted[1])
    assert messages(caplog, logging.WARNING) == []


# --- Terms of one's own -------------------------------------------------------------------------------------


class KeepsScores:
    """A term of what the scores of the loss were: log-probabilities (0) or entropies (1)."""

    which = 0

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        return self.scores

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return loss + 0.1 * self.scores[self.which].square().mean()


class ScoresAgain:
    """The same term, of another call."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        ids, mask = (
            torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
        )
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, T)  # type: ignore[attr-defined]
        return loss + 0.1 * logps.square().mean()


@pytest.mark.parametrize("old", [True, False], ids=["old", "on-policy"])
@pytest.mark.parametrize("which", [0, 1], ids=["logps", "entropy"])
def test_term_of_the_scores_of_our_loss(which: int, old: bool, folders: Folders, tmp_path: Path) -> None:
    """Its gradient would end at the scores, and the term would be lost without a word."""
    cls = type("Keeps", (KeepsScores, FusedGRPOTrainer), {"which": which})
    trainer = new_trainer(cls, folders("llama"), tmp_path)
    inputs = batch()
    if not old:
        del inputs["old_per_token_logps"]
    for _ in range(10):  # after those whose gradients are compared, too
        loss = trainer._compute_loss(trainer.model, inputs)
        with pytest.raises(RuntimeError, match=r"does not reach the model.*another call"):
            loss.backward()
    # Where the loss is TRL's, the term has its gradient.
    loss_and_gradients(new_trainer(cls, folders("llama"), tmp_path, top_entropy_quantile=0.5), inputs)


def test_term_of_other_scores(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the message advises."""
    got, wanted = (
        loss_and_gradients(new_trainer(type("A", (mixin, parent), {}), folders("llama"), tmp_path), batch())
        for mixin, parent in ((ScoresAgain, FusedGRPOTrainer), (KeepsScores, trl.GRPOTrainer))
    )
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert messages(caplog, logging.WARNING) == []


# --- Other classes in the method resolution order -----------------------------------------------------------


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
    """TRL's method does not call `super()`, so a class after GRPOTrainer adds nothing, as in TRL."""
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
