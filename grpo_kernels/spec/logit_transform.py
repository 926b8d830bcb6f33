"""The transform from raw logits to a distribution: scale, softcap, temperature, vocabulary padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checks.scalars import number_field


@dataclass(frozen=True)
class LogitTransform:
    """Maps z to `softcap * tanh(z * scale / softcap) / temperature`, or to `z * scale / temperature`.

    Attributes:
        vocab_size: number of vocabulary entries. Later columns are padding.
        scale, softcap: scale and softcap of the policy.
        ref_scale, ref_softcap: scale and softcap of the reference.
        temperature: the temperature of both models; 1 if `Rows.temperatures` has one per token.
    """

    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None
    ref_scale: float = 1.0
    ref_softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        number_field(self, "scale", name="logit_scale", strict=True)
        number_field(self, "softcap", name="logit_softcap", strict=True, optional=True)
        number_field(self, "ref_scale", name="ref_logit_scale", strict=True)
        number_field(self, "ref_softcap", name="ref_logit_softcap", strict=True, optional=True)
        number_field(self, "temperature", name="temperature", strict=True)

    @classmethod
    def of(
        cls,
        vocab_size: int,
        temperature: float | Tensor,
        scale: float,
        softcap: float | None,
        ref_scale: float | None = None,
        ref_softcap: float | None = None,
    ) -> LogitTransform:
        """Create the transform of a call. Scale and softcap of the reference default to the policy's."""
        return cls(
            vocab_size,
            scale,
            softcap,
            scale if ref_scale is None else ref_scale,
            softcap if ref_softcap is None else ref_softcap,
            1.0 if isinstance(temperature, Tensor) else temperature,
        )

    @property
    def same_factor(self) -> bool:
        """Whether a difference of softcapped, or else raw, logits is as many nats in both models."""
        if self.softcap is None:
            return self.ref_softcap is None and self.scale == self.ref_scale
        return self.ref_softcap is not None

    @property
    def numbers(self) -> list[float]:
        """The fields after `vocab_size` as floats, for a custom operator. A missing softcap is infinity."""
        softcap, ref_softcap = (math.inf if x is None else x for x in (self.softcap, self.ref_softcap))
        return [self.scale, softcap, self.ref_scale, ref_softcap, self.temperature]

    @classmethod
    def from_numbers(cls, vocab_size: int, numbers: Sequence[float]) -> LogitTransform:
        """Create the transform from its `numbers`."""
        scale, softcap, ref_scale, ref_softcap, temperature = numbers
        return cls(
            vocab_size,
            scale,
            None if softcap == math.inf else softcap,
            ref_scale,
            None if ref_softcap == math.inf else ref_softcap,
            temperature,
        )
