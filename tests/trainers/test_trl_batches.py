"""FusedGRPOTrainer on one batch: images, options, adapters, two ranks, a loss that TRL does not have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import run_workers, session_folder
from trl_runs import (
    TINY,
    TRAINER_MARKS,
    B,
    Folders,
    LogRatioTrainer,
    T,
    V,
    assert_close,
    assert_same_gradients,
    batch,
    grpo,
    lora,
    loss_and_gradients,
    messages,
    new_trainer,
    step_and_score,
)

import grpo_kernels
from grpo_kernels import grpo_loss

pytest.importorskip("trl", minversion="1.16")

import transformers
import trl
from distributed import trl_trainer

from grpo_kernels.integrations.trl import FusedGRPOTrainer, forward_loss
from grpo_kernels.integrations.trl import head as trl_head
from grpo_kernels.logps import linear_token_stats

pytestmark = TRAINER_MARKS


def test_images(tmp_path: Path, folders: Folders) -> None:
    """Images in the batch reach a vision-language model."""
    text = transformers.LlamaConfig(**TINY)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **vision),
        text_config=text,
        image_token_index=V - 1,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("llama"))
    found = []
    for trainer_class in (trl.GRPOTrainer, FusedGRPOTrainer):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
        trainer = new_trainer(
            lambda *a, c=trainer_class, **k: c(*a, processing_class=tokenizer, **k), model, tmp_path
        )
        inputs = batch()
        inputs["completion_ids"] %= V - 1
        inputs["prompt_ids"] = torch.full((B, 5), V - 1).index_fill(1, torch.tensor([4]), 3)
        inputs["prompt_mask"] = torch.ones(B, 5, dtype=torch.long)
        inputs["num_images"] = [1] * B
        inputs["pixel_values"] = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        found.append(loss_and_gradients(trainer, inputs))
    (wanted, wanted_grads), (got, got_grads) = found
    assert any("vision" in name and grad.abs().max() > 0 for name, grad in wanted_grads.items())
    assert_close("loss", got, wanted, 1e-6)
    assert_same_gradients(got_grads, wanted_grads)


@pytest.mark.parametrize("options", [{"chunk_tokens": 3}, {"compact": False}])
def test_loss_options(
    options: dict[str, Any], tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`loss_options` reach `linear_grpo_loss` and the log-probabilities."""
    monkeypatch.setattr(FusedGRPOTrainer, "loss_options", options)
    seen = {}

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return grpo_kernels.linear_grpo_loss(*args, **kwargs)

    scored: list[dict[str, Any]] = []

    def spy_of_logps(*args: Any, **kwargs: Any) -> Any:
        scored.append(kwargs)
        return linear_token_stats(*args, **kwargs)

    monkeypatch.setattr(forward_loss, "linear_grpo_loss", spy)
    monkeypatch.setattr(trl_head, "linear_token_stats", spy_of_logps)
    wanted = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), batch())
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    got = loss_and_gradients(trainer, batch())
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert options.items() <= seen.items()
    step_and_score(trainer)
    assert scored and all(options.items() <= kwargs.items() for kwargs in scored)


@pytest.mark.parametrize("option", ["skip_inactive", "spec"])
def test_other_options_are_refused(
    option: str, tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that would change the result are refused.

    `skip_inactive` leaves out rows that TRL's metrics need.
    """
    monkeypatch.setattr(FusedGRPOTrainer, "loss_options", {option: True})
    with pytest.raises(ValueError, match=rf"loss_options takes .*, got \['{option}'\]"):
        new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)


def test_constructor_has_the_signature_of_trl() -> None:
    """The constructor has the signature of TRL's."""
    import inspect

    assert inspect.signature(FusedGRPOTrainer) == inspect.signature(trl.GRPOTrainer)


def test_adapter_on_the_head(folders: Folders, tmp_path: Path) -> None:
    """TRL refuses an adapter on the head, and so does our trainer, because no fused loss would apply it."""
    config = lora()
    config.target_modules = {"q_proj", "lm_head"}
    for trainer_class in (trl.GRPOTrainer, FusedGRPOTrainer):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            grpo(trainer_class, folders("llama"), tmp_path, peft_config=config)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_workers(Path(trl_trainer.__file__), 2, session_folder(tmp_path_factory))


@pytest.mark.long
@pytest.mark.parametrize("name", trl_trainer.cases)
def test_two_ranks(outcomes: dict[str, str], name: str) -> None:
    """The cases of trl_trainer.py pass on two ranks."""
    assert outcomes[name] == "ok", outcomes[name]


def test_own_spec(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loss of a custom spec equals `grpo_loss` of the model's logits.

    TRL's metrics stay. Ours are added under a prefix.
    """
    config = {"beta": 0.04, "loss_type": "bnpo", "temperature": 0.8}
    trainer = new_trainer(LogRatioTrainer, folders("llama"), tmp_path, **config)
    inputs = batch()
    trainer.current_gradient_accumulation_steps = 2
    got, got_grads = loss_and_gradients(trainer, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attended).logits[:, -T - 1 : -1]
    out = grpo_loss(
        logits,
        inputs["completion_ids"],
        inputs["advantages"],
        spec="log_ratio",
        completion_mask=inputs["completion_mask"],
        ref_logps=inputs["ref_per_token_logps"],
        temperature=0.8,
    )
    trainer.model.zero_grad()
    (out.loss / 2).backward()
    assert_close("loss", got, out.loss.detach() / 2, 1e-6)
    assert_same_gradients(got_grads, {n: p.grad for n, p in trainer.model.named_parameters()})
    metrics = trainer._metrics["train"]
    assert metrics["grpo_kernels/log_ratio"] == [pytest.approx(float(out.metrics["log_ratio"]), rel=1e-5)]
    assert {"entropy", "kl", "clip_ratio/low_mean"} <= metrics.keys()
    assert messages(caplog, logging.WARNING) == []


def test_own_spec_divides_by_all_micro_batches(folders: Folders, tmp_path: Path) -> None:
    """With TRL's `dapo`, a custom token mean divides by the tokens of all micro-batches."""
    inputs = {**batch(), "num_items_in_batch": torch.tensor(52)}
    losses = {}
    for loss_type in ("bnpo", "dapo"):
        trainer = new_trainer(LogRatioTrainer, folders("llama"), tmp_path, beta=0.04, loss_type=loss_type)
        losses[loss_type] = trainer._compute_loss(trainer.model, inputs).detach()
    tokens = int(inputs["completion_mask"].sum())
    assert_close("loss", losses["dapo"], losses["bnpo"] * tokens / 52, 1e-6)
