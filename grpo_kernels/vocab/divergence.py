"""Divergences of the student's rows from the teacher's, as differentiable functions of the student's logits.

The statistics of both models take one pass over both. A second pass computes the divergence without
cancellation: of all rows for the JSD, and for a KL of the rows where it is small (see SMALL and SURE). The
backward reads both again and writes the gradient. In bytes of a row of logits, a row thus costs 7 for the
JSD, and 5 or 7 for a KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import ops
from ..checks.tensors import traced
from ..spec.divergence import Divergence
from ..tokens.differentiation import apply, first_order, outside_graphs
from . import dispatch, divergence_torch
from .autograd import new_gradient
from .divergence_torch import Sums
from .operators import ROWS, flatten_rows, register, unflatten_rows
from .rows import MASKED, Rows
from .shard import VocabShard
from .want import Want

SMALL = 1e-2
"""A KL below this, in nats, is computed again without cancellation."""

SURE = 1.01
"""A reverse KL is also computed again if the student's likeliest token has a probability above 1 / SURE.

The gradient at this token is the difference of its log-ratio and the mean log-ratio, which are nearly equal.
"""


class Divergences(NamedTuple):
    """Divergences of rows, and what their gradient needs."""

    value: Tensor  # [N]
    slope: Tensor  # [N]: the sum of `slope_terms`
    sums: Sums
    entropy: Tensor | None  # [N], of the student


def wanted(spec: Divergence, *, entropy: bool, shard: VocabShard | None, inplace: bool = False) -> Want:
    """Return the statistics that a divergence needs. `entropy`: the caller needs the entropy, too."""
    forward = spec.kind == "forward_kl"
    return Want(reference=True, kl_forward=forward, entropy=entropy, inplace=inplace, shard=shard)


def differentiable_divergence(rows: Rows, spec: Divergence, want: Want) -> tuple[Tensor, Tensor | None]:
    """Return each row's divergence `[N]`, differentiable, and entropy, which is not."""
    call = apply if want.shard is None else outside_graphs(apply)
    value, *entropy = call(DivergenceFunction, (rows.logits,), rows.detach(), spec, want)
    return value, entropy[0] if entropy else None


