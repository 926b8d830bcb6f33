"""The tokens of a batch: mask and sequences. Checks per-token arguments and flattens them to `[N]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from ..checks import debug
from ..checks.tensors import arithmetic_dtype, check_device, check_tensor, has_data, scalar_on, squeeze_hint
from .sequences import Sequences, check_context_group, check_seq_lens, sequences_within


@dataclass(frozen=True)
class Batch:
    """The tokens of a batch, without their logits or hidden states. `N` is `B * T` unless it is packed.

    Attributes:
        sequences: mask and sequences of the tokens.
        num_sequences: None if the batch is packed and `seq_lens` was not given.
        source: "logits", "hidden" or "logps", for messages.
        source_shape: its shape, for messages.
        device: of every tensor.
    """

    sequences: Sequences
    num_sequences: int | None
    source: str
    source_shape: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(
        cls,
        source: Tensor,
        mask: Tensor | None,
        seq_lens: Tensor | None,
        *,
        name: str = "logits",
        mask_name: str = "completion_mask",
        context_group: dist.ProcessGroup | None = None,
    ) -> Batch:
        """Create the batch of `source` `[B, T, ...]` or `[N, ...]`, the already checked argument `name`."""
        check_context_group(context_group)
        shape, device = tuple(source.shape[:-1]), source.device
        if seq_lens is not None:
            check_seq_lens(seq_lens, source, name)
        if mask is None:
            unmasked = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            unmasked = check_mask(mask_name, mask, shape, device, name)
        if debug.enabled():
            debug.check_mask(mask_name, unmasked)
            if mask is not None:
                debug.check_mask_values(mask_name, mask)
        num_sequences = shape[0] if len(shape) == 2 else None
        sequences = Sequences(shape, unmasked.reshape(-1), arithmetic_dtype(source), group=context_group)
        if seq_lens is not None:
            num_sequences = seq_lens.numel()
            sequences.seq_lens, sequences.ids = sequences_within(seq_lens.to(device, torch.int64), shape[0])
        return cls(sequences, num_sequences, name, tuple(source.shape), device)

    @property
    def packed(self) -> bool:
        """Whether the tokens are `[N]`."""
        return len(self.shape) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, T]` or `[N]`."""
        return self.sequences.shape

    @property
    def mask(self) -> Tensor:
        """`[N]` bool, flattened."""
        return self.sequences.mask

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of every per-token tensor."""
        return self.sequences.dtype

    def debug_numbers(self, **rows: Tensor | None) -> None:
        """Under GRPO_KERNELS_DEBUG, raise ValueError at an unmasked value that would make the loss NaN."""
        if debug.enabled():
            for name, x in rows.items():
                if x is not None:
                    debug.check_numbers(name, x.detach(), self.mask.view(self.shape))

    def debug_head(self, vocab_size: int, **parts: Tensor | None) -> None:
        """Under GRPO_KERNELS_DEBUG, raise ValueError if a weight or bias is NaN or infinite.

        Padding beyond `vocab_size` is not checked. Nothing is checked if all tokens are masked.
        """
        # `bool` syncs with the device, under GRPO_KERNELS_DEBUG only.
        if debug.enabled() and has_data(self.mask) and bool(self.mask.any()):
            for name, x in parts.items():
                if x is not None:
                    debug.check_head(name, x.detach()[:vocab_size])

    def require_sequences(self, what: str) -> None:
        """Raise ValueError if the batch is packed and `seq_lens` was not given."""
        if self.num_sequences is None:
            raise ValueError(f"{what} on a packed batch needs seq_lens")

    def unflatten(self, x: Tensor) -> Tensor:
        """Return `x` `[N, ...]` in the caller's shape, `[B, T, ...]` or `[N, ...]`."""
        return x.view(*self.shape, *x.shape[1:])

    def per_token(
        self,
        name: str,
        value: Tensor,
        *,
        per_sequence: bool = False,
        masked: float = 0.0,
    ) -> Tensor:
        """Check `value` and return it as `[N]`, detached, in the dtype of the arithmetic.

        Masked positions get the value `masked`. `per_sequence` also accepts `[B]`, `[B, 1]` and packed `[S]`.
        """
        check_tensor(name, value)
        check_device(name, value, self.device, self.source)
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
                if self.packed and per_sequence and self.sequences.ids is None
                else ""
            )
            squeeze = squeeze_hint(got, self.shape) if self.packed else ""
            raise ValueError(f"{name} must have shape {expected}{hint}, got {got}{squeeze}")
        if got == self.shape:
            value = value.reshape(-1)
        elif self.packed:
            value = value[self.sequences.ids]
        else:
            value = value.reshape(-1, 1).expand(self.shape).reshape(-1)
        if debug.enabled():
            debug.check_numbers(name, value.view(self.shape), self.mask.view(self.shape))
        return value.to(self.dtype).masked_fill(~self.mask, masked)

    def optional(self, name: str, value: Tensor | None, *, per_sequence: bool = False) -> Tensor | None:
        """Return `per_token(...)`, or None if `value` is None."""
        return None if value is None else self.per_token(name, value, per_sequence=per_sequence)

    def temperatures(self, temperature: float | Tensor) -> Tensor | None:
        """Return a temperature per token, `[N]`, or None if it is one number for all."""
        if not isinstance(temperature, Tensor):
            return None
        if temperature.dim() == 0:
            temperature = scalar_on(self.device, temperature).expand(self.shape)
        return self.per_token("temperature", temperature, per_sequence=True, masked=1.0)


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...], device: torch.device, source: str) -> Tensor:
    """Check the mask and return it as bool, True for unmasked tokens."""
    check_tensor(name, mask)
    check_device(name, mask, device, source)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(mask.shape)}{squeeze_hint(mask.shape, shape)}"
        )
    if mask.dtype.is_complex:
        raise ValueError(f"{name} must be real, got {mask.dtype}")
    return mask != 0
