"""The built-in surrogates: frozen descriptions that check themselves. No tensors, no mathematics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .checks import check_choice, number_field
from .names import ANCHORS, DPPO_KINDS, LEVELS, Anchor, DPPOKind, Level


class Surrogate:
    """Base of the built-in surrogates: what the objective and the kernels need to know of each."""

    anchor: Anchor | None = None
    """Which log-probabilities the log-ratio is taken against: "old", "ref" or None."""
    uses_ratio = False
    """Whether the loss depends on the ratio itself (a REINFORCE-like loss only depends on `logp`)."""
    levels: tuple[Level, ...] = ("token",)
    """Where its ratio may be formed."""
    couples_tokens = False
    """Whether a token's loss depends on other tokens of its sequence, whatever the level."""
    rests_at_zero = True
    """Whether a token without advantage has neither loss nor gradient."""

    statement: str
    """Its formula's name in `objective.py` and, where tokens are not coupled, `kernels/device.py`."""

    @property
    def params(self) -> tuple[float, ...]:
        """The numbers of this surrogate, in the order of its statements; an absent bound is infinite."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(
            math.inf if value is None else float(value) for value in values if not isinstance(value, str)
        )


@dataclass(frozen=True)
class LogRatio(Surrogate):
    """`-A * (logp - ref_logp)`: the reward-weighted log-ratio to the reference. Needs a reference."""

    anchor = "ref"
    statement = "log_ratio"


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """`-A * logp`: the score-function estimator (Williams, 1992)."""

    statement = "reinforce"


@dataclass(frozen=True)
class ImportanceRatio(Surrogate):
    """`-A * min(ratio, max_ratio)`, `ratio = exp(logp - anchor)`.

    `anchor="old"`: the samples came from the behaviour policy; `"ref"`: from the reference model, which makes
    it an off-policy estimate from a fixed data set. Above `max_ratio` the token has no gradient.
    """

    anchor: Anchor = "old"
    max_ratio: float | None = None
    statement = "importance_ratio"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        check_choice("ImportanceRatio.anchor", self.anchor, ANCHORS)
        number_field(self, "max_ratio", strict=True, optional=True)


@dataclass(frozen=True)
class PPOClip(Surrogate):
    """`-min(min(ratio, delta) * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)` (PPO, arXiv:1707.06347).

    `delta` bounds the unclipped ratio, which matters for negative advantages (two-sided clipping,
    INTELLECT-2, arXiv:2505.07291); `dual_clip` bounds their loss at `-dual_clip * A` (arXiv:1912.09729).
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    anchor = "old"
    statement = "ppo_clip"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "eps_low")
        number_field(self, "eps_high")
        number_field(self, "delta", strict=True, optional=True)
        number_field(self, "dual_clip", low=1.0, strict=True, optional=True)


@dataclass(frozen=True)
class CISPO(Surrogate):
    """`-sg(clip(ratio, ratio_min, ratio_max)) * A * logp` (MiniMax-M1, arXiv:2506.13585).

    The bounds are ratios themselves, not offsets from 1: 1.28, not 0.28. Clipped tokens keep their gradient.
    """

    ratio_max: float
    ratio_min: float = 0.0
    anchor = "old"
    statement = "cispo"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "ratio_min")
        number_field(self, "ratio_max", low=self.ratio_min, strict=True)


@dataclass(frozen=True)
class SAPO(Surrogate):
    """`-A * sigmoid(tau * (ratio - 1)) * 4 / tau`, tau_pos where A > 0, else tau_neg (arXiv:2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    anchor = "old"
    statement = "sapo"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        number_field(self, "tau_pos", strict=True)
        number_field(self, "tau_neg", strict=True)


@dataclass(frozen=True)
class DRO(Surrogate):
    """`-(A * logp - beta / 2 * (logp - anchor)^2)` (arXiv:2405.19107).

    At `level="sequence"` the square is that of the sequence's summed log-ratio, in equal shares of its
    tokens: Kimi k1.5 (arXiv:2501.12599), and with `anchor="ref"` OPMD. The square pulls where the advantage
    is zero, too.
    """

    beta: float
    anchor: Anchor = "old"
    statement = "dro"
    levels = ("token", "sequence")
    rests_at_zero = False

    def __post_init__(self) -> None:
        check_choice("DRO.anchor", self.anchor, ANCHORS)
        number_field(self, "beta", strict=True)


@dataclass(frozen=True)
class DPPO(Surrogate):
    """`-sg(min(ratio, ratio_cap)) * A * logp` inside a trust region of the taken token (arXiv:2602.04879).

    The region bounds the divergence of old and new policy over two outcomes, the taken token or another:
    kind "tv": the change of its probability; "kl": KL(old || new). `high` bounds steps that raise the
    probability of a token of positive advantage, `low` those that lower that of another.
    """

    kind: DPPOKind = "tv"
    low: float = 0.2
    high: float = 0.2
    ratio_cap: float = 20.0
    anchor = "old"
    uses_ratio = True

    @property
    def statement(self) -> str:  # type: ignore[override]
        return f"dppo_{self.kind}"

    def __post_init__(self) -> None:
        check_choice("DPPO.kind", self.kind, DPPO_KINDS)
        number_field(self, "low")
        number_field(self, "high")
        number_field(self, "ratio_cap", strict=True)


@dataclass(frozen=True)
class VESPO(Surrogate):
    """`-sg(phi) * A * logp`, `phi = e^lambda * w^k * e^(-lambda w)`, `w` the product of a sequence's ratios.

    `k_pos`, `lambda_pos` where A >= 0, else `k_neg`, `lambda_neg`. Token weights are factors of `w`: give a
    mask as zero advantages, not as zero weights. As TRL 1.16's "vespo", bounds included: log-ratios of a
    token to 20, log w between log 1e-8 and 20, lambda from 1e-4.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    anchor = "old"
    statement = "reinforce"  # whose token weights become phi
    params = ()
    uses_ratio = True
    couples_tokens = True

    def __post_init__(self) -> None:
        for f in fields(self):
            number_field(self, f.name)


@dataclass(frozen=True)
class GMPO(Surrogate):
    """`-A * exp(mean of the clipped log-ratios)`, a sequence's geometric mean ratio (arXiv:2507.20673).

    The bounds are on the log-ratio: it counts as at most `eps_high` where A > 0, at least `-eps_low` where
    A < 0. A is the sequence's mean advantage, token weights enter by their geometric mean, as in verl 0.9.1's
    "geo_mean": a token is taken out by the mask, not by a weight of 0. With the aggregation
    "seq-mean-token-mean" the loss is the mean over sequences.
    """

    eps_low: float = 0.4
    eps_high: float = 0.4
    anchor = "old"
    statement = "importance_ratio"  # of the sequence's mean bounded log-ratio
    params = (math.inf,)
    uses_ratio = True
    couples_tokens = True

    def __post_init__(self) -> None:
        number_field(self, "eps_low")
        number_field(self, "eps_high")
