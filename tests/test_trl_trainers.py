"""TRL's own trainers and the same ones with our losses or log-probabilities: ten steps from one seed give the
same losses, gradients, metrics and parameters.

Plain gradient descent at a high learning rate, so that a mistake in one step shows in all later ones; Adam
would blow rounding up as well, because it divides small gradients by their own size. Rewards are random, and
depend on the completion alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import zlib

# Nothing is downloaded: the Hub's client reads this when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from products import on_a_grid
from torch import Tensor

import grpo_kernels
from grpo_kernels import LossSpec, backend, grpo_loss

trl = pytest.importorskip("trl", minversion="1.16")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from distributed import trl_trainer  # noqa: E402
from distributed.launch import run_workers, session_folder  # noqa: E402
from trl.trainer import utils  # noqa: E402

from grpo_kernels.integrations.trl import FusedGRPOTrainer, forward_loss, fuse_trl_logps  # noqa: E402
from grpo_kernels.integrations.trl import head as trl_head  # noqa: E402
from grpo_kernels.integrations.trl import settings as trl_settings  # noqa: E402
from grpo_kernels.integrations.trl import trainer as fused_trl  # noqa: E402
from grpo_kernels.logps import linear_token_statistics  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "UserWarning", "RuntimeWarning")
]

V = 32
STEPS = 10
# Of the largest value of a run. fp32 on both sides: 1e-6 a step, and ten of them build on each other.
TOLERANCE = 1e-4

TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # distributions that are far from uniform
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "scale": ("Cohere", {"logit_scale": 0.3}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "experts": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.3}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Models by name, as if they came from the Hub, each with a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def folder(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / name
        if not path.exists():
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
        return str(path)

    return folder


class Forbidden:
    """Stands for what is not to be called."""

    @staticmethod
    def apply(*_: Any) -> None:
        raise AssertionError("TRL's own log-probabilities were called")


@pytest.fixture(autouse=True)
def one_message_per_test(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a new process: no message told, TRL unchanged."""
    backend.log_once.cache_clear()
    backend.warn_once.cache_clear()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", trl_head.ChunkedLogProbFunction)
    caplog.set_level(logging.INFO, logger="grpo_kernels")


@pytest.fixture
def no_stock_head(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, TRL's own log-probabilities raise."""

    def forbid() -> None:
        if utils._ChunkedLogProbFunction is trl_head.ChunkedLogProbFunction:
            monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Forbidden)
        monkeypatch.setattr(trl_head, "ChunkedLogProbFunction", Forbidden)

    return forbid


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.message for r in caplog.records if r.name == "grpo_kernels" and r.levelno == level]


class Run(NamedTuple):
    trainer: Any
    logs: list[dict[str, float]]
    before: dict[str, Tensor]  # parameters
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        """NaN where TRL logs None, the mean of nothing."""
        values = [log[key] for log in self.logs if key in log]
        return torch.tensor([torch.nan if x is None else x for x in values], dtype=torch.float64)


class Logs(transformers.TrainerCallback):
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
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def grpo(trainer_class: Any, model: str, tmp_path: Path, *, peft_config: Any = None, **config: Any) -> Run:
    """Two steps per generation, unless `config` has it otherwise: in the second the ratios leave 1."""
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
    assert len(got.logs) == len(wanted.logs)
    for ours, theirs in zip(got.logs, wanted.logs, strict=True):
        assert ours.keys() == theirs.keys()
    for key in sorted({key for log in wanted.logs for key in log if not key.endswith(TIMES)}):
        theirs = wanted.column(key)
        # Losses cancel: on-policy, that of a group sums up to 0.
        size = theirs.nan_to_num().abs().max().clamp(min=0.1 if "loss" in key else 0)
        assert_close(key, got.column(key), theirs, tolerance * float(size))
    movement = max(float((p - wanted.before[name]).abs().max()) for name, p in wanted.after.items())
    assert movement > 0.01, "nothing was learned that could be compared"
    for name, p in wanted.after.items():
        rounding = torch.finfo(p.dtype).eps * float(p.abs().max())
        assert_close(name, got.after[name], p, tolerance * movement + rounding)


