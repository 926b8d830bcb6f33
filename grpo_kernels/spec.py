"""What to compute: frozen descriptions of the loss that check themselves. No tensors, no mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

LEVELS = ("token", "sequence", "sequence-token")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
)
SAMPLED_KL = ("k1", "abs", "k2", "k3")
EXACT_KL = ("exact", "exact_forward")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_number(
    name: str, value: Any, *, low: float = 0.0, strict: bool = False, optional: bool = False
) -> None:
    """`value` is a finite number of at least `low` (above `low` if `strict`), or None if `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {value!r}")
    # Comparisons only, which torch.compile can trace on symbolic floats; a NaN fails them.
    if not (low <= value < math.inf) or (strict and value == low):
        raise ValueError(f"{name} must be finite and {'>' if strict else '>='} {low:g}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any, *, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


class Surrogate:
    """Base of the built-in surrogates: what the objective and the kernels need to know of each."""

    anchor: str | None = None
    """Which log-probabilities the log-ratio is taken against: "old", "ref" or None."""
    uses_ratio = False
    """Whether the loss depends on the ratio itself (a REINFORCE-like loss only depends on `logp`)."""
    levels: tuple[str, ...] = ("token",)
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

    anchor: str | None = "old"
    max_ratio: float | None = None
    statement = "importance_ratio"
    uses_ratio = True
    levels = LEVELS

    def __post_init__(self) -> None:
        check_choice("ImportanceRatio.anchor", self.anchor, ("old", "ref"))
        check_number("ImportanceRatio.max_ratio", self.max_ratio, strict=True, optional=True)


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
        check_number("PPOClip.eps_low", self.eps_low)
        check_number("PPOClip.eps_high", self.eps_high)
        check_number("PPOClip.delta", self.delta, strict=True, optional=True)
        check_number("PPOClip.dual_clip", self.dual_clip, low=1.0, strict=True, optional=True)


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
        check_number("CISPO.ratio_min", self.ratio_min)
        check_number("CISPO.ratio_max", self.ratio_max, low=self.ratio_min, strict=True)


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
        check_number("SAPO.tau_pos", self.tau_pos, strict=True)
        check_number("SAPO.tau_neg", self.tau_neg, strict=True)


@dataclass(frozen=True)
class DRO(Surrogate):
    """`-(A * logp - beta / 2 * (logp - anchor)^2)` (arXiv:2405.19107).

    At `level="sequence"` the square is that of the sequence's summed log-ratio, in equal shares of its
    tokens: Kimi k1.5 (arXiv:2501.12599), and with `anchor="ref"` OPMD. The square pulls where the advantage
    is zero, too.
    """

    beta: float
    anchor: str | None = "old"
    statement = "dro"
    levels = ("token", "sequence")
    rests_at_zero = False

    def __post_init__(self) -> None:
        check_choice("DRO.anchor", self.anchor, ("old", "ref"))
        check_number("DRO.beta", self.beta, strict=True)


@dataclass(frozen=True)
class DPPO(Surrogate):
    """`-sg(min(ratio, ratio_cap)) * A * logp` inside a trust region of the taken token (arXiv:2602.04879).

    The region bounds the divergence of old and new policy over two outcomes, the taken token or another:
    kind "tv": the change of its probability; "kl": KL(old || new). `high` bounds steps that raise the
    probability of a token of positive advantage, `low` those that lower that of another.
    """

    kind: str = "tv"
    low: float = 0.2
    high: float = 0.2
    ratio_cap: float = 20.0
    anchor = "old"
    uses_ratio = True

    @property
    def statement(self) -> str:  # type: ignore[override]
        return f"dppo_{self.kind}"

    def __post_init__(self) -> None:
        check_choice("DPPO.kind", self.kind, ("tv", "kl"))
        check_number("DPPO.low", self.low)
        check_number("DPPO.high", self.high)
        check_number("DPPO.ratio_cap", self.ratio_cap, strict=True)


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
            check_number(f"VESPO.{f.name}", getattr(self, f.name))


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
        check_number("GMPO.eps_low", self.eps_low)
        check_number("GMPO.eps_high", self.eps_high)


@dataclass(frozen=True)
class KL:
    """A penalty `beta * KL(policy, reference)` per token; `x = ref_logp - logp`, clamped to ±`clamp` if set.

    kind: "k1" `-x`, "abs" `|x|`, "k2" `x^2 / 2`, "k3" `exp(x) - x - 1` (Schulman, "Approximating KL
        divergence"), or over the whole vocabulary "exact" `KL(policy || reference)` and "exact_forward"
        `KL(reference || policy)`, which need the reference's logits.
    beta: weight of the penalty; at 0 no reference is read.
    ratio_corrected: multiply by `exp(logp - old_logp)`, at sequence level by the sequence's ratio, with
        gradient through both.
    straight_through: the value of `kind` with the gradient of "k2".
    clamp, output_clamp: bound `x` and the estimate in absolute value; no gradient where a bound bites.
    """

    kind: str = "k3"
    beta: float = 0.04
    ratio_corrected: bool = False
    straight_through: bool = False
    clamp: float | None = None
    output_clamp: float | None = None

    def __post_init__(self) -> None:
        check_choice("KL.kind", self.kind, SAMPLED_KL + EXACT_KL)
        check_number("KL.beta", self.beta)
        check_flag("KL.ratio_corrected", self.ratio_corrected)
        check_flag("KL.straight_through", self.straight_through)
        check_number("KL.clamp", self.clamp, strict=True, optional=True)
        check_number("KL.output_clamp", self.output_clamp, strict=True, optional=True)
        modified = self.ratio_corrected or self.straight_through or self.clamp or self.output_clamp
        if self.kind in EXACT_KL and modified:
            raise ValueError(
                f"KL({self.kind!r}) is no sampled estimate: ratio_corrected, straight_through, clamp and "
                f"output_clamp do not apply, got {self}"
            )


@dataclass(frozen=True)
class LossSpec:
    """The loss: `aggregate(surrogate + KL) - entropy_coef * mean entropy`.

    surrogate: a surrogate's instance, None for the KL term alone, or a callable
        `f(logps, old_logps, ref_logps, advantages, mask) -> per-token loss` in PyTorch (all `[B, T]`, or
        `[N]` packed; what was not given is None; masked positions hold zeros). Autograd takes its derivative.
    kl: a `KL`, or None.
    level: where the ratio is formed: of each token ("token"); of the sequence's mean log-ratio, whose
        gradient all its tokens share ("sequence": GSPO, arXiv:2507.18071; of DRO its sum); or that value,
        with the gradient of each token's own ("sequence-token": GSPO-token).
    aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm" (divides
        by `max_tokens`) or "token-sum".
    max_tokens: the constant of "seq-mean-token-sum-norm" (Dr. GRPO, arXiv:2503.20783); None: the padded width
        `T`.
    entropy_coef: weight of the entropy bonus.
    log_ratio_clamp: bound on the absolute log-ratio before it is exponentiated (DRO: squared); no gradient
        through the ratio where it bites.

    Raises ValueError for a bad value and TypeError for a wrong type, at construction.
    """

    surrogate: Surrogate | Callable[..., Any] | None = PPOClip()
    kl: KL | None = None
    level: str = "token"
    aggregation: str = "token-mean"
    max_tokens: int | None = None
    entropy_coef: float = 0.0
    log_ratio_clamp: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.surrogate, type):
            raise TypeError(f"surrogate must be an instance: {self.surrogate.__name__}(), not the class")
        if self.surrogate is not None and not (
            isinstance(self.surrogate, Surrogate) or callable(self.surrogate)
        ):
            raise TypeError(f"surrogate must be a surrogate, a callable or None, got {self.surrogate!r}")
        if self.kl is not None and not isinstance(self.kl, KL):
            raise TypeError(f"kl must be a KL or None, got {self.kl!r}")
        if self.surrogate is None and self.kl is None:
            raise ValueError("surrogate and kl are both None: there is nothing to minimise")
        check_choice("level", self.level, LEVELS)
        if self.uses_callable and self.level != "token":
            raise ValueError(
                f"level {self.level!r} is for built-in surrogates: a callable forms its own ratio"
            )
        if isinstance(self.surrogate, Surrogate) and self.level not in self.surrogate.levels:
            raise ValueError(
                f"{type(self.surrogate).__name__} takes level "
                f"{' or '.join(map(repr, self.surrogate.levels))}, got {self.level!r}"
            )
        if isinstance(self.surrogate, DRO) and self.level == "sequence" and self.log_ratio_clamp is not None:
            raise ValueError("log_ratio_clamp does not apply to DRO at level 'sequence', which squares a sum")
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens)
        check_number("entropy_coef", self.entropy_coef, low=-math.inf, strict=True)
        check_number("log_ratio_clamp", self.log_ratio_clamp, strict=True, optional=True)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LossSpec:
        """A published loss by name; `overrides` replace fields of the LossSpec or of its surrogate.

        >>> LossSpec.preset("dapo", eps_high=0.3, kl=KL("k3", beta=0.04)).surrogate.eps_high
        0.3
        """
        check_choice("preset", name, tuple(PRESETS))
        preset = PRESETS[name]
        of_spec = {f.name for f in fields(cls)}
        of_surrogate = {f.name for f in fields(preset.surrogate)}  # type: ignore[arg-type]
        unknown = overrides.keys() - of_spec - of_surrogate
        if unknown:
            raise ValueError(f"preset {name!r} has no option {', '.join(sorted(unknown))}")
        if "surrogate" in overrides and overrides.keys() & of_surrogate:
            lost = ", ".join(sorted(overrides.keys() & of_surrogate))
            raise ValueError(f"preset {name!r}: {lost} would be lost, because surrogate is replaced too")
        changes = {key: value for key, value in overrides.items() if key in of_surrogate}
        surrogate = replace(preset.surrogate, **changes)  # type: ignore[type-var]
        rest = {key: value for key, value in overrides.items() if key not in of_surrogate}
        return replace(preset, **{"surrogate": surrogate, **rest})

    @property
    def uses_callable(self) -> bool:
        return self.surrogate is not None and not isinstance(self.surrogate, Surrogate)

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's loss depends on other tokens: then it is known only when all statistics are."""
        if self.uses_callable or self.level != "token":
            return True
        return isinstance(self.surrogate, Surrogate) and self.surrogate.couples_tokens

    @property
    def sampled_kl(self) -> KL | None:
        """The KL term if it is a function of the taken token's log-probability, else None."""
        return self.kl if self.kl is not None and self.kl.beta and self.kl.kind in SAMPLED_KL else None

    @property
    def exact_kl(self) -> KL | None:
        """The KL term if it runs over the whole vocabulary, else None."""
        return self.kl if self.kl is not None and self.kl.beta and self.kl.kind in EXACT_KL else None


@dataclass(frozen=True)
class LogitTransform:
    """From raw logits to the distribution: `z -> softcap * tanh(z * scale / softcap)`, then `/ temperature`.

    `vocab_size`: columns from here on are padding. A temperature per token travels as a tensor beside this
    object, and `temperature` is then 1.
    """

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    ref_scale: float = 1.0
    ref_softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("logit_scale", self.scale, strict=True)
        check_number("logit_softcap", self.softcap, strict=True, optional=True)
        check_number("ref_logit_scale", self.ref_scale, strict=True)
        check_number("ref_logit_softcap", self.ref_softcap, strict=True, optional=True)
        check_number("temperature", self.temperature, strict=True)


PRESETS: dict[str, LossSpec] = {
    "log_ratio": LossSpec(LogRatio()),
    "importance_ratio": LossSpec(ImportanceRatio()),
    "reinforce": LossSpec(Reinforce()),
    "grpo": LossSpec(PPOClip(), aggregation="seq-mean-token-mean"),
    "bnpo": LossSpec(PPOClip()),
    "dapo": LossSpec(PPOClip(eps_low=0.2, eps_high=0.28)),
    "dr_grpo": LossSpec(PPOClip(), aggregation="seq-mean-token-sum-norm"),
    "cispo": LossSpec(CISPO(ratio_max=5.0)),
    "sapo": LossSpec(SAPO(), aggregation="seq-mean-token-mean"),
    "gspo": LossSpec(PPOClip(), level="sequence", aggregation="seq-mean-token-mean"),
    "gspo_token": LossSpec(PPOClip(), level="sequence-token", aggregation="seq-mean-token-mean"),
    "luspo": LossSpec(PPOClip(), level="sequence", aggregation="seq-mean-token-sum"),
    "vespo": LossSpec(VESPO()),
    "gmpo": LossSpec(GMPO(), aggregation="seq-mean-token-mean"),
    "dro": LossSpec(DRO(beta=0.1)),
    "opmd": LossSpec(DRO(beta=0.1, anchor="ref"), level="sequence", aggregation="seq-mean-token-sum"),
    "dppo_tv": LossSpec(DPPO("tv")),
    "dppo_kl": LossSpec(DPPO("kl")),
}
