"""A vocabulary split over ranks: which columns each rank holds, and the ranks' communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks.scalars import check_flag, integer_field
from ..checks.tensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns `start:stop` of a vocabulary that is split over the ranks of `group`.

    Logits, or the LM head's weight and bias, have only these columns. Hidden states and per-token tensors are
    the same on all ranks. All ranks call the loss and its backward together, with the same options and with
    gradients required for the same tensors. The parts may differ in length, be empty, and be in any order.
    Together they must cover the vocabulary.

    Attributes:
        start: the first column of this rank.
        stop: one more than its last column.
        group: a `torch.distributed` process group. None: all ranks.
        sum_dhidden: sum the gradient of the hidden states over the ranks, so that it is the same on all.
            If False, each rank keeps its part of the sum, for callers that sum the parts themselves, such as
            Megatron's sequence parallelism.

    Raises:
        ValueError: `start` or `stop` is out of range.
        TypeError: a wrong type.

    Examples:
        >>> import torch
        >>> from grpo_kernels import VocabShard, selective_logps
        >>> one_rank = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        >>> torch.distributed.init_process_group("gloo", **one_rank)  # as torchrun does for several ranks
        >>> shard = VocabShard(0, 5)  # with R ranks: (rank * 5 // R, (rank + 1) * 5 // R)
        >>> selective_logps(torch.zeros(1, 2, 5), torch.tensor([[3, 4]]), shard=shard)
        tensor([[-1.6094, -1.6094]])
        >>> torch.distributed.destroy_process_group()
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
        """This rank's part of the DTensor `x`, whose mesh has one dimension.

        `dim` is the dimension of the vocabulary: 0 for the weight of an LM head, -1 for logits.
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
        """The size of the whole vocabulary. Raises ValueError if there are gaps or overlaps. Syncs."""
        bounds = torch.tensor([self.start, self.stop], device=device)
        # Syncs with the device, under GRPO_KERNELS_DEBUG only: ids are checked against the size.
        parts = sorted((start, stop) for start, stop in self.gather(bounds).tolist() if start < stop)
        end = 0
        for start, stop in parts:
            if start != end:
                raise ValueError(f"the parts of the vocabulary must join, got {parts}")
            end = stop
        return end

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return torch.distributed.get_rank(self.group)

    def gather(self, x: Tensor) -> Tensor:
        """Return `x` of every rank, stacked."""
        ranks = torch.distributed.get_world_size(self.group)
        found = [torch.empty_like(x) for _ in range(ranks)]
        torch.distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def sum_over_ranks(self, dhidden: Tensor | None) -> None:
        """Sum the gradient of the hidden states over the ranks, in place, if `sum_dhidden`."""
        if dhidden is not None and self.sum_dhidden:
            torch.distributed.all_reduce(dhidden, group=self.group)

    def min_over_ranks(self, number: int, device: torch.device) -> int:
        """Return the minimum over ranks. Syncs, because the host needs the length of the chunks."""
        found = torch.tensor(number, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(found)


def local_part(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor unchanged."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]
