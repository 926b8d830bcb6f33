"""A few steps of TRL's trainer with the fused loss, on the GPU if there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

import trl
from datasets import Dataset
from datasets.table import InMemoryTable
from trl_runs import TRAINER_MARKS, save_model

from grpo_kernels.integrations.trl import FusedGRPOTrainer

pytestmark = TRAINER_MARKS


def test_three_steps(tmp_path: Path, device: str) -> None:
    """Losses are finite and parameters move, in bf16 on a GPU."""
    save_model("llama", tmp_path / "model")
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=3,
        learning_rate=0.1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        beta=0.04,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
    )
    prompts = [{"prompt": prompt} for prompt in ("3 4 5", "6 7", "8 9 10 11", "12")]
    trainer = FusedGRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=config,
        # Computing a fingerprint pickles the table, which can fail: benchmarks/training_step/trainers.py.
        train_dataset=Dataset(InMemoryTable.from_pylist(prompts), fingerprint="prompts"),
    )
    before = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    trainer.train()
    losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses) == 3 and bool(losses.isfinite().all())
    assert any(not torch.equal(x, before[name]) for name, x in trainer.model.named_parameters())
