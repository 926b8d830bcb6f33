"""`fuse_trl_logps` gives TRL's losses our log-probabilities and changes no result of TRL's trainers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from products import on_a_grid
from trl_runs import (
    KL,
    PROMPTS,
    TRAINER_MARKS,
    Folders,
    Run,
    V,
    assert_close,
    assert_same_runs,
    grpo,
    messages,
    train,
)

pytest.importorskip("trl", minversion="1.16")

import trl
from datasets import Dataset

from grpo_kernels.integrations.trl import fuse_trl_logps
from grpo_kernels.integrations.trl import head as trl_head

pytestmark = TRAINER_MARKS


ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logits", "is_top1"), ALL_OUTPUTS])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16 head", "autocast"])
def test_results_of_the_log_prob_function(
    outputs: tuple[str, ...], softcap: float | None, dtypes: str
) -> None:
    """Our function has the five results and three gradients of TRL's.

    TRL multiplies in the dtype of the hidden states.
    """
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
    # TRL rounds the logits of bf16 operands to bf16.
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
    """The KL of a policy to a reference with the same weights is exactly 0.

    The entropy is computed for the policy only.
    """
    torch.manual_seed(0)
    hidden, weight = on_a_grid(torch.randn(200, 32)), on_a_grid(torch.randn(V, 32))  # exact logits
    targets = torch.randint(0, V, (200,))
    policy, reference = (
        trl_head.FusedLogProbs().apply(hidden, weight, None, targets, 1.0, 20, None, 1.0, outputs).logps
        for outputs in (("log_probs", "entropy"), ("log_probs",))
    )
    assert torch.equal(policy, reference)


def texts(seed: int, count: int = 64) -> list[str]:
    """Return texts of 4 to 8 random numbers."""
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.long) if x in ("kto", "rloo", "sft, dft") else x for x in LOGPS],
)
def test_fused_logps(
    name: str,
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_stock_head: Callable[[], None],
) -> None:
    """Runs of six trainers of TRL are the same with `fuse_trl_logps`, and TRL's function is not called."""
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
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning names the outputs that TRL still computes, and the run is the same."""
    wanted = dpo(folders(model), tmp_path, **config)
    fuse_trl_logps()
    assert_same_runs(dpo(folders(model), tmp_path, **config), wanted)
    (warning,) = messages(caplog, logging.WARNING)
    assert reason in warning
