"""What to compute: frozen descriptions of the loss that check themselves. No tensors, no mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict, Unpack

from .checks import check_choice, check_flag, integer_field, number_field
from .names import (
    AGGREGATIONS,
    EXACT_KL,
    LEVELS,
    PRESET_NAMES,
    SAMPLED_KL,
    Aggregation,
    Anchor,
    DPPOKind,
    KLKind,
    Level,
    PresetName,
)
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

    kind: KLKind = "k3"
    beta: float = 0.04
    ratio_corrected: bool = False
    straight_through: bool = False
    clamp: float | None = None
    output_clamp: float | None = None

    def __post_init__(self) -> None:
        check_choice("KL.kind", self.kind, SAMPLED_KL + EXACT_KL)
        number_field(self, "beta")
        check_flag("KL.ratio_corrected", self.ratio_corrected)
        check_flag("KL.straight_through", self.straight_through)
        number_field(self, "clamp", strict=True, optional=True)
        number_field(self, "output_clamp", strict=True, optional=True)
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
    max_tokens: the constant of "seq-mean-token-sum-norm" (Dr. GRPO, arXiv:2503.20783), which requires it: the
        padded width would change the loss from batch to batch.
    entropy_coef: weight of the entropy bonus.
    log_ratio_clamp: bound on the absolute log-ratio before it is exponentiated (DRO: squared); no gradient
        through the ratio where it bites.

    Raises ValueError for a bad value and TypeError for a wrong type, at construction.
    """

    surrogate: Surrogate | Callable[..., Tensor] | None = PPOClip()  # noqa: RUF009 - it is frozen
    kl: KL | None = None
    level: Level = "token"
    aggregation: Aggregation = "token-mean"
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
        integer_field(self, "max_tokens", name="max_tokens", optional=True)
        if self.aggregation == "seq-mean-token-sum-norm" and self.max_tokens is None:
            raise ValueError(
                f"aggregation {self.aggregation!r} divides by max_tokens: give LossSpec(..., max_tokens=...)"
            )
        number_field(self, "entropy_coef", name="entropy_coef", low=-math.inf, strict=True)
        number_field(self, "log_ratio_clamp", name="log_ratio_clamp", strict=True, optional=True)

    @classmethod
    def preset(cls, name: PresetName, **options: Unpack[PresetOptions]) -> LossSpec:
        """A published loss by name; `options` replace fields of the LossSpec or of its surrogate.

        >>> LossSpec.preset("dapo", eps_high=0.3, kl=KL("k3", beta=0.04)).surrogate.eps_high
        0.3

        Args:
            name: one of the presets. `dr_grpo` requires the option `max_tokens`.
            options: the fields of LossSpec, and those of the preset's surrogate, such as `eps_low`.

        Raises:
            ValueError: an unknown name, an option that the preset does not have or that a new `surrogate`
                would discard, a bad value, or no `max_tokens` if the aggregation divides by it.
        """
        check_choice("preset", name, PRESET_NAMES)
        preset = PRESETS[name]
        of_spec = list(cls.__dataclass_fields__)  # torch.compile cannot trace `fields` of a class
        of_surrogate = [f.name for f in fields(preset["surrogate"])]
        unknown = sorted(options.keys() - {*of_spec, *of_surrogate})
        if unknown:
            raise ValueError(
                f"preset {name!r} has no option {', '.join(unknown)}. The options of "
                f"LossSpec.preset({name!r}, ...) are {', '.join(of_surrogate + of_spec)}"
            )
        changes = {key: value for key, value in options.items() if key in of_surrogate}
        if "surrogate" in options and changes:
            lost = ", ".join(sorted(changes))
            raise ValueError(f"preset {name!r}: {lost} would be lost, because surrogate is replaced too")
        rest = {key: value for key, value in options.items() if key not in of_surrogate}
        chosen: dict[str, Any] = {**preset, "surrogate": replace(preset["surrogate"], **changes), **rest}
        if chosen.get("aggregation") == "seq-mean-token-sum-norm" and chosen.get("max_tokens") is None:
            raise ValueError(
                f"preset {name!r} divides by max_tokens: give LossSpec.preset({name!r}, max_tokens=...)"
            )
        return cls(**chosen)

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
        number_field(self, "scale", name="logit_scale", strict=True)
        number_field(self, "softcap", name="logit_softcap", strict=True, optional=True)
        number_field(self, "ref_scale", name="ref_logit_scale", strict=True)
        number_field(self, "ref_softcap", name="ref_logit_softcap", strict=True, optional=True)
        number_field(self, "temperature", name="temperature", strict=True)


class PresetOptions(TypedDict, total=False):
    """What `LossSpec.preset` takes: the fields of LossSpec and of all surrogates."""

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
    ratio_cap: float
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


# The ratio of GSPO is that of a sequence's mean log-ratio, hence the narrow bounds (arXiv:2507.18071v2, 5.1).
GSPO_CLIP = PPOClip(eps_low=3e-4, eps_high=4e-4)

# Fields of the LossSpec, and not the LossSpec itself: "dr_grpo" is complete only with `max_tokens`.
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

# The presets that need no option. A loss looks its spec up here if it is a name.
COMPLETE_PRESETS: dict[PresetName, LossSpec] = {
    name: LossSpec.preset(name) for name in PRESET_NAMES if name != "dr_grpo"
}
