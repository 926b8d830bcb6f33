"""The `normalizer` of an optimizer step whose batch is spread over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import debug
from .checks.choices import AGGREGATIONS, Aggregation
from .checks.scalars import check_choice
from .checks.tensors import check_tensor


def global_normalizer(
    mask: Tensor | Iterable[Tensor],
    *,
    aggregation: Aggregation = "token-mean",
    seq_lens: Tensor | Iterable[Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """What the aggregation divides by in the whole batch of a step, over the number of ranks.

    Given to every micro-batch of every rank, it makes the sum of a rank's losses, averaged over the ranks as
    DDP and FSDP average gradients, the loss of one process that holds all sequences at once:

    | aggregation | it is | verl 0.9.1 (`agg_loss`) |
    |---|---|---|
    | "token-mean" | unmasked tokens / ranks | `batch_num_tokens / dp_size` |
    | "seq-mean-*" | sequences / ranks | `global_batch_size / dp_size` |
    | "token-sum" | 1 / ranks | `1 / dp_size` |

    As in `grpo_loss`, and as verl is configured, a sequence without an unmasked token counts.
    "seq-mean-token-sum-norm" divides by `LossSpec.max_tokens` itself (verl: `loss_scale_factor`), which has
    to be given: the padded widths of micro-batches differ. An entropy bonus is aggregated as the loss.

    TRL 1.16 divides its `dapo`, `cispo` and `vespo` by `num_items_in_batch / num_processes`, which equals
    this of all masks of one generation. If a generation serves several optimizer steps, TRL multiplies it by
    `gradient_accumulation_steps / steps_per_generation`: the mean of the steps' numbers of tokens, in place
    of each step's own.

    Args:
        mask: `[B, T]` or packed `[N]`, bool, int or float; 0: not a completion token. Or those of all
            micro-batches that this rank accumulates.
        aggregation: the `aggregation` of the `LossSpec`.
        seq_lens: packed and "seq-mean-*" only: `[S]`, or one for each mask.
        group: the ranks over which gradients are averaged; None: all, or one where torch.distributed is not
            initialised. "token-sum" apart, every one of them has to call, as in any all-reduce.

    Returns:
        0-dim fp32 on the device of `mask`; the host does not wait for it. 0 where all tokens are masked,
        which makes the losses 0.

    Raises:
        ValueError: no mask, one that is neither `[B, T]` nor `[N]`, an unknown aggregation, packed masks
            without as many `seq_lens` where sequences are counted; TypeError: a mask that is no tensor.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    masks = _tensors("mask", mask)
    if not masks:
        raise ValueError("mask holds no micro-batch")
    for x in masks:
        if x.dim() not in (1, 2):
            raise ValueError(f"mask must be [B, T] or packed [N], got shape {tuple(x.shape)}")
        if debug.enabled():
            debug.check_mask_values("mask", x)
    ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    device = masks[0].device
    if aggregation == "token-sum":
        return torch.full((), 1 / ranks, device=device, dtype=torch.float32)
    if aggregation == "token-mean":
        count = torch.stack([x.count_nonzero() for x in masks]).sum()
    else:
        # Filled on the device: a copy of the host's number would make the host wait.
        count = torch.full((), _sequences(masks, seq_lens), device=device)
    if ranks > 1:
        dist.all_reduce(count, group=group)
    return count.float() / ranks


def _sequences(masks: list[Tensor], seq_lens: Tensor | Iterable[Tensor] | None) -> int:
    packed = [x for x in masks if x.dim() == 1]
    lengths = [] if seq_lens is None else _tensors("seq_lens", seq_lens)
    if len(lengths) != len(packed):
        raise ValueError(f"{len(packed)} packed masks need as many seq_lens, got {len(lengths)}")
    return sum(x.shape[0] for x in masks if x.dim() == 2) + sum(x.numel() for x in lengths)


def _tensors(name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [check_tensor(name, x) for x in ([given] if isinstance(given, Tensor) else given)]
