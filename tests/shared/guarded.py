"""Poison around tensors and around allocations, which reveals stray reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

GUARD = 64  # elements before and after an allocation: rows keep their alignment


def poison(dtype: torch.dtype) -> Any:
    """Return NaN, True, or the integer that is furthest from 0."""
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).min or torch.iinfo(dtype).max


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, in which NaN equals NaN."""
    return x.detach().reshape(-1).view(torch.uint8)


class Surrounded(NamedTuple):
    """A tensor as part of a buffer with poison before it, behind it and between its rows."""

    buffer: Tensor
    index: tuple[int | slice, ...]

    @classmethod
    def of(cls, x: Tensor, *, dense: bool, aligned: bool | None = None) -> Surrounded:
        """Place `x` in a buffer of poison.

        Args:
            x: The tensor.
            dense: Whether the last dimension is contiguous. If not, every other element is poison.
            aligned: Whether every row or no row starts at a multiple of 16 bytes. None keeps the alignment
                of the rows of `x`.
        """
        if x.dim() == 0:
            buffer = x.new_full((3,), poison(x.dtype))
            index: tuple[int | slice, ...] = (1,)
        else:
            sizes, index = [2 * size + 1 for size in x.shape], (slice(1, None, 2),) * x.dim()
            if dense:
                width = x.shape[-1]
                if x.shape[-1] * x.element_size() % 16 == 0 if aligned is None else aligned:
                    before = 16 // x.element_size()
                    pitch = before + -(-width // before) * before + before
                else:
                    before, pitch = 3, width + 5 + (width + 1) % 2  # an odd offset and an even pitch
                sizes[-1], index = pitch, (*index[:-1], slice(before, before + width))
            buffer = x.new_full(sizes, poison(x.dtype))
        buffer[index] = x
        return cls(buffer, index)

    @property
    def view(self) -> Tensor:
        return self.buffer[self.index]

    def within(self, buffer: Tensor) -> Tensor:
        """Return the same part of a buffer of the same shape."""
        return buffer[self.index]

    def around(self, buffer: Tensor) -> Tensor:
        """Return all elements outside that part."""
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[self.index] = False
        return buffer[outside]


def contiguous_copy(x: Tensor, *, aligned: bool | None = None) -> Tensor:
    """Return a contiguous copy. With `aligned=False` it starts one element after an aligned address."""
    if aligned is not False:
        return x.clone(memory_format=torch.contiguous_format)
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


class Allocations:
    """Put guards around everything that `torch.empty` and similar functions allocate from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Tensor] = []
        for owner, name in (
            *((torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros_like")),
            (Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **options: Any) -> Tensor:
            new = allocate(*args, **options)
            if not new.numel() or new.is_meta:
                return new
            extent = 1 + sum((n - 1) * stride for n, stride in zip(new.shape, new.stride(), strict=True))
            whole = torch.full((extent + 2 * GUARD,), poison(new.dtype), dtype=new.dtype, device=new.device)
            self.found.append(whole)
            inside = torch.tensor([], dtype=new.dtype, device=new.device)
            # Autograd would treat a view differently.
            return inside.set_(whole.untyped_storage(), GUARD, new.shape, new.stride()).copy_(new)

        return allocate_guarded

    def check(self) -> None:
        for whole in self.found:
            clean = torch.full((GUARD,), poison(whole.dtype), dtype=whole.dtype, device=whole.device)
            for name, guard in ("before", whole[:GUARD]), ("behind", whole[-GUARD:]):
                assert torch.equal(bits(guard), bits(clean)), (
                    f"written {name} an allocation of {len(whole) - 2 * GUARD} elements"
                )
