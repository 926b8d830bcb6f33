"""verl 0.9.1 and later: our losses in its registry, `linear_logps` behind its `use_fused_kernels`.

Importing this module does both. One line of verl's configuration imports it in every worker:

    actor_rollout_ref.model.external_lib=grpo_kernels.integrations.verl
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks.choices import PRESET_NAMES, Aggregation, PresetName
from ..checks.scalars import check_choice
from ..log import logger, warn_once
from ..policy_loss import policy_loss
from ..spec import LossSpec, resolve_spec
from ..spec.surrogates import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    SAPO,
    ImportanceRatio,
    LogRatio,
    PPOClip,
    Reinforce,
    Surrogate,
)
from .versions import require

installed = require("verl", "verl", tested="0.9.1")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.utils import losses as actor_losses  # noqa: E402

try:
    from .verl_logps import fuse_verl_logps, replace_in_verl
except ImportError as error:
    raise ImportError(
        f"verl {installed} has other fused kernels than verl 0.9.1, and needs a newer grpo_kernels: {error}"
    ) from error

# verl's names are bare ("gspo"), and registering one again would replace verl's loss without a word.
PREFIX = "grpo_kernels."


# The losses.


def register_loss(name: str, spec: LossSpec | PresetName | Callable[[Any], LossSpec]) -> None:
    """Adds a loss to verl's registry, for `actor_rollout_ref.actor.policy_loss.loss_mode=<name>`.

    The aggregation is verl's `loss_agg_mode`, with its `loss_scale_factor`, whatever the spec's: it is also
    that of the KL and the entropy that verl itself adds. A reference is verl's `ref_log_prob`.

    Args:
        spec: a LossSpec, taken as it is (no bound on the log-ratio, no dual clip that it does not have), a
            preset's name, or a function of verl's `ActorConfig` that returns a LossSpec.

    Raises:
        ValueError: the registry has a loss of that name that is not ours; the spec has an exact KL, which
            needs logits, or an entropy bonus, which is verl's `entropy_coeff`.
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
            f"loss {name!r}: verl hands over log-probabilities alone: an exact KL is out of reach, and the "
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
        # "token-mean" is the default on both sides: who has left it has chosen.
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
            normalizer=normalizer(loss_agg_mode, info, response_mask),
        )
        found = verl_metrics(chosen, out.metrics, out.logps, old_log_prob, advantages, response_mask != 0)
        return out.loss, found

    core_algos.register_policy_loss(name)(loss)


def is_free(name: str) -> bool:
    taken = core_algos.POLICY_LOSS_REGISTRY.get(name)
    return taken is None or getattr(taken, "__module__", None) == __name__


def unscaled_preset(preset: PresetName) -> LossSpec:
    """A preset with any `max_tokens`, which verl's `loss_scale_factor` replaces."""
    return LossSpec.preset(preset, max_tokens=1)


def preset_spec(preset: PresetName, config: Any) -> LossSpec:
    """A preset with the bounds of verl's `ActorConfig` in place of its own, and verl's on the log-ratio."""
    spec = unscaled_preset(preset)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    surrogate, level = spec.surrogate, spec.level
    # verl's gspo, unlike its other losses, has a bound on the mean log-ratio, and from above only.
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


def normalizer(loss_agg_mode: str, info: Mapping[str, Any], mask: Tensor) -> float | Tensor:
    """The denominator of verl's `agg_loss`: that of all ranks and micro-batches, or of this one."""
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
        # Here verl does not count a sequence without a token.
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
    """Under verl's names, as its own losses report them: the host waits once."""
    bound = math.inf if spec.log_ratio_clamp is None or spec.level != "token" else spec.log_ratio_clamp
    log_ratio = torch.where(mask, logps - old_logps, 0.0).clamp(-bound, bound)
    tokens = mask.sum().clamp(min=1)
    found = {"actor/ppo_kl": -log_ratio.sum() / tokens}
    if "clip_fraction" in metrics:
        found["actor/pg_clipfrac"] = metrics["clip_fraction"]
    if isinstance(spec.surrogate, PPOClip) and spec.surrogate.dual_clip is not None:
        beyond = (log_ratio > math.log(spec.surrogate.dual_clip)) & (advantages < 0) & mask
        found["actor/pg_clipfrac_lower"] = beyond.sum() / tokens
    # The one wait of the host: verl wants floats.
    return dict(zip(found, torch.stack([x.to(logps.dtype) for x in found.values()]).tolist(), strict=True))


# The reference. verl's registry hands over no log-probabilities of it; the batch that its `ppo_loss` is given
# holds them wherever verl computes them.

current_batch: ContextVar[Any] = ContextVar("current_batch", default=None)


def with_reference(name: str, spec: LossSpec) -> tuple[LossSpec, Tensor | None]:
    """The spec with the reference's log-probabilities `[B, T]`, or with what can do without them."""
    anchored = isinstance(spec.surrogate, Surrogate) and spec.surrogate.anchor == "ref"
    if not (anchored or spec.sampled_kl is not None or spec.uses_callable):
        return spec, None
    batch = current_batch.get()
    if batch is not None and "ref_log_prob" in batch:
        return spec, batch.select("ref_log_prob").to_padded_tensor()["ref_log_prob"]
    advice = (
        "actor_rollout_ref.actor.use_kl_loss=True makes verl compute ref_log_prob (kl_loss_coef=0 adds no "
        "penalty)"
    )
    if isinstance(spec.surrogate, LogRatio) and spec.sampled_kl is None:
        warn_once(
            f"loss {name!r}: the batch has no ref_log_prob. Its gradient is the same without; the reported "
            f"loss is -A * logp, not -A * (logp - ref_logp). {advice}"
        )
        return replace(spec, surrogate=Reinforce()), None
    if anchored or spec.sampled_kl is not None:
        raise ValueError(f"loss {name!r} needs a reference, and the batch has no ref_log_prob: {advice}")
    return spec, None


def hand_batch_to_losses(verl_ppo_loss: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `ppo_loss`, whose batch the losses can read while it runs."""

    @functools.wraps(verl_ppo_loss)
    def ppo_loss(config: Any, model_output: Any, data: Any, *rest: Any, **options: Any) -> Any:
        token = current_batch.set(data)
        try:
            return verl_ppo_loss(config, model_output, data, *rest, **options)
        finally:
            current_batch.reset(token)

    return ppo_loss


# The import.


def install() -> None:
    for preset in PRESET_NAMES:
        register_loss(PREFIX + preset, functools.partial(preset_spec, preset))
    names = [f"{PREFIX}{{{','.join(PRESET_NAMES)}}}"]
    if is_free("log_ratio"):
        register_loss("log_ratio", functools.partial(preset_spec, "log_ratio"))
        names.insert(0, "log_ratio")
    replace_in_verl(actor_losses, "ppo_loss", hand_batch_to_losses(actor_losses.ppo_loss))
    fused = os.environ.get("GRPO_KERNELS_VERL_FUSE", "1") not in ("", "0")
    if fused:
        fuse_verl_logps()
    logger.info(
        "verl %s: registered %s; its fused kernels (torch, triton) %s",
        installed,
        " and ".join(names),
        "replaced by linear_logps" if fused else "left as they are (GRPO_KERNELS_VERL_FUSE=0)",
    )


install()
