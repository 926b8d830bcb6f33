"""`LossSpec`: a frozen description of a loss, checked when it is created."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks.choices import (
    AGGREGATIONS,
    EXACT_KL,
    LEVELS,
    PRESET_NAMES,
    SAMPLED_KL,
    Aggregation,
    Level,
    PresetName,
)
from ..checks.scalars import check_choice, integer_field, number_field
from .kl import KL
from .presets import PRESETS, PresetOptions
from .surrogates import PPOClip, Surrogate


@dataclass(frozen=True)
class LossSpec:
    """Description of the loss `aggregate(surrogate + KL) - entropy_coef * mean entropy`.

    Attributes:
        surrogate: an instance of a surrogate, None for the KL term alone, or a callable
            `f(logps, old_logps, ref_logps, advantages, mask) -> per-token loss` in PyTorch. Its arguments are
            `[B, T]`, or `[N]` if packed, None if they were not given, and zero at masked positions. Autograd
            differentiates it.
        kl: a `KL`, or None.
        level: the ratio of a token. "token" is its own ratio. "sequence" is the ratio of the sequence's mean
            log-ratio (for DRO its sum), and its gradient reaches all tokens of the sequence (GSPO,
            arXiv:2507.18071). "sequence-token" has the same value, but the gradient of the token's own ratio
            (GSPO-token).
        aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
            (divides by `max_tokens`), "token-sum" or "prompt-mean". "prompt-mean" averages the tokens of each
            prompt, over all its completions, and then the prompts (ScaleRL's prompt average,
            arXiv:2510.13786, SkyRL's `prompt_mean`). It needs `prompt_ids` at the call.
        max_tokens: the constant of "seq-mean-token-sum-norm" (Dr. GRPO, arXiv:2503.20783), which requires it.
            The padded width is not used, because it would change the loss from batch to batch.
        entropy_coef: weight of the entropy bonus.
        log_ratio_clamp: bound on the absolute log-ratio before `exp` (for DRO before the square). Beyond it
            the ratio has no gradient.

    Raises:
        ValueError: a bad value.
        TypeError: a wrong type.

    Examples:
        >>> from grpo_kernels import KL, LossSpec, PPOClip
        >>> spec = LossSpec(PPOClip(0.2, 0.28), kl=KL("k3", beta=0.04), aggregation="seq-mean-token-mean")
        >>> spec == LossSpec.preset("grpo", eps_high=0.28, kl=KL("k3", beta=0.04))
        True
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
                f"level {self.level!r} is for built-in surrogates: a callable computes its own ratio"
            )
        if isinstance(self.surrogate, Surrogate) and self.level not in self.surrogate.levels:
            raise ValueError(
                f"{type(self.surrogate).__name__} takes level "
                f"{' or '.join(map(repr, self.surrogate.levels))}, got {self.level!r}"
            )
        if (
            isinstance(self.surrogate, Surrogate)
            and self.log_ratio_clamp is not None
            and self.level not in self.surrogate.clamped_levels
        ):
            raise ValueError(
                f"log_ratio_clamp does not apply to {type(self.surrogate).__name__} at level {self.level!r}"
            )
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
        """Create a published loss by name. `options` override fields of the LossSpec or of its surrogate.

        Args:
            name: one of the presets. `dr_grpo` requires the option `max_tokens`.
            **options: the fields of LossSpec, and those of the preset's surrogate, such as `eps_low`.

        Raises:
            ValueError: the name is unknown; the preset has no such option; a new `surrogate` would discard an
                option; a value is bad; or `max_tokens` is missing and the aggregation divides by it.

        Examples:
            >>> from grpo_kernels import KL, LossSpec
            >>> LossSpec.preset("dapo", eps_high=0.3, kl=KL("k3", beta=0.04)).surrogate.eps_high
            0.3
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
        """Whether the surrogate is a user's callable."""
        return self.surrogate is not None and not isinstance(self.surrogate, Surrogate)

    @property
    def anchored_to_reference(self) -> bool:
        """Whether the surrogate's log-ratio is to the reference, not to the old policy."""
        return isinstance(self.surrogate, Surrogate) and self.surrogate.anchor == "ref"

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's loss depends on other tokens, and so on the statistics of all rows."""
        if self.uses_callable or self.level != "token":
            return True
        return isinstance(self.surrogate, Surrogate) and self.surrogate.couples_tokens

    @property
    def has_kernel(self) -> bool:
        """Whether the kernels can compute the loss: it does not couple tokens and has a Triton function."""
        if self.couples_tokens:
            return False
        return not isinstance(self.surrogate, Surrogate) or self.surrogate.kernel is not None

    @property
    def sampled_kl(self) -> KL | None:
        """The KL term if it is estimated from the taken token's log-probability, else None."""
        return self.kl if self.kl is not None and self.kl.beta and self.kl.kind in SAMPLED_KL else None

    @property
    def exact_kl(self) -> KL | None:
        """The KL term if it is computed over the whole vocabulary, else None."""
        return self.kl if self.kl is not None and self.kl.beta and self.kl.kind in EXACT_KL else None


# The presets that need no option. `resolve_spec` looks them up.
COMPLETE_PRESETS: dict[PresetName, LossSpec] = {
    name: LossSpec.preset(name) for name in PRESET_NAMES if name != "dr_grpo"
}


def resolve_spec(spec: LossSpec | PresetName) -> LossSpec:
    """Return `spec`, or the preset that it names."""
    if isinstance(spec, str):
        check_choice("spec", spec, PRESET_NAMES)
        return COMPLETE_PRESETS.get(spec) or LossSpec.preset(spec)  # its error names the missing option
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec must be a LossSpec or the name of a preset, got {spec!r}")
    return spec
