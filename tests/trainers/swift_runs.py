"""Runs of ms-swift's own trainers on tiny models, with and without our plugin.

A run is `SwiftRLHF(arguments).main()`, which the command `swift rlhf` calls. Only the dataset is replaced:
its rows are made here. Completions come from the model itself, without vLLM.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import SIZES
from torch import Tensor

pytest.importorskip("swift.rlhf_trainers")

import transformers
from datasets import Dataset
from swift import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rewards import orms

SYMBOLS = ["<pad>", "<eos>", *"a0123456789+="]  # ms-swift encodes an "a" to see what a tokenizer adds
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
}
TINY = {**SIZES, "vocab_size": len(SYMBOLS), "tie_word_embeddings": False}
COMMON = {
    "template": "dummy",
    "use_chat_template": False,
    "truncation_strategy": "left",
    "dataset": ["rows"],
    "split_dataset_ratio": 0,
    "lazy_tokenize": True,
    "dataloader_num_workers": 0,
    "tuner_type": "full",
    "torch_dtype": "float32",
    "bf16": False,
    "fp16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": [],
    "check_model": False,  # it asks a hub whether the model is the newest
    "disable_tqdm": True,
    "seed": 3,
}
# Each generation serves two steps. In the second, the ratios are not 1.
GRPO = {
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 6,
    "epsilon": 0.1,
    "beta": 0.0,
    "reward_funcs": ["grpo_kernels_test"],
}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Return a random reward of 0 or 1, which depends only on the completion."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


orms["grpo_kernels_test"] = lambda args: reward


def rows(kind: str) -> list[dict[str, Any]]:
    """Sums, with answers unless they are for GRPO."""
    found: list[dict[str, Any]] = []
    for i in range(16):
        row: dict[str, Any] = {"messages": [{"role": "user", "content": f"{i}+{i + 1}="}]}
        if kind != "grpo":
            row["messages"].append({"role": "assistant", "content": str(2 * i + 1)})
            row |= {"label": i % 2 == 0} if kind == "kto" else {"rejected_response": str(7 * i + 100)}
        found.append(row)
    return found


def save_model(name: str, path: Path) -> None:
    """Save a model of `MODELS` and a tokenizer with one token per character."""
    from tokenizers import Tokenizer, models

    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)


class Run(NamedTuple):
    """The logs of a finished run, and its parameters at the end."""

    logs: list[dict[str, Any]]
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        return torch.tensor([log[key] for log in self.logs if key in log], dtype=torch.float64)


def train(kind: str, folder: Path, *, model: str = "qwen2", plugin: str = "", **options: Any) -> Run:
    """Train with ms-swift, after the lines of a plugin.

    Args:
        kind: "grpo", "dpo", "cpo", "orpo" or "kto".
        folder: an empty folder.
        model: a name in `MODELS`.
        plugin: the contents of a file for `--external_plugins`.
        options: arguments of `swift rlhf`. `rows` replaces the dataset's rows.
    """
    torch.set_num_threads(1)
    save_model(model, folder / "model")
    (folder / "plugin.py").write_text(plugin)
    data = Dataset.from_list(options.pop("rows", rows(kind)))
    arguments = RLHFArguments(
        rlhf_type=kind,
        model=str(folder / "model"),
        model_type="gemma2" if model == "gemma2" else "qwen2",
        output_dir=str(folder / "output"),
        external_plugins=[str(folder / "plugin.py")],
        **{**COMMON, **(GRPO if kind == "grpo" else {}), **options},
    )
    evaluated = data.select(range(4)) if arguments.val_dataset else None
    arguments.load_dataset = lambda: (data, evaluated)  # type: ignore[method-assign]
    pipeline = SwiftRLHF(arguments)
    logs = pipeline.main()["log_history"]
    return Run(logs, {name: p.detach().clone() for name, p in pipeline.model.named_parameters()})
