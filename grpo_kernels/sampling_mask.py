"""Packs the tokens that a sampler kept into a sampling mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks.scalars import check_integer
from .checks.tensors import check_device, check_tensor
from .vocab.sampling_mask import WORD


def pack_sampling_mask(kept: Tensor, offsets: Tensor | None = None, vocab_size: int | None = None) -> Tensor:
    """Pack the tokens that top-k, top-p or min-p sampling kept at each position into 32-bit words.

    Bit `v % 32` of word `v // 32` is 1 if token `v` was kept. Losses and log-probabilities take the result,
    with its rows in the order of the tokens, as `sampling_mask`. `pack_sampling_mask(keep)` packs a bool
    tensor, `pack_sampling_mask(token_ids, offsets, vocab_size)` lists of ids.

    Args:
        kept: bool `[..., V]`, or the kept ids of all positions end to end, `[nnz]` int32 or int64. An id may
            be repeated.
        offsets: `[N + 1]` int32 or int64, if `kept` are ids: those of position n are
            `kept[offsets[n] : offsets[n + 1]]`.
        vocab_size: `V`, if `kept` are ids.

    Returns:
        int32 `[..., ceil(V / 32)]`, or `[N, ceil(V / 32)]` for ids, on the device of `kept`.

    Raises:
        ValueError: a wrong shape, dtype or device, an id outside the vocabulary, or offsets that do not
            ascend from 0 to `nnz`. The check of ids and offsets syncs with the device.
        TypeError: a wrong type.

    Examples:
        >>> import torch
        >>> from grpo_kernels import pack_sampling_mask
        >>> pack_sampling_mask(torch.tensor([[True, False, False, True, False]]))  # tokens 0 and 3: 1 + 8
        tensor([[9]], dtype=torch.int32)
        >>> ids, offsets = torch.tensor([0, 3, 1]), torch.tensor([0, 2, 3])  # 0 and 3, then 1
        >>> pack_sampling_mask(ids, offsets, vocab_size=5)
        tensor([[9],
                [2]], dtype=torch.int32)
    """
    check_tensor("kept", kept)
    if kept.dtype == torch.bool:
        if offsets is not None or vocab_size is not None:
            raise ValueError("offsets and vocab_size go with ids, and kept is bool")
        if kept.dim() == 0:
            raise ValueError("kept must be [..., V], got a 0-dim tensor")
        return pack_bits(kept)
    if kept.dtype not in (torch.int32, torch.int64) or kept.dim() != 1:
        raise ValueError(f"kept must be bool [..., V] or ids [nnz], got {kept.dtype} {tuple(kept.shape)}")
    if offsets is None or vocab_size is None:
        raise ValueError("kept ids need offsets and vocab_size")
    check_tensor("offsets", offsets)
    check_device("offsets", offsets, kept.device, "kept")
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.dim() != 1 or not offsets.numel():
        raise ValueError(f"offsets must be integers [N + 1], got {offsets.dtype} {tuple(offsets.shape)}")
    size = check_integer("vocab_size", vocab_size)
    lengths = offsets.diff()
    check_lists(kept, offsets, lengths, size)
    width = -(-size // WORD) * WORD
    rows = torch.repeat_interleave(lengths.long(), output_size=kept.numel())
    # Each bit is set once, however often its id is given, so that adding bits sets them.
    bits = torch.unique(rows * width + kept)
    words = torch.zeros(lengths.numel() * width // WORD, dtype=torch.int64, device=kept.device)
    words.index_add_(0, bits // WORD, torch.ones_like(bits) << bits % WORD)
    return words.to(torch.int32).view(lengths.numel(), width // WORD)


def check_lists(ids: Tensor, offsets: Tensor, lengths: Tensor, size: int) -> None:
    """Raise ValueError unless the ids are in the vocabulary and the offsets divide them. Syncs."""
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.numel():
        raise ValueError(f"kept has the id {int(outside[0])}, outside [0, {size})")
    if int(offsets[0]) != 0 or int(offsets[-1]) != ids.numel() or bool((lengths < 0).any()):
        raise ValueError(f"offsets must ascend from 0 to {ids.numel()}, the number of ids")


def pack_bits(keep: Tensor) -> Tensor:
    """Pack bools `[..., V]` into int32 `[..., ceil(V / 32)]`."""
    if not keep.shape[-1]:  # an empty part of a vocabulary that is split over ranks
        return torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % WORD)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (keep.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8).view(torch.int32)
