"""What a model does between its hidden states and its logits, read from its config and its head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The model multiplies its logits by the first of these that its config has (Cohere, Muse, Falcon-H1).
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# The names of the softcap (Gemma, RecurrentGemma).
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class LogitRule(NamedTuple):
    """Computes logits from the output `z` of a linear head: `softcap * tanh(z * scale / softcap)`.

    Attributes:
        scale: the factor.
        softcap: the bound of the logits; None for `z * scale`.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Return the rule that a config of transformers describes. Its models use several names."""
        config = config.get_text_config()

        def first(names: tuple[str, ...]) -> Any:
            return next((x for name in names if (x := getattr(config, name, None)) is not None), None)

        scale = first(MULTIPLIERS)
        divisor = getattr(config, "logits_scaling", None)
        if scale is None and divisor is not None:
            # Granite and MiniCPM3 divide by this, HyperCLOVA X multiplies by it.
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        if scale is None and getattr(config, "dim_model_base", None) is not None:
            # MiniCPM multiplies its hidden states by this before the head.
            scale = config.dim_model_base / config.hidden_size
        return cls(1.0 if scale is None else scale, first(SOFTCAPS))

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def __str__(self) -> str:
        parts = [] if self.scale == 1 else [f"a factor of {self.scale:g}"]
        if self.softcap is not None:
            parts.append(f"a softcap of {self.softcap:g}")
        return " and ".join(parts) or "nothing"


def wrapped_layer(head: Any) -> Any:
    """Return the layer that FSDP, or PEFT's `modules_to_save`, have wrapped; else `head`."""
    for name in ("_fsdp_wrapped_module", "original_module"):
        head = getattr(head, name, head)
    return head


def is_linear(layer: Any) -> bool:
    """Whether the forward is that of a linear layer. A layer with LoRA, for example, adds to it."""
    return type(layer).forward is torch.nn.Linear.forward
