"""`fuse_trl_distillation` changes no result of TRL's DistillationTrainer."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import (
    PROMPTS,
    TINY,
    TRAINER_MARKS,
    Folders,
    Run,
    V,
    assert_close,
    assert_same_runs,
    messages,
    train,
)

pytest.importorskip("trl", minversion="1.16")

import transformers
import trl
from datasets import Dataset
from trl.trainer import distillation_trainer

from grpo_kernels.integrations.trl import distillation as fused
from grpo_kernels.integrations.trl import fuse_trl_distillation

pytestmark = TRAINER_MARKS

STOCK = distillation_trainer._chunked_divergence_loss
B, T, H, TEACHER_H = 3, 5, 8, 12
SOFTCAPS = {"no softcap": (None, None), "both": (2.0, 3.0), "student": (2.0, None), "teacher": (None, 3.0)}


@pytest.fixture(autouse=True)
def stock_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with TRL's own loss. It is restored afterwards."""
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", STOCK)


@pytest.fixture
def no_stock_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function. After it is called, TRL's kernel raises."""

    class Forbidden:
        @staticmethod
        def apply(*_: Any) -> None:
            raise AssertionError("TRL's own divergence was called")

    return lambda: monkeypatch.setattr(distillation_trainer, "ChunkedDivergenceFunction", Forbidden)


def teacher_model(**options: Any) -> Any:
    """Return a teacher that is wider than the students of `trl_runs`, with other weights."""
    family = "Gemma2" if options else "Llama"
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**TINY, "hidden_size": 48, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


SOFTCAPPED = {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8}


def distill(student: str, tmp_path: Path, teacher: dict[str, Any], **config: Any) -> Run:
    data = Dataset.from_dict({"prompt": PROMPTS})
    return train(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        student,
        tmp_path,
        {"max_completion_length": 6, **config},
        teacher_model=teacher_model(**teacher),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if "eval_strategy" in config else None,
    )


RUNS = {
    "forward KL": ("llama", {}, {"beta": 0.0}),
    "JSD": ("llama", {}, {"beta": 0.5, "eval_strategy": "steps", "eval_steps": 5}),
    "reverse KL": ("llama", {}, {"beta": 1.0, "temperature": 0.7, "top_k": 5}),
    "forward KL, softcaps": ("softcap", SOFTCAPPED, {"beta": 0.0}),
    "JSD, softcap of the teacher": ("bias", SOFTCAPPED, {"beta": 0.3}),
    "reverse KL, softcap of the student": ("softcap", {}, {"beta": 1.0, "gradient_accumulation_steps": 2}),
}
SHORT = ("JSD", "reverse KL, softcap of the student")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in RUNS]
)
def test_runs(
    name: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_stock_loss: Callable[[], None],
) -> None:
    """Losses, entropies, gradient norms and parameters of ten steps are the same."""
    student, teacher, config = RUNS[name]
    wanted = distill(folders(student), tmp_path, teacher, **config)
    assert max(wanted.column("loss").abs()) > 0.02
    fuse_trl_distillation()
    no_stock_loss()
    assert_same_runs(distill(folders(student), tmp_path, teacher, **config), wanted)
    assert messages(caplog, logging.WARNING) == []


def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return hidden states and weights of student and teacher, and the biases of both."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H), (B, T, TEACHER_H), (V, H), (V, TEACHER_H), (V,), (V,)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def results(function: Any, given: tuple[Tensor, ...], mask: Tensor, beta: float, *rest: Any) -> list[Tensor]:
    """Return loss, sum of entropies, number of tokens, and the gradients of the student's tensors."""
    hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias = given
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    count, scales, softcaps = rest
    loss, entropy, tokens = function(
        leaves[0],
        teacher_hidden,
        leaves[1],
        teacher_weight.clone().requires_grad_(),
        mask,
        beta,
        num_items_in_batch=count,
        student_lm_head_bias=leaves[2],
        teacher_lm_head_bias=teacher_bias,
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        student_final_logit_softcapping=softcaps[0],
        teacher_final_logit_softcapping=softcaps[1],
        temperature=0.7,
    )
    (2 * loss).backward()
    return [loss.detach(), entropy.detach(), tokens, *(x.grad for x in leaves)]


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("softcaps", SOFTCAPS)
@pytest.mark.parametrize("count", [None, 7, torch.tensor(7.5)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_of_the_loss(
    beta: float, softcaps: str, count: Tensor | int | None, dtype: torch.dtype
) -> None:
    """Our function has the results and gradients of TRL's. Masked positions do not matter."""
    given = heads(dtype)
    mask = (torch.arange(T) < torch.tensor([5, 0, 3])[:, None]).long()
    options = mask, beta, count, (0.6, 1.5), SOFTCAPS[softcaps]
    wanted = results(STOCK, given, *options)
    fuse_trl_distillation()
    given[0][1], given[1][1] = torch.nan, torch.nan
    got = results(distillation_trainer._chunked_divergence_loss, given, *options)
    # TRL rounds the gradient of each logit to bf16.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    names = "loss", "entropy", "tokens", "hidden", "weight", "bias"
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        assert ours.dtype == theirs.dtype, name
        bound = 1e-5 if name in ("loss", "entropy", "tokens") else tolerance
        assert_close(name, ours.float(), theirs.float(), bound * float(theirs.float().abs().max()))


def test_no_token() -> None:
    """Loss and gradients of a batch without a token are 0."""
    fuse_trl_distillation()
    mask = torch.zeros(B, T, dtype=torch.long)
    function = distillation_trainer._chunked_divergence_loss
    for x in results(function, heads(torch.float32), mask, 1.0, None, (1.0, 1.0), (None, None)):
        assert bool((x == 0).all())


def test_two_calls() -> None:
    """A second call changes nothing."""
    fuse_trl_distillation()
    first = distillation_trainer._chunked_divergence_loss
    assert first is not STOCK
    fuse_trl_distillation()
    assert distillation_trainer._chunked_divergence_loss is first


def test_import_changes_nothing() -> None:
    program = """
from trl.trainer import distillation_trainer
before = distillation_trainer._chunked_divergence_loss
from grpo_kernels.integrations.trl import fuse_trl_distillation
assert distillation_trainer._chunked_divergence_loss is before
fuse_trl_distillation()
assert distillation_trainer._chunked_divergence_loss is not before
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sharded_heads(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Under DeepSpeed ZeRO-3 the loss is TRL's, and one warning says so."""
    monkeypatch.setattr(fused, "zero3_enabled", lambda: True)
    fuse_trl_distillation()
    mask = torch.ones(B, T, dtype=torch.long)
    options = heads(torch.float32), mask, 0.5, None, (1.0, 1.0), (None, None)
    for _ in range(2):
        got = results(distillation_trainer._chunked_divergence_loss, *options)
    for ours, theirs in zip(got, results(STOCK, *options), strict=True):
        assert torch.equal(ours, theirs)
    (warning,) = messages(caplog, logging.WARNING)
    assert "ZeRO-3" in warning


@pytest.mark.parametrize("change", ["missing", "other arguments"])
def test_another_version_of_trl(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook refuses a TRL whose loss it does not know."""
    if change == "missing":
        monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    else:
        monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", lambda hidden, beta: None)
    with pytest.raises(ImportError, match="another distillation loss"):
        fuse_trl_distillation()
