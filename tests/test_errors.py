"""Every wrong input raises at the call, before the logits are read, naming the argument and what it held."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    GRPOLoss,
    ImportanceRatio,
    LinearGRPOLoss,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    linear_grpo_loss,
    log_ratio_loss,
    policy_loss,
    selective_logps,
)
from grpo_kernels.names import PRESET_NAMES

B, T, V = 2, 3, 7  # a padded batch
N, S = 5, 2  # a packed one


def zeros(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(shape, **how)


def ids(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(shape, **{"dtype": torch.int64, **how})


def lengths(*values: float) -> Tensor:
    return torch.tensor(values)


def padded(**changes: Any) -> Any:
    given = {
        "logits": zeros(B, T, V),
        "completion_ids": ids(B, T),
        "advantages": zeros(B),
        "spec": LossSpec(),
    }
    return grpo_loss(**{**given, **changes})


def packed(**changes: Any) -> Any:
    given = {"logits": zeros(N, V), "completion_ids": ids(N), "advantages": zeros(N), "spec": LossSpec()}
    return grpo_loss(**{**given, **changes})


def logps(**changes: Any) -> Any:
    return selective_logps(**{"logits": zeros(B, T, V), "ids": ids(B, T), **changes})


def spec(**fields: Any) -> dict[str, LossSpec]:
    return {"spec": LossSpec(**fields)}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the logits were read")

    for name in ("row_stats", "fused_loss"):
        monkeypatch.setattr(f"grpo_kernels.backend.{name}", refuse)


def check(call: Callable[..., Any], changes: dict[str, Any], error: type[Exception], *parts: str) -> None:
    """The message starts with the first of `parts` and holds the others in their order."""
    with pytest.raises(error, match="^" + ".*".join(map(re.escape, parts))):
        call(**changes)


def case(call: Callable[..., Any], changes: dict[str, Any], *parts: str) -> Any:
    named = "-".join(
        f"{name}={value}" for name, value in changes.items() if not isinstance(value, Tensor | LossSpec)
    )
    return pytest.param(call, changes, parts, id=f"{call.__name__}-{named or '-'.join(changes)}")


def test_the_calls_are_right_before_their_changes() -> None:
    for call in (padded, packed, logps):
        call()
    packed(seq_lens=lengths(2, 3), advantages=zeros(S), temperature=zeros(S) + 1)


PER_TOKEN = {
    "completion_ids": "(2, 3), as logits (2, 3, 7)",
    "completion_mask": "(2, 3)",
    "ref_logps": "(2, 3)",
    "old_logps": "(2, 3)",
    "token_weights": "(2, 3) or (2, 1) or (2,)",
    "advantages": "(2, 3) or (2, 1) or (2,)",
    "temperature": "(2, 3) or (2, 1) or (2,)",
}


@pytest.mark.usefixtures("nothing_runs")
class TestTensors:
    @pytest.mark.parametrize("name", PER_TOKEN)
    @pytest.mark.parametrize("shape", [(B, T + 1), (B + 1, T), (B, T, 1), (1,), ()], ids=str)
    def test_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name == "temperature" and shape == ():
            return  # one temperature for all
        value = ids(*shape) if name == "completion_ids" else zeros(*shape)
        check(padded, {name: value}, ValueError, f"{name} must have shape {PER_TOKEN[name]}", f"got {shape}")

    @pytest.mark.parametrize("name", [*PER_TOKEN, "ref_logits"])
    def test_device(self, name: str) -> None:
        shape = (B, T, V) if name == "ref_logits" else (B, T)
        value = ids(*shape, device="meta") if name == "completion_ids" else zeros(*shape, device="meta")
        check(padded, {name: value}, ValueError, f"{name} is on meta, logits on cpu")

    @pytest.mark.parametrize(
        "name", [*(name for name in PER_TOKEN if name != "temperature"), "logits", "ref_logits"]
    )
    @pytest.mark.parametrize("value", [[1.0], "x", 1])
    def test_no_tensor(self, name: str, value: Any) -> None:
        check(padded, {name: value}, TypeError, f"{name} must be a tensor, got {type(value).__name__}")

    @pytest.mark.parametrize(
        "call, changes, parts",
        [
            case(
                padded,
                {"logits": zeros(B, T, V, 1)},
                "logits must be [B, T, V] or packed [N, V]",
                "(2, 3, 7, 1)",
            ),
            case(padded, {"logits": zeros(V)}, "logits must be [B, T, V] or packed [N, V]", "(7,)"),
            case(padded, {"logits": zeros(B, T, 0)}, "vocab_size must be between 1 and the 0 columns"),
            case(padded, {"logits": ids(B, T, V)}, "logits must be fp16, bf16, fp32 or fp64", "int64"),
            case(
                padded,
                {"logits": zeros(B, V, T).mT},
                "logits must have stride 1 along the vocabulary",
                "(21, 1, 3)",
            ),
            case(
                padded, {"ref_logits": zeros(B, T, V + 1)}, "ref_logits", "logits (2, 3, 7)", "got (2, 3, 8)"
            ),
            case(padded, {"ref_logits": zeros(B, V)}, "ref_logits", "logits (2, 3, 7)", "got (2, 7)"),
            case(padded, {"ref_logits": zeros(B, V, T).mT}, "ref_logits must have stride 1", "(21, 1, 3)"),
            case(
                padded, {"ref_logits": ids(B, T, V)}, "ref_logits must be fp16, bf16, fp32 or fp64", "int64"
            ),
            case(
                padded,
                {"ref_logits": zeros(B, T, V).double()},
                "ref_logits is torch.float64",
                "torch.float32",
            ),
            case(
                padded,
                {"ref_logits": zeros(B, T, 5), "vocab_size": 6},
                "ref_logits has 5 columns",
                "fewer than the 6",
            ),
            case(padded, {"completion_ids": zeros(B, T)}, "completion_ids must be int32 or int64", "float32"),
            case(
                padded,
                {"completion_ids": ids(B, T).short()},
                "completion_ids must be int32 or int64",
                "int16",
            ),
            *(
                case(padded, {name: zeros(B, T, dtype=torch.complex64)}, f"{name} must be real", "complex64")
                for name in PER_TOKEN
                if name != "completion_ids"
            ),
            case(logps, {"ids": ids(B, T + 1)}, "ids must have shape (2, 3), as logits (2, 3, 7)", "(2, 4)"),
            case(logps, {"ids": zeros(B, T)}, "ids must be int32 or int64", "float32"),
            case(logps, {"mask": zeros(B)}, "mask must have shape (2, 3)", "(2,)"),
            case(logps, {"mask": zeros(B, T, device="meta")}, "mask is on meta, logits on cpu"),
            case(logps, {"temperature": zeros(T)}, "temperature must have shape (2, 3)", "(3,)"),
        ],
    )
    def test_others(self, call: Callable[..., Any], changes: dict[str, Any], parts: tuple[str, ...]) -> None:
        check(call, changes, ValueError, *parts)


@pytest.mark.usefixtures("nothing_runs")
class TestNumbers:
    @pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf])
    @pytest.mark.parametrize(
        "name", ["temperature", "logit_scale", "logit_softcap", "ref_logit_scale", "ref_logit_softcap"]
    )
    def test_positive(self, name: str, value: float) -> None:
        check(padded, {name: value}, ValueError, f"{name} must be finite and > 0, got {value!r}")

    @pytest.mark.parametrize("value", ["1", True, [1.0]])
    @pytest.mark.parametrize(
        "name", ["temperature", "logit_scale", "logit_softcap", "normalizer", "vocab_size"]
    )
    def test_no_number(self, name: str, value: Any) -> None:
        check(padded, {name: value}, TypeError, f"{name} must be a", f"got {value!r}")

    @pytest.mark.parametrize("call", [padded, logps])
    @pytest.mark.parametrize("value", [0, -1, V + 1])
    def test_vocab_size(self, call: Callable[..., Any], value: int) -> None:
        bound = f"between 1 and the {V} columns" if value > V else ">= 1"
        check(call, {"vocab_size": value}, ValueError, f"vocab_size must be {bound}", f"got {value}")

    @pytest.mark.parametrize("value", [math.nan, math.inf, zeros(2)])
    def test_normalizer(self, value: Any) -> None:
        got = "(2,)" if isinstance(value, Tensor) else f"{value}"
        check(
            padded,
            {"normalizer": value},
            ValueError,
            "normalizer must be",
            f"got {'shape ' * (got == '(2,)')}{got}",
        )


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
                for name in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
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


@pytest.mark.usefixtures("nothing_runs")
class TestChoices:
    @pytest.mark.parametrize("value", ["cuda", None, ""])
    def test_backend(self, value: Any) -> None:
        for call in (padded, logps):
            check(
                call,
                {"backend": value},
                ValueError,
                "backend must be one of 'auto', 'triton', 'torch'",
                f"{value!r}",
            )

    @pytest.mark.parametrize("value", [PPOClip(), PPOClip, LossSpec, None, 1])
    def test_spec_of_another_type(self, value: Any) -> None:
        check(
            padded, {"spec": value}, TypeError, "spec must be a LossSpec or the name of a preset", repr(value)
        )
        check(
            GRPOLoss,
            {"spec": value},
            TypeError,
            "spec must be a LossSpec or the name of a preset",
            repr(value),
        )

    def test_unknown_preset(self) -> None:
        for call in (padded, GRPOLoss):
            check(call, {"spec": "gppo"}, ValueError, "spec must be one of", "'dapo'", "got 'gppo'")

    def test_a_preset_by_name_that_needs_max_tokens(self) -> None:
        for call in (padded, GRPOLoss, LinearGRPOLoss):
            check(
                call,
                {"spec": "dr_grpo"},
                ValueError,
                "preset 'dr_grpo' divides by max_tokens",
                "LossSpec.preset('dr_grpo', max_tokens=...)",
            )

    def test_unknown_options(self) -> None:
        listed = "The options are ", "ref_logits", "temperature"
        check(GRPOLoss, {"temprature": 1.0}, TypeError, "GRPOLoss has no option temprature. ", *listed)
        check(
            LinearGRPOLoss,
            {"temprature": 1.0, "x": 2},
            TypeError,
            "LinearGRPOLoss has no option temprature, x. The options are lm_head_bias, ",
            "chunk_tokens",
        )
        at_the_call = {"logits": zeros(B, T, V), "completion_ids": ids(B, T), "advantages": zeros(B)}
        check(GRPOLoss(), {**at_the_call, "maskk": 1}, TypeError, "GRPOLoss has no option maskk. ", *listed)
        of_the_loss = "GRPOLoss has no option eps_high, kl: options of the loss go into its spec, "
        for where, preset in (({"spec": "dapo"}, "'dapo'"), ({"spec": LossSpec()}, "name"), ({}, "name")):
            given = {**where, "eps_high": 0.3, "kl": None}
            advice = f"{of_the_loss}LossSpec.preset({preset}, eps_high=..., kl=...). "
            check(GRPOLoss, given, TypeError, advice, *listed)
            check(GRPOLoss(), {**at_the_call, **given}, TypeError, advice, *listed)
        check(
            padded,
            {"temprature": 1.0},
            TypeError,
            "grpo_loss() got an unexpected keyword argument 'temprature'",
        )
        fixed = {
            "logits": zeros(B, T, V),
            "ref_logits": zeros(B, T, V),
            "completion_ids": ids(B, T),
            "rewards": zeros(B),
        }
        check(log_ratio_loss, {**fixed, "spec": "grpo"}, TypeError, "log_ratio_loss has a fixed spec")
        check(
            log_ratio_loss,
            {**fixed, "aggregation": "mean"},
            ValueError,
            "aggregation must be one of",
            "'mean'",
        )


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


class TestConstruction:
    @pytest.mark.parametrize(
        "make, parts",
        ids=lambda x: x[0] if isinstance(x, list) else "",
        argvalues=[
            (lambda: LossSpec(None), ["surrogate and kl are both None"]),
            (lambda: LossSpec(level="tokens"), ["level must be one of 'token'", "got 'tokens'"]),
            (lambda: LossSpec(aggregation="mean"), ["aggregation must be one of 'token-mean'", "got 'mean'"]),
            (
                lambda: LossSpec(aggregation="seq-mean-token-sum-norm"),
                [
                    "aggregation 'seq-mean-token-sum-norm' divides by max_tokens",
                    "LossSpec(..., max_tokens=...)",
                ],
            ),
            (
                lambda: LossSpec.preset("dr_grpo"),
                ["preset 'dr_grpo' divides by max_tokens", "LossSpec.preset('dr_grpo', max_tokens=...)"],
            ),
            (
                lambda: LossSpec.preset("grpo", aggregation="seq-mean-token-sum-norm"),
                ["preset 'grpo' divides by max_tokens", "LossSpec.preset('grpo', max_tokens=...)"],
            ),
            (lambda: LossSpec(max_tokens=0), ["max_tokens must be >= 1, got 0"]),
            (lambda: LossSpec(entropy_coef=math.nan), ["entropy_coef must be finite", "got nan"]),
            (lambda: LossSpec(entropy_coef=-math.inf), ["entropy_coef must be finite", "got -inf"]),
            (lambda: LossSpec(log_ratio_clamp=0), ["log_ratio_clamp must be finite and > 0, got 0"]),
            (lambda: KL("k4"), ["KL.kind must be one of 'k1'", "'exact_forward', got 'k4'"]),
            (lambda: KL(beta=-1), ["KL.beta must be finite and >= 0, got -1"]),
            (lambda: KL(beta=math.inf), ["KL.beta must be finite and >= 0, got inf"]),
            (lambda: KL(clamp=0), ["KL.clamp must be finite and > 0, got 0"]),
            (lambda: KL(output_clamp=-1), ["KL.output_clamp must be finite and > 0, got -1"]),
            (lambda: KL("exact", clamp=1.0), ["KL('exact')", "clamp", "do not apply", "clamp=1.0"]),
            (
                lambda: KL("exact_forward", ratio_corrected=True),
                ["KL('exact_forward')", "ratio_corrected=True"],
            ),
            (lambda: PPOClip(eps_low=-0.1), ["PPOClip.eps_low must be finite and >= 0, got -0.1"]),
            (lambda: PPOClip(eps_high=math.nan), ["PPOClip.eps_high must be finite and >= 0, got nan"]),
            (lambda: PPOClip(delta=0), ["PPOClip.delta must be finite and > 0, got 0"]),
            (lambda: PPOClip(dual_clip=1.0), ["PPOClip.dual_clip must be finite and > 1, got 1.0"]),
            (
                lambda: ImportanceRatio("new"),
                ["ImportanceRatio.anchor must be one of 'old', 'ref', got 'new'"],
            ),
            (
                lambda: ImportanceRatio(max_ratio=0),
                ["ImportanceRatio.max_ratio must be finite and > 0, got 0"],
            ),
            (lambda: CISPO(ratio_max=0), ["CISPO.ratio_max must be finite and > 0, got 0"]),
            (lambda: CISPO(1.0, ratio_min=2), ["CISPO.ratio_max must be finite and > 2, got 1.0"]),
            (lambda: SAPO(tau_pos=0), ["SAPO.tau_pos must be finite and > 0, got 0"]),
            (lambda: SAPO(tau_neg=math.nan), ["SAPO.tau_neg must be finite and > 0, got nan"]),
            (lambda: DRO(beta=0), ["DRO.beta must be finite and > 0, got 0"]),
            (lambda: DRO(0.1, anchor="new"), ["DRO.anchor must be one of 'old', 'ref', got 'new'"]),
            (lambda: DPPO("js"), ["DPPO.kind must be one of 'tv', 'kl', got 'js'"]),
            (lambda: DPPO(low=-1), ["DPPO.low must be finite and >= 0, got -1"]),
            (lambda: DPPO(ratio_cap=0), ["DPPO.ratio_cap must be finite and > 0, got 0"]),
            (lambda: VESPO(k_neg=-1), ["VESPO.k_neg must be finite and >= 0, got -1"]),
            (lambda: GMPO(eps_high=math.inf), ["GMPO.eps_high must be finite and >= 0, got inf"]),
            (
                lambda: LossSpec(Reinforce(), level="sequence"),
                ["Reinforce takes level 'token', got 'sequence'"],
            ),
            (lambda: LossSpec(VESPO(), level="sequence"), ["VESPO takes level 'token', got 'sequence'"]),
            (
                lambda: LossSpec(DRO(0.1), level="sequence-token"),
                ["DRO takes level 'token' or 'sequence', got 'sequence-token'"],
            ),
            (
                lambda: LossSpec(DRO(0.1), level="sequence", log_ratio_clamp=1.0),
                ["log_ratio_clamp does not apply to DRO at level 'sequence'"],
            ),
            (lambda: LossSpec(max, level="sequence"), ["level 'sequence'", "a callable forms its own ratio"]),
            (lambda: LossSpec.preset("gppo"), ["preset must be one of", "'grpo'", "got 'gppo'"]),
            (
                lambda: LossSpec.preset("grpo", eps=1),
                [
                    "preset 'grpo' has no option eps. The options of LossSpec.preset('grpo', ...) are ",
                    "eps_low, ",
                    "dual_clip, surrogate, kl, level, ",
                    "log_ratio_clamp",
                ],
            ),
            (lambda: LossSpec.preset("reinforce", eps_low=0.1), ["preset 'reinforce' has no option eps_low"]),
            (
                lambda: LossSpec.preset("grpo", eps_low=-1),
                ["PPOClip.eps_low must be finite and >= 0, got -1"],
            ),
            (
                lambda: LossSpec.preset("grpo", surrogate=Reinforce(), eps_low=0.1),
                ["preset 'grpo'", "eps_low"],
            ),
        ],
    )
    def test_value(self, make: Callable[[], Any], parts: list[str]) -> None:
        check(make, {}, ValueError, *parts)

    @pytest.mark.parametrize(
        "make, parts",
        ids=lambda x: x[0] if isinstance(x, list) else "",
        argvalues=[
            (lambda: CISPO(ratio_max=None), ["CISPO.ratio_max must be a number, got None"]),
            (lambda: LossSpec(PPOClip), ["surrogate must be an instance: PPOClip(), not the class"]),
            (lambda: LossSpec(3), ["surrogate must be a surrogate, a callable or None, got 3"]),
            (lambda: LossSpec(KL()), ["surrogate must be", "KL(kind='k3'"]),
            (lambda: LossSpec(kl=KL), ["kl must be a KL or None", "KL"]),
            (lambda: LossSpec(kl="k3"), ["kl must be a KL or None, got 'k3'"]),
            (lambda: LossSpec(max_tokens=2.5), ["max_tokens must be an integer, got 2.5"]),
            (lambda: LossSpec(entropy_coef="a"), ["entropy_coef must be a number, got 'a'"]),
            (lambda: KL(beta=None), ["KL.beta must be a number, got None"]),
            (lambda: KL(ratio_corrected="no"), ["KL.ratio_corrected must be", "got 'no'"]),
            (lambda: KL(straight_through=1), ["KL.straight_through must be", "got 1"]),
            (lambda: PPOClip(0.2, True), ["PPOClip.eps_high must be a number, got True"]),
            (lambda: PPOClip(dual_clip="3"), ["PPOClip.dual_clip must be a number or None, got '3'"]),
        ],
    )
    def test_type(self, make: Callable[[], Any], parts: list[str]) -> None:
        check(make, {}, TypeError, *parts)

    def test_every_preset(self) -> None:
        """Those that the documentation names; each can be built anew, and its numbers replaced."""
        names = (
            "log_ratio importance_ratio grpo bnpo dapo dr_grpo cispo sapo gspo gspo_token luspo vespo gmpo "
        )
        names += "reinforce dro dppo_tv dppo_kl opmd"
        assert set(PRESET_NAMES) == set(names.split())
        for name in PRESET_NAMES:
            preset = LossSpec.preset(name, max_tokens=5)
            numbers = {f.name: getattr(preset.surrogate, f.name) for f in fields(preset.surrogate)}
            assert LossSpec.preset(name, max_tokens=5, **numbers) == preset
        assert LossSpec.preset("dapo", eps_low=0.1, eps_high=0.3).surrogate == PPOClip(0.1, 0.3)

    @pytest.mark.parametrize(
        "described", [LossSpec(), KL(), PPOClip(), LogRatio()], ids=lambda x: type(x).__name__
    )
    def test_frozen(self, described: Any) -> None:
        with pytest.raises(AttributeError):
            described.beta = 1.0
        assert hash(described) == hash(type(described)())


def test_kernels_on_cpu_tensors_without_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET once."""
    program = """
import torch, grpo_kernels
ids = torch.zeros(2, 3).long()
for call in (
    lambda **how: grpo_kernels.grpo_loss(torch.zeros(2, 3, 7), ids, torch.zeros(2), **how),
    lambda **how: grpo_kernels.selective_logps(torch.zeros(2, 3, 7), ids, **how),
):
    call()
    try:
        call(backend="triton")
    except ValueError as error:
        print(error)
"""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("backend='triton' needs GPU tensors, got logits on cpu")
        assert "TRITON_INTERPRET=1" in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logps": zeros(1, B, T)}, "logps must be [B, T] or packed [N], got shape (1, 2, 3)"),
        ({"spec": LossSpec(entropy_coef=0.1)}, "entropy_coef is 0.1: it needs entropy"),
        ({"entropy": zeros(B, T + 1)}, "entropy must have shape (2, 3), as logps, got (2, 4)"),
        ({"spec": LossSpec(kl=KL("exact")), "ref_logps": zeros(B, T)}, "KL("),
    ],
)
def test_policy_loss(changes: dict[str, Any], message: str) -> None:
    def of_logps(**changes: Any) -> Any:
        return policy_loss(**{"logps": zeros(B, T), "advantages": zeros(B), "spec": LossSpec(), **changes})

    of_logps()
    check(of_logps, changes, ValueError, message)