class DivergenceFunction(torch.autograd.Function):
    """Returns the divergence of each row, and with `want.entropy` the entropy."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, spec: Divergence, want: Want, origin: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        value, slope, sums, entropy = divergences(rows, spec, want)
        ctx.spec, ctx.want, ctx.origin = spec, want, origin
        ctx.settings = rows.transform, rows.backend
        ctx.save_for_backward(*rows._replace(logits=logits).tensors, slope, *sums)
        ctx.set_materialize_grads(False)
        if entropy is None:
            return (value,)
        ctx.mark_non_differentiable(entropy)
        return value, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        # Read once, because each read runs the hooks of checkpointing and offloading on all of them.
        *tensors, slope, shift, sum_exp, ref_shift, ref_sum_exp = ctx.saved_tensors
        rows, sums = Rows(*tensors, *ctx.settings), Sums(shift, sum_exp, ref_shift, ref_sum_exp)
        logits = rows.logits
        out = logits.detach() if ctx.want.inplace else new_gradient(logits)
        gradient(rows, sums, slope, grad.contiguous(), ctx.spec, out)
        if ctx.want.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 4


def divergences(rows: Rows, spec: Divergence, want: Want) -> Divergences:
    """Compute the divergence of every row, of the whole vocabulary if it is split. Masked rows get zeros."""
    stats = want.empty_stats(rows.num_rows, rows.dtype, rows.logits.device, for_backward=True)
    dispatch.row_stats(rows, stats)
    stats = want.merged(stats, rows)
    given = (stats.shift, stats.sum_exp, stats.ref_shift, stats.ref_sum_exp)
    sums = Sums(*(x for x in given if x is not None))
    whole = stats.kl_forward if spec.kind == "forward_kl" else stats.kl
    assert whole is not None
    needed = rows.targets != MASKED
    if spec.kind == "reverse_kl":
        needed = needed & ((whole < SMALL) | (sums.sum_exp < SURE))
    elif spec.kind == "forward_kl":
        needed = needed & (whole < SMALL)
    value, slope = torch.empty_like(whole), torch.empty_like(whole)
    terms(rows, sums, needed, spec, value, slope)
    if want.shard is not None:
        parts = torch.stack([value, slope])
        torch.distributed.all_reduce(parts, group=want.shard.group)
        value, slope = parts.unbind()
    if spec.kind != "jsd":
        value = torch.where(needed, value, whole)
        # With all digits, the sum of the slopes is the reverse KL, or 0 for the forward KL.
        slope = torch.where(needed, slope, whole if spec.kind == "reverse_kl" else 0.0)
    return Divergences(value, slope, sums, stats.entropy)


# --- The choice of a backend. If a call is `traced`, each of these is an opaque operator. ---


def terms(rows: Rows, sums: Sums, needed: Tensor, spec: Divergence, value: Tensor, slope: Tensor) -> None:
    """Fill `value` and `slope` with the sums of their terms over these columns.

    Only the rows `needed`, `[N]` bool, are read. Others get zeros.
    """
    if not traced(rows.logits):
        fill_terms(rows, sums, needed, spec, value, slope)
        return
    settings = needed, spec.kind, spec.weight
    ops.divergence(value, slope, list(sums), *settings, *flatten_rows(rows))


def gradient(
    rows: Rows, sums: Sums, slope: Tensor, coefficient: Tensor, spec: Divergence, out: Tensor
) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with `coefficient` `[N]` times the gradient.

    Rows whose coefficient is zero are not read and get zeros.
    """
    if not traced(rows.logits):
        fill_gradient(rows, sums, slope, coefficient, spec, out)
        return
    settings = slope, coefficient, spec.kind, spec.weight
    ops.divergence_gradient(out, list(sums), *settings, *flatten_rows(rows))


def fill_terms(
    rows: Rows, sums: Sums, needed: Tensor, spec: Divergence, value: Tensor, slope: Tensor
) -> None:
    if rows.num_rows == 0:
        return
    if rows.transform.vocab_size == 0:  # an empty part of a vocabulary that is split over ranks
        value.zero_()
        slope.zero_()
        return
    if rows.backend == "torch":
        divergence_torch.divergence(rows, sums, needed, spec, value, slope)
        return
    from ..kernels import divergence

    divergence.divergence(rows, sums, needed, spec, value, slope)


def fill_gradient(
    rows: Rows, sums: Sums, slope: Tensor, coefficient: Tensor, spec: Divergence, out: Tensor
) -> None:
    if rows.num_rows == 0:
        return
    if rows.transform.vocab_size == 0:
        out.zero_()
        return
    if rows.backend == "torch":
        divergence_torch.gradient(rows, sums, slope, coefficient, spec, out)
        return
    from ..kernels import divergence

    divergence.gradient(rows, sums, slope, coefficient, spec, out)


def divergence_operator(
    value: Tensor, slope: Tensor, sums: Sequence[Tensor], needed: Tensor, kind: Any, weight: float, *rows: Any
) -> None:
    fill_terms(unflatten_rows(*rows), Sums(*sums), needed, Divergence(kind, weight), value, slope)


def divergence_gradient_operator(
    out: Tensor,
    sums: Sequence[Tensor],
    slope: Tensor,
    coefficient: Tensor,
    kind: Any,
    weight: float,
    *rows: Any,
) -> None:
    fill_gradient(unflatten_rows(*rows), Sums(*sums), slope, coefficient, Divergence(kind, weight), out)


register(
    "divergence",
    divergence_operator,
    f"Tensor(a!) value, Tensor(b!) slope, Tensor[] sums, Tensor needed, str kind, float weight, {ROWS}",
)
register(
    "divergence_gradient",
    divergence_gradient_operator,
    f"Tensor(a!) out, Tensor[] sums, Tensor slope, Tensor coefficient, str kind, float weight, {ROWS}",
)
