"""Fixtures of the tests with TRL: model folders, a stock trainer, watched functions of TRL.

The imports of TRL are inside the fixtures, so that the tests are skipped if TRL is missing.
"""

from __future__ import annotations

import logging
import os

# Nothing is downloaded. The Hub's client reads this when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function from a name in `trl_runs.MODELS` to the folder of that model."""
    from trl_runs import save_model

    def folder(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / name
        if not path.exists():
            save_model(name, path)
        return str(path)

    return folder


@pytest.fixture
def one_message_per_test(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Start as in a new process: no message has been logged, and TRL is unchanged."""
    from trl.trainer import utils

    from grpo_kernels import log
    from grpo_kernels.integrations.trl import head as trl_head

    log.log_once.cache_clear()
    log.warn_once.cache_clear()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", trl_head.ChunkedLogProbFunction)
    caplog.set_level(logging.INFO, logger="grpo_kernels")


class Forbidden:
    """Raises if it is called in place of TRL's own log-probabilities."""

    @staticmethod
    def apply(*_: Any) -> None:
        raise AssertionError("TRL's own log-probabilities were called")


@pytest.fixture
def no_stock_head(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function. After it is called, TRL's own log-probabilities raise."""
    from trl.trainer import utils

    from grpo_kernels.integrations.trl import head as trl_head

    def forbid() -> None:
        if utils._ChunkedLogProbFunction is trl_head.ChunkedLogProbFunction:
            monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Forbidden)
        monkeypatch.setattr(trl_head, "ChunkedLogProbFunction", Forbidden)

    return forbid


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pretend that DeepSpeed ZeRO-3 is on.

    The list has one entry per call of TRL's own log-probabilities: whether gradients were enabled.
    """
    from trl.trainer import utils

    from grpo_kernels.integrations.trl import head as trl_head
    from grpo_kernels.integrations.trl import trainer as fused_trl

    for module in (trl_head, fused_trl):
        monkeypatch.setattr(module, "zero3_enabled", lambda: True)
    called = []
    stock = trl_head.ChunkedLogProbFunction

    class Spy:
        @staticmethod
        def apply(*args: Any) -> Any:
            called.append(torch.is_grad_enabled())
            return stock.apply(*args)

    monkeypatch.setattr(trl_head, "ChunkedLogProbFunction", Spy)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    return called


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stock GRPOTrainer of a one-layer Llama and a tokenizer of digits, loaded from a folder.

    Its tests change its settings, so each module has its own.
    """
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl_losses import MAX_COMPLETION, TEMPERATURE, P, T, V

    folder = tmp_path_factory.mktemp("trl")
    tokens = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(V - 2))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=P + T,
        initializer_range=0.5,  # distributions that are far from uniform
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    args = trl.GRPOConfig(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=MAX_COMPLETION,
        temperature=TEMPERATURE,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    return trl.GRPOTrainer(
        str(folder / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1 2"}] * 2),
    )
