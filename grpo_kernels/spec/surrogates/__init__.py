"""The surrogates, one per file: parameters, formula with derivative, clip rule, and coupling of tokens."""

from .base import Surrogate
from .cispo import CISPO
from .dppo import DPPO
from .dro import DRO
from .gmpo import GMPO
from .importance_ratio import ImportanceRatio
from .log_ratio import LogRatio
from .ppo_clip import PPOClip
from .reinforce import Reinforce
from .sapo import SAPO
from .vespo import VESPO

__all__ = [
    "CISPO",
    "DPPO",
    "DRO",
    "GMPO",
    "SAPO",
    "VESPO",
    "ImportanceRatio",
    "LogRatio",
    "PPOClip",
    "Reinforce",
    "Surrogate",
]
