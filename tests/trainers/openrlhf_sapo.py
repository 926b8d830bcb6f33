"""SAPO as a loss of OpenRLHF in plain PyTorch, to compare with. An edited file of OpenRLHF imports it."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.models import PolicyLoss as Stock
from openrlhf.models import aggregate_loss
from torch import Tensor


class PolicyLoss(Stock):
    """The surrogate of SAPO. Metrics are OpenRLHF's, as is the clamped weight of each token."""

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor,
        **counts: Any,
    ) -> tuple[Any, ...]:
        given = {"action_mask": action_mask, "rollout_log_probs": rollout_log_probs, **counts}
        _, *metrics = super().forward(log_probs, old_log_probs, advantages, **given)
        tau = torch.where(advantages > 0, 1.0, 1.05)
        gate = torch.sigmoid(tau * ((log_probs - old_log_probs).exp() - 1))
        weights = (old_log_probs - rollout_log_probs).exp().clamp(*self.is_correction_threshold)
        loss = aggregate_loss(
            -gate * 4 / tau * advantages * weights, action_mask, self.token_level_loss, **counts
        )
        return loss, *metrics
