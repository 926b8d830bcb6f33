"""OpenRLHF 0.11: `PolicyLoss`, in place of the class of that name that its actor creates."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..checks.choices import PresetName
from ..spec import LossSpec
from ..spec.surrogates import PPOClip
from .shared import surrogate_spec, token_weights_of, weighted_loss
from .versions import require

require("openrlhf", "OpenRLHF", tested="0.11")

from openrlhf.models import loss as openrlhf_loss  # noqa: E402


class PolicyLoss(openrlhf_loss.PolicyLoss):
    """OpenRLHF's `PolicyLoss` with a surrogate of this package, by default its own (PPO or GSPO).

    Aggregation, counts of the global batch and the correction for the sampler (`is_correction_*`) are
    OpenRLHF's.

    Args:
        args, options: as of OpenRLHF's class.
        spec: a LossSpec or a preset's name, used unchanged; None: what `policy_loss_type` says.

    Raises ValueError if `spec` needs what OpenRLHF does not pass, or is given with `policy_loss_type="gspo"`.
    """

    def __init__(self, *args: Any, spec: LossSpec | PresetName | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        gspo = self.policy_loss_type == "gspo"
        if spec is None:
            clip = PPOClip(self.clip_eps_low, self.clip_eps_high, dual_clip=self.dual_clip)
            spec = LossSpec(clip, level="sequence") if gspo else LossSpec(clip, log_ratio_clamp=20.0)
        elif gspo:
            raise ValueError("spec replaces policy_loss_type, which must be 'ppo' then, got 'gspo'")
        mean: Any = "token-mean" if self.token_level_loss else "seq-mean-token-mean"
        self.spec = surrogate_spec("OpenRLHF", spec, mean)

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        options |= zip(("action_mask", "rollout_log_probs"), args, strict=False)
        theirs = functools.partial(super().forward, **options)
        # With the correction on, OpenRLHF's GSPO takes its ratio to the sampler.
        to_sampler = self.policy_loss_type == "gspo" and self.is_correction_level != "off"
        anchor = options["rollout_log_probs"] if to_sampler else old_log_probs
        # At a ratio of 1 the loss is -advantage, times the weights of correction and aggregation.
        weights = token_weights_of(lambda x: -theirs(anchor, old_log_probs, x)[0], advantages)
        given = {"completion_mask": options.get("action_mask"), "old_logps": anchor}
        out = weighted_loss(self.spec, log_probs, advantages, weights, **given)
        with torch.no_grad():
            _, clip_ratio, *others = theirs(log_probs, old_log_probs, advantages)
        return out.loss, out.metrics.get("clip_fraction", clip_ratio), *others
