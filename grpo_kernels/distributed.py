"""A vocabulary split over ranks: who holds which columns, and how the parts' statistics merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_flag, integer_field
from .objective import MASKED, RowStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns `start:stop` of a vocabulary that is split over the ranks of `group`.

    Logits, or the head's weight and bias, hold these columns; hidden states and whatever is per token are the
    same on all ranks, which all call the loss, and its backward, together: with the same options, and with
    gradients wanted of the same tensors. The parts may be of different length, or empty, and stand in any
    order; together they are the vocabulary.

    group: a `torch.distributed` process group; None: all ranks.
    sum_dhidden: sum the gradient of the hidden states over the ranks, so that it is the same on all. False
        leaves each rank its part, for those who sum the parts themselves, as Megatron's sequence parallelism
        does.

    Raises ValueError for bounds that do not fit, TypeError for a wrong type.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    sum_dhidden: bool = True

    def __post_init__(self) -> None:
        integer_field(self, "start", low=0)
        integer_field(self, "stop", low=self.start)
        check_flag("VocabShard.sum_dhidden", self.sum_dhidden)

    @classmethod
    def of(cls, x: Tensor, dim: int = 0) -> VocabShard:
        """This rank's part of a DTensor whose mesh has one dimension.

        `dim` is the vocabulary's: 0 of a head's weight, -1 of logits.
        """
        from torch.distributed.tensor import DTensor, Shard

        dim %= x.dim()
        if not isinstance(x, DTensor) or tuple(x.placements) != (Shard(dim),):
            raise ValueError(
                f"VocabShard.of needs a DTensor with placements (Shard(dim={dim}),), got "
                f"{getattr(x, 'placements', type(x).__name__)}"
            )
        size, mesh = x.shape[dim], x.device_mesh
        longest = -(-size // mesh.size())  # as torch.chunk
        start = min(size, mesh.get_local_rank() * longest)
        return cls(start, min(size, start + longest), mesh.get_group())

    def vocab_size(self, device: torch.device) -> int:
        """Of all parts together. Raises ValueError where they do not join. The host waits."""
        bounds = torch.tensor([self.start, self.stop], device=device)
        # The host waits, under GRPO_KERNELS_DEBUG only: ids are held against the sum.
        parts = sorted((start, stop) for start, stop in self.gather(bounds).tolist() if start < stop)
        end = 0
        for start, stop in parts:
            if start != end:
                raise ValueError(f"the parts of the vocabulary must join, got {parts}")
            end = stop
        return end

    def gather(self, x: Tensor) -> Tensor:
        """`x` of every rank, stacked."""
        ranks = torch.distributed.get_world_size(self.group)
        found = [torch.empty_like(x) for _ in range(ranks)]
        torch.distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def sum_over_ranks(self, dhidden: Tensor | None) -> None:
        """The gradient of the hidden states, in place, where `sum_dhidden`."""
        if dhidden is not None and self.sum_dhidden:
            torch.distributed.all_reduce(dhidden, group=self.group)

    def least(self, number: int, device: torch.device) -> int:
        """Of all ranks' numbers. The host waits: it is to cut chunks of that length."""
        found = torch.tensor(number, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(found)


def is_dtensor(x: Tensor) -> bool:
    if type(x) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local_part(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; other tensors as they are."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def merge(
    own: RowStats,  # of this part's columns
    targets: Tensor,  # [N]: MASKED, the column of the taken token, or `width` where it is another part's
    width: int,
    nats_per_shift: tuple[Tensor | float, Tensor | float],  # of shift and ref_shift
    shard: VocabShard,
) -> RowStats:
    """The statistics of the whole vocabulary, from one gathering of the parts'.

    With P_i the probability of part i: H = sum P_i (H_i - log P_i), and for the reference's Q_i
    KL(p || q) = sum P_i (KL_i + log P_i - log Q_i). A part without probability counts nothing.
    """
    dtype = own.logps.dtype
    names = [name for name, x in zip(own._fields, own, strict=True) if x is not None]
    here = (targets >= 0) & (targets < width)
    local = torch.stack([*(x for x in own if x is not None), here.to(dtype)])
    # Few numbers per token: what they are made of in fp64 costs nothing, and no digits.
    wide = dtype if local.device.type == "mps" else torch.float64
    *values, holds = shard.gather(local).to(wide).unbind(1)
    parts = RowStats(**dict(zip(names, values, strict=True)))
    assert parts.shift is not None and parts.sum_exp is not None
    held = holds != 0

    def of_holder(x: Tensor) -> Tensor:
        """The value of the part that holds the taken token; NaN where none does, or several."""
        return torch.where(held.sum(0) == 1, torch.where(held, x, 0.0).sum(0), torch.nan)

    def merged(shift: Tensor, sum_exp: Tensor, unit: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Shift and sum of the row, and log P of each part."""
        row_shift = shift.amax(0)
        moved = (shift - row_shift) * unit
        total = (sum_exp * moved.exp()).sum(0)
        return row_shift, total, sum_exp.log() + moved - total.log()

    def logps_of_holder(logps: Tensor, log_part: Tensor) -> Tensor:
        return of_holder(torch.where(log_part == -torch.inf, -torch.inf, logps + log_part))

    def expected(log_part: Tensor, each: Tensor) -> Tensor:
        # In the dtype of the arithmetic, in which a word of so little probability counts nothing either: what
        # it would be multiplied by may be infinite.
        share = log_part.exp().to(dtype)
        return torch.where(share == 0, 0.0, share * each).sum(0).clamp(min=0)

    def divergence(each: Tensor, log_part: Tensor, log_other: Tensor) -> Tensor:
        infinite = log_other == -torch.inf  # and `each` may be a NaN
        return expected(log_part, torch.where(infinite, torch.inf, each + log_part - log_other))

    shift, sum_exp, log_part = merged(parts.shift, parts.sum_exp, nats_per_shift[0])
    found = RowStats(logps_of_holder(parts.logps, log_part), shift, sum_exp)
    if parts.entropy is not None:
        found = found._replace(entropy=expected(log_part, parts.entropy - log_part))
    if parts.ref_logps is not None:
        assert parts.ref_shift is not None and parts.ref_sum_exp is not None and parts.kl is not None
        ref_shift, ref_sum_exp, log_ref = merged(parts.ref_shift, parts.ref_sum_exp, nats_per_shift[1])
        found = found._replace(
            ref_logps=logps_of_holder(parts.ref_logps, log_ref),
            ref_shift=ref_shift,
            ref_sum_exp=ref_sum_exp,
            kl=divergence(parts.kl, log_part, log_ref),
        )
        if parts.kl_forward is not None:
            found = found._replace(kl_forward=divergence(parts.kl_forward, log_ref, log_part))
    if parts.top1 is not None:
        found = found._replace(top1=of_holder(parts.top1 * (parts.shift == shift)))
    masked = targets == MASKED
    return RowStats(*(None if x is None else torch.where(masked, 0.0, x).to(dtype) for x in found))  # type: ignore[arg-type]