def assert_close(what: str, got: Tensor, wanted: Tensor, bound: float) -> None:
    error = (got - wanted).abs().where(~(wanted.isnan() & got.isnan()), 0)
    worst = float(error.max())
    assert worst <= bound, f"{what}: {worst:.3g} apart, {bound:.3g} allowed"


# --- The whole loss -----------------------------------------------------------------------------------------


class ExtraInputs:
    """Of a trainer: what tools and vLLM would add to a batch, random but by the completions alone."""

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


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", **options)


def prompt_tuning() -> Any:
    peft = pytest.importorskip("peft")
    return peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


@dataclass
class Case:
    config: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    peft: Callable[[], Any] = lambda: None
    extra: frozenset[str] = frozenset()
    theirs: str | None = None  # why the loss is TRL's, of our log-probabilities
    tolerance: float = TOLERANCE
    stock: dict[str, Any] = field(default_factory=dict)  # options of the stock trainer alone


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
    return Case(
        config, model, peft, frozenset(filter(None, extra.split(", "))), theirs, tolerance, stock or {}
    )


# One generation serves two optimizer steps of three micro-batches each.
ACCUMULATED = {"gradient_accumulation_steps": 3, "steps_per_generation": 6, "per_device_train_batch_size": 4}
ON_POLICY = {"steps_per_generation": 1}
KL = {"beta": 0.04}
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
    "experts, high entropy": case(
        "experts",
        loss_type="grpo",
        top_entropy_quantile=0.4,
        theirs="top_entropy_quantile=0.4",
        **ACCUMULATED,
    ),
    # In bf16 a number that is rounded the other way moves by 2^-8, and takes the steps after it along.
    "head in fp32": case(
        loss_type="grpo",
        cast_lm_head_to_fp32=True,
        model_init_kwargs={"dtype": "bfloat16"},
        max_steps=4,
        tolerance=0.01,
        **KL,
    ),
    # Our logits are fp32 under autocast. TRL rounds them to bf16, unless it is asked to keep them in fp32.
    "autocast": case(
        loss_type="dapo",
        bf16=True,
        max_steps=4,
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
# `make test` runs the options of these in other cases, or with one micro-batch in test_trl.py.
LONG = {
    *(
        "grpo",
        "grpo, accumulated",
        "luspo, accumulated",
        "vespo, sequence",
        "evaluated",
        "bonus",
        "bonus, counted",
    ),
    *("adaptive bonus", "high entropy", "high entropy, bonus", "experts", "lora, high entropy", "tools"),
    *(
        "sampler, vespo",
        "sampler, all masks",
        "dr_grpo, plain KL",
        "sapo",
        "gspo",
        "delta",
        "luspo, sequence",
    ),
    *("masked truncated", "tied", "checkpointed", "prompt tuning", "experts, high entropy", "tools, bonus"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in CASES]
)
def test_same_run(
    name: str,
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_stock_head: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_runs_are_worth_comparing(folders: Callable[[str], str], tmp_path: Path) -> None:
    run = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, loss_type="grpo")
    assert len(run.logs) == STEPS + 1  # and a summary
    without_advantage = run.column("frac_reward_zero_std")
    assert 0 < without_advantage.max() < 1
    assert run.column("clip_ratio/low_mean").max() > 0.02 < run.column("clip_ratio/high_mean").max()
    assert run.column("completions/min_length").min() < run.column("completions/max_length").max()
    assert run.column("loss").abs().max() > 0.05 < run.column("grad_norm").min()


def test_rows_where_there_is_triton(
    folders: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_stock_head: Callable[[], None],
) -> None:
    """There TRL hands over the rows of labelled tokens alone; some sequences, in the end whole batches, have
    none."""
    config = {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 3, **KL}
    wanted = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, **config)
    assert wanted.column("completions/clipped_ratio").max() > 0.8
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    no_stock_head()
    assert_same_runs(grpo(FusedGRPOTrainer, folders("llama"), tmp_path, **config), wanted)


