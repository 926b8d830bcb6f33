"""The examples in the docstrings of the integration of TRL run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from docstring_examples import run_examples
from trl_runs import PROMPTS, TRAINER_MARKS, Folders, reward

pytest.importorskip("trl", minversion="1.16")

import transformers
import trl
from datasets import Dataset
from trl.trainer import distillation_trainer

from grpo_kernels.integrations import trl as integration

pytestmark = TRAINER_MARKS


@pytest.mark.parametrize("name", integration.__all__)
def test_examples(name: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Restored after the test.
    loss = distillation_trainer._chunked_divergence_loss
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", loss)
    config: Any = trl.DistillationConfig if name == "fuse_trl_distillation" else trl.GRPOConfig
    names = {
        "model": folders("llama"),
        "teacher": transformers.AutoModelForCausalLM.from_pretrained(folders("llama")),
        "reward": reward,
        "prompts": Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        "args": config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
    }
    run_examples(getattr(integration, name), name, names)
