"""Wrong arguments of `linear_grpo_loss` and `linear_logps` raise an error that names them (case 16)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hard_cases import INF, NAN
from linear_cases import random_case, run_linear
from linear_hard_cases import H, V

from grpo_kernels import KL, LogRatio, LossSpec, PPOClip, linear_grpo_loss, linear_logps


def with_reference(**more: Any) -> dict[str, Any]:
    return {"ref_hidden": torch.randn(4, 16, H), "ref_lm_head_weight": torch.randn(V, H), **more}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden of one dimension": ({"hidden": torch.randn(H)}, r"hidden must be \[B, T, H\].*\(24,\)"),
    "hidden of integers": ({"hidden": torch.ones(4, 16, H).int()}, "hidden must be fp16.*int32"),
    "weight transposed": (
        {"lm_head_weight": torch.randn(H, V)},
        r"lm_head_weight must be \[V, H\].*\(24, 128\)",
    ),
    "weight of another dtype": (
        {"lm_head_weight": torch.randn(V, H).bfloat16()},
        "lm_head_weight is torch.bfloat16, hidden torch.float32",
    ),
    "weight in fp64": ({"lm_head_weight": torch.randn(V, H).double()}, "fp64 goes with fp64 only"),
    "weight elsewhere": ({"lm_head_weight": torch.empty(V, H, device="meta")}, "lm_head_weight is on meta"),
    "bias of another length": ({"lm_head_bias": torch.randn(H)}, r"lm_head_bias must be \[V\] = \(128,\)"),
    "ids of another shape": ({"completion_ids": torch.zeros(4, 15).long()}, r"completion_ids.*as hidden"),
    "vocab_size": ({"vocab_size": V + 1}, "vocab_size must be between 1 and the 128 rows of lm_head_weight"),
    "both references": (
        with_reference(ref_logps=torch.zeros(4, 16)),
        "ref_hidden and ref_logps are both given",
    ),
    "no reference": ({"spec": LossSpec(LogRatio())}, "needs a reference: give ref_hidden or ref_logps"),
    "no reference for the exact KL": (
        {"spec": LossSpec(PPOClip(), KL("exact")), "ref_logps": torch.zeros(4, 16)},
        "it needs ref_hidden",
    ),
    "no reference weight": (
        {"ref_hidden": torch.randn(4, 16, H)},
        "ref_hidden is given without ref_lm_head_weight",
    ),
    "no reference hidden": ({"ref_lm_head_weight": torch.randn(V, H)}, "without ref_hidden"),
    "reference of another length": (
        with_reference(ref_hidden=torch.randn(4, 15, H)),
        r"ref_hidden must have the leading shape of hidden \(4, 16, 24\)",
    ),
    "reference of another vocabulary": (
        with_reference(ref_lm_head_weight=torch.randn(V + 1, H)),
        "ref_lm_head_weight has 129 rows, lm_head_weight 128: give vocab_size",
    ),
    "reference of too small a vocabulary": (
        with_reference(ref_lm_head_weight=torch.randn(V - 9, H), vocab_size=V - 8),
        "ref_lm_head_weight has 119 rows, fewer than the 120 of the vocabulary",
    ),
    "logits_dtype": ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float32 or torch.bfloat16"),
    "bf16 logits of fp32 operands": (
        {"logits_dtype": torch.bfloat16},
        "needs bf16 operands, got torch.float32",
    ),
    "chunk_tokens": ({"chunk_tokens": 0}, "chunk_tokens must be >= 1"),
    "skip without compact": (
        {"skip_inactive": True, "compact": False},
        "skip_inactive=True needs compact=True",
    ),
    "packed without seq_lens": (
        {"hidden": torch.randn(64, H), "completion_ids": torch.zeros(64).long()},
        "seq_lens",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_case_16_refused(changes: dict[str, Any], message: str) -> None:
    case = random_case()
    arguments: dict[str, Any] = {
        "hidden": case.hidden,
        "lm_head_weight": case.weight,
        "completion_ids": case.completion_ids,
        "advantages": case.advantages,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**arguments)


@pytest.mark.parametrize(
    "options", [{"chunk_tokens": 2.5}, {"compact": 1}, {"skip_inactive": None}, {"lm_head_bias": [0.0] * V}]
)
def test_case_16_refused_types(options: dict[str, Any]) -> None:
    case = random_case()
    arguments = (case.hidden, case.weight, case.completion_ids, case.advantages)
    with pytest.raises(TypeError, match=next(iter(options))):
        linear_grpo_loss(*arguments, **options)


def test_case_16_logps_refuses_as_the_loss_does() -> None:
    case = random_case()
    with pytest.raises(ValueError, match=r"lm_head_weight must be \[V, H\]"):
        linear_logps(case.hidden, case.weight.t(), case.completion_ids)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 16\)"):
        linear_logps(case.hidden, case.weight, case.completion_ids, mask=torch.ones(4))


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF])
def test_case_16_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"^temperature must be finite and > 0, got {temperature}$"):
        run_linear(random_case().with_options(temperature=temperature))
