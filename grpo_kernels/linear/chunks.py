"""Logits from hidden states, a chunk of tokens at a time, in buffers that all chunks share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import NamedTuple, Union

import torch
from torch import Tensor

from ..vocab.rows import Rows
from ..vocab.shard import VocabShard
from .plan import RowPlan
from .rows import LinearRows

logger = logging.getLogger("grpo_kernels")

Index = Union[Tensor, slice]

# Memory for the buffers of a chunk. On a CPU it is small compared to that of training, but large enough for
# efficient products. On other devices it is a share of the free memory. Each chunk reads and writes the fp32
# gradient of the weight once. Longer chunks thus save traffic, but beyond CHUNK_TOKENS they gain little.
CPU_CHUNK_BYTES = 1 << 26
MEMORY_SHARE, CHUNK_TOKENS = 0.25, 8192
ASSUMED_MEMORY = 16 << 30  # if the device does not report it


class Chunk(NamedTuple):
    """Some rows with their logits."""

    place: slice  # in the order of the plan
    indices: Index  # among all rows
    hidden: Tensor  # [n, H]
    rows: Rows  # logits [1, n, V]
    dlogits: Tensor  # [1, n, V], to be filled; may be the logits


class Chunks:
    """Iterates over the rows of a plan, one chunk at a time.

    Create it after the other allocations of a call, because it takes a share of the memory that is still
    free. What is allocated later is `reserved`, in bytes.
    """

    def __init__(
        self, rows: LinearRows, plan: RowPlan, shard: VocabShard | None = None, *, reserved: int = 0
    ) -> None:
        """`rows` are the result of `LinearRows.cast`. With a `shard`, all ranks use the same chunk length."""
        self.rows, self.plan = rows, plan
        self.targets, *self.others = (plan.take(x) for x in rows.token_tensors)
        config, weight = rows.config, rows.head.weight
        # The matrix products of the gradient need operands of one dtype.
        in_place = plan.active == 0 or config.logits_dtype == config.dtype
        dtypes = [config.logits_dtype, *([] if in_place else [config.dtype])]
        dtypes += [] if rows.ref is None else [config.ref_logits_dtype]
        bytes_per_token = padded(weight.shape[0]) * sum(dtype.itemsize for dtype in dtypes)
        self.size = config.chunk_tokens or choose_chunk_tokens(
            plan.running, bytes_per_token, weight.device, reserved
        )
        if shard is not None and config.chunk_tokens is None:
            self.size = shard.min_over_ranks(self.size, weight.device)
        self.size = max(1, min(self.size, plan.running))
        logger.debug(
            "linear form: %d of %d tokens run, %d with a gradient, in chunks of %d: %.0f MiB",
            *(plan.running, plan.total, plan.active, self.size, self.size * bytes_per_token / 2**20),
        )
        self.logits = self.buffer(config.logits_dtype)
        self.dlogits = self.logits if in_place else self.buffer(config.dtype)
        self.ref_logits = None if rows.ref is None else self.buffer(config.ref_logits_dtype)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Allocate `[size, V]`, with each row aligned for 16-byte loads."""
        weight = self.rows.head.weight
        vocab = weight.shape[0]
        return torch.empty(self.size, padded(vocab), dtype=dtype, device=weight.device)[:, :vocab]

    def __call__(self, start: int, stop: int) -> Iterator[Chunk]:
        """Yield the chunks of the rows from `start` to `stop` in the order of the plan."""
        for begin in range(start, stop, self.size):
            place = slice(begin, min(begin + self.size, stop))
            n = place.stop - begin
            indices = place if self.plan.order is None else self.plan.order[place]
            hidden, logits = self.rows.head.hidden[indices], self.logits[:n]
            self.rows.head.write_logits(hidden, logits)
            ref, ref_logits = self.rows.ref, None
            if ref is not None and self.ref_logits is not None:
                ref_logits = self.ref_logits[:n]
                ref.write_logits(ref.hidden[indices], ref_logits)
                ref_logits = ref_logits.unsqueeze(0)
            temperatures, sampling_mask, ids = (None if x is None else x[place] for x in self.others)
            rows = Rows(
                logits.unsqueeze(0),
                ref_logits,
                self.targets[place],
                temperatures,
                None if sampling_mask is None else sampling_mask.unsqueeze(0),
                ids,
                self.rows.transform,
                self.rows.backend,
            )
            yield Chunk(place, indices, hidden, rows, self.dlogits[:n].unsqueeze(0))


def padded(vocab: int) -> int:
    """Return the length of a row that keeps the next row aligned for 16-byte loads, in any dtype."""
    return math.ceil(vocab / 8) * 8


def choose_chunk_tokens(count: int, bytes_per_token: int, device: torch.device, reserved: int = 0) -> int:
    """Return the number of tokens per chunk: `count` divided evenly into as few chunks as possible."""
    bytes_per_token = max(1, bytes_per_token)  # 0 in an empty part of a vocabulary that is split over ranks
    if device.type == "cpu":
        longest, multiple = CPU_CHUNK_BYTES // bytes_per_token, 1
    else:
        free = max(0, free_memory(device) - reserved)
        longest, multiple = int(MEMORY_SHARE * free) // bytes_per_token, 128
    # Rounded down to a power of two, so that a small change of free memory does not change the order of sums.
    longest = 1 << max(multiple, min(longest, CHUNK_TOKENS)).bit_length() - 1
    chunks = max(1, math.ceil(count / longest))
    return math.ceil(count / chunks / multiple) * multiple


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated, including those that PyTorch's allocator keeps for reuse."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return ASSUMED_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
