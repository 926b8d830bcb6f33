"""The cases that are measured, each with a loss, a shape of the model and sizes; and their models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ..work.workload import SEQUENCES, Workload

WARM_UP = 2  # steps; the first one compiles, the second one is the first with optimizer state
LEARNING_RATE = 1e-6
POLICY, REFERENCE = 0, 1  # seeds
MODELS: dict[str, dict[str, int]] = {
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 521,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


@dataclass(frozen=True)
class Case:
    """A loss, a shape of the model, and the sizes of the step."""

    model: str  # a key of MODELS
    loss: str
    device: torch.device
    prompt: int  # tokens of each sequence
    completion: int
    inactive: float  # fraction of the sequences whose advantage is 0
    steps: int  # timed steps

    @property
    def work(self) -> Workload:
        sizes = MODELS[self.model]
        return Workload(
            *("linear", self.loss, SEQUENCES * self.completion, sizes["vocab_size"], sizes["hidden_size"]),
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            inactive=self.inactive,
        )


def make_model(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**MODELS[case.model], tie_word_embeddings=True)
    with torch.device(case.device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=case.work.dtype, attn_implementation="sdpa"
        )


def make_models(case: Case) -> tuple[Any, Any]:
    """The policy, and the reference if the loss has one."""
    policy = make_model(case, POLICY).train()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, make_model(case, REFERENCE).eval().requires_grad_(False) if case.work.reference else None


def hidden_of(model: Any, ids: Tensor, completion: int) -> Tensor:
    """`[B, T, H]`, the hidden states that predict the tokens of the completions."""
    return model.model(ids, use_cache=False).last_hidden_state[:, -completion - 1 : -1]
