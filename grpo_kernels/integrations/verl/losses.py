"""Our losses in verl's registry: `register_loss`, verl's normalizer and verl's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos

from ...checks.choices import PRESET_NAMES, Aggregation, PresetName
from ...checks.scalars import check_choice
from ...log import warn_once
from ...policy_loss import policy_loss
from ...spec import LossSpec, resolve_spec
from ...spec.surrogates import PPOClip
from .presets import unscaled_preset
from .reference import with_reference


def register_loss(name: str, spec: LossSpec | PresetName | Callable[[Any], LossSpec]) -> None:
    """Add a loss to verl's registry, for `actor_rollout_ref.actor.policy_loss.loss_mode=<name>`.

    verl's `loss_agg_mode` and `loss_scale_factor` replace the spec's own aggregation, because verl aggregates
    its KL and its entropy in the same way. The reference is verl's `ref_log_prob`.

    Args:
        name: a name that verl does not use itself. A loss that was added here before may be replaced.
        spec: a LossSpec, a preset's name, or a function that takes verl's `ActorConfig` and returns a
            LossSpec. A LossSpec gets no bound on the log-ratio and no dual clip from verl.

    Raises:
        ValueError: verl's registry has a loss of its own with this name; `spec` has an exact KL, which needs
            logits, or an entropy bonus, which is verl's `entropy_coeff`; `spec` names no preset.
        TypeError: `spec` is of another type.

    Examples:
        >>> from verl.trainer.ppo.core_algos import get_policy_loss_fn
        >>> from grpo_kernels import LossSpec, PPOClip
        >>> from grpo_kernels.integrations.verl import register_loss
        >>> register_loss("two_sided", LossSpec(PPOClip(eps_high=0.28, delta=4.0)))
        >>> callable(get_policy_loss_fn("two_sided"))  # what loss_mode=two_sided selects
        True
    """
    if isinstance(spec, str):
        check_choice("spec", spec, PRESET_NAMES)
        spec = unscaled_preset(spec)
    elif not callable(spec):
        spec = resolve_spec(spec)
    if not is_free(name):
        raise ValueError(f"verl's registry has a loss {name!r} of its own")
    if isinstance(spec, LossSpec) and (spec.exact_kl is not None or spec.entropy_coef):
        raise ValueError(
            f"loss {name!r}: verl passes only log-probabilities to a loss. An exact KL needs logits, and the "
            f"entropy bonus is actor.entropy_coeff, got {spec}"
        )

    def loss(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        loss_agg_mode: Aggregation = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, float]]:
        chosen = spec if isinstance(spec, LossSpec) else spec(config)
        # "token-mean" is the default of LossSpec, so the user need not have chosen it.
        if chosen.aggregation not in ("token-mean", loss_agg_mode):
            warn_once(
                f"loss {name!r}: its own aggregation is {chosen.aggregation}, but "
                f"actor.loss_agg_mode={loss_agg_mode} decides"
            )
        info = config.global_batch_info
        # If `loss_scale_factor` is null, verl's `agg_loss` divides by the padded width.
        max_tokens = info.get("loss_scale_factor") or max(response_mask.shape[-1], 1)
        chosen = replace(chosen, aggregation=loss_agg_mode, max_tokens=max_tokens)
        chosen, ref_logps = with_reference(name, chosen)
        out = policy_loss(
            log_prob,
            advantages,
            spec=chosen,
            completion_mask=response_mask,
            ref_logps=ref_logps,
            old_logps=old_log_prob,
            token_weights=rollout_is_weights,
            normalizer=verl_normalizer(loss_agg_mode, info, response_mask),
        )
        found = verl_metrics(chosen, out.metrics, out.logps, old_log_prob, advantages, response_mask != 0)
        return out.loss, found

    core_algos.register_policy_loss(name)(loss)


def is_free(name: str) -> bool:
    """Return whether verl has no loss of this name. Losses that `register_loss` added do not count."""
    taken = core_algos.POLICY_LOSS_REGISTRY.get(name)
    return taken is None or getattr(taken, "__module__", None) == __name__


def verl_normalizer(loss_agg_mode: str, info: Mapping[str, Any], mask: Tensor) -> float | Tensor:
    """Return the denominator of verl's `agg_loss`, divided by the number of ranks.

    It counts all ranks and micro-batches if verl knows these numbers.

    Args:
        loss_agg_mode: verl's aggregation.
        info: verl's `global_batch_info`.
        mask: `[B, T]`, the tokens of this micro-batch, for a batch on one rank without global numbers.

    Raises:
        ValueError: there are several ranks, and `info` lacks the number of tokens or sequences.
    """
    ranks = info.get("dp_size", 1)
    if loss_agg_mode == "token-sum":
        return 1 / ranks
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    total = info.get(name)
    if total is None:
        if ranks > 1:
            raise ValueError(
                f"loss_agg_mode {loss_agg_mode!r} over {ranks} ranks needs global_batch_info[{name!r}]"
            )
        # Without global numbers, verl does not count sequences without tokens.
        total = (mask != 0).sum() if loss_agg_mode == "token-mean" else (mask != 0).any(-1).sum()
    return total / ranks


def verl_metrics(
    spec: LossSpec,
    metrics: Mapping[str, Tensor],
    logps: Tensor,  # [B, T]
    old_logps: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
) -> dict[str, float]:
    """Compute metrics under the names of verl's own losses. Syncs with the device once."""
    bound = math.inf if spec.log_ratio_clamp is None or spec.level != "token" else spec.log_ratio_clamp
    log_ratio = torch.where(mask, logps - old_logps, 0.0).clamp(-bound, bound)
    tokens = mask.sum().clamp(min=1)
    found = {"actor/ppo_kl": -log_ratio.sum() / tokens}
    if "clip_fraction" in metrics:
        found["actor/pg_clipfrac"] = metrics["clip_fraction"]
    if isinstance(spec.surrogate, PPOClip) and spec.surrogate.dual_clip is not None:
        beyond = (log_ratio > math.log(spec.surrogate.dual_clip)) & (advantages < 0) & mask
        found["actor/pg_clipfrac_lower"] = beyond.sum() / tokens
    # The one sync: verl takes floats.
    return dict(zip(found, torch.stack([x.to(logps.dtype) for x in found.values()]).tolist(), strict=True))
