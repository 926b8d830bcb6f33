"""Ten steps with our losses give the same losses, gradients, metrics and parameters as TRL's own trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import (
    KL,
    STEPS,
    TOLERANCE,
    TRAINER_MARKS,
    Folders,
    assert_same_runs,
    grpo,
    lora,
    messages,
)

pytest.importorskip("trl", minversion="1.16")

import trl
from trl.trainer import utils

from grpo_kernels.integrations.trl import FusedGRPOTrainer

pytestmark = TRAINER_MARKS


class ExtraInputs:
    """Adds to a trainer's batch what tools and vLLM would add.

    The values are random, and depend only on the completions.
    """

    extra: frozenset[str] = frozenset()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        mask = batch["completion_mask"].bool()
        generator = torch.Generator().manual_seed(int(batch["completion_ids"].sum()))

        def normal(size: tuple[int, ...]) -> Tensor:
            return torch.randn(size, generator=generator)

        if "tool_mask" in self.extra:
            batch["tool_mask"] = (torch.rand(mask.shape, generator=generator) < 0.7).long()
        if "advantages" in self.extra:
            batch["advantages"] = normal(mask.shape)
        if "sampler" in self.extra:
            ratio = torch.exp(0.5 * normal(mask.shape)).clamp(max=1.5)
            batch["importance_sampling_ratio"] = ratio.where(mask, 1)
            batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + 0.2 * normal(mask.shape)
        if "sequence sampler" in self.extra:
            batch["importance_sampling_ratio"] = torch.exp(normal((mask.shape[0], 1))).clamp(max=2)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.use_vllm = "importance_sampling_ratio" in inputs
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self.use_vllm = False


class Stock(ExtraInputs, trl.GRPOTrainer):
    pass


class Fused(ExtraInputs, FusedGRPOTrainer):
    pass


def prompt_tuning() -> Any:
    peft = pytest.importorskip("peft")
    return peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


@dataclass
class Case:
    """One comparison of two runs."""

    config: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    peft: Callable[[], Any] = lambda: None
    extra: frozenset[str] = frozenset()
    theirs: str | None = None  # why the loss is TRL's, computed from our log-probabilities
    tolerance: float = TOLERANCE
    stock: dict[str, Any] = field(default_factory=dict)  # options of the stock trainer only


def case(
    model: str = "llama",
    *,
    peft: Any = lambda: None,
    extra: str = "",
    theirs: str | None = None,
    tolerance: float = TOLERANCE,
    stock: dict[str, Any] | None = None,
    **config: Any,
) -> Case:
    """Make a `Case` from keyword arguments. `config` holds options of GRPOConfig."""
    return Case(
        config, model, peft, frozenset(filter(None, extra.split(", "))), theirs, tolerance, stock or {}
    )


# One generation serves two optimizer steps of three micro-batches each.
ACCUMULATED = {"gradient_accumulation_steps": 3, "steps_per_generation": 6, "per_device_train_batch_size": 4}
ON_POLICY = {"steps_per_generation": 1}


BONUS = {"entropy_coef": 0.05}
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 2.9, "entropy_coef_delta": 0.02, **BONUS}
CASES = {
    "grpo": case(loss_type="grpo"),
    "grpo, on-policy": case(loss_type="grpo", **ON_POLICY),
    "grpo, iterated": case(loss_type="grpo", num_iterations=2, **KL),
    "grpo, accumulated": case(loss_type="grpo", **ACCUMULATED),
    "bnpo, corrected KL": case(loss_type="bnpo", **KL),
    "dr_grpo, plain KL": case(loss_type="dr_grpo", use_bias_correction_kl=False, **KL),
    "dapo, accumulated": case(loss_type="dapo", epsilon_high=0.28, **ACCUMULATED, **KL),
    "luspo, sequence": case(loss_type="luspo", importance_sampling_level="sequence", learning_rate=0.1),
    "luspo, accumulated": case(loss_type="luspo", learning_rate=0.1, **ACCUMULATED),
    "cispo, accumulated": case(loss_type="cispo", epsilon_high=1.5, **ACCUMULATED),
    "sapo": case(loss_type="sapo", **KL),
    "vespo, accumulated": case(loss_type="vespo", **ACCUMULATED, **KL),
    "vespo, sequence": case(
        loss_type="vespo", importance_sampling_level="sequence", use_bias_correction_kl=False, **KL
    ),
    "vespo, sequence, corrected KL": case(
        loss_type="vespo", importance_sampling_level="sequence", theirs="VESPO's KL term", **KL
    ),
    "gspo": case(loss_type="grpo", importance_sampling_level="sequence", **KL),
    "delta": case(loss_type="grpo", delta=1.3),
    "masked truncated": case(loss_type="dapo", mask_truncated_completions=True),
    "evaluated": case(loss_type="grpo", eval_strategy="steps", eval_steps=4, **ACCUMULATED, **KL),
    "evaluated, bonus": case(
        loss_type="cispo", epsilon_high=1.5, eval_strategy="steps", eval_steps=4, **ACCUMULATED, **BONUS
    ),
    "checkpointed": case(loss_type="grpo", gradient_checkpointing=True),
    "bonus": case(loss_type="grpo", **ACCUMULATED, **BONUS),
    "bonus, counted": case(loss_type="dapo", **ACCUMULATED, **BONUS),
    "adaptive bonus": case(loss_type="grpo", **ACCUMULATED, **ADAPTIVE),
    "adaptive bonus, counted": case(loss_type="dapo", **ACCUMULATED, **ADAPTIVE),
    "high entropy": case(loss_type="dapo", top_entropy_quantile=0.4, theirs="top_entropy_quantile=0.4", **KL),
    "high entropy, bonus": case(
        loss_type="grpo",
        top_entropy_quantile=0.4,
        theirs="top_entropy_quantile=0.4",
        **ACCUMULATED,
        **ADAPTIVE,
    ),
    "off-policy": case(
        loss_type="grpo",
        off_policy_mask_threshold=0.02,
        theirs="off_policy_mask_threshold=0.02",
        num_iterations=2,
    ),
    "tied": case("tied", loss_type="grpo", **KL),
    "bias": case("bias", loss_type="grpo", **KL),
    "scale": case("scale", loss_type="dapo", **KL),
    "softcap": case("softcap", loss_type="dapo", **KL),
    "experts": case("experts", loss_type="grpo", **ACCUMULATED),
    # The threshold is an entropy of the batch. Sooner or later two entropies differ by one rounding only, and
    # the runs train on different tokens.
    "experts, high entropy": case(
        "experts",
        loss_type="grpo",
        max_steps=6,
        top_entropy_quantile=0.4,
        theirs="top_entropy_quantile=0.4",
        **ACCUMULATED,
    ),
    # A bf16 number that rounds the other way moves by 2^-8, and all later steps follow it.
    "head in fp32": case(
        loss_type="grpo",
        cast_lm_head_to_fp32=True,
        model_init_kwargs={"dtype": "bfloat16"},
        max_steps=4,
        tolerance=0.01,
        **KL,
    ),
    # Our logits are fp32 under autocast. TRL rounds them to bf16, unless `cast_lm_head_to_fp32` is set. A
    # difference of one rounding to bf16 grows with every step, so there are two.
    "autocast": case(
        loss_type="dapo",
        bf16=True,
        max_steps=2,
        tolerance=0.01,
        stock={"cast_lm_head_to_fp32": True},
        **KL,
    ),
    "lora": case(peft=lora, loss_type="grpo", learning_rate=2.0, **KL),
    "lora, high entropy": case(
        peft=lora,
        loss_type="grpo",
        learning_rate=2.0,
        top_entropy_quantile=0.4,
        theirs="top_entropy_quantile=0.4",
    ),
    "lora, saved head": case(peft=lambda: lora(modules_to_save=["lm_head"]), loss_type="grpo", **KL),
    "prompt tuning": case(peft=prompt_tuning, loss_type="grpo"),
    "tools": case(extra="tool_mask", loss_type="grpo", **KL),
    "tools, bonus": case(extra="tool_mask", loss_type="dapo", **ACCUMULATED, **BONUS),
    "advantages per token": case(extra="advantages", loss_type="bnpo"),
    "sampler": case(extra="sampler, tool_mask", loss_type="dapo", **KL),
    "sampler, vespo": case(extra="sampler", loss_type="vespo"),
    "sampler, sequence": case(
        extra="sequence sampler", loss_type="grpo", importance_sampling_level="sequence"
    ),
    "sampler, all masks": case(
        extra="sampler, tool_mask",
        loss_type="vespo",
        off_policy_mask_threshold=0.02,
        top_entropy_quantile=0.6,
        theirs="top_entropy_quantile=0.6",
    ),
}
# `make test` covers the options of these in other cases, or with one micro-batch in test_trl_losses.py.
LONG = {
    "grpo",
    "grpo, accumulated",
    "grpo, on-policy",
    "dapo, accumulated",
    "vespo, accumulated",
    "luspo, accumulated",
    "luspo, sequence",
    "vespo, sequence",
    "vespo, sequence, corrected KL",
    "evaluated",
    "evaluated, bonus",
    "bonus",
    "bonus, counted",
    "adaptive bonus",
    "adaptive bonus, counted",
    "high entropy",
    "high entropy, bonus",
    "experts",
    "experts, high entropy",
    "lora, high entropy",
    "lora, saved head",
    "tools",
    "tools, bonus",
    "sampler, vespo",
    "sampler, all masks",
    "dr_grpo, plain KL",
    "sapo",
    "gspo",
    "delta",
    "masked truncated",
    "tied",
    "checkpointed",
    "prompt tuning",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in CASES]
)
def test_same_run(
    name: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_stock_head: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run with our loss equals TRL's, and the log names the reason if the loss is TRL's."""
    chosen = CASES[name]
    for trainer_class in (Stock, Fused):
        monkeypatch.setattr(trainer_class, "extra", chosen.extra)
    folder = folders(chosen.model)
    wanted = grpo(Stock, folder, tmp_path, peft_config=chosen.peft(), **chosen.config, **chosen.stock)
    no_stock_head()
    got = grpo(Fused, folder, tmp_path, peft_config=chosen.peft(), **chosen.config)
    assert_same_runs(got, wanted, chosen.tolerance)
    assert messages(caplog, logging.WARNING) == []
    paths = [text for text in messages(caplog, logging.INFO) if text.startswith("FusedGRPOTrainer")]
    assert len(paths) == 1
    assert (f"because {chosen.theirs}" if chosen.theirs else "in the model's forward") in paths[0]


def test_runs_are_worth_comparing(folders: Folders, tmp_path: Path) -> None:
    """A run has clipped tokens, groups without advantage, and completions of several lengths."""
    run = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, loss_type="grpo")
    assert len(run.logs) == STEPS + 1  # and the summary at the end
    without_advantage = run.column("frac_reward_zero_std")
    assert 0 < without_advantage.max() < 1
    assert run.column("clip_ratio/low_mean").max() > 0.02 < run.column("clip_ratio/high_mean").max()
    assert run.column("completions/min_length").min() < run.column("completions/max_length").max()
    assert run.column("loss").abs().max() > 0.05 < run.column("grad_norm").min()


def test_rows_of_labelled_tokens(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_stock_head: Callable[[], None],
) -> None:
    """If Triton is available, TRL passes only the rows of labelled tokens to the head, and the runs agree.

    Some sequences have no such rows. At the end, neither do whole batches.
    """
    config = {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 3, **KL}
    wanted = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, **config)
    assert wanted.column("completions/clipped_ratio").max() > 0.8
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    no_stock_head()
    assert_same_runs(grpo(FusedGRPOTrainer, folders("llama"), tmp_path, **config), wanted)
