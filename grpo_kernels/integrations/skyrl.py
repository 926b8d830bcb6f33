"""SkyRL 0.3: `register_loss` adds a loss to its `PolicyLossRegistry`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks.choices import PresetName
from ..spec import LossSpec
from ..spec.surrogates import DPPO
from .shared import surrogate_spec, weighted_loss, with_bounds
from .versions import require

require("skyrl", "SkyRL", tested="0.3")

from skyrl.backends.skyrl_train.utils import off_policy_correction_utils, ppo_utils  # noqa: E402


def register_loss(name: str, spec: LossSpec | PresetName) -> None:
    """Add a loss to SkyRL's registry, for `trainer.algorithm.policy_loss_type=<name>`.

    Aggregation, KL, entropy bonus and `off_policy_correction` are SkyRL's. A LossSpec is used unchanged; a
    preset gets SkyRL's bounds. Raises ValueError if the name is taken, or if SkyRL lacks what the loss needs.
    """
    surrogate_spec("SkyRL", spec, "any", scaled_advantages=True)
    ppo_utils.PolicyLossRegistry.register(name, SkyRLLoss(spec))


class SkyRLLoss(NamedTuple):
    """A loss with the signature of SkyRL's. Ray's workers unpickle it, so they need this package."""

    spec: LossSpec | PresetName

    def __call__(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor, config: Any, **given: Any
    ) -> tuple[Tensor, dict[str, float]]:
        spec = surrogate_spec("SkyRL", self.spec, "any", scaled_advantages=True)
        if isinstance(self.spec, str):
            spec = with_bounds(spec, 20.0, 10.0, **bounds_of(config))
        mask, sampler, found = given.get("loss_mask"), given.get("rollout_logprobs"), {}
        weights = mask
        if sampler is not None:
            correct = off_policy_correction_utils.compute_off_policy_correction
            ratios, found, weights = correct(old, sampler, mask, config.off_policy_correction)
            weights = weights if ratios is None else weights * ratios
            old = sampler if isinstance(spec.surrogate, DPPO) else old  # as SkyRL's own DPPO
        out = weighted_loss(spec, log_probs, advantages, weights, completion_mask=mask, old_logps=old)
        # The one sync: SkyRL takes floats.
        values = torch.stack(list(out.metrics.values())).tolist()
        names = [name.replace("clip_fraction", "clip_ratio") for name in out.metrics]  # SkyRL's name
        return out.loss, found | dict(zip(names, values, strict=True))


def bounds_of(config: Any) -> dict[str, float]:
    dppo, sapo = config.dppo, config.sapo
    found = {"eps_low": config.eps_clip_low, "eps_high": config.eps_clip_high}
    low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
    found |= {"ratio_min": max(0.0, 1 - low), "ratio_max": 1 + high}
    found |= {"low": dppo.delta_low, "high": dppo.delta_high, "ratio_cap": math.exp(20)}
    return found | {"tau_pos": sapo.tau_pos, "tau_neg": sapo.tau_neg}
