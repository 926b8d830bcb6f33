"""Descriptions of losses: LossSpec and presets, KL, and the surrogates with their formulas."""

from .kl import KL
from .logit_transform import LogitTransform
from .loss_spec import LossSpec, resolve_spec
from .presets import PRESETS, PresetOptions

__all__ = ["KL", "PRESETS", "LogitTransform", "LossSpec", "PresetOptions", "resolve_spec"]
