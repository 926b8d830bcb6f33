"""Statistics of rows and the gradient of the logits in PyTorch, a few rows at a time, on any device.

A chunk of rows stays in the cache between the operations on it. So each pass reads the logits from memory
once, as the fused kernels do, and no tensor of their size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import arithmetic_dtype
from ..tokens.loss import BatchLoss
from ..tokens.statistics import Coefficients, RowStats
from .row_chunks import Index, RowChunk, Scratch, row_chunks
from .rows import MASKED, FusedOutput, Rows


class Exponentials(NamedTuple):
    """A chunk of one distribution: `d = k * (y - row_max)`, `e = exp(d)`."""

    d: Tensor | None  # [n, V]; None if only e is wanted
    e: Tensor  # [n, V]
    slope: Tensor | float  # dd/dz: [n, V] with a softcap, else [n, 1] or a number

    def pick(self, picked: Tensor) -> Exponentials:
        slope = self.slope[picked] if isinstance(self.slope, Tensor) else self.slope
        return Exponentials(None if self.d is None else self.d[picked], self.e[picked], slope)


class Distribution(NamedTuple):
    """How one model's raw logits become a distribution."""

    scale: float
    softcap: float | None
    temperature: Tensor | float  # [n, 1], or a number for all rows

    def exponentials(
        self,
        z: Tensor,
        row_max: Tensor | None,
        *,
        keep_d: bool,
        scratch: Scratch | None = None,
        name: str = "",
    ) -> tuple[Exponentials, Tensor]:
        """Return the exponentials of raw logits `[n, V]` and the row maxima, which are computed if None.

        If `scratch` is given, they are in its buffers whose names start with `name`.
        """
        y = z.to(arithmetic_dtype(z))
        k: Tensor | float = self.scale / self.temperature
        slope = k
        if self.softcap is not None:
            y = self.softcap * torch.tanh(y * (self.scale / self.softcap))
            k = 1.0 / self.temperature
            slope = k * self.scale * (1 - (y / self.softcap) ** 2)
        if row_max is None:
            # Finite, so that a part of the vocabulary with only -inf sums to 0 instead of NaN.
            row_max = y.amax(-1).clamp(min=torch.finfo(y.dtype).min)
        d = torch.sub(y, row_max.unsqueeze(-1), out=None if scratch is None else scratch.like(f"{name} d", y))
        if isinstance(k, Tensor) or k != 1.0:
            d *= k
        if not keep_d:
            return Exponentials(None, d.exp_(), slope), row_max
        e = torch.exp(d, out=None if scratch is None else scratch.like(f"{name} e", d))
        return Exponentials(d, e, slope), row_max

    def taken(self, z: Tensor, row_max: Tensor, targets: Tensor) -> Tensor:
        """Return `d` of the taken tokens, `[n]`. It is NaN for an id outside the vocabulary."""
        valid, column = columns_of(targets, z.shape[1])
        d = self.exponentials(z.gather(-1, column), row_max, keep_d=True)[0].d
        assert d is not None
        return torch.where(valid, d, torch.nan).squeeze(-1)


class ChunkRows(NamedTuple):
    """The rows of a chunk, of both models."""

    z: Tensor  # [n, V] raw logits, without the padding columns
    ref_z: Tensor | None
    targets: Tensor  # [n]
    policy: Distribution
    reference: Distribution

    @classmethod
    def read(cls, chunk: RowChunk, rows: Rows) -> ChunkRows:
        transform = rows.transform
        temperature: Tensor | float = transform.temperature
        if rows.temperatures is not None:
            temperature = rows.temperatures[chunk.rows].unsqueeze(-1)
        z, *rest = (chunk.read(x)[:, : transform.vocab_size] for x in rows.all_logits)
        return cls(
            z,
            rest[0] if rest else None,
            rows.targets[chunk.rows],
            Distribution(transform.scale, transform.softcap, temperature),
            Distribution(transform.ref_scale, transform.ref_softcap, temperature),
        )


def row_sum(x: Tensor) -> Tensor:
    """Sum `[n, V]` to `[n]`, so that the bits of a row's sum do not depend on the other rows.

    PyTorch would divide a single long row among its threads, and add in another order. So a single row is
    summed twice, as two rows.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def columns_of(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return which ids are in the vocabulary, and the columns of the taken tokens, 0 for others. `[n, 1]`."""
    valid = ((targets >= 0) & (targets < width)).unsqueeze(-1)
    return valid, torch.where(valid, targets.unsqueeze(-1), 0)


def replace_taken(x: Tensor, targets: Tensor, value: Tensor) -> Tensor:
    """Write `value` `[n]` to the columns of the taken tokens of `x` `[n, V]`, and return what was there."""
    valid, column = columns_of(targets, x.shape[1])
    before = x.gather(-1, column)
    x.scatter_(-1, column, torch.where(valid, value.unsqueeze(-1), before))
    return before.squeeze(-1)


