"""The inputs that break policy losses, from hidden states; and the arguments that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_cases import LinearCase, assert_gradients, linear_oracle, run_linear
from test_linear_paths import local_and_not, random_case

from grpo_kernels import (
    KL,
    LogRatio,
    LossSpec,
    PPOClip,
    linear_grpo_loss,
    linear_logps,
)

V, H = 128, 24


def one_token(log_ratio: float, advantage: float, device: str, **spec: Any) -> LinearCase:
    """Off the behaviour policy by `log_ratio`."""
    case = random_case(LossSpec(PPOClip(**spec)), shape=(1, 1), device=device)
    logps = run_linear(case).out.logps
    return case._replace(advantages=torch.full((1,), advantage, device=device)).with_options(
        old_logps=logps - log_ratio
    )


class TestHugeRatio:
    """exp(200) is inf in fp32, and inf * 0 is NaN."""

    def test_clipped(self, backend: str, device: str) -> None:
        got = run_linear(one_token(200.0, 1.0, device, eps_high=0.28), backend=backend)
        assert got.out.loss.item() == pytest.approx(-1.28)
        assert not any(x.any() for x in got.grads)

    def test_unbounded(self, backend: str, device: str) -> None:
        case = one_token(200.0, -1.0, device)
        assert run_linear(case, backend=backend).out.loss == math.inf
        clamped = case._replace(spec=LossSpec(PPOClip(), log_ratio_clamp=20.0))
        dual = case._replace(spec=LossSpec(PPOClip(dual_clip=3.0)))
        for case, loss in ((clamped, math.exp(20.0)), (dual, 3.0)):
            got = run_linear(case, backend=backend)
            assert got.out.loss.item() == pytest.approx(loss) and not any(x.any() for x in got.grads)

    @pytest.mark.parametrize("compact", [True, False])
    def test_no_advantage(self, compact: bool, backend: str, device: str) -> None:
        got = run_linear(one_token(200.0, 0.0, device), compact=compact, backend=backend)
        assert not got.out.loss and not any(x.any() for x in got.grads)


@local_and_not
class TestLogits:
    @pytest.mark.parametrize("words", [1, 100])
    @pytest.mark.parametrize("value", [-math.inf, -1e4, -3e38])
    def test_suppressed_words(
        self, spec: LossSpec, value: float, words: int, backend: str, device: str
    ) -> None:
        """By the bias, as trainers do it."""
        case = random_case(spec, device=device)
        bias = torch.zeros(V, device=device)
        bias[:words] = value
        case = case._replace(bias=bias, completion_ids=case.completion_ids.clamp(min=words))
        expected = linear_oracle(case)
        got = run_linear(case, backend=backend)
        torch.testing.assert_close(
            got.out.logps.double(), expected.by_logits.truth.out.logps, rtol=0, atol=1e-5
        )
        assert_gradients(got.grads, expected.eager, expected.truth, expected.terms, "")

    @pytest.mark.parametrize("shift", [-120.0, 1e4])
    def test_shifted(self, spec: LossSpec, shift: float, backend: str, device: str) -> None:
        case = random_case(spec, device=device)
        want = run_linear(case, backend=backend)
        got = run_linear(case._replace(bias=torch.full((V,), shift, device=device)), backend=backend)
        precision = torch.finfo(torch.float32).eps * abs(shift) + 1e-5
        torch.testing.assert_close(got.out.logps, want.out.logps, rtol=0, atol=precision)

    @pytest.mark.parametrize("wrong", [-100, -1, V, 2**31])
    def test_wrong_ids(
        self, spec: LossSpec, wrong: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = random_case(spec, device=device)
        case.completion_ids[1, 2] = wrong
        out = run_linear(case, backend=backend).out
        assert out.loss.isnan() and out.logps.isnan().sum() == 1 and out.logps[1, 2].isnan()
        monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
        with pytest.raises(ValueError, match=rf"completion_ids\[1, 2\] is {wrong}"):
            run_linear(case, backend=backend)

    def test_nan_surfaces(self, spec: LossSpec, backend: str, device: str) -> None:
        case = random_case(spec, device=device)
        case.hidden[1, 2, 3] = math.nan
        assert run_linear(case, backend=backend).out.loss.isnan()


@local_and_not
@pytest.mark.parametrize("compact", [True, False])
def test_everything_masked(spec: LossSpec, compact: bool, backend: str, device: str) -> None:
    case = random_case(spec, device=device)
    mask = torch.zeros_like(case.completion_ids)
    got = run_linear(case, completion_mask=mask, compact=compact, backend=backend)
    assert not got.out.loss and not any(x.any() for x in got.grads)
    assert not any(x.isnan() for x in got.out.metrics.values())


@local_and_not
def test_micro_batches(spec: LossSpec, backend: str, device: str) -> None:
    """With a common normalizer, the gradients of uneven parts add up to that of the batch."""
    case = random_case(spec, device=device).with_options(normalizer=64.0)
    want = run_linear(case, backend=backend)
    total = [torch.zeros_like(x) for x in want.grads]
    for part in (slice(0, 1), slice(1, 4)):
        got = run_linear(
            case._replace(
                hidden=case.hidden[part],
                completion_ids=case.completion_ids[part],
                advantages=case.advantages[part],
            ),
            backend=backend,
        )
        total[0][part] = got.grads[0]
        total[1] += got.grads[1]
    for x, y in zip(total, want.grads, strict=True):
        torch.testing.assert_close(x, y)


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
        "ref_lm_head_weight has 129 rows, the vocabulary 128 words",
    ),
    "reference of too small a vocabulary": (
        with_reference(ref_lm_head_weight=torch.randn(V - 9, H), vocab_size=V - 8),
        "ref_lm_head_weight has 119 rows, the vocabulary 120 words",
    ),
    "logits_dtype": ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float32 or torch.bfloat16"),
    "bf16 logits of fp32 factors": ({"logits_dtype": torch.bfloat16}, "is for factors of bf16"),
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
def test_refused(changes: dict[str, Any], message: str) -> None:
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
def test_refused_types(options: dict[str, Any]) -> None:
    case = random_case()
    arguments = (case.hidden, case.weight, case.completion_ids, case.advantages)
    with pytest.raises(TypeError, match=next(iter(options))):
        linear_grpo_loss(*arguments, **options)


def test_logps_refuses_as_the_loss_does() -> None:
    case = random_case()
    with pytest.raises(ValueError, match=r"lm_head_weight must be \[V, H\]"):
        linear_logps(case.hidden, case.weight.t(), case.completion_ids)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 16\)"):
        linear_logps(case.hidden, case.weight, case.completion_ids, mask=torch.ones(4))
