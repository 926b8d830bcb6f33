"""A batch laid out by rows: every per-token argument checked and as `[N]`, masked positions selected away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import debug
from .checks import check_integer, has_data
from .distributed import VocabShard, is_dtensor
from .objective import MASKED, arithmetic_dtype
from .sequences import Layout

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, {of} on {device}")


def check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype}")


class Vocabulary(NamedTuple):
    """Which words the columns of logits, or the rows of a head, stand for."""

    width: int  # columns that are no padding
    start: int = 0  # the word of the first, where the vocabulary is split over ranks
    size: int | None = None  # of the whole vocabulary, where that is known

    @classmethod
    def of(
        cls, vocab_size: int | None, held: Tensor, dim: int, what: str, shard: VocabShard | None = None
    ) -> Vocabulary:
        """`held` has the vocabulary, or the shard's part of it, along `dim`."""
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


def check_logits(
    name: str, logits: Tensor, *, like: Tensor | None = None, width: int = 0, padded: bool = False
) -> None:
    """`like` is the policy's logits; `padded`: the widths may differ, the vocabulary having been named."""
    check_tensor(name, logits)
    if is_dtensor(logits):
        raise ValueError(f"{name} is a DTensor: give shard=VocabShard.of(logits, dim=-1), or full_tensor()")
    check_dtype(name, logits)
    if like is None:
        if logits.dim() not in (2, 3):
            raise ValueError(f"{name} must be [B, T, V] or packed [N, V], got shape {tuple(logits.shape)}")
    else:
        check_device(name, logits, like.device, "logits")
        if logits.shape[:-1] != like.shape[:-1]:
            raise ValueError(
                f"{name} must be shaped as logits {tuple(like.shape)}, got {tuple(logits.shape)}"
                f"{squeeze_hint(logits.shape[:-1], like.shape[:-1])}"
            )
        if not padded and logits.shape != like.shape:
            raise ValueError(
                f"{name} must be shaped as logits {tuple(like.shape)}, got {tuple(logits.shape)}: give "
                "vocab_size, the number of columns that both have in common, to ignore the rest as padding"
            )
        if (logits.dtype == torch.float64) != (like.dtype == torch.float64):
            raise ValueError(f"{name} is {logits.dtype}, logits {like.dtype}: fp64 goes with fp64 only")
    if logits.shape[-1] < width:
        raise ValueError(f"{name} has {logits.shape[-1]} columns, fewer than the {width} of the vocabulary")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {logits.stride()}")


def by_rows(x: Tensor) -> Tensor:
    """Logits or hidden states as `[B, T, ...]`: a packed batch is one of a single sequence."""
    return x if x.dim() == 3 else x.unsqueeze(0)


def check_writable(logits: Tensor, given: Tensor, ref_logits: Tensor | None) -> None:
    """Raises where the gradient cannot take the place of the logits `[B, T, V]`, a part of `given`."""
    owners = (given,) if given._base is None else (given, given._base)
    if torch.is_grad_enabled() and any(x.is_leaf and x.requires_grad for x in owners):
        raise RuntimeError(
            "inplace=True would overwrite logits that are a leaf requiring grad: as for every in-place "
            "operation, they must be computed from something"
        )
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"inplace=True needs rows of their own: logits {tuple(logits.shape)} with strides "
                f"{logits.stride()} overlap"
            )
        extent = max(extent, stride * size)
    if ref_logits is not None and overlaps_other_rows(logits, ref_logits):
        raise ValueError(
            "inplace=True would overwrite ref_logits, which share memory with logits of other tokens"
        )


def overlaps_other_rows(x: Tensor, y: Tensor) -> bool:
    """Whether a row of `x` `[B, T, V]` shares memory with `y` `[B, T, W]`, but as the same row of both."""
    storages = {z.untyped_storage().data_ptr() for z in (x, y)}
    if len(storages) == 2 or 0 in storages:  # 0: an empty tensor, or one on "meta"
        return False

    def first_bytes(z: Tensor) -> Tensor:
        # On the CPU, whatever the default device: nothing waits.
        batch, time = (torch.arange(z.shape[dim], device="cpu") * z.stride(dim) for dim in (0, 1))
        return (z.data_ptr() + z.element_size() * (batch[:, None] + time)).view(-1)

    ours, theirs = first_bytes(x), first_bytes(y)
    ordered = theirs.sort().values
    below = torch.searchsorted(ordered, ours - y.shape[2] * y.element_size(), right=True)
    touched = torch.searchsorted(ordered, ours + x.shape[2] * x.element_size()) - below
    return bool((touched > (ours == theirs) * (x.dtype == y.dtype)).any())


