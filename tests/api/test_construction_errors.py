"""A loss specification checks its own fields when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from wrong_calls import check

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    KL,
    SAPO,
    VESPO,
    ImportanceRatio,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
)
from grpo_kernels.checks.choices import PRESET_NAMES


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
            (
                lambda: LossSpec(max, level="sequence"),
                ["level 'sequence'", "a callable computes its own ratio"],
            ),
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
        """Every documented preset exists, accepts its own numbers as options, and accepts other numbers."""
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
