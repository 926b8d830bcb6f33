"""Hidden states and the heads that make logits of them: checked, gathered, in the dtype of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import check_device, check_dtype, check_tensor
from .linear import Head, LinearConfig
from .spec import check_flag, check_integer


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> Head:
    """`hidden` `[B, T, H]` or `[N, H]`, `weight` `[V, H]`, `bias` `[V]`, as rows `[B * T, H]`."""
    names = [prefix + name for name in ("hidden", "lm_head_weight", "lm_head_bias")]
    check_tensor(names[0], hidden)
    check_dtype(names[0], hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{names[0]} must be [B, T, H] or packed [N, H], got shape {tuple(hidden.shape)}")
    weight = gathered(check_tensor(names[1], weight))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, H], H as {names[0]} {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        bias = gathered(check_tensor(names[2], bias))
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
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def check_ref_head(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    like: Tensor,  # the policy's hidden states
    vocab_size: int,
    padded: bool,  # the widths may differ, the vocabulary having been named
) -> Head | None:
    """The reference's head as constants, in the dtype of its product; None where it is not given."""
    if hidden is None or weight is None:
        for name, given, other, wanted in (
            ("ref_hidden", hidden, "ref_lm_head_weight", weight),
            ("ref_lm_head_weight", weight, "ref_hidden", hidden),
            ("ref_lm_head_bias", bias, "ref_hidden", hidden),
        ):
            if given is not None and wanted is None:
                raise ValueError(f"{name} is given without {other}")
        return None
    head = check_head(hidden, weight, bias, prefix="ref_").detach()
    check_device("ref_hidden", hidden, like.device, "hidden")
    if hidden.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"ref_hidden must have the leading shape of hidden {tuple(like.shape)}, got {tuple(hidden.shape)}"
        )
    if (hidden.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ValueError(f"ref_hidden is {hidden.dtype}, hidden {like.dtype}: fp64 goes with fp64 only")
    rows = head.weight.shape[0]
    if rows < vocab_size or (rows > vocab_size and not padded):
        raise ValueError(f"ref_lm_head_weight has {rows} rows, the vocabulary {vocab_size} words")
    return head.to(product_dtype(hidden), vocab_size)


def gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor, as FSDP2 and tensor parallelism shard weights; other tensors as they are.

    Each rank's gradient is that of its own batch: the shards get their mean, as from FSDP2 itself.
    """
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    whole = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return (
        x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    )


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would multiply in."""
    return torch.get_autocast_dtype(hidden.device.type) if autocasts(hidden) else hidden.dtype


def linear_config(
    hidden: Tensor,
    ref: Head | None,
    *,
    logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    compact: bool,
    skip_inactive: bool = False,
) -> LinearConfig:
    """Checks the options of the linear form. `ref`: in the dtype of its product."""
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be torch.float32 or torch.bfloat16, got {logits_dtype}")
    dtype = product_dtype(hidden)
    if logits_dtype == torch.bfloat16 != dtype:
        raise ValueError(f"logits_dtype=torch.bfloat16 is for factors of bf16, got {dtype}")
    if chunk_tokens is not None:
        check_integer("chunk_tokens", chunk_tokens)
    check_flag("compact", compact)
    check_flag("skip_inactive", skip_inactive)
    if skip_inactive and not compact:
        raise ValueError(
            "skip_inactive=True needs compact=True: rows that are not counted cannot be left out"
        )

    def held(factors: torch.dtype) -> torch.dtype:
        return logits_dtype if factors == torch.bfloat16 else torch.promote_types(factors, torch.float32)

    ref_dtype = dtype if ref is None else ref.weight.dtype
    return LinearConfig(dtype, held(dtype), held(ref_dtype), chunk_tokens, compact, skip_inactive)
