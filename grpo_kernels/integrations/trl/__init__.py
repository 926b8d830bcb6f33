"""TRL 1.16 and later: `FusedGRPOTrainer`, and functions that change what TRL's other trainers call."""

from .distillation import fuse_trl_distillation
from .head import fuse_trl_logps
from .trainer import FusedGRPOTrainer

__all__ = ["FusedGRPOTrainer", "fuse_trl_distillation", "fuse_trl_logps"]
