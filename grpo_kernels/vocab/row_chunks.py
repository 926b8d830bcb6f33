"""Chunks of rows of logits for the PyTorch backend: their indices, views of them, and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# On the CPU each thread has 4 MiB of fp32 of a chunk, so that it stays in the cache. Other devices need
# larger chunks to amortise the launches.
THREAD_ELEMENTS, CHUNK_ELEMENTS = 1 << 20, 1 << 25

Index: TypeAlias = Tensor | slice


class RowChunk(NamedTuple):
    """Some rows of a batch, and their position in a 2-D view of the logits."""

    rows: Index  # among the B * T rows of the batch
    local: Index  # the same rows in the 2-D view
    sequence: int | None  # the view is logits[sequence]; None: the whole batch is one 2-D view

    def read(self, logits: Tensor, name: str, scratch: Scratch) -> Tensor:
        """Return the chunk's rows of `logits` `[B, T, V]`, as `[n, V]`: a view, or a copy in a buffer."""
        rows = self.view(logits)
        if isinstance(self.local, slice):
            return rows[self.local]
        out = scratch.like(name, rows[: len(self.local)], rows.dtype)
        return torch.index_select(rows, 0, self.local, out=out)

    def direct(self, out: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return the chunk's rows of `out` if the gradient can be computed there directly, else None."""
        if isinstance(self.local, slice) and out.dtype == dtype and out.device.type == "cpu":
            return self.view(out)[self.local, :width]
        return None

    def write(self, out: Tensor, values: Tensor, needed: Tensor) -> None:
        """Write `values` into the rows of `out`, and zeros into the padding columns beyond them."""
        target, width = self.view(out), values.shape[1]
        if needed.device.type != "cpu":
            # On these devices a chunk has all rows, and those that are not needed may be NaN.
            values = torch.where(needed[self.rows].unsqueeze(-1), values, 0.0)
        if isinstance(self.local, slice):
            if values.data_ptr() != target[self.local].data_ptr():
                target[self.local, :width] = values
            target[self.local, width:] = 0
        else:
            target[:, :width].index_copy_(0, self.local, values.to(out.dtype))
            target[:, width:].index_fill_(0, self.local, 0.0)

    def view(self, logits: Tensor) -> Tensor:
        """The 2-D view of `logits` that has the rows."""
        if self.sequence is not None:
            return logits[self.sequence]
        return logits.as_strided((logits.shape[0] * logits.shape[1], logits.shape[2]), logits.stride()[1:])


def is_flat(logits: Tensor) -> bool:
    """Return whether all rows of `[B, T, V]` have one stride, so that they are rows of one 2-D view."""
    batch, time, _ = logits.shape
    return batch == 1 or time == 0 or logits.stride(0) == time * logits.stride(1)


def row_chunks(needed: Tensor, *tensors: Tensor) -> Iterator[RowChunk]:
    """Yield chunks of the `needed` rows, `[B * T]` bool.

    On a GPU the chunks have all rows, because selecting some of them would sync. On the CPU it does not.
    """
    batch, time, vocab = tensors[0].shape
    flat = all(is_flat(tensor) for tensor in tensors)
    on_cpu = needed.device.type == "cpu"
    elements = min(torch.get_num_threads() * THREAD_ELEMENTS, CHUNK_ELEMENTS) if on_cpu else CHUNK_ELEMENTS
    rows = max(1, elements // max(1, vocab))
    span = batch * time if flat else time
    for sequence in range(1 if flat else batch):
        start = sequence * span
        whole = None if flat else sequence
        here = needed[start : start + span]
        if on_cpu and 2 * int(here.sum()) < span:
            for part in here.nonzero().view(-1).split(rows) if here.any() else ():
                yield RowChunk(part + start, part, whole)
            continue
        for begin in range(0, span, rows):
            end = min(begin + rows, span)
            if not on_cpu or here[begin:end].all():
                yield RowChunk(slice(start + begin, start + end), slice(begin, end), whole)
            elif here[begin:end].any():
                part = here[begin:end].nonzero().view(-1) + begin
                yield RowChunk(part + start, part, whole)


class Scratch:
    """Buffers that all chunks of a pass share. New ones per chunk would cost more than the arithmetic.

    Attributes:
        has_infinities: whether sums must expect products of 0 and an infinite logarithm.
    """

    def __init__(self, *, has_infinities: bool) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.has_infinities = has_infinities

    def like(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer of the shape `[n, V]` of `x`."""
        found = self.buffers.get(name)
        if found is None or found.shape[0] < x.shape[0]:
            found = self.buffers[name] = torch.empty(x.shape, dtype=dtype, device=x.device)
        return found[: x.shape[0]]
