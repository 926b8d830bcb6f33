"""The gradients of hidden states, weight and bias, summed over chunks in fp32 (fp64 for fp64)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import arithmetic_dtype
from .chunks import Chunk
from .head import Head
from .products import add_product, product


class HeadGradients(NamedTuple):
    """The gradients of a head, in fp32 (fp64 for fp64). None if they are not needed."""

    dhidden: Tensor | None = None  # [N, H]
    dweight: Tensor | None = None  # [V, H]; of a single chunk in the weight's dtype
    dbias: Tensor | None = None  # [V]

    @classmethod
    def empty(
        cls, head: Head, needed: tuple[bool, ...], dweight_dtype: torch.dtype | None = None
    ) -> HeadGradients:
        """Allocate those that are `needed`, of hidden states, weight and bias."""
        dtype = arithmetic_dtype(head.hidden)
        dtypes = (dtype, dweight_dtype or dtype, dtype)
        return cls(
            *(
                torch.empty(x.shape, dtype=dtype, device=x.device) if x is not None and need else None
                for x, need, dtype in zip(head, needed, dtypes)
            )
        )


class GradientSums:
    """Accumulates the gradients of hidden states, weight and bias over chunks."""

    def __init__(
        self, head: Head, out: HeadGradients, selected: Tensor | None, *, add_weight: bool = False
    ) -> None:
        """`out` is filled. `selected` `[N]` bool marks the rows with a gradient. None: all have one.

        With `add_weight`, the weight's gradient is added to what `out.dweight` holds.
        """
        self.head, self.out, self.selected, self.add_weight = head, out, selected, add_weight
        self.started = False

    def finish(self) -> None:
        """Write zeros if there was no chunk."""
        if not self.started:
            self.start(0)

    def start(self, vocab: int) -> None:
        """Write zeros where the first chunk does not write. For the weight this is only the padding."""
        dhidden, dweight, dbias = self.out
        padding = None if dweight is None or self.add_weight else dweight[vocab:]
        for part in (dhidden, padding, dbias):
            if part is not None:
                part.zero_()

    def add(self, chunk: Chunk) -> None:
        """Add the gradients of a chunk whose `dlogits` have been filled."""
        dlogits, indices, vocab = chunk.dlogits[0], chunk.indices, self.head.weight.shape[0]
        if not self.started:
            self.start(vocab)
        dhidden, dweight, dbias = self.out
        if dhidden is not None:
            if isinstance(indices, slice):
                product(dlogits, self.head.weight, out=dhidden[indices])
            else:
                part = dhidden.new_empty(len(indices), dhidden.shape[1])
                dhidden.index_copy_(0, indices, product(dlogits, self.head.weight, out=part))
        if dweight is not None:
            hidden = chunk.hidden
            if self.selected is not None:
                # The hidden state of a row without a gradient may be NaN, and 0 * NaN is NaN.
                hidden = torch.where(self.selected[indices].unsqueeze(-1), hidden, 0.0)
            if self.started or self.add_weight:
                add_product(dlogits.t(), hidden, dweight[:vocab])
            else:
                product(dlogits.t(), hidden, out=dweight[:vocab])
        if dbias is not None:
            dbias[:vocab] += dlogits.sum(0, dtype=dbias.dtype)
        self.started = True