def normalizer(e: Tensor, d: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the exponentials `e` `[n, V]` and its logarithm. `d` `[n]`: of the taken token.

    The other tokens are summed by themselves. If the taken token is the likeliest, the logarithm is
    log1p of their sum. It keeps its digits if the taken token has nearly all the probability.
    """
    taken = replace_taken(e, targets, torch.zeros_like(d))
    others = row_sum(e)
    replace_taken(e, targets, taken)
    sum_exp = torch.where(d.isnan(), others, others + taken)
    return sum_exp, torch.where(d == 0, torch.log1p(others), sum_exp.log())


def is_sure(logps: Tensor) -> Tensor:
    """Return whether each taken token is certainly the likeliest: its probability is at least 0.6."""
    return logps > -0.5


def log_normalizer(logps: Tensor, sum_exp: Tensor) -> Tensor:
    """Return `log(sum_exp)`. If the taken token is the likeliest, it is -logp, which has more digits."""
    return torch.where(is_sure(logps), -logps, sum_exp.log())


def statistics(
    rows: ChunkRows, want: RowStats, scratch: Scratch
) -> tuple[RowStats, Exponentials, Exponentials | None]:
    """Compute a chunk's statistics that are not None in `want`. Also return both models' exponentials."""
    keep_d = want.entropy is not None or rows.ref_z is not None
    p, row_max = rows.policy.exponentials(rows.z, None, keep_d=keep_d, scratch=scratch, name="policy")
    d = rows.policy.taken(rows.z, row_max, rows.targets)
    sum_exp, log_sum = normalizer(p.e, d, rows.targets)
    found = RowStats(d - log_sum, row_max, sum_exp)
    if want.top1 is not None:
        found = found._replace(top1=(d >= 0).to(d.dtype))
    if want.entropy is not None:
        assert p.d is not None
        expected = row_sum(torch.where(p.e > 0, p.e * p.d, p.e)) / sum_exp
        found = found._replace(entropy=(log_sum - expected).clamp(min=0))
    q = None
    if rows.ref_z is not None:
        q, ref_max = rows.reference.exponentials(
            rows.ref_z, None, keep_d=keep_d, scratch=scratch, name="reference"
        )
        ref_d = rows.reference.taken(rows.ref_z, ref_max, rows.targets)
        ref_sum, ref_log_sum = normalizer(q.e, ref_d, rows.targets)
        assert p.d is not None and q.d is not None
        difference = p.d - q.d
        expected = row_sum(torch.where(p.e > 0, p.e * difference, p.e)) / sum_exp
        found = found._replace(
            ref_logps=ref_d - ref_log_sum,
            ref_shift=ref_max,
            ref_sum_exp=ref_sum,
            kl=(expected - log_sum + ref_log_sum).clamp(min=0),
        )
        if want.kl_forward is not None:
            expected = row_sum(torch.where(q.e > 0, q.e * difference, -q.e)) / ref_sum
            found = found._replace(kl_forward=(log_sum - ref_log_sum - expected).clamp(min=0))
    return found, p, q


def gradient(
    p: Exponentials,
    q: Exponentials | None,
    targets: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    out: Tensor | None,
) -> Tensor:
    """Compute the gradient with respect to a chunk's raw logits, `[n, V]`, in `out`, or in `p.e` if None.

    dz_v = dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H) + dkl p_v (log p_v - log q_v - KL)
           + dkl_forward (p_v - q_v), times dd/dz.
    """
    dlogp, dentropy, dkl, dkl_forward = coefficients
    dlogp = torch.zeros_like(stats.logps) if dlogp is None else dlogp
    assert stats.sum_exp is not None
    inverse = 1 / stats.sum_exp
    # If the taken token is the likeliest, the log-probabilities give its gradient: 1 - p_y is -expm1(logp).
    # They keep the digits that 1 - p_y would cancel if p_y is nearly 1.
    taken = -dlogp * torch.expm1(stats.logps)
    rest = None  # the terms other than that of dlogp
    if dentropy is not None or dkl is not None or dkl_forward is not None:
        rest = torch.zeros_like(p.e)
        offset, per_p = torch.zeros_like(dlogp), torch.zeros_like(dlogp)
        log_sum = log_normalizer(stats.logps, stats.sum_exp)
        if dentropy is not None:
            assert stats.entropy is not None and p.d is not None
            rest -= dentropy.unsqueeze(-1) * p.d
            offset -= dentropy * (stats.entropy - log_sum)
            per_p -= dentropy * (stats.entropy + stats.logps)
        if dkl is not None:
            assert stats.kl is not None and stats.ref_logps is not None and stats.ref_sum_exp is not None
            assert q is not None and p.d is not None and q.d is not None
            rest += dkl.unsqueeze(-1) * (p.d - q.d)
            offset -= dkl * (log_sum - log_normalizer(stats.ref_logps, stats.ref_sum_exp) + stats.kl)
            per_p += dkl * (stats.logps - stats.ref_logps - stats.kl)
        if dkl_forward is not None:
            offset += dkl_forward
        # If p_v is 0, its logarithm is -inf. `where` avoids 0 * inf.
        rest = torch.where(p.e > 0, (rest + offset.unsqueeze(-1)) * (p.e * inverse.unsqueeze(-1)), p.e)
        taken += torch.where(stats.logps > -torch.inf, stats.logps.exp() * per_p, 0.0)
        if dkl_forward is not None:
            assert q is not None and stats.ref_logps is not None and stats.ref_sum_exp is not None
            rest -= q.e * (dkl_forward / stats.ref_sum_exp).unsqueeze(-1)
            taken += dkl_forward * (torch.expm1(stats.logps) - torch.expm1(stats.ref_logps))
    grad = torch.mul(p.e, (-dlogp * inverse).unsqueeze(-1), out=p.e if out is None else out)
    if rest is not None:
        grad += rest
    _, column = columns_of(targets, grad.shape[1])
    entry = grad.gather(-1, column).squeeze(-1)
    # If p is 0, dlogp may be infinite, and a sum with 0 * dlogp would be NaN.
    alone = is_sure(stats.logps) | (stats.logps.exp() == 0)
    replace_taken(grad, targets, torch.where(alone, taken, entry + dlogp))
    if isinstance(p.slope, Tensor) or p.slope != 1.0:
        grad *= p.slope
    return grad


def row_stats(rows: Rows, out: RowStats) -> None:
    """Fill `out` with each row's statistics. Masked rows get zeros, and on the CPU they are not read."""
    scratch = Scratch()
    for chunk in row_chunks(rows.targets != MASKED, *rows.all_logits):
        found, _, _ = statistics(ChunkRows.read(chunk, rows), out, scratch)
        store(out, found, chunk.rows)
    clear_masked(out, rows.targets)


