"""Fused policy losses for GRPO-style reinforcement learning of language models."""

from .advantages import group_advantages
from .arguments import LossOutput
from .distributed import VocabShard
from .linear_losses import LinearGRPOLoss, linear_grpo_loss
from .logps import linear_logps, selective_logps
from .losses import GRPOLoss, grpo_loss, log_ratio_loss
from .spec import KL, LossSpec
from .surrogates import CISPO, DPPO, DRO, GMPO, SAPO, VESPO, ImportanceRatio, LogRatio, PPOClip, Reinforce

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
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logps",
    "log_ratio_loss",
    "selective_logps",
]
