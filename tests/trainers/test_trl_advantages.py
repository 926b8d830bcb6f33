"""`group_advantages` equals the advantages that TRL's trainers compute for the same rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import COMMON, TRAINER_MARKS, Folders, assert_close

from grpo_kernels import group_advantages

pytest.importorskip("trl", minversion="1.16")

import trl
from datasets import Dataset

pytestmark = TRAINER_MARKS

# Two groups of four completions and one with equal rewards; two reward functions.
SIZE = 4
REWARDS = torch.tensor(
    [[1.0, 0], [0, 0], [1, 1], [0.5, 0], [2, 1], [0, 1], [3, 0], [1, 0.25], [1, 1], [1, 1], [1, 1], [1, 1]]
)
WEIGHTS = [0.5, 2.0]
SUMMED = (REWARDS * torch.tensor(WEIGHTS)).sum(1)


def theirs(trainer_class: Any, model: str, folder: Path, **config: Any) -> Tensor:
    """Return TRL's advantages of completions that its trainer samples and that have `REWARDS`."""

    def column(k: int) -> Any:
        def reward(completions: list[str], **_: Any) -> list[float]:
            assert len(completions) == len(REWARDS)
            return REWARDS[:, k].tolist()

        reward.__name__ = f"reward_{k}"
        return reward

    config_class = trl.GRPOConfig if trainer_class is trl.GRPOTrainer else trl.RLOOConfig
    args = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=len(REWARDS),
        num_generations=SIZE,
        max_completion_length=3,
        reward_weights=WEIGHTS,
        beta=0.0,  # RLOOTrainer would subtract a KL from the rewards
        **{key: COMMON[key] for key in ("use_cpu", "bf16", "gradient_checkpointing", "report_to")},
        **config,
    )
    prompts = [{"prompt": "1 2"}] * len(REWARDS)
    trainer = trainer_class(
        model, args=args, reward_funcs=[column(0), column(1)], train_dataset=Dataset.from_list(prompts)
    )
    trainer.model.train()
    return trainer._generate_and_score_completions(prompts)["advantages"]


CASES = {
    'scale_rewards="group"': ("GRPOTrainer", {"scale_rewards": "group"}, {}),
    'scale_rewards="batch"': ("GRPOTrainer", {"scale_rewards": "batch"}, {"scale": "batch"}),
    'scale_rewards="none"': ("GRPOTrainer", {"scale_rewards": "none"}, {"scale": "none"}),
    "normalize_then_sum": (
        "GRPOTrainer",
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"estimator": "gdpo", "reward_weights": WEIGHTS},
    ),
    "RLOO": ("RLOOTrainer", {}, {"scale": "none", "leave_one_out": True}),
    "RLOO, normalize_advantages": (
        "RLOOTrainer",
        {"normalize_advantages": True},
        {"estimator": "reinforce_plus_plus_baseline", "leave_one_out": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_advantages(name: str, folders: Folders, tmp_path: Path) -> None:
    """TRL computes in fp32."""
    trainer, config, options = CASES[name]
    want = theirs(getattr(trl, trainer), folders("llama"), tmp_path, **config)
    got = group_advantages(
        REWARDS if options.get("estimator") == "gdpo" else SUMMED, group_size=SIZE, **options
    )
    assert want.abs().max() > 0.5
    assert_close(name, got, want, 2e-6)
    assert not got[-SIZE:].any()