def dlogits(rows: Rows, stats: RowStats, coefficients: Coefficients, out: Tensor) -> None:
    """Fill `out` with the gradient. Rows without one get zeros, and on the CPU they are not read."""
    needed = coefficients.active() & (rows.targets != MASKED)
    keep_d = coefficients.dentropy is not None or coefficients.dkl is not None
    scratch = Scratch()
    for chunk in row_chunks(needed, out, *rows.all_logits):
        here, own = ChunkRows.read(chunk, rows), stats.rows(chunk.rows)
        p, _ = here.policy.exponentials(here.z, own.shift, keep_d=keep_d, scratch=scratch, name="policy")
        q = None
        if here.ref_z is not None:
            q, _ = here.reference.exponentials(
                here.ref_z, own.ref_shift, keep_d=keep_d, scratch=scratch, name="reference"
            )
        target = chunk.direct(out, here.z.shape[1], p.e.dtype)
        grad = gradient(p, q, here.targets, own, coefficients.rows(chunk.rows), target)
        chunk.write(out, grad, needed)
    zero_rows(out, needed)


def fused_loss(rows: Rows, loss: BatchLoss, out: FusedOutput) -> None:
    """Fill `out`: statistics, loss and gradient, while a chunk of rows is in the cache."""
    present = rows.targets != MASKED
    written = present.clone()
    scratch = Scratch()
    for chunk in row_chunks(present, out.dlogits, *rows.all_logits):
        here = ChunkRows.read(chunk, rows)
        stats, p, q = statistics(here, out.stats, scratch)
        out.value[chunk.rows], own = loss.rows(chunk.rows).values(stats)
        assert own.dlogp is not None
        out.dlogp[chunk.rows] = own.dlogp
        store(out.stats, stats, chunk.rows)
        active = own.active() & present[chunk.rows]
        written[chunk.rows] = active
        # Picking rows copies them, which pays only for few rows. Otherwise zeros overwrite the other rows.
        if active.device.type == "cpu" and 2 * int(active.sum()) < active.numel():
            picked = active.nonzero().view(-1)  # on the CPU, so it does not sync
            chunk, stats, own, p = chunk.pick(picked), stats.rows(picked), own.rows(picked), p.pick(picked)
            q = None if q is None else q.pick(picked)
        target = chunk.direct(out.dlogits, here.z.shape[1], p.e.dtype)
        chunk.write(out.dlogits, gradient(p, q, rows.targets[chunk.rows], stats, own, target), written)
    clear_masked((*out.stats, out.value, out.dlogp), rows.targets)
    zero_rows(out.dlogits, written)


def store(out: RowStats, values: RowStats, index: Index) -> None:
    """Write the values of some rows into the fields of `out` that are not None."""
    for target, value in zip(out, values, strict=True):
        if target is not None and value is not None:
            target[index] = value


def clear_masked(out: Iterable[Tensor | None], targets: Tensor) -> None:
    """Write zeros at masked rows."""
    masked = targets == MASKED
    for target in out:
        if target is not None:
            target.masked_fill_(masked, 0.0)


def zero_rows(out: Tensor, written: Tensor) -> None:
    """Write zeros into the rows of `out` that no chunk wrote. On a GPU every row is in a chunk."""
    if written.device.type == "cpu" and not bool(written.all()):
        for chunk in row_chunks(~written, out):
            view = chunk.view(out)
            if isinstance(chunk.local, slice):
                view[chunk.local] = 0
            else:
                view.index_fill_(0, chunk.local, 0.0)
