"""The LM head: hidden states, weight and bias, checked and flattened to rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import check_device, check_dtype, check_tensor, has_data, is_dtensor, squeeze_hint
from ..vocab.shard import VocabShard, local_part
from .products import autocasts, product


class Head(NamedTuple):
    """`logits = hidden @ weight.T + bias`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    def to(self, dtype: torch.dtype, vocab_size: int) -> Head:
        """Return the head in the dtype of the matrix products, without the vocabulary's padding."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return Head(self.hidden.to(dtype), self.weight[:vocab_size].to(dtype), bias)

    def detach(self) -> Head:
        return Head(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]

    def write_logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits of the rows `hidden` `[n, H]` into `out` `[n, V]`."""
        product(hidden, self.weight.t(), out=out)
        if self.bias is not None:
            out += self.bias


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    prefix: str = "",
    shard: VocabShard | None = None,
) -> Head:
    """Check hidden states, weight and bias, and return them as a Head.

    `hidden` is `[B, T, H]` or `[N, H]`, `weight` `[V, H]`, `bias` `[V]`. `prefix` starts the names in errors.
    """
    plain = gathered if shard is None else local_part
    names = [prefix + name for name in ("hidden", "lm_head_weight", "lm_head_bias")]
    check_tensor(names[0], hidden)
    if is_dtensor(hidden):
        raise ValueError(
            f"{names[0]} is a DTensor: pass this rank's own tokens, by to_local() or full_tensor()"
        )
    check_dtype(names[0], hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{names[0]} must be [B, T, H] or packed [N, H], got shape {tuple(hidden.shape)}")
    weight = plain(check_tensor(names[1], weight))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, H] with H of {names[0]} {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        bias = plain(check_tensor(names[2], bias))
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]} must be [V] = {tuple(weight.shape[:1])}, as {names[1]}, got {tuple(bias.shape)}"
            )
    for name, x in zip(names[1:], (weight, bias)):
        if x is not None:
            check_dtype(name, x)
            check_device(name, x, hidden.device, names[0])
            if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
                raise ValueError(f"{name} is {x.dtype}, {names[0]} {hidden.dtype}: fp64 goes with fp64 only")
    if weight.dtype != hidden.dtype and not autocasts(hidden):
        raise ValueError(
            f"{names[1]} is {weight.dtype}, {names[0]} {hidden.dtype}: without autocast they must be equal"
        )
    return Head(hidden.flatten(0, -2), weight, bias)


def check_ref_head(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    policy: Tensor,
    width: int,
    padded: bool,
    shard: VocabShard | None = None,
    prefix: str = "ref_",
) -> Head | None:
    """Check the reference's head and return it detached, or None if it is not given.

    `prefix` starts the names of its arguments. `policy` is the policy's hidden states. The vocabulary has
    `width` rows. `padded` means that the caller gave `vocab_size`, so the numbers of rows may differ.
    """
    if hidden is None or weight is None:
        for name, given, other, wanted in (
            ("hidden", hidden, "lm_head_weight", weight),
            ("lm_head_weight", weight, "hidden", hidden),
            ("lm_head_bias", bias, "hidden", hidden),
        ):
            if given is not None and wanted is None:
                raise ValueError(f"{prefix}{name} is given without {prefix}{other}")
        return None
    head = check_head(hidden, weight, bias, prefix=prefix, shard=shard).detach()
    check_device(f"{prefix}hidden", hidden, policy.device, "hidden")
    if hidden.shape[:-1] != policy.shape[:-1]:
        raise ValueError(
            f"{prefix}hidden must have the leading shape of hidden {tuple(policy.shape)}, got "
            f"{tuple(hidden.shape)}{squeeze_hint(hidden.shape[:-1], policy.shape[:-1])}"
        )
    if (hidden.dtype == torch.float64) != (policy.dtype == torch.float64):
        raise ValueError(f"{prefix}hidden is {hidden.dtype}, hidden {policy.dtype}: fp64 goes with fp64 only")
    rows = head.weight.shape[0]
    if rows != width and not padded:
        raise ValueError(
            f"{prefix}lm_head_weight has {rows} rows, lm_head_weight {width}: give vocab_size, the number of "
            "rows that both have in common, to ignore the rest as padding"
        )
    if rows < width:
        raise ValueError(f"{prefix}lm_head_weight has {rows} rows, fewer than the {width} of the vocabulary")
    return head


def check_accumulate_into(
    total: Tensor | None, weight: Tensor, head: Head, shard: VocabShard | None
) -> Tensor | None:
    """Check `accumulate_into`, and return it, or None if there is no backward.

    `weight` is the argument `lm_head_weight`, and `head` the result of `check_head`.
    """
    if total is None:
        return None
    name, wide = "accumulate_into", torch.float64
    check_tensor(name, total)
    if is_dtensor(total):
        raise ValueError(f"{name} is a DTensor: pass this rank's own part, by to_local()")
    if shard is None and is_dtensor(weight):
        raise ValueError(
            f"{name} needs a lm_head_weight that is no DTensor, or a shard: the gradient of a gathered "
            "weight goes to all ranks, through autograd"
        )
    if total.shape != head.weight.shape:
        raise ValueError(
            f"{name} must be [V, H] = {tuple(head.weight.shape)}, as lm_head_weight, got {tuple(total.shape)}"
        )
    dtypes = {wide} if weight.dtype == wide else {torch.float32, torch.bfloat16, weight.dtype}
    if total.dtype not in dtypes:
        wanted = " or ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{name} must be {wanted} for a lm_head_weight of {weight.dtype}, got {total.dtype}")
    check_device(name, total, head.hidden.device, "hidden")
    if total.requires_grad:
        raise ValueError(f"{name} requires a gradient: pass a buffer such as lm_head_weight.grad")
    if 0 in total.stride() and total.numel() > 1:
        raise ValueError(f"{name} has strides {total.stride()}: several of its entries share memory")
    if has_data(total) and any(total.data_ptr() == x.data_ptr() for x in (head.weight, head.hidden)):
        raise ValueError(f"{name} has the memory of lm_head_weight or hidden, which the backward reads")
    if not torch.is_grad_enabled():
        return None
    if not weight.requires_grad:
        raise ValueError(f"{name} is given, but lm_head_weight requires no gradient")
    return total


def gathered(x: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and any other tensor unchanged.

    FSDP2 and tensor parallelism shard weights as DTensors. Each rank computes the gradient of its own batch,
    and the shards get the mean over ranks, as with FSDP2.
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
