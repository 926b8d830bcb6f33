"""ms-swift 4.6: `fuse_swift_logps` replaces the function that computes its log-probabilities."""

from __future__ import annotations

import sys

from torch import Tensor

from ..log import logger
from ..logps import selective_logps
from .versions import require

require("swift", "ms-swift", tested="4.6", distribution="ms-swift")

from swift.rlhf_trainers import cpo_trainer, grpo_trainer, orpo_trainer, rlhf_mixin  # noqa: E402

# The modules that compute log-probabilities. For CPO and ORPO these are TRL's.
FROM_TRL = (cpo_trainer.HFCPOTrainer, orpo_trainer.HFORPOTrainer)
MODULES = (grpo_trainer, rlhf_mixin, *(sys.modules[trainer.__module__] for trainer in FROM_TRL))


def swift_logps(logits: Tensor, index: Tensor) -> Tensor:
    """Compute log-probabilities with the signature of TRL's `selective_log_softmax`.

    Args:
        logits: `[B, T, V]` or `[N, V]`, divided by the temperature.
        index: `[B, T]` or `[N]`: the taken tokens.

    Returns:
        As `index`, fp32, nats. DPO and KTO write zeros into it, which a view would not allow.
    """
    return selective_logps(logits, index).clone()


def fuse_swift_logps() -> None:
    """Compute the log-probabilities of ms-swift's GRPO, DPO, CPO, ORPO and KTO with `selective_logps`.

    Their losses stay. Call it in a file of `--external_plugins`. A second call changes nothing.
    """
    for module in MODULES:
        module.selective_log_softmax = swift_logps
    logger.info("fuse_swift_logps: ms-swift computes log-probabilities with selective_logps")
