"""Fused policy losses for GRPO-style reinforcement learning of language models."""

from .advantages import group_advantages
from .distillation import distillation_loss
from .linear_distillation import linear_distillation_loss
from .linear_losses import LinearGRPOLoss, linear_grpo_loss
from .logps import linear_logps, selective_logps
from .losses import GRPOLoss, grpo_loss, log_ratio_loss
from .mismatch import mismatch_metrics
from .normalizers import global_normalizer
from .policy_loss import policy_loss
from .sampling_mask import pack_sampling_mask
from .spec import KL, LossSpec
from .spec.surrogates import (
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
)
from .tokens.output import LossOutput
from .vocab.shard import VocabShard
from .weights import importance_weights, rejection_mask

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DPPO",
    "DRO",
    "GMPO",
    "KL",
    "SAPO",
    "VESPO",
    "GRPOLoss",
    "ImportanceRatio",
    "LinearGRPOLoss",
    "LogRatio",
    "LossOutput",
    "LossSpec",
    "PPOClip",
    "Reinforce",
    "VocabShard",
    "distillation_loss",
    "global_normalizer",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "linear_distillation_loss",
    "linear_grpo_loss",
    "linear_logps",
    "log_ratio_loss",
    "mismatch_metrics",
    "pack_sampling_mask",
    "policy_loss",
    "rejection_mask",
    "selective_logps",
]
