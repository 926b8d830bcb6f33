"""Computes the `normalizer` of an optimizer step with several micro-batches or ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import debug
from .checks.choices import AGGREGATIONS, Aggregation
from .checks.scalars import check_choice
from .checks.tensors import check_device, check_integers, check_tensor
from .tokens.groups import number_groups


def global_normalizer(
    mask: Tensor | Iterable[Tensor],
    *,
    aggregation: Aggregation = "token-mean",
    seq_lens: Tensor | Iterable[Tensor] | None = None,
    prompt_ids: Tensor | Iterable[Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute the denominator of the loss for the whole batch of an optimizer step, divided by the ranks.

    Pass the result as `normalizer` to the loss of every micro-batch on every rank. Add up the losses of a
    rank; DDP and FSDP average the gradients over ranks. The result equals the loss of one process that holds
    all sequences at once.

    | aggregation | normalizer | verl 0.9.1 (`agg_loss`) |
    |---|---|---|
    | "token-mean" | unmasked tokens / ranks | `batch_num_tokens / dp_size` |
    | "seq-mean-*" | sequences / ranks | `global_batch_size / dp_size` |
    | "token-sum" | 1 / ranks | `1 / dp_size` |
    | "prompt-mean" | prompts / ranks | |

    Sequences are counted even if all their tokens are masked, as in `grpo_loss` and in verl's configuration.
    "seq-mean-token-sum-norm" divides by `LossSpec.max_tokens` in addition (verl: `loss_scale_factor`). Set
    it, because micro-batches are padded to different widths. An entropy bonus is aggregated as the loss is.

    With "prompt-mean", keep all completions of a prompt in one micro-batch of one rank. A loss averages over
    the tokens of a prompt that it is given. So a prompt that is split counts once in every micro-batch that
    has a part of it, here and in the losses. Ids need not differ between micro-batches.

    TRL 1.16 divides the losses `dapo`, `cispo` and `vespo` by `num_items_in_batch / num_processes`. That is
    the "token-mean" normalizer for the masks of one generation. If a generation serves several optimizer
    steps, TRL multiplies by `gradient_accumulation_steps / steps_per_generation`. It thus uses the average
    number of tokens in these steps. This function uses the number of tokens in one step.

    Args:
        mask: `[B, T]` or packed `[N]`, bool, int or float. 0: not a completion token. Or the masks of all
            micro-batches that this rank accumulates.
        aggregation: the `aggregation` of the `LossSpec`.
        seq_lens: `[S]`, or one such tensor for each packed mask. Only for packed masks with "seq-mean-*".
        prompt_ids: `[B]` or packed `[S]`, as in `grpo_loss`, or one such tensor for each mask. Only for
            "prompt-mean".
        group: the ranks over which gradients are averaged. None: all ranks, or a single one if
            torch.distributed is not initialized. All ranks of the group must call this function, except with
            "token-sum".

    Returns:
        0-dim fp32 on the device of `mask`, computed without a device sync. 0 if all tokens are masked; the
        losses are then 0.

    Raises:
        ValueError: there is no mask; a mask is neither `[B, T]` nor `[N]`; `aggregation` is unknown; the
            number of `seq_lens` is not the number of packed masks; the number of `prompt_ids` is not that of
            the masks, or they are no integers of shape `[B]`.
        TypeError: a mask is not a tensor.

    Examples:
        >>> import torch
        >>> from grpo_kernels import global_normalizer
        >>> masks = [torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1]])]  # two micro-batches
        >>> global_normalizer(masks)  # tokens
        tensor(6.)
        >>> global_normalizer(masks, aggregation="seq-mean-token-mean")  # sequences
        tensor(3.)
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    masks = _tensors("mask", mask)
    if not masks:
        raise ValueError("mask must hold at least one tensor, got 0")
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
    elif aggregation == "prompt-mean":
        count = _prompts(masks, prompt_ids)
    else:
        # Copying a number from the host would sync with the device; filling a tensor does not.
        count = torch.full((), _sequences(masks, seq_lens), device=device)
    if ranks > 1:
        dist.all_reduce(count, group=group)
    return count.float() / ranks


def _sequences(masks: list[Tensor], seq_lens: Tensor | Iterable[Tensor] | None) -> int:
    packed = [x for x in masks if x.dim() == 1]
    lengths = [] if seq_lens is None else _tensors("seq_lens", seq_lens)
    if len(lengths) != len(packed):
        raise ValueError(
            f"seq_lens must hold one tensor for each packed mask, got {len(lengths)} for {len(packed)} masks"
        )
    return sum(x.shape[0] for x in masks if x.dim() == 2) + sum(x.numel() for x in lengths)


def _prompts(masks: list[Tensor], prompt_ids: Tensor | Iterable[Tensor] | None) -> Tensor:
    given = [] if prompt_ids is None else _tensors("prompt_ids", prompt_ids)
    if len(given) != len(masks):
        raise ValueError(f"prompt_ids must hold one tensor for each mask, got {len(given)} for {len(masks)}")
    for ids, mask in zip(given, masks):
        check_device("prompt_ids", ids, mask.device, "mask")
        check_integers("prompt_ids", ids, mask.shape[0] if mask.dim() == 2 else None)
    return torch.stack([number_groups(ids)[1] for ids in given]).sum()


def _tensors(name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [check_tensor(name, x) for x in ([given] if isinstance(given, Tensor) else given)]
