"""Statistics of rows and the gradient of the logits in PyTorch, a few rows at a time, on any device.

A chunk of rows stays in the cache between the operations on it. So each pass reads the logits from memory
once, as the fused kernels do, and no tensor of their size is allocated. Where it can be, the gradient is
computed in its place from the exponentials on, so that few buffers share the cache with the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..tokens.loss import BatchLoss
from ..tokens.statistics import Coefficients, RowStats
from .exponentials import Distribution, Exponentials, Taken
from .row_chunks import Index, RowChunk, Scratch, row_chunks
from .rows import MASKED, FusedOutput, Rows
from .sampling_mask import KeptColumns


class ChunkRows(NamedTuple):
    """The rows of a chunk, of both models."""

    z: Tensor  # [n, V] raw logits, without the padding columns
    ref_z: Tensor | None
    place: Tensor | None  # [n, V], for the policy's exponentials; may be z; None: they need a buffer
    kept: KeptColumns | None  # if there is a sampling mask
    taken: Taken
    policy: Distribution
    reference: Distribution


class Pass:
    """A pass over the `needed` rows `[N]` of a batch: its chunks, and the buffers that they share.

    The gradient will be written to `out` `[B, T, V]`, if there is one. `parts` is that of `row_chunks`.
    """

    def __init__(self, rows: Rows, needed: Tensor, out: Tensor | None = None, parts: int = 1) -> None:
        self.rows, self.out = rows, out
        self.taken = Taken.of(rows.targets, rows.transform.vocab_size, needed)
        # Once for all chunks, because a mask whose sequences are not adjacent is copied.
        self.words = None if rows.sampling_mask is None else rows.sampling_mask.flatten(0, 1)
        self.scratch = Scratch(has_infinities=needed.device.type != "cpu")
        self.chunks = row_chunks(needed, *([] if out is None else [out]), *rows.all_logits, parts=parts)

    def read(self, chunk: RowChunk) -> ChunkRows:
        rows, transform = self.rows, self.rows.transform
        temperature: Tensor | float = transform.temperature
        if rows.temperatures is not None:
            temperature = rows.temperatures[chunk.rows].unsqueeze(-1)
        width, ref_z = transform.vocab_size, None
        z = chunk.read(rows.logits, "policy z", self.scratch)[:, :width]
        if rows.ref_logits is not None:
            ref_z = chunk.read(rows.ref_logits, "reference z", self.scratch)[:, :width]
        kept = None
        if self.words is not None:
            kept = KeptColumns.of(self.words[chunk.rows], width, rows.dtype, self.scratch)
        place = None if self.out is None else chunk.direct(self.out, width, rows.dtype)
        return ChunkRows(
            z,
            ref_z,
            place,
            kept,
            self.taken.rows(chunk.rows),
            Distribution("policy", transform.scale, transform.softcap, temperature),
            Distribution("reference", transform.ref_scale, transform.ref_softcap, temperature),
        )


def statistics(
    rows: ChunkRows, want: RowStats, scratch: Scratch
) -> tuple[RowStats, Exponentials, Exponentials | None]:
    """Compute a chunk's statistics that are not None in `want`. Also return both models' exponentials.

    `d` of the reference becomes that of the policy minus it.
    """
    q = None
    # The reference comes first, because its logits may be the policy's, which `rows.place` may overwrite.
    if rows.ref_z is not None:
        q = rows.reference.exponentials(rows.ref_z, None, rows.taken, scratch, rows.kept, keep_d=True)
        ref_sum, ref_log_sum = q.normalizer()
    p = rows.policy.exponentials(
        rows.z,
        None,
        rows.taken,
        scratch,
        rows.kept,
        keep_d=want.entropy is not None,
        out=rows.place,
        reference=q,
    )
    sum_exp, log_sum = p.normalizer()
    found = RowStats(p.taken_d - log_sum, p.row_max, sum_exp)
    if want.top1 is not None:
        found = found._replace(top1=(p.taken_d >= 0).to(log_sum.dtype))
    if want.entropy is not None:
        expected = p.sum_of(p.d, p.taken_d, scratch, scratch.like("product", p.e, p.e.dtype)) / sum_exp
        found = found._replace(entropy=(log_sum - expected).clamp(min=0))
    if q is not None:
        taken = p.taken_d - q.taken_d
        if want.kl_forward is not None:
            product = scratch.like("product", q.e, q.e.dtype)
            expected = q.sum_of(q.d, taken, scratch, product) / ref_sum
            found = found._replace(kl_forward=(log_sum - ref_log_sum - expected).clamp(min=0))
        else:
            product = q.e
        expected = p.sum_of(q.d, taken, scratch, product) / sum_exp
        found = found._replace(
            ref_logps=q.taken_d - ref_log_sum,
            ref_shift=q.row_max,
            ref_sum_exp=ref_sum,
            kl=(expected - log_sum + ref_log_sum).clamp(min=0),
        )
    return found, p, q


def is_finite(x: Tensor) -> bool:
    """Return whether all numbers are certainly finite. False on a GPU, where it would have to sync."""
    return x.device.type == "cpu" and bool(x.sum().isfinite())


def is_sure(logps: Tensor) -> Tensor:
    """Return whether each taken token is certainly the likeliest: its probability is at least 0.6."""
    return logps > -0.5


def log_normalizer(logps: Tensor, sum_exp: Tensor) -> Tensor:
    """Return `log(sum_exp)`. If the taken token is the likeliest, it is -logp, which has more digits."""
    return torch.where(is_sure(logps), -logps, sum_exp.log())


def gradient(
    p: Exponentials,
    q: Exponentials | None,
    taken: Taken,
    stats: RowStats,
    coefficients: Coefficients,
) -> Tensor:
    """Replace `p.e` with the gradient with respect to a chunk's raw logits, `[n, V]`, and return it.

    dz_v = dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H) + dkl p_v (log p_v - log q_v - KL)
           + dkl_forward (p_v - q_v), times dd/dz.

    Besides `p.e`, the `d` of both models are overwritten; `q.d` is their difference, if there is `dkl`.
    """
    dlogp, dentropy, dkl, dkl_forward = coefficients
    logps, sum_exp = stats.logps, stats.sum_exp
    assert sum_exp is not None
    slope = p.slope.squeeze(-1) if isinstance(p.slope, Tensor) else p.slope
    per_e = slope / sum_exp
    # The factor of e_v is `factor`, the same in the whole row, plus `terms`, which differ. At the taken token
    # it is `factor_y`, besides dlogp, of which 1 - p_y is the factor: -expm1(logp) keeps its digits if p_y is
    # nearly 1.
    factor = torch.zeros_like(logps) if dlogp is None else -dlogp
    entry = factor * torch.expm1(logps)
    terms: list[Tensor] = []
    factor_y = torch.zeros_like(logps)
    if dentropy is not None:
        assert stats.entropy is not None
        terms.append(p.d.mul_((-dentropy * per_e).unsqueeze(-1)))
        factor = factor - dentropy * (stats.entropy - log_normalizer(logps, sum_exp))
        factor_y = factor_y - dentropy * (stats.entropy + logps)
    if dkl is not None:
        assert stats.kl is not None and stats.ref_logps is not None and stats.ref_sum_exp is not None
        assert q is not None
        terms.append(q.d.mul_((dkl * per_e).unsqueeze(-1)))
        log_ratio = log_normalizer(logps, sum_exp) - log_normalizer(stats.ref_logps, stats.ref_sum_exp)
        factor = factor - dkl * (log_ratio + stats.kl)
        factor_y = factor_y + dkl * (logps - stats.ref_logps - stats.kl)
    if dkl_forward is not None:
        factor = factor + dkl_forward
    factor = (factor * per_e).unsqueeze(-1)
    if not terms:
        grad = p.e.mul_(factor)
    else:
        total = functools.reduce(Tensor.add_, terms).add_(factor)
        # If e_v is 0, its logarithm may be -inf, and 0 * inf would be NaN. A row that is NaN stays so.
        if not is_finite(total):
            total.masked_fill_((p.e == 0) & ~factor.isnan(), 0.0)
        grad = p.e.mul_(total)
        entry = entry + torch.where(p.taken_e > 0, p.taken_e / sum_exp * factor_y, 0.0)
    if dkl_forward is not None:
        assert q is not None and stats.ref_logps is not None and stats.ref_sum_exp is not None
        grad -= q.e.mul_((dkl_forward * slope / stats.ref_sum_exp).unsqueeze(-1))
        gap = p.taken_e / sum_exp - q.taken_e / stats.ref_sum_exp
        sure_gap = torch.expm1(logps) - torch.expm1(stats.ref_logps)
        entry = entry + dkl_forward * torch.where(is_sure(logps), sure_gap, gap)
    if p.kept is not None:
        entry = torch.where(p.kept.has(taken.column), entry, 0.0)
    taken.write(grad, entry * slope)
    grad = p.times_softcap_slope(grad)
    # At a column that was not kept, the gradient is 0 times a number, which may be NaN.
    if p.kept is None or is_finite(grad):
        return grad
    return p.kept.keep(grad, out=grad)


def row_stats(rows: Rows, out: RowStats) -> None:
    """Fill `out` with each row's statistics. Masked rows get zeros, and on the CPU they are not read."""
    present = rows.targets != MASKED
    over = Pass(rows, present)
    for chunk in over.chunks:
        found, _, _ = statistics(over.read(chunk), out, over.scratch)
        store(out, found, chunk.rows)
    clear_masked(out, present)


