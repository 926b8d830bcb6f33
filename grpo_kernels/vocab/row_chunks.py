"""Chunks of rows of logits for the PyTorch backend: their indices, views of them, and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# On the CPU, 16 MiB of fp32 make Python's overhead small and still fit into the last-level cache. Other
# devices need larger chunks to amortise the launches.
CPU_CHUNK_ELEMENTS, CHUNK_ELEMENTS = 1 << 22, 1 << 25

Index: TypeAlias = Tensor | slice


class RowChunk(NamedTuple):
    """Some rows of a batch, and their position in a 2-D view of the logits."""

    rows: Index  # among the B * T rows of the batch
    local: Index  # the same rows in the 2-D view
    sequence: int | None  # the view is logits[sequence]; None: the whole batch is one 2-D view

    def read(self, logits: Tensor) -> Tensor:
        """Return the chunk's rows of `logits` `[B, T, V]`, as `[n, V]`."""
        rows = self.view(logits)
        return rows[self.local] if isinstance(self.local, slice) else rows.index_select(0, self.local)

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

    def pick(self, picked: Tensor) -> RowChunk:
        """Return some rows of the chunk, by their position in it."""

        def take(index: Index) -> Tensor:
            return index[picked] if isinstance(index, Tensor) else picked + index.start

        return RowChunk(take(self.rows), take(self.local), self.sequence)

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

    On a GPU the chunks have all rows, because selecting some of them would sync.
    """
    batch, time, vocab = tensors[0].shape
    flat = all(is_flat(tensor) for tensor in tensors)
    rows = max(1, (CPU_CHUNK_ELEMENTS if needed.device.type == "cpu" else CHUNK_ELEMENTS) // max(1, vocab))
    span = batch * time if flat else time
    for sequence in range(1 if flat else batch):
        start = sequence * span
        here = needed[start : start + span]
        if needed.device.type != "cpu" or bool(here.all()):
            for begin in range(0, span, rows):
                end = min(begin + rows, span)
                local = slice(begin, end)
                yield RowChunk(slice(start + begin, start + end), local, None if flat else sequence)
        else:  # on the CPU, so it does not sync
            for part in here.nonzero().view(-1).split(rows) if here.any() else ():
                yield RowChunk(part + start, part, None if flat else sequence)


class Scratch:
    """Buffers that all chunks of a pass share. New ones per chunk would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def like(self, name: str, x: Tensor) -> Tensor:
        """An uninitialised buffer of the shape `[n, V]` and dtype of `x`."""
        found = self.buffers.get(name)
        if found is None or found.shape[0] < x.shape[0]:
            found = self.buffers[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return found[: x.shape[0]]