def new_trainer(trainer_class: Any, model: Any, tmp_path: Path, **config: Any) -> Any:
    """One that has not trained, for a batch made by hand."""
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
    loss = trainer._compute_loss(trainer.model if model is None else model, inputs)
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        # Some are sums that are zero but for rounding: of the bias of attention's keys.
        assert_close(name, got[name], grad, 1e-5 * max(float(grad.abs().max()), 1e-3 * largest))


def test_images(tmp_path: Path, folders: Callable[[str], str]) -> None:
    """What TRL gives a model with eyes reaches it."""
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
    options: dict[str, Any], tmp_path: Path, folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedGRPOTrainer, "loss_options", options)
    seen = {}

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return grpo_kernels.linear_grpo_loss(*args, **kwargs)

    scored: list[dict[str, Any]] = []

    def spy_of_logps(*args: Any, **kwargs: Any) -> Any:
        scored.append(kwargs)
        return linear_token_statistics(*args, **kwargs)

    monkeypatch.setattr(forward_loss, "linear_grpo_loss", spy)
    monkeypatch.setattr(trl_head, "linear_token_statistics", spy_of_logps)
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
    option: str, tmp_path: Path, folders: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are not run would be missing in TRL's metrics."""
    monkeypatch.setattr(FusedGRPOTrainer, "loss_options", {option: True})
    with pytest.raises(ValueError, match=rf"loss_options takes .*, got \['{option}'\]"):
        new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)


def test_constructor_is_that_of_trl() -> None:
    import inspect

    assert inspect.signature(FusedGRPOTrainer) == inspect.signature(trl.GRPOTrainer)


def test_adapter_on_the_head(folders: Callable[[str], str], tmp_path: Path) -> None:
    """TRL refuses one, whose own log-probabilities would not see it, and so nothing is fused past it."""
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
    assert outcomes[name] == "ok", outcomes[name]


# --- TRL's own loss has the last word -----------------------------------------------------------------------


def ratio(logps: Tensor, old: Tensor | None) -> Tensor:
    return torch.exp(logps - (logps.detach() if old is None else old))


