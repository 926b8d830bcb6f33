"""Missing arguments, and arguments that contradict others, raise before the logits are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_calls import PER_TOKEN, B, N, S, T, V, case, check, ids, lengths, packed, padded, spec, zeros

from grpo_kernels import KL, ImportanceRatio, LogRatio, LossSpec, linear_grpo_loss, policy_loss

REFERENCE = "needs a reference: give ref_logits or ref_logps"


@pytest.mark.usefixtures("nothing_runs")
class TestCompanions:
    @pytest.mark.parametrize(
        "call, changes, parts",
        [
            case(padded, spec(surrogate=LogRatio()), "LogRatio()", REFERENCE),
            case(
                padded,
                spec(surrogate=ImportanceRatio(anchor="ref")),
                "ImportanceRatio(anchor='ref'",
                REFERENCE,
            ),
            case(padded, spec(kl=KL("k2")), "KL(kind='k2'", REFERENCE),
            case(padded, spec(kl=KL("exact")), "KL('exact')", "needs ref_logits"),
            case(
                padded,
                {"ref_logps": zeros(B, T), **spec(kl=KL("exact_forward"))},
                "KL('exact_forward')",
                "ref_logits",
            ),
            case(
                padded,
                {"ref_logits": zeros(B, T, V), "ref_logps": zeros(B, T)},
                "ref_logits and ref_logps are both given",
            ),
            case(
                packed,
                spec(level="sequence"),
                "PPOClip at level 'sequence' on a packed batch",
                "seq_lens",
            ),
            case(packed, {"spec": "vespo"}, "VESPO at level 'token' on a packed batch needs seq_lens"),
            case(
                packed,
                {"advantages": zeros(S)},
                "advantages must have shape (5,)",
                "with seq_lens",
                "got (2,)",
            ),
            case(
                packed,
                {"temperature": zeros(S)},
                "temperature must have shape (5,)",
                "with seq_lens",
                "got (2,)",
            ),
            *(
                case(
                    packed,
                    spec(aggregation=name, max_tokens=5),
                    f"aggregation '{name}' on a packed batch needs seq_lens",
                )
                for name in (
                    "seq-mean-token-mean",
                    "seq-mean-token-sum",
                    "seq-mean-token-sum-norm",
                    "prompt-mean",
                )
            ),
            case(
                packed,
                {"normalizer": 2.0, "prompt_ids": lengths(1, 1), **spec(aggregation="prompt-mean")},
                "aggregation 'prompt-mean' on a packed batch needs seq_lens",
            ),
            case(
                padded,
                {"normalizer": 2.0, **spec(aggregation="prompt-mean")},
                "aggregation 'prompt-mean' needs prompt_ids",
            ),
            case(
                packed,
                {"seq_lens": lengths(2, 3), **spec(aggregation="prompt-mean")},
                "aggregation 'prompt-mean' needs prompt_ids",
            ),
            case(
                packed,
                {"normalizer": 2.0, **spec(aggregation="seq-mean-token-mean")},
                "aggregation 'seq-mean-token-mean' on a packed batch needs seq_lens",
            ),
        ],
    )
    def test_missing(self, call: Callable[..., Any], changes: dict[str, Any], parts: tuple[str, ...]) -> None:
        check(call, changes, ValueError, *parts)

    @pytest.mark.parametrize(
        "call, prompt_ids, message",
        [
            (padded, ids(B, T), "of shape (2,), got torch.int64 of shape (2, 3)"),
            (padded, ids(B, 1), "of shape (2,), got torch.int64 of shape (2, 1)"),
            (padded, ids(B + 1), "of shape (2,), got torch.int64 of shape (3,)"),
            (padded, zeros(B), "of shape (2,), got torch.float32 of shape (2,)"),
            (padded, zeros(B, dtype=torch.bool), "of shape (2,), got torch.bool of shape (2,)"),
            (packed, ids(N), "of shape (2,), got torch.int64 of shape (5,)"),
        ],
    )
    def test_prompt_ids(self, call: Callable[..., Any], prompt_ids: Tensor, message: str) -> None:
        changes = {"prompt_ids": prompt_ids, **spec(aggregation="prompt-mean")}
        changes |= {"seq_lens": lengths(2, 3)} if call is packed else {}
        check(call, changes, ValueError, f"prompt_ids must be integers {message}")

    def test_prompt_ids_elsewhere(self) -> None:
        of_prompts = spec(aggregation="prompt-mean")
        for value, error, message in (
            (ids(B, device="meta"), ValueError, "prompt_ids is on meta, logits on cpu"),
            ([0, 0], TypeError, "prompt_ids must be a tensor, got list"),
        ):
            check(padded, {"prompt_ids": value, **of_prompts}, error, message)

    def test_zero_beta_needs_no_reference(self) -> None:
        with pytest.raises(AssertionError, match="the logits were read"):
            padded(spec=LossSpec(kl=KL("exact", beta=0.0)))

    @pytest.mark.parametrize(
        "call, changes, parts",
        [
            case(
                padded, {"seq_lens": lengths(1, 1)}, "seq_lens belongs to packed logits [N, ...]", "(2, 3, 7)"
            ),
            case(packed, {"seq_lens": lengths(2, 2)}, "seq_lens must", "sum to N = 5", "got", "4"),
            case(packed, {"seq_lens": lengths(6, -1)}, "seq_lens must be non-negative", "got", "-1"),
            case(packed, {"seq_lens": lengths(2.0, 3.0)}, "seq_lens must be [S] integers", "float32"),
            case(packed, {"seq_lens": lengths(2, 3)[None]}, "seq_lens must be [S] integers", "(1, 2)"),
            case(
                packed,
                {"seq_lens": lengths(2, 3), "advantages": zeros(3)},
                "advantages must have shape (5,) or (2,), got (3,)",
            ),
        ],
    )
    def test_seq_lens(
        self, call: Callable[..., Any], changes: dict[str, Any], parts: tuple[str, ...]
    ) -> None:
        check(call, changes, ValueError, *parts)

    @pytest.mark.parametrize(
        "changes, parts",
        [
            ({}, ["seq_lens belongs to packed logits [N, ...]", "(1, 5, 7): pass logits.squeeze(0)"]),
            ({"completion_ids": ids(N)}, ["seq_lens belongs to packed logits", "squeeze(0)"]),
            ({"logits": zeros(N, V)}, ["completion_ids must have shape (5,)", "got (1, 5)", "squeeze(0)"]),
        ],
    )
    def test_padding_free(self, changes: dict[str, Any], parts: list[str]) -> None:
        """Hugging Face's padding-free batches are `[1, N, ...]`."""
        given = {"logits": zeros(1, N, V), "completion_ids": ids(1, N), "seq_lens": lengths(2, 3)}
        check(packed, {**given, **changes}, ValueError, *parts)

    @pytest.mark.parametrize("name", PER_TOKEN)
    def test_padding_free_per_token(self, name: str) -> None:
        value = ids(1, N) if name == "completion_ids" else zeros(1, N)
        check(packed, {name: value}, ValueError, f"{name} must have shape (5,)", "got (1, 5); squeeze(0)")

    def test_padding_free_elsewhere(self) -> None:
        """Hidden states, log-probabilities, entropies and references."""
        head = {"lm_head_weight": zeros(V, 4), "advantages": zeros(N), "completion_ids": ids(N)}
        for call, changes, parts in (
            (
                linear_grpo_loss,
                {**head, "hidden": zeros(1, N, 4), "seq_lens": lengths(2, 3)},
                ["seq_lens belongs to packed hidden", "(1, 5, 4): pass hidden.squeeze(0)"],
            ),
            (
                linear_grpo_loss,
                {
                    **{**head, "hidden": zeros(N, 4), "spec": LossSpec()},
                    **{"ref_hidden": zeros(1, N, 4), "ref_lm_head_weight": zeros(V, 4)},
                },
                ["ref_hidden must have the leading shape", "got (1, 5, 4); squeeze(0)"],
            ),
            (
                policy_loss,
                {"logps": zeros(1, N), "advantages": zeros(2), "seq_lens": lengths(2, 3)},
                ["seq_lens belongs to packed logps", "pass logps.squeeze(0)"],
            ),
            (
                policy_loss,
                {"logps": zeros(N), "advantages": zeros(N), "entropy": zeros(1, N), "spec": LossSpec()},
                ["entropy must have shape (5,)", "got (1, 5); squeeze(0)"],
            ),
            (packed, {"ref_logits": zeros(1, N, V)}, ["ref_logits must be shaped", "(1, 5, 7); squeeze(0)"]),
        ):
            check(call, changes, ValueError, *parts)

    def test_seq_lens_of_another_type(self) -> None:
        check(packed, {"seq_lens": [2, 3]}, TypeError, "seq_lens must be a tensor, got list")


