"""Hidden states and the heads that make logits of them: checked, gathered, in the dtype of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import check_device, check_dtype, check_tensor, squeeze_hint
from .checks import check_flag, check_integer
from .distributed import VocabShard, is_dtensor, local_part
from .linear import Head, LinearConfig, multiplies_mixed


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    prefix: str = "",
    shard: VocabShard | None = None,
) -> Head:
    """`hidden` `[B, T, H]` or `[N, H]`, `weight` `[V, H]`, `bias` `[V]`, as rows `[B * T, H]`."""
    plain = gathered if shard is None else local_part
    names = [prefix + name for name in ("hidden", "lm_head_weight", "lm_head_bias")]
    check_tensor(names[0], hidden)
    if is_dtensor(hidden):
        raise ValueError(
            f"{names[0]} is a DTensor: each rank gives its own tokens, to_local() or full_tensor()"
        )
    check_dtype(names[0], hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{names[0]} must be [B, T, H] or packed [N, H], got shape {tuple(hidden.shape)}")
    weight = plain(check_tensor(names[1], weight))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, H], H as {names[0]} {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        bias = plain(check_tensor(names[2], bias))
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]} must be [V] = {tuple(weight.shape[:1])}, as {names[1]}, got {tuple(bias.shape)}"
            )
    for name, x in zip(names[1:], (weight, bias), strict=True):
        if x is not None:
            check_dtype(name, x)
            check_device(name, x, hidden.device, names[0])
            if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
                raise ValueError(f"{name} is {x.dtype}, {names[0]} {hidden.dtype}: fp64 goes with fp64 only")
    if weight.dtype != hidden.dtype and not autocasts(hidden):
        raise ValueError(
            f"{names[1]} is {weight.dtype}, {names[0]} {hidden.dtype}: without autocast they must be alike"
        )
    return Head(hidden.flatten(0, -2), weight, bias)


def check_ref_head(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    like: Tensor,  # the policy's hidden states
    width: int,
    padded: bool,  # the widths may differ, the vocabulary having been named
    shard: VocabShard | None = None,
) -> Head | None:
    """The reference's head as constants; None where it is not given."""
    if hidden is None or weight is None:
        for name, given, other, wanted in (
            ("ref_hidden", hidden, "ref_lm_head_weight", weight),
            ("ref_lm_head_weight", weight, "ref_hidden", hidden),
            ("ref_lm_head_bias", bias, "ref_hidden", hidden),
        ):
            if given is not None and wanted is None:
                raise ValueError(f"{name} is given without {other}")
        return None
    head = check_head(hidden, weight, bias, prefix="ref_", shard=shard).detach()
    check_device("ref_hidden", hidden, like.device, "hidden")
    if hidden.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"ref_hidden must have the leading shape of hidden {tuple(like.shape)}, got {tuple(hidden.shape)}"
            f"{squeeze_hint(hidden.shape[:-1], like.shape[:-1])}"
        )
    if (hidden.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ValueError(f"ref_hidden is {hidden.dtype}, hidden {like.dtype}: fp64 goes with fp64 only")
    rows = head.weight.shape[0]
    if rows != width and not padded:
        raise ValueError(
            f"ref_lm_head_weight has {rows} rows, lm_head_weight {width}: give vocab_size, the number of "
            "rows that both have in common, to ignore the rest as padding"
        )
    if rows < width:
        raise ValueError(f"ref_lm_head_weight has {rows} rows, fewer than the {width} of the vocabulary")
    return head


def gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor, as FSDP2 and tensor parallelism shard weights; other tensors as they are.

    Each rank's gradient is that of its own batch: the shards get their mean, as from FSDP2 itself.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    whole = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    # Autocast knows nothing of "meta". To ask whether it does is more than Dynamo can trace before torch 2.9.
    return x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would multiply in."""
    return torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden) else hidden.dtype


def held_dtypes(hidden: Tensor, logits_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of the factors of all products, and of the logits. Where 16-bit factors cannot be multiplied into fp32,
    they are widened once and for all."""
    dtype = product_dtype(hidden)
    widens = logits_dtype == torch.float32 and dtype.itemsize == 2
    if dtype == logits_dtype or (widens and multiplies_mixed(hidden)):
        return dtype, logits_dtype
    wide = torch.promote_types(dtype, torch.float32)
    return wide, wide


def linear_config(
    hidden: Tensor,
    ref: Head | None,
    *,
    logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    compact: bool,
    skip_inactive: bool = False,
) -> LinearConfig:
    """Checks the options of the linear form."""
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be torch.float32 or torch.bfloat16, got {logits_dtype}")
    if logits_dtype == torch.bfloat16 != product_dtype(hidden):
        raise ValueError(f"logits_dtype=torch.bfloat16 is for factors of bf16, got {product_dtype(hidden)}")
    chunk_tokens = check_integer("chunk_tokens", chunk_tokens, optional=True)
    check_flag("compact", compact)
    check_flag("skip_inactive", skip_inactive)
    if skip_inactive and not compact:
        raise ValueError(
            "skip_inactive=True needs compact=True: rows that are not counted cannot be left out"
        )
    ref_hidden = hidden if ref is None else ref.hidden
    return LinearConfig(
        *held_dtypes(hidden, logits_dtype),
        *held_dtypes(ref_hidden, logits_dtype),
        chunk_tokens,
        compact,
    )
