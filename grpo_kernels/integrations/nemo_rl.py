"""NeMo-RL 0.6: `PolicyLossFn`, a loss object for its trainers, in place of its `ClippedPGLossFn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from ..spec.surrogates import CISPO, PPOClip, Reinforce
from .shared import surrogate_spec, token_weights_of, weighted_loss
from .versions import require

require("nemo_rl", "NeMo-RL", tested="0.6", distribution="nemo-rl")

from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn  # noqa: E402

# What remains is PPO's loss. At a ratio of 1 it is -advantage, times the weights of the aggregation and of
# the correction for the sampler.
PLAIN: dict[str, Any] = {"use_cispo": False, "disable_ppo_ratio": False, "ratio_clip_c": None}
PLAIN |= {"reference_policy_kl_penalty": 0.0, "positive_example_nll_weight": 0.0}


def own_surrogate(cfg: Any) -> LossSpec:
    """Return NeMo-RL's own surrogate for the options `cfg`, a `ClippedPGLossConfig`."""
    low, high, bound = cfg.ratio_clip_min, cfg.ratio_clip_max, cfg.ratio_clip_c
    if cfg.use_cispo:
        return LossSpec(CISPO(ratio_min=max(0.0, 1 - low), ratio_max=1 + high))
    # force_on_policy_ratio overrides the next two options.
    if cfg.disable_ppo_ratio and not cfg.force_on_policy_ratio:
        if bound is not None:
            raise ValueError(f"disable_ppo_ratio leaves no ratio for ratio_clip_c={bound}")
        return LossSpec(Reinforce())
    sequence = cfg.sequence_level_importance_ratios and not cfg.force_on_policy_ratio
    return LossSpec(PPOClip(low, high, dual_clip=bound), level="sequence" if sequence else "token")


class PolicyLossFn(ClippedPGLossFn):
    """NeMo-RL's loss with `spec`, a LossSpec or a preset's name, for its surrogate; None: that of `cfg`.

    KL, aggregation, importance weights and metrics are NeMo-RL's. Raises ValueError for a spec with a KL or
    an entropy bonus, for one that needs the reference without `reference_policy_kl_penalty`, and for
    `disable_ppo_ratio` with `ratio_clip_c`.
    """

    def __init__(self, cfg: Any, *args: Any, spec: Any = None, **options: Any) -> None:
        super().__init__(cfg, *args, **options)
        self.plain = ClippedPGLossFn(cfg.model_copy(update=PLAIN))
        # Without a penalty NeMo-RL does not load the reference. Its log-probabilities are then zeros.
        self.has_reference = cfg.reference_policy_kl_penalty > 0
        mean: Any = "token-mean" if cfg.token_level_loss else "seq-mean-token-mean"
        spec = own_surrogate(cfg) if spec is None else spec
        self.spec = surrogate_spec("NeMo-RL", spec, mean, reference=self.has_reference)

    def __call__(self, next_token_logprobs: Tensor, data: Any, **counts: Tensor) -> tuple[Tensor, Any]:
        every, mask = data["advantages"], data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        # Without advantages, NeMo-RL's loss is its KL and its other terms.
        none = {**data, "advantages": torch.zeros_like(every)}
        rest, metrics = super().__call__(next_token_logprobs, none, **counts)
        old = None if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        ref = data["reference_policy_logprobs"][:, 1:] if self.has_reference else None
        same = next_token_logprobs.detach() if old is None else old
        weights = token_weights_of(lambda x: -self.plain(same, {**data, "advantages": x}, **counts)[0], every)
        options = {"completion_mask": mask, "old_logps": old, "ref_logps": ref}
        out = weighted_loss(self.spec, next_token_logprobs, every[:, 1:], weights[:, 1:], **options)
        # NeMo-RL's own loss syncs here too: its metrics are floats.
        return rest + out.loss, {**metrics, "loss": (rest + out.loss).item()}