def gradient_lost(logps: Tensor, old: Tensor | None, ref: None, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * ratio(logps, old).detach() + 0 * logps


def constant_added(logps: Tensor, old: Tensor | None, ref: None, advantages: Tensor, mask: Tensor) -> Tensor:
    return -advantages * ratio(logps, old) + 0.1


MISTAKES = {
    "scale": {"trl_normalizer": lambda trainer, spec, inputs: inputs["num_items_in_batch"] * 3.0},
    "gradient": {"surrogate_of_settings": lambda trainer: gradient_lost},
    "value": {"surrogate_of_settings": lambda trainer: constant_added},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_loss_is_handed_over(
    mistake: str,
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One warning, and from that very micro-batch on all is as in TRL."""
    config = {"loss_type": "dapo", "epsilon": 100.0}
    wanted = grpo(trl.GRPOTrainer, folders("llama"), tmp_path, **config)
    for name, wrong in MISTAKES[mistake].items():
        monkeypatch.setattr(trl_settings, name, wrong)
    got = grpo(FusedGRPOTrainer, folders("llama"), tmp_path, **config)
    (warning,) = messages(caplog, logging.WARNING)
    assert "our loss is" in warning and "TRL's" in warning
    assert_same_runs(got, wanted)


def test_gradients_are_compared_where_there_are_some(folders: Callable[[str], str], tmp_path: Path) -> None:
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)
    inputs = batch()
    for advantages, left in ((torch.zeros(B), fused_trl.GRADIENT_CHECKS), (inputs["advantages"], 7)):
        trainer._compute_loss(trainer.model, {**inputs, "advantages": advantages})
        assert trainer._gradient_checks == left


def test_every_rank_hands_over(
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where losses differ on one: all have to call the model equally often."""
    trainer = new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path)

    def gather(self: Any, x: Tensor) -> Tensor:
        return torch.stack([x, ~x]) if x.dtype == torch.bool else x

    monkeypatch.setattr(type(trainer.accelerator), "gather", gather)
    trainer._compute_loss(trainer.model, batch())
    assert len(messages(caplog, logging.WARNING)) == 1
    monkeypatch.setattr(forward_loss, "linear_grpo_loss", None)
    trainer._compute_loss(trainer.model, batch())


def test_infinite_ratio(
    folders: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of tokens without advantage: NaN in TRL, which multiplies 0 by it. That is no reason to hand over."""
    inputs = batch()
    inputs["old_per_token_logps"][2] -= 200  # the advantage is 0
    theirs = loss_and_gradients(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path), inputs)
    ours = loss_and_gradients(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path), inputs)
    without = loss_and_gradients(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path), batch())
    assert theirs[0].isnan()
    assert_close("loss", ours[0], without[0], 1e-6)
    assert_same_gradients(ours[1], without[1])
    assert messages(caplog, logging.WARNING) == []


def test_log_probabilities_of_tools(folders: Callable[[str], str], tmp_path: Path) -> None:
    """A tool's token may have had any: TRL forms its ratio, infinite if ours is 0, and masks it later."""
    inputs = batch()
    inputs["completion_ids"] %= V - 1
    inputs["completion_ids"][0, 2] = V - 1
    inputs["tool_mask"] = (inputs["completion_ids"] != V - 1).long()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    found = []
    for trainer_class in (trl.GRPOTrainer, FusedGRPOTrainer):
        trainer = new_trainer(trainer_class, folders("bias"), tmp_path, beta=0.04)
        with torch.no_grad():
            trainer.model.lm_head.bias[V - 1] = -200
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), T
            )
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            inputs[name][0, 2] = logps[0, 2]
        found.append((loss_and_gradients(trainer, inputs), dict(trainer._metrics["train"])))
    (wanted, wanted_metrics), (got, got_metrics) = found
    assert_close("loss", got[0], wanted[0], 1e-6)
    assert_same_gradients(got[1], wanted[1])
    assert got_metrics == {name: pytest.approx(values, rel=1e-5) for name, values in wanted_metrics.items()}


# --- A loss that TRL does not have --------------------------------------------------------------------------


class LogRatioTrainer(FusedGRPOTrainer):
    def loss_spec(self) -> LossSpec:
        return LossSpec.preset("log_ratio")


def test_own_spec(folders: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its value is that of grpo_loss of the model's logits; TRL's metrics stay, ours come beside them."""
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


def test_own_spec_of_all_micro_batches(folders: Callable[[str], str], tmp_path: Path) -> None:
    """TRL's `dapo` counts the tokens of the window: so does a token mean of our own."""
    inputs = {**batch(), "num_items_in_batch": torch.tensor(52)}
    losses = {}
    for loss_type in ("bnpo", "dapo"):
        trainer = new_trainer(LogRatioTrainer, folders("llama"), tmp_path, beta=0.04, loss_type=loss_type)
        losses[loss_type] = trainer._compute_loss(trainer.model, inputs).detach()
    tokens = int(inputs["completion_mask"].sum())
    assert_close("loss", losses["dapo"], losses["bnpo"] * tokens / 52, 1e-6)


# --- TRL's losses of our log-probabilities ------------------------------------------------------------------


ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logits", "is_top1"), ALL_OUTPUTS])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16 head", "autocast"])
def test_results_of_trl_s_function(outputs: tuple[str, ...], softcap: float | None, dtypes: str) -> None:
    """The same five results and three gradients. TRL multiplies in the dtype of the hidden states."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(11, 16), torch.randn(V, 16), torch.randn(V)
    targets = torch.randint(0, V, (11,))
    targets[:4] = (hidden @ weight.T + bias)[:4].argmax(-1)
    if dtypes == "bf16 head":
        weight, bias = weight.bfloat16(), bias.bfloat16()
    upstream = torch.randn(2, 11)
    found = []
    for function in (trl_head.ChunkedLogProbFunction, trl_head.FusedLogProbs()):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", enabled=dtypes == "autocast"):
            results = function.apply(*leaves, targets, 0.7, 20, softcap, 0.6, outputs)
        sum((x * g).sum() for x, g in zip(results[:2], upstream, strict=True) if x is not None).backward()
        found.append((results, [x.grad for x in leaves]))
    (wanted, wanted_grads), (got, got_grads) = found
    # TRL rounds the logits of bf16 factors to bf16.
    tolerance = 0.03 if dtypes == "autocast" else 1e-5
    for name, ours, theirs in zip(trl_head.PerToken._fields, got, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert ours.dtype == theirs.dtype, name
            assert_close(name, ours.float(), theirs.float(), tolerance * float(theirs.float().abs().max()))
    for ours, theirs in zip(got_grads, wanted_grads, strict=True):
        assert ours.dtype == theirs.dtype
        rounding = 0.01 if theirs.dtype == torch.bfloat16 else 0.0
        assert_close("gradient", ours, theirs, (tolerance + rounding) * float(theirs.abs().max()))


def test_start_at_the_reference() -> None:
    """A policy is asked for its entropy, a reference is not; of the same weights their KL is exactly 0."""
    torch.manual_seed(0)
    hidden, weight = on_a_grid(torch.randn(200, 32)), on_a_grid(torch.randn(V, 32))  # exact logits
    targets = torch.randint(0, V, (200,))
    policy, reference = (
        trl_head.FusedLogProbs().apply(hidden, weight, None, targets, 1.0, 20, None, 1.0, outputs).logps
        for outputs in (("log_probs", "entropy"), ("log_probs",))
    )
    assert torch.equal(policy, reference)


def texts(seed: int, count: int = 64) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, V - 2, (count, 9), generator=generator).tolist()
    return [" ".join(map(str, row[: 4 + i % 5])) for i, row in enumerate(rows)]


def rloo(model: str, tmp_path: Path) -> Run:
    return grpo(trl.RLOOTrainer, model, tmp_path, beta=0.04)


def grpo_stock(model: str, tmp_path: Path) -> Run:
    return grpo(trl.GRPOTrainer, model, tmp_path, loss_type="dapo", entropy_coef=0.05, **KL)


def sft(model: str, tmp_path: Path, **config: Any) -> Run:
    data = Dataset.from_dict({"text": texts(0)})
    return train(trl.SFTTrainer, trl.SFTConfig, model, tmp_path, config, train_dataset=data)


def dpo(model: str, tmp_path: Path, **config: Any) -> Run:
    data = Dataset.from_dict({"prompt": PROMPTS, "chosen": texts(1), "rejected": texts(2)})
    return train(trl.DPOTrainer, trl.DPOConfig, model, tmp_path, config, train_dataset=data)


def kto(model: str, tmp_path: Path) -> Run:
    labels = [i % 3 == 0 for i in range(64)]
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": texts(3), "label": labels})
    return train(trl.KTOTrainer, trl.KTOConfig, model, tmp_path, {}, train_dataset=data)


LOGPS = {
    "grpo": (grpo_stock, "llama"),
    "rloo": (rloo, "llama"),
    "sft": (sft, "llama"),
    "sft, dft": (lambda *a: sft(*a, loss_type="dft", learning_rate=2.0), "softcap"),
    "dpo": (dpo, "scale"),
    "kto": (kto, "bias"),
}


@pytest.mark.parametrize("name", LOGPS)
def test_fused_logps(
    name: str,
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_stock_head: Callable[[], None],
) -> None:
    run, model = LOGPS[name]
    wanted = run(folders(model), tmp_path)
    fuse_trl_logps()
    fuse_trl_logps()
    no_stock_head()
    assert_same_runs(run(folders(model), tmp_path), wanted)
    assert messages(caplog, logging.WARNING) == []


@pytest.mark.parametrize(
    "model, config, reason",
    [
        ("llama", {"use_weighting": True}, "log_sum_sq_probs and mean_logits of each token"),
        ("softcap", {}, "mean_logits of each token"),
    ],
)
def test_outputs_left_to_trl(
    model: str,
    config: dict[str, Any],
    reason: str,
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = dpo(folders(model), tmp_path, **config)
    fuse_trl_logps()
    assert_same_runs(dpo(folders(model), tmp_path, **config), wanted)
    (warning,) = messages(caplog, logging.WARNING)
    assert reason in warning


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As under DeepSpeed ZeRO-3. Of each call of TRL's own log-probabilities: was it with gradients?"""
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


