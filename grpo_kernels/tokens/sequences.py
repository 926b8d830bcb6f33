"""Sequences of a batch: which tokens form one, sums over each, and the check of `seq_lens`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from ..checks import debug
from ..checks.tensors import check_tensor, has_data
from .differentiation import outside_graphs


@dataclass
class Sequences:
    """The division of `N` tokens into sequences. A packed batch has `S` of them.

    Attributes:
        shape: `[B, T]`, or `[N]` if packed.
        mask: `[N]` bool, flattened.
        dtype: of the arithmetic.
        seq_lens: `[S]`, if packed and given.
        ids: `[N]`, if packed and given: the sequence of each token.
        group: the ranks over which the tokens of each sequence are split. None: this rank has all of them.
    """

    shape: tuple[int, ...]
    mask: Tensor
    dtype: torch.dtype
    seq_lens: Tensor | None = None
    ids: Tensor | None = None
    group: dist.ProcessGroup | None = None
    _counts: Tensor | None = field(default=None, init=False, repr=False)
    _lengths: Tensor | None = field(default=None, init=False, repr=False)

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the unmasked tokens of each token's sequence, `[N]`."""
        return self.spread(self.sums(x))

    def sums(self, x: Tensor) -> Tensor:
        """The sum of `x` over the unmasked tokens of each sequence, `[B, 1]` or packed `[S]`.

        The sum is in fp64, except on MPS, which lacks it. A packed batch without `seq_lens` is one sequence.
        """
        return self._sums(widened(torch.where(self.mask, x, 0.0))).to(x.dtype)

    def maxima(self, x: Tensor) -> Tensor:
        """The largest `x` over the unmasked tokens of each sequence, `[B, 1]` or packed `[S]`.

        It is -inf for a sequence without unmasked tokens. The ranks of `group` are not compared.
        """
        x = torch.where(self.mask, x, -math.inf)
        if self.seq_lens is None or self.ids is None:
            # A sequence of no tokens has no maximum, so each gets one more entry.
            return functional.pad(x.view(self.shape), (0, 1), value=-math.inf).amax(-1, keepdim=True)
        return torch.segment_reduce(x, "max", lengths=self.seq_lens, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """Expand one value per sequence, shaped as those of `sums`, to one per token, `[N]`."""
        return x.expand(self.shape).reshape(-1) if self.ids is None else x[self.ids]

    def _sums(self, x: Tensor) -> Tensor:
        if self.seq_lens is None or self.ids is None:
            return self.over_ranks(x.view(self.shape).sum(-1, keepdim=True))
        # On a GPU, index_add would sum in an undefined order.
        return self.over_ranks(torch.segment_reduce(x, "sum", lengths=self.seq_lens, unsafe=True))

    def over_ranks(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the ranks of `group`."""
        return x if self.group is None else outside_graphs(sum_over_ranks)(x, self.group)

    @property
    def counts(self) -> Tensor:
        """The number of unmasked tokens of each sequence, `[B, 1]` or packed `[S]`."""
        if self._counts is None:  # torch.compile does not support functools.cached_property
            self._counts = self._sums(self.mask.to(self.dtype))
        return self._counts

    @property
    def lengths(self) -> Tensor:
        """The number of unmasked tokens of each token's sequence, `[N]`, at least 1."""
        if self._lengths is None:
            self._lengths = self.spread(self.counts.clamp(min=1))
        return self._lengths


def widened(x: Tensor) -> Tensor:
    """Return `x` in fp64, or unchanged on MPS, which lacks it."""
    return x if x.device.type == "mps" else x.to(torch.float64)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def check_context_group(group: Any) -> None:
    """Raise TypeError unless `group` is a process group or None."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"context_group must be a torch.distributed process group or None, got {group!r}")


def check_seq_lens(seq_lens: Tensor, source: Tensor, name: str) -> None:
    """Raise an error unless `seq_lens` `[S]` are lengths of sequences in `source` `[N, ...]`.

    `name` is the name of the argument `source`. The values are read only if that needs no sync with a device,
    or under GRPO_KERNELS_DEBUG.
    """
    check_tensor("seq_lens", seq_lens)
    if source.dim() != 2:
        hint = ""
        if source.shape[0] == 1:
            hint = f": pass {name}.squeeze(0), and squeeze every other tensor of tokens"
        raise ValueError(f"seq_lens belongs to packed {name} [N, ...], got shape {tuple(source.shape)}{hint}")
    if seq_lens.dim() != 1 or seq_lens.dtype.is_floating_point or seq_lens.dtype == torch.bool:
        raise ValueError(
            f"seq_lens must be [S] integers, got {seq_lens.dtype} of shape {tuple(seq_lens.shape)}"
        )
    readable = seq_lens.device.type == "cpu" or debug.enabled()
    if not torch.compiler.is_compiling() and readable and has_data(seq_lens):
        total = int(seq_lens.sum())
        shortest = int(seq_lens.min()) if seq_lens.numel() else 0
        if total != source.shape[0] or shortest < 0:
            raise ValueError(
                f"seq_lens must be non-negative and sum to N = {source.shape[0]}, got a sum of {total} and a "
                f"smallest length of {shortest}"
            )


def sequences_within(seq_lens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return lengths that sum to at most `tokens` for any `seq_lens`, and the sequence of each token.

    On a GPU the values have not been checked. Wrong ones would make `segment_reduce` read out of bounds.
    """
    ends = seq_lens.cumsum(0).clamp(0, tokens).cummax(0).values
    positions = torch.arange(tokens, device=seq_lens.device)
    ids = torch.searchsorted(ends, positions, right=True).clamp(max=max(0, seq_lens.numel() - 1))
    return ends.diff(prepend=ends.new_zeros(1)), ids
