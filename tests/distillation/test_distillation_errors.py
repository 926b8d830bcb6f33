"""Wrong arguments of the distillation losses raise an error that names the argument and shows the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_kernels import VocabShard, distillation_loss, linear_distillation_loss

Z, T = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
IDS, LOGPS = torch.randint(7, (2, 3, 2)), torch.randn(2, 3, 2)
H, W = torch.randn(2, 3, 4), torch.randn(7, 4)

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "a teacher is missing: give teacher_logits, or teacher_ids and teacher_logps"),
    ({"teacher_logits": T, "teacher_ids": IDS}, ValueError, "teacher_logits and teacher_ids are both given"),
    ({"teacher_ids": IDS}, ValueError, "teacher_ids is given without teacher_logps"),
    ({"teacher_logps": LOGPS}, ValueError, "teacher_logps is given without teacher_ids"),
    ({"teacher_logits": T[:, :2]}, ValueError, r"teacher_logits must be shaped as logits \(2, 3, 7\), got"),
    ({"teacher_logits": T[..., :5]}, ValueError, "give vocab_size, the number of columns"),
    ({"teacher_logits": T[..., :5], "vocab_size": 6}, ValueError, "teacher_logits has 5 columns, fewer than"),
    ({"teacher_logits": T.double()}, ValueError, "teacher_logits is torch.float64, logits torch.float32"),
    ({"teacher_logits": T.long()}, ValueError, "teacher_logits must be fp16, bf16, fp32 or fp64, got"),
    ({"teacher_logits": [1.0]}, TypeError, "teacher_logits must be a tensor, got list"),
    ({"teacher_logits": T, "divergence": "kl"}, ValueError, "divergence must be one of 'reverse_kl', .*'kl'"),
    ({"teacher_logits": T, "jsd_weight": 1.0}, ValueError, "jsd_weight must be < 1, got 1.0"),
    ({"teacher_logits": T, "jsd_weight": 0.0}, ValueError, "jsd_weight must be finite and > 0, got 0"),
    ({"teacher_logits": T, "jsd_weight": "a"}, TypeError, "jsd_weight must be a number, got 'a'"),
    ({"teacher_logits": T, "rest": "all"}, ValueError, "rest must be one of 'bucket', 'drop', got 'all'"),
    ({"teacher_logits": T, "aggregation": "mean"}, ValueError, "aggregation must be one of .*'mean'"),
    (
        {"teacher_logits": T, "aggregation": "seq-mean-token-sum-norm"},
        ValueError,
        "divides by max_tokens: give max_tokens",
    ),
    ({"teacher_logits": T, "normalizer": torch.ones(2)}, ValueError, r"normalizer .*got shape \(2,\)"),
    ({"teacher_logits": T, "completion_mask": torch.ones(2, 4)}, ValueError, "completion_mask must have sha"),
    ({"teacher_logits": T, "temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
    ({"teacher_logits": T, "vocab_size": 8}, ValueError, "vocab_size must be between 1 and the 7 columns"),
    (
        {"teacher_logits": T, "sampling_mask": torch.ones(2, 3, 2, dtype=torch.int32)},
        ValueError,
        "sampling_mask must have shape",
    ),
    ({"teacher_logits": T, "backend": "cuda"}, ValueError, "backend must be one of"),
    ({"teacher_logits": T, "shard": VocabShard(0, 3)}, ValueError, "shard is 0:3, but there are 7 columns"),
    ({"teacher_ids": IDS[:, :2], "teacher_logps": LOGPS}, ValueError, "teacher_ids must have shape"),
    ({"teacher_ids": IDS.float(), "teacher_logps": LOGPS}, ValueError, "teacher_ids must be int32 or int64"),
    (
        {"teacher_ids": IDS, "teacher_logps": LOGPS[..., :1]},
        ValueError,
        r"teacher_logps must have the shape of teacher_ids \(2, 3, 2\), got \(2, 3, 1\)",
    ),
    ({"teacher_ids": IDS, "teacher_logps": IDS}, ValueError, "teacher_logps must be floating-point numbers"),
]


@pytest.mark.parametrize("options, error, message", WRONG, ids=[x[2][:40] for x in WRONG])
def test_from_logits(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distillation_loss(Z, **options)


WRONG_HIDDEN: list[tuple[dict[str, Any], str]] = [
    ({}, "a teacher is missing: give teacher_hidden, or teacher_ids and teacher_logps"),
    ({"teacher_hidden": H}, "teacher_hidden is given without teacher_lm_head_weight"),
    ({"teacher_lm_head_weight": W}, "teacher_lm_head_weight is given without teacher_hidden"),
    ({"teacher_hidden": H, "teacher_ids": IDS}, "teacher_hidden and teacher_ids are both given: give one"),
    ({"teacher_hidden": H[:1], "teacher_lm_head_weight": W}, "teacher_hidden must have the leading shape of"),
    (
        {"teacher_hidden": H, "teacher_lm_head_weight": W[:, :3]},
        r"teacher_lm_head_weight must be \[V, H\] with H of teacher_hidden",
    ),
    (
        {"teacher_hidden": H, "teacher_lm_head_weight": W[:5]},
        "teacher_lm_head_weight has 5 rows, lm_head_weight 7: give vocab_size",
    ),
    ({"teacher_hidden": H.double(), "teacher_lm_head_weight": W.double()}, "fp64 goes with fp64 only"),
    ({"teacher_hidden": H, "teacher_lm_head_weight": W, "chunk_tokens": 0}, "chunk_tokens must be >= 1"),
    (
        {"teacher_ids": IDS, "teacher_logps": LOGPS, "teacher_lm_head_bias": W[:, 0]},
        "teacher_lm_head_bias is given without teacher_hidden",
    ),
]


@pytest.mark.parametrize("options, message", WRONG_HIDDEN, ids=[x[1][:40] for x in WRONG_HIDDEN])
def test_from_hidden_states(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(H, W, **options)


def test_packed_sequences_need_their_lengths() -> None:
    with pytest.raises(
        ValueError, match="aggregation 'seq-mean-token-mean' on a packed batch needs seq_lens"
    ):
        distillation_loss(Z[0], teacher_logits=T[0], aggregation="seq-mean-token-mean")


def test_debug_names_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    bad = T.clone()
    bad[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="teacher_logits"):
        distillation_loss(Z, teacher_logits=bad)
    with pytest.raises(ValueError, match="teacher_ids"):
        distillation_loss(Z, teacher_ids=IDS + 7, teacher_logps=LOGPS)
