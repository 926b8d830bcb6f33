"""Fused policy losses for GRPO-style reinforcement learning of language models."""

from .advantages import group_advantages
from .losses import GRPOLoss, LossOutput, grpo_loss, log_ratio_loss, selective_logps
from .spec import KL, ImportanceRatio, LogRatio, LossSpec, PPOClip, Reinforce

__version__ = "0.1.0"

__all__ = [
    "KL",
    "GRPOLoss",
    "ImportanceRatio",
    "LogRatio",
    "LossOutput",
    "LossSpec",
    "PPOClip",
    "Reinforce",
    "group_advantages",
    "grpo_loss",
    "log_ratio_loss",
    "selective_logps",
]
