"""The tokens of a batch under trainer and sampler: their log-ratios, and statistics of the mismatch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.choices import MismatchStatistic, StatisticOver, WeightLevel
from ..checks.tensors import check_dtype, check_tensor
from .batch import Batch
from .sequences import Sequences, widened


@dataclass(frozen=True)
class Mismatch:
    """Log-probabilities of trainer and sampler for the same tokens, detached.

    What is computed per sequence has the shape `[B, 1]`, or `[S]` for a packed batch.

    Attributes:
        batch: mask and sequences of the tokens.
        logps: `[N]`, nats: the trainer's, 0 for masked tokens.
        sampler_logps: `[N]`, nats: the sampler's, 0 for masked tokens and for those without a value.
        known: `[N]` bool: whether the token is unmasked and the sampler returned a value for it, not NaN.
    """

    batch: Batch
    logps: Tensor
    sampler_logps: Tensor
    known: Tensor

    @classmethod
    def of(cls, logps: Tensor, sampler_logps: Tensor, mask: Tensor, seq_lens: Tensor | None) -> Mismatch:
        """Check the arguments, `[B, T]` or packed `[N]`, and compare their tokens."""
        for name, x in (("logps", logps), ("sampler_logps", sampler_logps), ("mask", mask)):
            check_tensor(name, x)
        check_dtype("logps", logps)
        if logps.dim() not in (1, 2):
            raise ValueError(f"logps must be [B, T] or packed [N], got shape {tuple(logps.shape)}")
        batch = Batch.of(logps.unsqueeze(-1), mask, seq_lens, name="logps", mask_name="mask")
        missing = sampler_logps.isnan()
        # NaN is allowed here. Under GRPO_KERNELS_DEBUG, `per_token` would raise an error.
        sampled = batch.per_token("sampler_logps", sampler_logps.masked_fill(missing, 0))
        known = batch.mask & ~missing.reshape(-1)
        return cls(batch, batch.per_token("logps", logps), sampled, known)

    @property
    def sequences(self) -> Sequences:
        return self.batch.sequences

    @property
    def log_ratio(self) -> Tensor:
        """`logps - sampler_logps`, `[N]`: 0 for masked tokens and for those without a sampler's value."""
        return torch.where(self.known, self.logps - self.sampler_logps, 0.0)

    @property
    def counts(self) -> Tensor:
        """The number of unmasked tokens of each sequence."""
        return self.sequences.counts

    def means(self, x: Tensor) -> Tensor:
        """The mean of `x` `[N]` over the unmasked tokens of each sequence, 0 if there are none."""
        return self.sequences.sums(x) / self.counts.clamp(min=1)

    def ratio(self, level: WeightLevel) -> Tensor:
        """The importance ratio of each token, `[N]`, or with another level than "token" of each sequence.

        In fp64, except on MPS, which lacks it: a ratio beyond the range of fp32 may be divided by a mean.
        """
        if level == "token":
            return torch.exp(widened(self.log_ratio))
        self.batch.require_sequences(f"level {level!r}")
        log_ratio = self.sequences.sums(self.log_ratio) if level == "sequence" else self.means(self.log_ratio)
        return torch.exp(widened(log_ratio))

    def statistic(self, kind: MismatchStatistic) -> Tensor:
        """The statistic of each token, `[N]`, 0 where `log_ratio` is."""
        d = self.log_ratio
        if kind == "k1":
            return -d
        if kind == "k2":
            return d.square() / 2
        if kind == "k3":
            return torch.where(d == math.inf, d, torch.expm1(d) - d)  # without inf - inf
        if kind == "abs":
            return d.abs()
        return torch.where(self.known, (self.logps.exp() - self.sampler_logps.exp()).abs(), 0.0)

    def over_sequences(self, x: Tensor, over: StatisticOver) -> Tensor:
        """The mean, sum or maximum of `x` `[N]` over the unmasked tokens of each sequence."""
        self.batch.require_sequences(f"over={over!r}")
        if over == "sequence-mean":
            return self.means(x)
        if over == "sequence-sum":
            return self.sequences.sums(x)
        return self.sequences.maxima(x)

    def shaped(self, x: Tensor, per_sequence: bool) -> Tensor:
        """Return values of tokens as `[B, T]`, of sequences as `[B, 1]`, of a packed batch as `[N]`."""
        if not per_sequence:
            return self.batch.unflatten(x)
        return self.sequences.spread(x) if self.batch.packed else x