def step_and_score(trainer: Any) -> None:
    inputs = batch()
    trainer._compute_loss(trainer.model, inputs).backward()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), T)


def test_sharded_head(
    sharded: list[bool], folders: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is whole in the forward alone. A gradient that is made there can do without it later on."""
    step_and_score(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path))
    assert sharded == [] == messages(caplog, logging.WARNING)


class GSPOTrainer(FusedGRPOTrainer):
    def loss_spec(self) -> LossSpec:
        return LossSpec.preset("gspo")


def test_sharded_head_and_own_spec(
    sharded: list[bool], folders: Callable[[str], str], tmp_path: Path
) -> None:
    """TRL's loss would be another than was asked for."""
    with pytest.raises(
        ValueError, match=r"the forward has to compute the gradient of your own loss_spec\(\)"
    ):
        new_trainer(GSPOTrainer, folders("llama"), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.4},
        {"model_init_kwargs": {"dtype": "float16"}},
    ],
)
def test_sharded_head_in_the_backward(
    config: dict[str, Any],
    sharded: list[bool],
    folders: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Everything is TRL's then, so that all log-probabilities are rounded alike."""
    step_and_score(new_trainer(FusedGRPOTrainer, folders("llama"), tmp_path, loss_type="grpo", **config))
    assert sharded == [True, False]
    (warning,) = messages(caplog, logging.WARNING)
    assert "ZeRO-3" in warning


def test_sharded_head_of_other_trainers(
    sharded: list[bool], folders: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fuse_trl_logps()
    step_and_score(new_trainer(trl.GRPOTrainer, folders("llama"), tmp_path))
    assert sharded == [True, False]
    (warning,) = messages(caplog, logging.WARNING)
    assert "ZeRO-3" in warning


# --- Which TRL ----------------------------------------------------------------------------------------------


@pytest.fixture
def import_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    name = "grpo_kernels.integrations.trl.head"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(grpo_kernels.integrations.trl, "head", trl_head)  # to be put back
    yield lambda: importlib.import_module(name)


def test_trl_missing(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16'"):
        import_anew()


def test_trl_too_old(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with pytest.raises(ImportError, match=r"needs TRL 1\.16 or later, found 1\.15\.0"):
        import_anew()


@pytest.mark.filterwarnings("default::UserWarning")
def test_trl_newer(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.17.1")
    with pytest.warns(UserWarning, match=r"tested with TRL 1\.16; TRL 1\.17\.1 is newer"):
        import_anew()


def test_trl_with_another_head(import_anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match="needs a newer grpo_kernels"):
        import_anew()


def test_package_without_trl() -> None:
    code = "import grpo_kernels, sys; assert not {'trl', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
