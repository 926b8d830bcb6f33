"""From hidden states: the logits come a chunk of tokens at a time, and go before the next chunk comes.

`N` tokens, `V` words, `H` hidden dimensions. What is done with a chunk stands in `linear_autograd.py`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .checks import has_data
from .distributed import VocabShard
from .objective import arithmetic_dtype

logger = logging.getLogger("grpo_kernels")

Rows: TypeAlias = Tensor | slice

# What the buffers of a chunk may take. On a CPU little beside what training holds, yet enough for efficient
# products; elsewhere a share of the free memory, up to a length from which on longer chunks gain little (each
# chunk reads and writes the fp32 gradient of the weight once).
CPU_CHUNK_BYTES = 1 << 26
MEMORY_SHARE, CHUNK_TOKENS = 0.25, 8192
ASSUMED_MEMORY = 16 << 30  # where a device does not tell


@dataclass(frozen=True)
class LinearConfig:
    """How the logits are made of hidden states."""

    dtype: torch.dtype  # of the factors of all matrix products
    logits_dtype: torch.dtype  # what a chunk of logits is held in
    ref_dtype: torch.dtype
    ref_logits_dtype: torch.dtype
    chunk_tokens: int | None  # None: chosen
    compact: bool


class RowPlan(NamedTuple):
    """Which rows are run, and in what order: those with a gradient first."""

    total: int
    running: int  # rows that are run
    active: int  # rows of these that have a gradient
    order: Tensor | None = None  # [running] int64; None: all rows, where they stand
    selected: Tensor | None = None  # [total] bool: the rows with a gradient, where they were not counted

    @classmethod
    def of(cls, needed: Tensor, active: Tensor, *, compact: bool) -> RowPlan:
        """`needed` `[N]` bool: the rows to run; `active`: those of them that have a gradient.

        Unless `compact`, all rows are run as if they had one.
        """
        total = needed.numel()
        if not compact:
            return cls(total, total, total, selected=active)
        # The one wait of the host: how many rows to multiply. compact=False does without.
        with_gradient, running = torch.stack([active.sum(), needed.sum()]).tolist()
        if running == total and with_gradient in (0, total):
            return cls(total, running, with_gradient)
        order = (needed.to(torch.int8) + active).sort(descending=True, stable=True).indices[:running]
        return cls(total, running, with_gradient, order)

    def pick(self, x: Any) -> Any:
        """`[N]` in the plan's order: a tensor, a tuple of tensors that knows its `rows`, or None."""
        if x is None or self.order is None:
            return x
        return x[self.order] if isinstance(x, Tensor) else x.rows(self.order)

    def empty_like(self, x: Tensor) -> Tensor:
        """`[running]`, to be filled in the plan's order, for an `x` `[N]`; where that is the same, `x`."""
        return x if self.order is None else x.new_empty(self.running)

    def spread(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The plan's order back to `[N]`, with 0 for rows that are not run."""
        if self.order is None:
            return x
        out = x.new_empty(self.total) if out is None else out
        return out.zero_().index_copy_(0, self.order, x)


class Head(NamedTuple):
    """`logits = hidden @ weight.T + bias`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    def to(self, dtype: torch.dtype, vocab_size: int) -> Head:
        """In the dtype of the matrix products, without the vocabulary's padding."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return Head(self.hidden.to(dtype), self.weight[:vocab_size].to(dtype), bias)

    def detach(self) -> Head:
        return Head(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def write_logits(self, hidden: Tensor, out: Tensor) -> None:
        product(hidden, self.weight.t(), out=out)
        if self.bias is not None:
            out += self.bias


class Chunk(NamedTuple):
    """Rows at hand: `place` in the plan, `rows` among all."""

    place: slice
    rows: Rows
    hidden: Tensor  # [n, H]
    logits: Tensor  # [1, n, V]
    ref_logits: Tensor | None
    dlogits: Tensor  # [1, n, V], to be filled; may be logits


class Chunks:
    """The rows of a plan, a few at a time, in buffers that all chunks share.

    To be made after everything else that the call allocates, of whose rest it takes a share.
    """

    def __init__(
        self,
        head: Head,
        ref: Head | None,
        plan: RowPlan,
        config: LinearConfig,
        shard: VocabShard | None = None,  # whose ranks meet at every chunk
    ) -> None:
        self.head, self.ref, self.plan = head, ref, plan
        # The backward's products want factors of one dtype.
        in_place = plan.active == 0 or config.logits_dtype == config.dtype
        dtypes = [config.logits_dtype, *([] if in_place else [config.dtype])]
        bytes_per_token = padded(head.weight.shape[0]) * sum(
            dtype.itemsize for dtype in (*dtypes, *([] if ref is None else [config.ref_logits_dtype]))
        )
        device = head.weight.device
        self.size = config.chunk_tokens or choose_chunk_tokens(plan.running, bytes_per_token, device)
        if shard is not None and config.chunk_tokens is None:
            self.size = shard.least(self.size, device)
        self.size = max(1, min(self.size, plan.running))
        logger.debug(
            "linear form: %d of %d tokens run, %d with a gradient, in chunks of %d: %.0f MiB",
            *(plan.running, plan.total, plan.active, self.size, self.size * bytes_per_token / 2**20),
        )
        self.logits = self.buffer(config.logits_dtype)
        self.dlogits = self.logits if in_place else self.buffer(config.dtype)
        self.ref_logits = None if ref is None else self.buffer(config.ref_logits_dtype)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """`[size, V]`, each row aligned for 16-byte loads."""
        vocab = self.head.weight.shape[0]
        return torch.empty(self.size, padded(vocab), dtype=dtype, device=self.head.weight.device)[:, :vocab]

    def __call__(self, start: int, stop: int) -> Iterator[Chunk]:
        """The chunks of these places in the plan."""
        for begin in range(start, stop, self.size):
            place = slice(begin, min(begin + self.size, stop))
            n = place.stop - begin
            rows = place if self.plan.order is None else self.plan.order[place]
            hidden, logits = self.head.hidden[rows], self.logits[:n]
            self.head.write_logits(hidden, logits)
            ref_logits = None
            if self.ref is not None and self.ref_logits is not None:
                ref_logits = self.ref_logits[:n]
                self.ref.write_logits(self.ref.hidden[rows], ref_logits)
                ref_logits = ref_logits.unsqueeze(0)
            yield Chunk(place, rows, hidden, logits.unsqueeze(0), ref_logits, self.dlogits[:n].unsqueeze(0))


class HeadGradients(NamedTuple):
    """fp32 (fp64); None where it is not wanted."""

    dhidden: Tensor | None = None  # [N, H]
    dweight: Tensor | None = None  # [V, H]
    dbias: Tensor | None = None  # [V]

    @classmethod
    def empty(cls, head: Head, needed: tuple[bool, ...]) -> HeadGradients:
        dtype = arithmetic_dtype(head.hidden)
        return cls(
            *(
                torch.empty(x.shape, dtype=dtype, device=x.device) if x is not None and need else None
                for x, need in zip(head, needed, strict=True)
            )
        )


class Gradients:
    """By hidden states, weight and bias, of the chunks so far: summed in fp32 (fp64)."""

    def __init__(self, head: Head, out: HeadGradients, selected: Tensor | None) -> None:
        """`out` is filled."""
        self.head, self.tensors, self.selected = head, out, selected
        self.started = False

    def finish(self) -> None:
        if not self.started:
            self.start(0)

    def start(self, vocab: int) -> None:
        """Zeros where the first chunk does not write: of the weight's gradient, which is large, few."""
        dhidden, dweight, dbias = self.tensors
        for part in (dhidden, None if dweight is None else dweight[vocab:], dbias):
            if part is not None:
                part.zero_()

    def add(self, chunk: Chunk) -> None:
        dlogits, rows, vocab = chunk.dlogits[0], chunk.rows, self.head.weight.shape[0]
        if not self.started:
            self.start(vocab)
        dhidden, dweight, dbias = self.tensors
        if dhidden is not None:
            if isinstance(rows, slice):
                product(dlogits, self.head.weight, out=dhidden[rows])
            else:
                part = dhidden.new_empty(len(rows), dhidden.shape[1])
                dhidden.index_copy_(0, rows, product(dlogits, self.head.weight, out=part))
        if dweight is not None:
            hidden = chunk.hidden
            if self.selected is not None:
                # What a row without a gradient holds never matters, and 0 * NaN would.
                hidden = torch.where(self.selected[rows].unsqueeze(-1), hidden, 0.0)
            product(dlogits.t(), hidden, out=dweight[:vocab], add=self.started)
        if dbias is not None:
            dbias[:vocab] += dlogits.sum(0, dtype=dbias.dtype)
        self.started = True


def product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """`out = a @ b`, or `out += a @ b`; never rounded to less than the dtype of `out` on the way."""
    options: dict[str, Any] = {}
    if a.dtype != out.dtype:
        if multiplies_mixed(a):
            options["out_dtype"] = out.dtype
        else:
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        return torch.addmm(out, a, b, out=out, **options)
    return torch.mm(a, b, out=out, **options)


def multiplies_mixed(x: Tensor) -> bool:
    """Whether the device of `x` multiplies 16-bit operands into fp32. Without data no device is tried."""
    return x.device.type != "cpu" and has_data(x) and device_multiplies_mixed(x.device)


@functools.cache
def device_multiplies_mixed(device: torch.device) -> bool:
    """Try whether a device multiplies 16-bit operands into fp32. CUDA does, and ROCm with recent PyTorch."""
    factor = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:
        logger.warning(
            "%s multiplies 16-bit factors into fp32 only when they are widened (%s)", device, error
        )
        return False
    return True


def padded(vocab: int) -> int:
    """The length of a row whose successor is aligned for 16-byte loads, in any dtype."""
    return math.ceil(vocab / 8) * 8


def choose_chunk_tokens(count: int, bytes_per_token: int, device: torch.device) -> int:
    """The length of chunks: as even as can be for `count` tokens."""
    bytes_per_token = max(1, bytes_per_token)  # an empty part of a vocabulary that is split over ranks
    if device.type == "cpu":
        longest, multiple = CPU_CHUNK_BYTES // bytes_per_token, 1
    else:
        longest, multiple = int(MEMORY_SHARE * free_memory(device)) // bytes_per_token, 128
    # A power of two: the sums of a gradient should not be cut elsewhere for a little more free memory.
    longest = 1 << max(multiple, min(longest, CHUNK_TOKENS)).bit_length() - 1
    chunks = max(1, math.ceil(count / longest))
    return math.ceil(count / chunks / multiple) * multiple


def free_memory(device: torch.device) -> int:
    """Bytes that may be allocated, those that PyTorch's allocator keeps for reuse included."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return ASSUMED_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
