"""Workloads: a loss with its sizes, and the floor, which is the least that any provider has to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from grpo_kernels import KL, LogRatio, LossSpec, PPOClip, Reinforce

CLIP = 0.2
# Large enough that a provider which omits the KL term fails the check.
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
    """A loss of a batch of `SEQUENCES` sequences."""

    form: str  # "logits" or "linear"
    loss: str  # a key of LOSSES
    T: int  # tokens of the batch, including masked ones
    V: int
    H: int = 0  # 0 in the logits form
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0  # fraction of the tokens; the sequences differ in length
    inactive: float = 0.0  # fraction of the sequences whose advantage is 0
    frozen_head: bool = False
    given_ref: bool = False  # the reference's log-probabilities are given, instead of its logits
    entropy: bool = False  # the entropy of each unmasked token is computed too, without a gradient

    def __post_init__(self) -> None:
        if self.given_ref and self.loss not in WITH_REFERENCE:
            raise ValueError(f"given_ref needs a loss of {WITH_REFERENCE}, got {self.loss}")

    @property
    def reference(self) -> bool:
        """Whether a provider reads the reference's logits, or computes them from hidden states."""
        return self.loss in WITH_REFERENCE and not self.given_ref

    @property
    def learning(self) -> float:
        """Fraction of the tokens that have a gradient. With a KL term, that includes inactive tokens."""
        idle = 0.0 if self.loss == "grpo_kl" else self.inactive
        return (1 - self.masked) * (1 - idle)

    @property
    def floor(self) -> Floor:
        """The least that a provider of the loss, its gradient and all unmasked log-probabilities has to do.

        In the logits form these are bytes: each unmasked row of policy and reference is read once, and the
        gradient of every row is written once. In the linear form these are FLOPs: one product in the forward
        for each unmasked row, and two in the backward for each row with a gradient.
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
        flags = (
            ("frozen head", self.frozen_head),
            ("given ref_logps", self.given_ref),
            ("entropy", self.entropy),
        )
        return " ".join([self.form, self.loss, sizes, *rest, *(name for name, flag in flags if flag)])

    def config(self) -> dict[str, object]:
        """The fields for a CSV."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def tiny(self) -> Workload:
        """The same work in sizes for a CPU and Triton's interpreter."""
        return replace(self, T=16, V=333, H=64 if self.H else 0)


class Floor(NamedTuple):
    amount: int
    unit: str  # "B", read from or written to memory, or "FLOP", of matrix products
    formula: str  # bytes per element of E = T * V, or FLOPs per T * V * H
