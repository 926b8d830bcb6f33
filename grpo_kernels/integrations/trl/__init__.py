"""TRL 1.16 and later: `FusedGRPOTrainer`, and `fuse_trl_logps` for GRPO, RLOO, SFT, DPO and KTO."""

from .head import fuse_trl_logps
from .trainer import FusedGRPOTrainer

__all__ = ["FusedGRPOTrainer", "fuse_trl_logps"]
