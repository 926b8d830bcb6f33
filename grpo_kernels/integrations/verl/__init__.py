"""verl 0.9.1 and later: adds our losses to its registry, and `linear_logps` behind its `use_fused_kernels`.

Importing this package does both. One line of verl's configuration imports it in every worker:

    actor_rollout_ref.model.external_lib=grpo_kernels.integrations.verl
"""

from __future__ import annotations

import functools
import os

from ...checks.choices import PRESET_NAMES
from ...log import logger
from ..versions import require

installed = require("verl", "verl", tested="0.9.1")

from verl.workers.utils import losses as actor_losses  # noqa: E402

try:
    from .logps import fuse_verl_logps, replace_in_verl
except ImportError as error:
    raise ImportError(
        f"verl {installed} has other fused kernels than verl 0.9.1, and needs a newer grpo_kernels: {error}"
    ) from error

from .losses import is_free, register_loss  # noqa: E402
from .presets import PREFIX, preset_spec  # noqa: E402
from .reference import hand_batch_to_losses  # noqa: E402

__all__ = ["fuse_verl_logps", "register_loss"]


def install() -> None:
    """Register a loss for each preset, and replace verl's fused kernels unless the environment forbids it."""
    for preset in PRESET_NAMES:
        register_loss(PREFIX + preset, functools.partial(preset_spec, preset))
    names = [f"{PREFIX}{{{','.join(PRESET_NAMES)}}}"]
    if is_free("log_ratio"):
        register_loss("log_ratio", functools.partial(preset_spec, "log_ratio"))
        names.insert(0, "log_ratio")
    replace_in_verl(actor_losses, "ppo_loss", hand_batch_to_losses(actor_losses.ppo_loss))
    fused = os.environ.get("GRPO_KERNELS_VERL_FUSE", "1") not in ("", "0")
    if fused:
        fuse_verl_logps()
    logger.info(
        "verl %s: registered %s; its fused kernels (torch, triton) %s",
        installed,
        " and ".join(names),
        "replaced by linear_logps" if fused else "left as they are (GRPO_KERNELS_VERL_FUSE=0)",
    )


install()
