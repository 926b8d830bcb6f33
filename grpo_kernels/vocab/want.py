"""The statistics that a call needs from its rows, and their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..spec import LogitTransform, LossSpec
from ..tokens.statistics import Coefficients, RowStats
from .merge import merge, nats_per_shift
from .shard import VocabShard


class TransformedRows(Protocol):
    """Rows of logits, or of hidden states."""

    @property
    def targets(self) -> Tensor: ...
    @property
    def temperatures(self) -> Tensor | None: ...
    @property
    def ids(self) -> Tensor | None: ...
    @property
    def transform(self) -> LogitTransform: ...


@dataclass(frozen=True)
class Want:
    """The statistics that a call needs from its rows.

    Attributes:
        reference: there are logits of a reference, so `ref_logps` and `kl` are wanted.
        entropy, kl_forward, top1: these statistics are wanted.
        kl_gradient: the exact KL is part of the loss, so the backward reads the reference's logits.
        inplace: the gradient overwrites the logits.
        shard: the logits are a part of the vocabulary.
        ids: the number of tokens per row; 0: one, that of `Rows.targets`.
    """

    reference: bool = False
    entropy: bool = False
    kl_forward: bool = False
    top1: bool = False
    kl_gradient: bool = False
    inplace: bool = False
    shard: VocabShard | None = None
    ids: int = 0

    @classmethod
    def of(
        cls,
        spec: LossSpec,
        *,
        reference: bool,
        entropy: bool,
        inplace: bool = False,
        shard: VocabShard | None = None,
    ) -> Want:
        """Return what a loss needs. `entropy` means that the caller needs the entropy, too."""
        return cls(
            reference,
            entropy=entropy or bool(spec.entropy_coef),
            kl_forward=spec.exact_kl is not None and spec.exact_kl.kind == "exact_forward",
            kl_gradient=spec.exact_kl is not None,
            inplace=inplace,
            shard=shard,
        )

    @property
    def outputs(self) -> list[str]:
        """The wanted statistics, by their names in `RowStats`."""
        names = ["logps"]
        if self.entropy:
            names += ["entropy"]
        if self.reference:
            names += ["ref_logps", "kl"]
        if self.kl_forward:
            names += ["kl_forward"]
        if self.top1:
            names += ["top1"]
        if self.ids:
            names += ["id_logps"]
        return names

    @property
    def constants(self) -> tuple[str, ...]:
        """The outputs that have no gradient."""
        names = ("ref_logps", "top1") if self.kl_gradient else ("ref_logps", "kl", "kl_forward", "top1")
        return ("logps", *names) if self.ids else names

    def empty_stats(
        self, count: int, dtype: torch.dtype, device: torch.device, *, for_backward: bool
    ) -> RowStats:
        """Allocate statistics of `count` rows, including shifts and sums if `for_backward`."""
        names = self.outputs
        if for_backward:
            names += ["shift", "sum_exp"]
            names += ["ref_shift", "ref_sum_exp"] if self.reference else []
        shapes = {name: (count, self.ids) if name == "id_logps" else (count,) for name in names}
        return RowStats(**{name: torch.empty(shapes[name], dtype=dtype, device=device) for name in names})

    def merged(self, stats: RowStats, rows: TransformedRows) -> RowStats:
        """Return the statistics of the whole vocabulary, from those of this rank's columns."""
        if self.shard is None:
            return stats
        nats = nats_per_shift(rows.transform, rows.temperatures)
        return merge(stats, rows.targets, rows.ids, rows.transform.vocab_size, nats, self.shard)

    def coefficients(self, grads: tuple[Tensor | None, ...]) -> Coefficients | None:
        """Return the gradients with respect to `outputs` as coefficients, or None if there are none."""
        by = {name: g.contiguous() for name, g in zip(self.outputs, grads) if g is not None}
        found = Coefficients(by.get("id_logps" if self.ids else "logps"), by.get("entropy"))
        if self.kl_gradient:
            found = found._replace(dkl=by.get("kl"), dkl_forward=by.get("kl_forward"))
        return None if all(x is None for x in found) else found
