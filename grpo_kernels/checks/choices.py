"""Allowed values of string options. Each list is written once, as a `Literal` that run-time checks read."""

from __future__ import annotations

from typing import Literal, get_args

PresetName = Literal[
    "log_ratio",
    "importance_ratio",
    "reinforce",
    "grpo",
    "bnpo",
    "dapo",
    "dr_grpo",
    "cispo",
    "sapo",
    "gspo",
    "gspo_token",
    "luspo",
    "vespo",
    "gmpo",
    "dro",
    "opmd",
    "dppo_tv",
    "dppo_kl",
]
Level = Literal["token", "sequence", "sequence-token"]
Aggregation = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "prompt-mean",
]
SampledKLKind = Literal["k1", "abs", "k2", "k3"]
ExactKLKind = Literal["exact", "exact_forward"]
KLKind = Literal[SampledKLKind, ExactKLKind]
Anchor = Literal["old", "ref"]
DPPOKind = Literal["tv", "kl"]
Backend = Literal["auto", "triton", "torch"]
DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]
Rest = Literal["bucket", "drop"]
AdvantageScale = Literal["std", "batch", "none"]
AdvantageEstimator = Literal[
    "grpo", "opo", "maxrl", "gpg", "grpo_passk", "reinforce_plus_plus_baseline", "gdpo"
]
WeightLevel = Literal["token", "sequence", "geometric"]
WeightMode = Literal["truncate", "mask"]
MismatchStatistic = Literal["k1", "k2", "k3", "abs", "tv"]
StatisticOver = Literal["token", "sequence-mean", "sequence-sum", "sequence-max"]

PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)
LEVELS: tuple[Level, ...] = get_args(Level)
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
SAMPLED_KL: tuple[SampledKLKind, ...] = get_args(SampledKLKind)
EXACT_KL: tuple[ExactKLKind, ...] = get_args(ExactKLKind)
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)
DPPO_KINDS: tuple[DPPOKind, ...] = get_args(DPPOKind)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DIVERGENCES: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
RESTS: tuple[Rest, ...] = get_args(Rest)
ADVANTAGE_SCALES: tuple[AdvantageScale, ...] = get_args(AdvantageScale)
ADVANTAGE_ESTIMATORS: tuple[AdvantageEstimator, ...] = get_args(AdvantageEstimator)
WEIGHT_LEVELS: tuple[WeightLevel, ...] = get_args(WeightLevel)
WEIGHT_MODES: tuple[WeightMode, ...] = get_args(WeightMode)
MISMATCH_STATISTICS: tuple[MismatchStatistic, ...] = get_args(MismatchStatistic)
STATISTIC_OVERS: tuple[StatisticOver, ...] = get_args(StatisticOver)