@pytest.mark.parametrize(
    "values",
    [lambda *args: zeros(B), lambda *args: zeros(B, T, 1), lambda *args: 0.0],
    ids=["[B]", "[B, T, 1]", "float"],
)
def test_callable_of_the_wrong_shape(values: Callable[..., Any]) -> None:
    got = values()
    shape = str(tuple(got.shape)) if isinstance(got, Tensor) else "0.0"
    check(
        padded, spec(surrogate=values), ValueError, "the callable surrogate", f"shape {(B, T)}, got {shape}"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logps": zeros(1, B, T)}, "logps must be [B, T] or packed [N], got shape (1, 2, 3)"),
        ({"spec": LossSpec(entropy_coef=0.1)}, "entropy_coef is 0.1, which needs entropy"),
        ({"entropy": zeros(B, T + 1)}, "entropy must have shape (2, 3), as logps, got (2, 4)"),
        ({"spec": LossSpec(kl=KL("exact")), "ref_logps": zeros(B, T)}, "KL("),
    ],
)
def test_policy_loss(changes: dict[str, Any], message: str) -> None:
    def of_logps(**changes: Any) -> Any:
        return policy_loss(**{"logps": zeros(B, T), "advantages": zeros(B), "spec": LossSpec(), **changes})

    of_logps()
    check(of_logps, changes, ValueError, message)