def dlogits(rows: Rows, stats: RowStats, coefficients: Coefficients, out: Tensor) -> None:
    """Fill `out` with the gradient. Rows without one get zeros, and on the CPU they are not read."""
    needed = coefficients.active() & (rows.targets != MASKED)
    with_difference = coefficients.dkl is not None
    over = Pass(rows, needed, out)
    for chunk in over.chunks:
        here, own = over.read(chunk), stats.rows(chunk.rows)
        q = None
        if here.ref_z is not None:
            q = here.reference.exponentials(
                here.ref_z, own.ref_shift, here.taken, over.scratch, here.kept, keep_d=with_difference
            )
        p = here.policy.exponentials(
            here.z,
            own.shift,
            here.taken,
            over.scratch,
            here.kept,
            keep_d=coefficients.dentropy is not None,
            out=here.place,
            reference=q if with_difference else None,
        )
        chunk.write(out, gradient(p, q, here.taken, own, coefficients.rows(chunk.rows)), needed)
    zero_rows(out, needed)


def fused_loss(rows: Rows, loss: BatchLoss, out: FusedOutput) -> None:
    """Fill `out`: statistics, loss and gradient, while a chunk of rows is in the cache."""
    present = rows.targets != MASKED
    written = present.clone()
    over = Pass(rows, present, out.dlogits)
    for chunk in over.chunks:
        here = over.read(chunk)
        stats, p, q = statistics(here, out.stats, over.scratch)
        out.value[chunk.rows], own = loss.rows(chunk.rows).values(stats)
        assert own.dlogp is not None
        out.dlogp[chunk.rows] = own.dlogp
        store(out.stats, stats, chunk.rows)
        written[chunk.rows] = own.active() & present[chunk.rows]
        chunk.write(out.dlogits, gradient(p, q, here.taken, stats, own), written)
    clear_masked((*out.stats, out.value, out.dlogp), present)
    zero_rows(out.dlogits, written)


def store(out: RowStats, values: RowStats, index: Index) -> None:
    """Write the values of some rows into the fields of `out` that are not None."""
    for target, value in zip(out, values):
        if target is not None and value is not None:
            target[index] = value


def clear_masked(out: Iterable[Tensor | None], present: Tensor) -> None:
    """Write zeros at masked rows, those that are not `present`."""
    if present.device.type != "cpu" or not present.all():  # on the CPU, so it does not sync
        masked = ~present
        for target in out:
            if target is not None:
                target.masked_fill_(masked, 0.0)


def zero_rows(out: Tensor, written: Tensor) -> None:
    """Write zeros into the rows of `out` that no chunk wrote. On a GPU every row is in a chunk."""
    if written.device.type == "cpu" and not bool(written.all()):
        for chunk in row_chunks(~written, out):
            view, rows = chunk.locate(out)
            view[rows] = 0
