"""Published losses by name, as a surrogate, a level and an aggregation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from ..checks.choices import Aggregation, Anchor, DPPOKind, Level, PresetName
from .kl import KL
from .surrogates import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    SAPO,
    VESPO,
    ImportanceRatio,
    LogRatio,
    PPOClip,
    Reinforce,
    Surrogate,
)


class PresetOptions(TypedDict, total=False):
    """The options of `LossSpec.preset`: the fields of LossSpec and of all surrogates."""

    surrogate: Surrogate | Callable[..., Tensor] | None
    kl: KL | None
    level: Level
    aggregation: Aggregation
    max_tokens: int | None
    entropy_coef: float
    log_ratio_clamp: float | None
    eps_low: float
    eps_high: float
    delta: float | None
    dual_clip: float | None
    ratio_min: float
    ratio_max: float
    max_ratio: float | None
    anchor: Anchor
    tau_pos: float
    tau_neg: float
    beta: float
    kind: DPPOKind
    low: float
    high: float
    ratio_cap: float | None
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


# GSPO's ratio comes from a sequence's mean log-ratio, hence the narrow bounds (arXiv:2507.18071v2, section
# 5.1).
GSPO_CLIP = PPOClip(eps_low=3e-4, eps_high=4e-4)

# Each value has fields of a LossSpec. It is not a LossSpec, because "dr_grpo" still needs `max_tokens`.
PRESETS: dict[PresetName, dict[str, Any]] = {
    "log_ratio": {"surrogate": LogRatio()},
    "importance_ratio": {"surrogate": ImportanceRatio()},
    "reinforce": {"surrogate": Reinforce()},
    "grpo": {"surrogate": PPOClip(), "aggregation": "seq-mean-token-mean"},
    "bnpo": {"surrogate": PPOClip()},
    "dapo": {"surrogate": PPOClip(eps_low=0.2, eps_high=0.28)},
    "dr_grpo": {"surrogate": PPOClip(), "aggregation": "seq-mean-token-sum-norm"},
    "cispo": {"surrogate": CISPO(ratio_max=5.0)},
    "sapo": {"surrogate": SAPO(), "aggregation": "seq-mean-token-mean"},
    "gspo": {"surrogate": GSPO_CLIP, "level": "sequence", "aggregation": "seq-mean-token-mean"},
    "gspo_token": {"surrogate": GSPO_CLIP, "level": "sequence-token", "aggregation": "seq-mean-token-mean"},
    "luspo": {"surrogate": GSPO_CLIP, "level": "sequence", "aggregation": "seq-mean-token-sum"},
    "vespo": {"surrogate": VESPO()},
    "gmpo": {"surrogate": GMPO(), "aggregation": "seq-mean-token-mean"},
    "dro": {"surrogate": DRO(beta=0.1)},
    "opmd": {
        "surrogate": DRO(beta=0.1, anchor="ref"),
        "level": "sequence",
        "aggregation": "seq-mean-token-sum",
    },
    "dppo_tv": {"surrogate": DPPO("tv")},
    "dppo_kl": {"surrogate": DPPO("kl")},
}
