"""Our presets with the bounds of verl's configuration in place of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...checks.choices import PresetName
from ...spec import LossSpec
from ...spec.surrogates import CISPO, DPPO, DRO, GMPO, SAPO, ImportanceRatio, PPOClip

# verl's names have no prefix ("gspo"), and registering one again would silently replace verl's loss.
PREFIX = "grpo_kernels."


def unscaled_preset(preset: PresetName) -> LossSpec:
    """Return a preset with an arbitrary `max_tokens`, which verl's `loss_scale_factor` replaces."""
    return LossSpec.preset(preset, max_tokens=1)


def preset_spec(preset: PresetName, config: Any) -> LossSpec:
    """Return a preset with verl's bounds: `ActorConfig`'s on the ratio, a constant on the log-ratio."""
    spec = unscaled_preset(preset)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    surrogate, level = spec.surrogate, spec.level
    # Unlike its other losses, verl's gspo bounds the mean log-ratio, and only from above.
    clamp: float | None = 20.0 if level == "token" else 10.0
    match surrogate:
        case PPOClip():
            dual_clip = config.get("clip_ratio_c", 3.0) if level == "token" else None
            surrogate = replace(surrogate, eps_low=low, eps_high=high, dual_clip=dual_clip)
        case CISPO():
            surrogate = replace(surrogate, ratio_min=1 - low, ratio_max=1 + high)
        case DPPO():
            surrogate = replace(surrogate, low=low, high=high, ratio_cap=config.get("clip_ratio_c", 20.0))
        case SAPO():
            surrogate = replace(surrogate, tau_pos=config.tau_pos, tau_neg=config.tau_neg)
        case ImportanceRatio():
            pass
        case GMPO():
            surrogate, clamp = replace(surrogate, eps_low=low, eps_high=high), None
        case DRO():
            beta = config.policy_loss.dro_beta
            if beta is None:
                raise ValueError(f"loss {PREFIX + preset!r} needs actor.policy_loss.dro_beta, which is null")
            surrogate, clamp = replace(surrogate, beta=beta), None
        case _:
            clamp = None
    return replace(spec, surrogate=surrogate, log_ratio_clamp=clamp)
