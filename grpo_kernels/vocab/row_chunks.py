"""Chunks of rows of logits for the PyTorch backend: their indices, views of them, and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Union

import torch
from torch import Tensor

# On the CPU each thread has 4 MiB of fp32 of a chunk, so that it stays in the cache. Other devices need
# larger chunks to amortise the launches.
THREAD_ELEMENTS, CHUNK_ELEMENTS = 1 << 20, 1 << 25

Index = Union[Tensor, slice]


class RowChunk(NamedTuple):
    """Some rows of a batch."""

    rows: Index  # among the B * T rows
    sequence: int | None  # the one that has them all; None: they are rows of the whole batch

    def locate(self, x: Tensor) -> tuple[Tensor, Index]:
        """Return a 2-D view of `x` `[B, T, V]`, and the indices of the chunk's rows in it."""
        batch, time, width = x.shape
        if self.sequence is not None:
            start = self.sequence * time
            if isinstance(self.rows, slice):
                return x[self.sequence], slice(self.rows.start - start, self.rows.stop - start)
            return x[self.sequence], self.rows - start
        layout = row_layout(x)
        assert layout is not None
        step, period = layout
        view = x.as_strided(((batch - 1) * period + time, width), (step, x.stride(2)))
        if period == time:
            return view, self.rows
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=x.device)
        return view, rows + rows // time * (period - time)

    def read(self, logits: Tensor, name: str, scratch: Scratch) -> Tensor:
        """Return the chunk's rows of `logits` `[B, T, V]`, as `[n, V]`: a view, or a copy in a buffer."""
        view, rows = self.locate(logits)
        if isinstance(rows, slice):
            return view[rows]
        out = scratch.empty(name, len(rows), view.shape[1], view.dtype, view.device)
        return torch.index_select(view, 0, rows, out=out)

    def direct(self, out: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return the chunk's rows of `out` if the gradient can be computed there directly, else None."""
        view, rows = self.locate(out)
        if isinstance(rows, slice) and out.dtype == dtype and out.device.type == "cpu":
            return view[rows, :width]
        return None

    def write(self, out: Tensor, values: Tensor, needed: Tensor) -> None:
        """Write `values` into the rows of `out`, and zeros into the padding columns beyond them."""
        (view, rows), width = self.locate(out), values.shape[1]
        if needed.device.type != "cpu":
            # On these devices a chunk has all rows, and those that are not needed may be NaN.
            values = torch.where(needed[self.rows].unsqueeze(-1), values, 0.0)
        if isinstance(rows, slice):
            if values.data_ptr() != view[rows].data_ptr():
                view[rows, :width] = values
            view[rows, width:] = 0
        else:
            view[:, :width].index_copy_(0, rows, values.to(out.dtype))
            view[:, width:].index_fill_(0, rows, 0.0)


def row_layout(x: Tensor) -> tuple[int, int] | None:
    """Return the stride of a row of `[B, T, V]`, and that of a sequence, counted in rows.

    None: a sequence's stride is not a multiple of a row's. That of a slice along T is.
    """
    batch, time, _ = x.shape
    if batch == 1 or time == 0:
        return x.stride(1), time
    if time == 1:
        return x.stride(0), 1
    if x.stride(1) == 0 or x.stride(0) % x.stride(1):
        return None
    return x.stride(1), x.stride(0) // x.stride(1)


def row_chunks(needed: Tensor, *tensors: Tensor, parts: int = 1) -> Iterator[RowChunk]:
    """Yield chunks of the `needed` rows, `[B * T]` bool.

    On a CPU a chunk has one of `parts` of the usual rows: a pass with many buffers needs shorter chunks.
    On a GPU the chunks have all rows, because selecting some of them would sync. On the CPU it does not.
    """
    batch, time, vocab = tensors[0].shape
    on_cpu = needed.device.type == "cpu"
    elements = CHUNK_ELEMENTS
    if on_cpu:
        elements = min(elements, torch.get_num_threads() * THREAD_ELEMENTS // parts)
    size = max(1, elements // max(1, vocab))
    # A chunk of several sequences copies the rows of a slice along T. If its sequences are short, this costs
    # less than a chunk for each of them.
    layouts = [row_layout(x) for x in tensors]
    whole = None not in layouts and (2 * time <= size or all(x is not None and x[1] == time for x in layouts))
    span = batch * time if whole else time
    for sequence in range(1 if whole else batch):
        start = sequence * span
        of = None if whole else sequence
        here = needed[start : start + span]
        if on_cpu and 2 * int(here.sum()) < span:
            for part in here.nonzero().view(-1).split(size) if here.any() else ():
                yield RowChunk(part + start, of)
            continue
        for begin in range(0, span, size):
            end = min(begin + size, span)
            if not on_cpu or here[begin:end].all():
                yield RowChunk(slice(start + begin, start + end), of)
            elif here[begin:end].any():
                yield RowChunk(here[begin:end].nonzero().view(-1) + (start + begin), of)


class Scratch:
    """Buffers that all chunks of a pass share. New ones per chunk would cost more than the arithmetic.

    Attributes:
        has_infinities: whether sums must expect products of 0 and an infinite logarithm.
    """

    def __init__(self, *, has_infinities: bool) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.has_infinities = has_infinities

    def like(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialized buffer of the shape `[n, V]` of `x`."""
        return self.empty(name, x.shape[0], x.shape[1], dtype, x.device)

    def empty(self, name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized buffer `[rows, width]`. The same name always has the same width and dtype."""
        found = self.buffers.get(name)
        if found is None or found.shape[0] < rows:
            found = self.buffers[name] = torch.empty(rows, width, dtype=dtype, device=device)
        return found[:rows]