@dataclass(frozen=True)
class Batch:
    """What is known of each token, whose row of logits or hidden states stands elsewhere."""

    targets: Tensor  # [B * T] int64: MASKED, the column of the taken token, or the width where none is it
    layout: Layout
    num_sequences: int | None  # None: packed, and not told
    source: str  # "logits" or "hidden", for messages

    @classmethod
    def of(
        cls,
        source: Tensor,  # [B, T, ...] or [N, ...], checked: logits or hidden states
        ids: Tensor | None,  # None: the log-probabilities of the taken tokens are at hand
        mask: Tensor | None,
        seq_lens: Tensor | None,
        vocab: Vocabulary,
        *,
        name: str = "logits",
        ids_name: str = "completion_ids",
        mask_name: str = "completion_mask",
    ) -> Batch:
        shape, device = tuple(source.shape[:-1]), source.device
        if seq_lens is not None:
            _check_seq_lens(seq_lens, source, name)
        if ids is None:
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
        check_tensor(ids_name, ids)
        check_device(ids_name, ids, device, name)
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{ids_name} must be int32 or int64, got {ids.dtype}")
        if tuple(ids.shape) != shape:
            raise ValueError(
                f"{ids_name} must have shape {shape}, as {name} {tuple(source.shape)}, got {tuple(ids.shape)}"
                f"{squeeze_hint(ids.shape, shape)}"
            )
        if mask is None:
            unmasked = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            check_tensor(mask_name, mask)
            check_device(mask_name, mask, device, name)
            if tuple(mask.shape) != shape:
                raise ValueError(
                    f"{mask_name} must have shape {shape}, got {tuple(mask.shape)}"
                    f"{squeeze_hint(mask.shape, shape)}"
                )
            if mask.dtype.is_complex:
                raise ValueError(f"{mask_name} must be real, got {mask.dtype}")
            unmasked = mask != 0
        ids = ids.to(torch.int64)
        if debug.enabled():
            debug.check_ids(ids_name, ids, unmasked, vocab.size)
            debug.check_mask(mask_name, unmasked)
            if mask is not None:
                debug.check_mask_values(mask_name, mask)
        columns = ids - vocab.start if vocab.start else ids
        here = (columns >= 0) & (columns < vocab.width)
        targets = torch.where(unmasked, torch.where(here, columns, vocab.width), MASKED)
        num_sequences = shape[0] if len(shape) == 2 else None
        layout = Layout(shape, unmasked.reshape(-1), arithmetic_dtype(source))
        if seq_lens is not None:
            num_sequences = seq_lens.numel()
            layout.seq_lens, layout.sequence_ids = sequences_within(
                seq_lens.to(device, torch.int64), shape[0]
            )
        return cls(targets.reshape(-1), layout, num_sequences, name)

    @property
    def packed(self) -> bool:
        return len(self.shape) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, T]` or `[N]`."""
        return self.layout.shape

    @property
    def mask(self) -> Tensor:
        """`[B * T]` bool."""
        return self.layout.mask

    @property
    def dtype(self) -> torch.dtype:
        """Of all arithmetic, and of every per-token tensor."""
        return self.layout.dtype

    def look_at(self, **rows: Tensor | None) -> None:
        """Under GRPO_KERNELS_DEBUG raises ValueError where one of these has a NaN that is not masked."""
        if debug.enabled():
            for name, x in rows.items():
                if x is not None:
                    debug.check_numbers(name, x.detach(), self.mask.view(self.shape))

    def look_at_heads(self, vocab_size: int, **parts: Tensor | None) -> None:
        """Under GRPO_KERNELS_DEBUG, raise ValueError if a weight or bias is NaN or infinite.

        Padding beyond `vocab_size` is not checked. Nothing is checked if all tokens are masked.
        """
        # The sync is part of GRPO_KERNELS_DEBUG.
        if debug.enabled() and has_data(self.mask) and bool(self.mask.any()):
            for name, x in parts.items():
                if x is not None:
                    debug.check_head(name, x.detach()[:vocab_size])

    def require_sequences(self, what: str) -> None:
        if self.num_sequences is None:
            raise ValueError(f"{what} on a packed batch needs seq_lens")

    def shaped(self, x: Tensor) -> Tensor:
        """`[B * T]` as the caller knows it: `[B, T]` or `[N]`."""
        return x.view(self.shape)

    def per_token(
        self,
        name: str,
        value: Tensor,
        *,
        per_sequence: bool = False,
        masked: float = 0.0,
    ) -> Tensor:
        """`value` as `[B * T]` constants in the dtype of the arithmetic, `masked` where the mask is off.

        `per_sequence` also accepts `[B]`, `[B, 1]` and packed `[S]`.
        """
        check_tensor(name, value)
        check_device(name, value, self.targets.device, self.source)
        if value.dtype.is_complex:
            raise ValueError(f"{name} must be real, got {value.dtype}")
        value, got = value.detach(), tuple(value.shape)
        allowed = [self.shape]
        if per_sequence and not self.packed:
            allowed += [(self.shape[0], 1), (self.shape[0],)]
        elif per_sequence and self.num_sequences is not None:
            allowed += [(self.num_sequences,)]
        if got not in allowed:
            expected = " or ".join(map(str, allowed))
            hint = (
                " (or one per sequence, with seq_lens)"
                if self.packed and per_sequence and self.layout.sequence_ids is None
                else ""
            )
            squeeze = squeeze_hint(got, self.shape) if self.packed else ""
            raise ValueError(f"{name} must have shape {expected}{hint}, got {got}{squeeze}")
        if got == self.shape:
            value = value.reshape(-1)
        elif self.packed:
            value = value[self.layout.sequence_ids]
        else:
            value = value.reshape(-1, 1).expand(self.shape).reshape(-1)
        if debug.enabled():
            debug.check_numbers(name, value.view(self.shape), self.mask.view(self.shape))
        return torch.where(self.mask, value.to(self.dtype), masked)

    def optional(self, name: str, value: Tensor | None, *, per_sequence: bool = False) -> Tensor | None:
        return None if value is None else self.per_token(name, value, per_sequence=per_sequence)

    def temperatures(self, temperature: float | Tensor) -> Tensor | None:
        """A temperature per token, where it is not one number for all."""
        if not isinstance(temperature, Tensor):
            return None
        if temperature.dim() == 0:
            temperature = moved_scalar(temperature, self.targets.device).expand(self.shape)
        return self.per_token("temperature", temperature, per_sequence=True, masked=1.0)


def moved_scalar(x: Tensor, device: torch.device) -> Tensor:
    """Return a 0-dim tensor detached, and on `device` if it was on the CPU.

    Operators take a 0-dim CPU tensor as a number, so it gets to a GPU without the sync of a copy.
    """
    x = x.detach()
    return torch.zeros_like(x, device=device) + x if x.device.type == "cpu" != device.type else x


def squeeze_hint(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The end of an error's message if the shape is `[1, N]`, that of Hugging Face's padding-free batches."""
    return "; squeeze(0) removes its first dimension" if tuple(got) == (1, *expected) else ""


def sequences_within(seq_lens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Lengths that lie within `tokens` whatever they were, and the sequence of each token.

    On a GPU nobody has looked at them, and what sums over them trusts them.
    """
    ends = seq_lens.cumsum(0).clamp(0, tokens).cummax(0).values
    positions = torch.arange(tokens, device=seq_lens.device)
    ids = torch.searchsorted(ends, positions, right=True).clamp(max=max(0, seq_lens.numel() - 1))
    return ends.diff(prepend=ends.new_zeros(1)), ids


def _check_seq_lens(seq_lens: Tensor, source: Tensor, name: str) -> None:
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
    # On a GPU, reading the values would sync with the device.
    readable = seq_lens.device.type == "cpu" or debug.enabled()
    if not torch.compiler.is_compiling() and readable and has_data(seq_lens):
        total = int(seq_lens.sum())
        shortest = int(seq_lens.min()) if seq_lens.numel() else 0
        if total != source.shape[0] or shortest < 0:
            raise ValueError(
                f"seq_lens must be non-negative and sum to N = {source.shape[0]}, got a sum of {total} and a "
                f"smallest length of {shortest}"
            )
