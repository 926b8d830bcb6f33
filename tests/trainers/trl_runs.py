"""Runs of TRL's own trainers and of the same trainers with our losses, and what the tests of them share.

Both runs start from one seed. They use plain gradient descent at a high learning rate, so that a mistake in
one step shows in all later steps. Adam divides small gradients by their own size and would amplify rounding.
Rewards are random, and depend only on the completion.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import SIZES
from torch import Tensor

from grpo_kernels import LossSpec

pytest.importorskip("trl", minversion="1.16")

import transformers
import trl
from datasets import Dataset

from grpo_kernels.integrations.trl import FusedGRPOTrainer

TRAINER_MARKS = [
    pytest.mark.usefixtures("one_message_per_test"),
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
    ),
]

Folders = Callable[[str], str]  # the fixture `folders`: from a model's name to its path

V = 32
STEPS = 10
# Relative to the largest value of a run. Both sides are fp32: 1e-6 per step, and errors grow over ten steps.
TOLERANCE = 1e-4

TINY = {**SIZES, "vocab_size": V}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "scale": ("Cohere", {"logit_scale": 0.3}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "experts": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.3}),
}


def save_model(name: str, path: Path) -> None:
    """Save a model of `MODELS` and a tokenizer of numbers to a folder, as if they came from the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(V - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return the messages of this package at one level."""
    return [r.message for r in caplog.records if r.name == "grpo_kernels" and r.levelno == level]


class Run(NamedTuple):
    """A finished training run."""

    trainer: Any
    logs: list[dict[str, float]]
    before: dict[str, Tensor]  # parameters
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        """Return the values of one key. They are NaN if TRL logs None, which is its mean of no values."""
        values = [log[key] for log in self.logs if key in log]
        return torch.tensor([torch.nan if x is None else x for x in values], dtype=torch.float64)


class Logs(transformers.TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


COMMON = {
    "per_device_train_batch_size": 8,
    "learning_rate": 0.4,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_steps": STEPS,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "seed": 3,
}


def train(
    trainer_class: Any, config_class: Any, model: str, tmp_path: Path, config: dict, **rest: Any
) -> Run:
    """Train and return the logs and the parameters before and after."""
    torch.set_num_threads(1)
    recorder = Logs()
    args = config_class(output_dir=str(tmp_path), **{**COMMON, **config})
    trainer = trainer_class(model, args=args, callbacks=[recorder], **rest)
    trainer.remove_callback(transformers.PrinterCallback)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return Run(trainer, recorder.logs, before, after)


PROMPTS = ["".join(f"{(7 * i + j) % 28} " for j in range(1 + i % 4)) for i in range(64)]


def reward(completions: list[str], **_: Any) -> list[float]:
    """Return a random reward of 0 or 1 for each completion."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def grpo(trainer_class: Any, model: str, tmp_path: Path, *, peft_config: Any = None, **config: Any) -> Run:
    """Train with two steps per generation, unless `config` says otherwise.

    In the second step, the ratios are not 1.
    """
    defaults = {
        "num_generations": 4,
        "max_completion_length": 6,
        "steps_per_generation": 2,
        "beta": 0.0,
        "epsilon": 0.1,
    }
    prompts = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    return train(
        trainer_class,
        trl.GRPOConfig if trainer_class is not trl.RLOOTrainer else trl.RLOOConfig,
        model,
        tmp_path,
        {**defaults, **config},
        reward_funcs=reward,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)) if "eval_strategy" in config else None,
        peft_config=peft_config,
    )


TIMES = ("time", "runtime", "_per_second")


def assert_same_runs(got: Run, wanted: Run, tolerance: float = TOLERANCE) -> None:
    """Assert that metrics and parameters of two runs agree."""
    assert len(got.logs) == len(wanted.logs)
    for ours, theirs in zip(got.logs, wanted.logs, strict=True):
        assert ours.keys() == theirs.keys()
    for key in sorted({key for log in wanted.logs for key in log if not key.endswith(TIMES)}):
        theirs = wanted.column(key)
        # The terms of a loss cancel. On-policy, the loss of a group is 0.
        size = theirs.nan_to_num().abs().max().clamp(min=0.1 if "loss" in key else 0)
        assert_close(key, got.column(key), theirs, tolerance * float(size))
    movement = max(float((p - wanted.before[name]).abs().max()) for name, p in wanted.after.items())
    assert movement > 0.01, "the parameters hardly moved"
    for name, p in wanted.after.items():
        rounding = torch.finfo(p.dtype).eps * float(p.abs().max())
        assert_close(name, got.after[name], p, tolerance * movement + rounding)


def assert_close(what: str, got: Tensor, wanted: Tensor, bound: float) -> None:
    """Assert that the largest error is at most `bound`. NaN equals NaN."""
    error = (got - wanted).abs().where(~(wanted.isnan() & got.isnan()), 0)
    worst = float(error.max())
    assert worst <= bound, f"{what}: {worst:.3g} apart, {bound:.3g} allowed"


KL = {"beta": 0.04}


def lora(**options: Any) -> Any:
    """Return a LoRA config of the attention, or skip the test if PEFT is missing."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", **options)


def new_trainer(trainer_class: Any, model: Any, tmp_path: Path, **config: Any) -> Any:
    """Make a trainer that has not trained, for a batch made by hand."""
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        **{**{k: COMMON[k] for k in ("use_cpu", "bf16", "gradient_checkpointing", "report_to")}, **config},
    )
    prompts = Dataset.from_list([{"prompt": "1 2"}] * 4)
    trainer = trainer_class(model, args=args, reward_funcs=reward, train_dataset=prompts)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


B, T, P = 4, 5, 3


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Make a batch by hand, as `_generate_and_score_completions` would."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.tensor([5, 3, 1, 4])[:, None]).long()
    return {
        "prompt_ids": torch.randint(2, V, (B, P), generator=generator),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": torch.randint(2, V, (B, T), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.0, 0.7]),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": (-3 + torch.randn(B, T, generator=generator)) * mask,
        "ref_per_token_logps": (-3 + torch.randn(B, T, generator=generator)) * mask,
    }


def loss_and_gradients(
    trainer: Any, inputs: dict[str, Any], model: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the trainer's loss and the gradients of its parameters."""
    loss = trainer._compute_loss(trainer.model if model is None else model, inputs)
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that all gradients agree to 1e-5."""
    assert got.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        # Some are zero except for rounding, such as the gradient of the bias of attention's keys.
        assert_close(name, got[name], grad, 1e-5 * max(float(grad.abs().max()), 1e-3 * largest))


def step_and_score(trainer: Any) -> None:
    """Compute a loss with its gradients, and then log-probabilities without gradients."""
    inputs = batch()
    trainer._compute_loss(trainer.model, inputs).backward()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), T)


class LogRatioTrainer(FusedGRPOTrainer):
    """A trainer with a loss that TRL does not have."""

    def loss_spec(self) -> LossSpec:
        return LossSpec.preset("log_ratio")
