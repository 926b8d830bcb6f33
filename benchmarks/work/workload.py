"""What is computed: losses, sizes, and the least that any provider has to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from grpo_kernels import KL, LogRatio, LossSpec, PPOClip, Reinforce

CLIP = 0.2
# Large, so that a provider which leaves the term out is seen to be wrong.
BETA = 0.5
LOSSES = {
    "grpo": LossSpec(PPOClip(CLIP, CLIP), aggregation="token-mean"),
    "grpo_kl": LossSpec(PPOClip(CLIP, CLIP), KL("k3", beta=BETA), aggregation="token-mean"),
    "log_ratio": LossSpec(LogRatio(), aggregation="token-mean"),
    "cross_entropy": LossSpec(Reinforce(), aggregation="token-mean"),
}
WITH_REFERENCE = ("grpo_kl", "log_ratio")
SEQUENCES = 8


@dataclass(frozen=True)
class Workload:
    """One batch of `SEQUENCES` sequences, and the loss wanted of it."""

    form: str  # "logits" or "linear"
    loss: str  # of LOSSES
    T: int  # tokens of the batch, masked ones included
    V: int
    H: int = 0  # of the linear form
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0  # fraction of the tokens, by ragged lengths
    inactive: float = 0.0  # fraction of the sequences whose advantage is 0
    frozen_head: bool = False

    @property
    def reference(self) -> bool:
        return self.loss in WITH_REFERENCE

    @property
    def learning(self) -> float:
        """Fraction of the tokens with a gradient. A KL term gives one to tokens without advantage."""
        idle = 0.0 if self.loss == "grpo_kl" else self.inactive
        return (1 - self.masked) * (1 - idle)

    @property
    def floor(self) -> Floor:
        """The least that any provider of loss, gradient and all unmasked log-probabilities has to do.

        Bytes of the logits form: read each unmasked row of policy and reference once, write the gradient of
        every row. Operations of the linear form: the forward product of each unmasked row, two more for each
        that learns.
        """
        E = self.T * self.V
        read = (1 - self.masked) * (1 + self.reference)
        if self.form == "logits":
            per_element = (read + 1) * self.dtype.itemsize
            return Floor(round(per_element * E), "B", f"{per_element:g}E")
        products = 2 * read + (2 if self.frozen_head else 4) * self.learning
        return Floor(round(products * E * self.H), "FLOP", f"{products:g}TVH")

    def __str__(self) -> str:
        sizes = f"T={self.T} V={self.V}" + (f" H={self.H}" if self.H else "")
        rest = [f"{n}={x:g}" for n, x in (("masked", self.masked), ("inactive", self.inactive)) if x]
        return " ".join([self.form, self.loss, sizes, *rest, *(["frozen head"] if self.frozen_head else [])])


class Floor(NamedTuple):
    amount: int
    unit: str  # "B", moved to or from memory, or "FLOP", of matrix products
    formula: str  # bytes per element of E = T * V, or operations per T * V * H
