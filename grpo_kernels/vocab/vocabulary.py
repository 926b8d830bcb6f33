"""The vocabulary entries of the columns of logits, or of the rows of an LM head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import debug
from ..checks.scalars import check_integer
from ..checks.tensors import check_device, check_tensor, squeeze_hint
from ..tokens.batch import Batch
from .rows import MASKED
from .shard import VocabShard


class Vocabulary(NamedTuple):
    """The range of vocabulary entries that a tensor has."""

    width: int  # columns that are not padding
    start: int = 0  # the entry of the first column, if the vocabulary is split over ranks
    size: int | None = None  # of the whole vocabulary, if it is known

    @classmethod
    def of(
        cls, vocab_size: int | None, held: Tensor, dim: int, what: str, shard: VocabShard | None = None
    ) -> Vocabulary:
        """Create the vocabulary, or the shard's part of it, from dimension `dim` of `held`."""
        columns = held.shape[dim]
        vocab_size = check_integer("vocab_size", vocab_size, optional=True)
        if shard is None:
            size = columns if vocab_size is None else vocab_size
            if not 1 <= size <= columns:
                raise ValueError(f"vocab_size must be between 1 and the {columns} {what}, got {size}")
            return cls(size, 0, size)
        if not isinstance(shard, VocabShard):
            raise TypeError(f"shard must be a VocabShard or None, got {shard!r}")
        if shard.stop - shard.start != columns:
            raise ValueError(f"shard is {shard.start}:{shard.stop}, but there are {columns} {what}")
        stop = shard.stop if vocab_size is None else min(shard.stop, vocab_size)
        if debug.enabled():
            size = shard.vocab_size(held.device)
            vocab_size = size if vocab_size is None else min(size, vocab_size)
        return cls(max(0, stop - shard.start), shard.start, vocab_size)

    def targets(self, batch: Batch, ids: Tensor, name: str = "completion_ids") -> Tensor:
        """Return the column of each taken token, `[N]` int64: MASKED if masked, `width` if not here.

        Raises an error unless `ids`, the argument `name`, are int32 or int64 of the batch's shape.
        """
        check_ids(name, ids, batch)
        if tuple(ids.shape) != batch.shape:
            raise ValueError(
                f"{name} must have shape {batch.shape}, as {batch.source} {batch.source_shape}, got "
                f"{tuple(ids.shape)}{squeeze_hint(ids.shape, batch.shape)}"
            )
        unmasked = batch.mask.view(batch.shape)
        if debug.enabled():
            debug.check_ids(name, ids, unmasked, self.size)
        return self.columns(ids, unmasked).reshape(-1)

    def several_targets(
        self, batch: Batch, ids: Tensor, name: str, *, every_row: bool
    ) -> tuple[Tensor, Tensor]:
        """Return `Rows.targets` `[N]` and `Rows.ids` `[N, K]` of several tokens per position.

        A row without a token is masked, except with `every_row`. Errors are those of `targets`.
        """
        check_ids(name, ids, batch)
        if tuple(ids.shape[:-1]) != batch.shape or not ids.shape[-1]:
            raise ValueError(
                f"{name} must have shape {(*batch.shape, 'K')}, K at least 1, as {batch.source} "
                f"{batch.source_shape}, got {tuple(ids.shape)}"
            )
        given = batch.mask.view(*batch.shape, 1) & (ids >= 0)
        if debug.enabled():
            debug.check_ids(name, ids, given, self.size)
        columns = self.columns(ids, given).flatten(0, -2)
        present = batch.mask if every_row else given.any(-1).reshape(-1)
        return torch.where(present, self.width, MASKED), columns

    def columns(self, ids: Tensor, given: Tensor) -> Tensor:
        """Return the column of each of `ids`, int64: MASKED if not `given`, `width` if it is not here."""
        columns = ids.to(torch.int64) - self.start
        elsewhere = (columns < 0) | (columns >= self.width)
        return columns.masked_fill(elsewhere, self.width).masked_fill_(~given, MASKED)


def check_ids(name: str, ids: Tensor, batch: Batch) -> None:
    """Raise an error unless the argument `name` is integers on the device of the batch."""
    check_tensor(name, ids)
    check_device(name, ids, batch.device, batch.source)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")
