"""From raw logits to the distribution: scale, softcap, temperature, and padding of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checks.scalars import number_field


@dataclass(frozen=True)
class LogitTransform:
    """`z -> softcap * tanh(z * scale / softcap)`, then `/ temperature`. Without a softcap `z * scale`.

    Attributes:
        vocab_size: columns from here on are padding.
        scale, softcap: of the policy.
        ref_scale, ref_softcap: of the reference.
        temperature: of both; 1 if there is a temperature per token, which is a tensor elsewhere.
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
        """The transform of a call. The reference's scale and softcap default to those of the policy."""
        return cls(
            vocab_size,
            scale,
            softcap,
            scale if ref_scale is None else ref_scale,
            softcap if ref_softcap is None else ref_softcap,
            1.0 if isinstance(temperature, Tensor) else temperature,
        )

    @property
    def numbers(self) -> list[float]:
        """The fields after `vocab_size` as floats, for an operator. No softcap is infinity."""
        softcap, ref_softcap = (math.inf if x is None else x for x in (self.softcap, self.ref_softcap))
        return [self.scale, softcap, self.ref_scale, ref_softcap, self.temperature]

    @classmethod
    def from_numbers(cls, vocab_size: int, numbers: Sequence[float]) -> LogitTransform:
        """The transform whose `numbers` are given."""
        scale, softcap, ref_scale, ref_softcap, temperature = numbers
        return cls(
            vocab_size,
            scale,
            None if softcap == math.inf else softcap,
            ref_scale,
            None if ref_softcap == math.inf else ref_softcap,
            temperature,
        )
