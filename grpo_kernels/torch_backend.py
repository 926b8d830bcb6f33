"""Row statistics and the gradient of the logits in PyTorch, a few rows at a time: for the CPU and any device.

A chunk of rows stays in the cache between the passes over it, so memory traffic and extra memory are those of
the fused kernels: the logits are read once per pass, and nothing of the logits' size is ever allocated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import MASKED, Coefficients, RowStats, TokenInputs, arithmetic_dtype
from .row_chunks import RowChunk, Rows, Scratch, row_chunks
from .row_loss import row_loss
from .spec import LogitTransform, LossSpec


class Exponentials(NamedTuple):
    """A chunk of one distribution: `d = k * (y - row_max)`, `e = exp(d)`."""

    d: Tensor | None  # [n, V]; None where only e is wanted
    e: Tensor  # [n, V]
    slope: Tensor | float  # dd/dz: [n, V] under a softcap, else [n, 1] or a number

    def pick(self, picked: Tensor) -> Exponentials:
        slope = self.slope[picked] if isinstance(self.slope, Tensor) else self.slope
        return Exponentials(None if self.d is None else self.d[picked], self.e[picked], slope)


def exponentials(
    z: Tensor,
    row_max: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: Tensor | float,
    keep_d: bool,
    scratch: Scratch | None = None,
    name: str = "",
) -> tuple[Exponentials, Tensor]:
    """Exponentials of a chunk of raw logits, and its row maxima, computed unless they are given.

    They lie in the buffers of `scratch` that begin with `name`, where it is given.
    """
    y = z.to(arithmetic_dtype(z))
    k: Tensor | float = scale / temperature
    slope = k
    if softcap is not None:
        y = softcap * torch.tanh(y * (scale / softcap))
        k = 1.0 / temperature
        slope = k * scale * (1 - (y / softcap) ** 2)
    if row_max is None:
        # Finite, so that a part of the vocabulary with nothing but -inf sums to 0 and not to NaN.
        row_max = y.amax(-1).clamp(min=torch.finfo(y.dtype).min)
    d = torch.sub(y, row_max.unsqueeze(-1), out=None if scratch is None else scratch.like(f"{name} d", y))
    if isinstance(k, Tensor) or k != 1.0:
        d *= k
    if not keep_d:
        return Exponentials(None, d.exp_(), slope), row_max
    e = torch.exp(d, out=None if scratch is None else scratch.like(f"{name} e", d))
    return Exponentials(d, e, slope), row_max


def row_sum(x: Tensor) -> Tensor:
    """`[n, V]` to `[n]`, the same bits for a row whatever stands beside it.

    A lone long row PyTorch would split over its threads, and so add in another order: it gets company.
    """
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def statistics(
    z: Tensor,  # [n, V] raw logits of the rows, padding columns cut off
    ref_z: Tensor | None,
    targets: Tensor,  # [n]
    temperature: Tensor | float,
    transform: LogitTransform,
    want: RowStats,  # what is not None here is computed
    scratch: Scratch,
) -> tuple[RowStats, Exponentials, Exponentials | None]:
    """Statistics of a chunk of rows, and the exponentials they were made of."""

    def taken(z: Tensor, row_max: Tensor, scale: float, softcap: float | None) -> Tensor:
        """`d` of the taken token; NaN for an id outside the vocabulary."""
        valid = (targets >= 0) & (targets < transform.vocab_size)
        column = z.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1))
        d = exponentials(column, row_max, scale, softcap, temperature, keep_d=True)[0].d
        assert d is not None
        return torch.where(valid, d.squeeze(-1), torch.nan)

    keep_d = want.entropy is not None or ref_z is not None
    p, row_max = exponentials(
        z, None, transform.scale, transform.softcap, temperature, keep_d, scratch, "policy"
    )
    sum_exp = row_sum(p.e)
    log_sum = sum_exp.log()
    d = taken(z, row_max, transform.scale, transform.softcap)
    found = RowStats(d - log_sum, row_max, sum_exp)
    if want.top1 is not None:
        found = found._replace(top1=(d >= 0).to(d.dtype))
    if want.entropy is not None:
        assert p.d is not None
        expected = row_sum(torch.where(p.e > 0, p.e * p.d, p.e)) / sum_exp
        found = found._replace(entropy=(log_sum - expected).clamp(min=0))
    q = None
    if ref_z is not None:
        q, ref_max = exponentials(
            ref_z, None, transform.ref_scale, transform.ref_softcap, temperature, keep_d, scratch, "reference"
        )
        ref_sum = row_sum(q.e)
        ref_log_sum = ref_sum.log()
        assert p.d is not None and q.d is not None
        difference = p.d - q.d
        expected = row_sum(torch.where(p.e > 0, p.e * difference, p.e)) / sum_exp
        found = found._replace(
            ref_logps=taken(ref_z, ref_max, transform.ref_scale, transform.ref_softcap) - ref_log_sum,
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
    """`[n, V]`: the loss's derivative by the raw logits of a chunk of rows. In `out`, or over `p.e`.

    dz_v = dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H) + dkl p_v (log p_v - log q_v - KL)
           + dkl_forward (p_v - q_v), times dd/dz.
    """
    dlogp, dentropy, dkl, dkl_forward = coefficients
    dlogp = torch.zeros_like(stats.logps) if dlogp is None else dlogp
    assert stats.sum_exp is not None
    inverse = 1 / stats.sum_exp
    rest = None  # what does not come from dlogp
    if dentropy is not None or dkl is not None or dkl_forward is not None:
        rest = torch.zeros_like(p.e)
        offset = torch.zeros_like(dlogp)
        if dentropy is not None:
            assert stats.entropy is not None and p.d is not None
            rest -= dentropy.unsqueeze(-1) * p.d
            offset -= dentropy * (stats.entropy - stats.sum_exp.log())
        if dkl is not None:
            assert stats.kl is not None and stats.ref_sum_exp is not None
            assert q is not None and p.d is not None and q.d is not None
            rest += dkl.unsqueeze(-1) * (p.d - q.d)
            offset -= dkl * (stats.sum_exp.log() - stats.ref_sum_exp.log() + stats.kl)
        if dkl_forward is not None:
            offset += dkl_forward
        # Where p_v = 0 its logarithm is -inf, and 0 * inf is not the 0 that is meant.
        rest = torch.where(p.e > 0, (rest + offset.unsqueeze(-1)) * (p.e * inverse.unsqueeze(-1)), p.e)
        if dkl_forward is not None:
            assert q is not None and stats.ref_sum_exp is not None
            rest -= q.e * (dkl_forward / stats.ref_sum_exp).unsqueeze(-1)
    grad = torch.mul(p.e, (-dlogp * inverse).unsqueeze(-1), out=p.e if out is None else out)
    # dlogp (1 - p_y) as -dlogp expm1(logp), which keeps its digits where p_y is nearly 1.
    valid = (targets >= 0) & (targets < grad.shape[-1])
    column = torch.where(valid, targets, 0).unsqueeze(-1)
    taken = (-dlogp * torch.expm1(stats.logps)).unsqueeze(-1)
    grad.scatter_(-1, column, torch.where(valid.unsqueeze(-1), taken, grad.gather(-1, column)))
    if rest is not None:
        grad += rest
    if isinstance(p.slope, Tensor) or p.slope != 1.0:
        grad *= p.slope
    return grad


def row_stats(
    logits: Tensor,
    targets: Tensor,
    out: RowStats,
    ref_logits: Tensor | None,
    temperature: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Fills `out`; masked rows are not read and get zeros."""
    scratch = Scratch()
    for chunk in row_chunks(targets != MASKED, *(x for x in (logits, ref_logits) if x is not None)):
        z, ref_z = read(chunk, logits, ref_logits, transform)
        t = temperature_of(chunk, temperature, transform)
        found, _, _ = statistics(z, ref_z, targets[chunk.rows], t, transform, out, scratch)
        store(out, found, chunk.rows)
    clear_masked(out, targets)


def dlogits(
    out: Tensor,  # [B, T, V]; may be logits itself
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    coefficients: Coefficients,
    ref_logits: Tensor | None,
    temperature: Tensor | None,
    transform: LogitTransform,
) -> None:
    """Fills `out` with the gradient; rows whose coefficients are all zero are not read and get zeros."""
    needed = coefficients.active() & (targets != MASKED)
    keep_d = coefficients.dentropy is not None or coefficients.dkl is not None
    scratch = Scratch()
    for chunk in row_chunks(needed, *(x for x in (out, logits, ref_logits) if x is not None)):
        z, ref_z = read(chunk, logits, ref_logits, transform)
        own = stats.rows(chunk.rows)
        t = temperature_of(chunk, temperature, transform)
        p, _ = exponentials(z, own.shift, transform.scale, transform.softcap, t, keep_d, scratch, "policy")
        q = None
        if ref_z is not None:
            ref = transform.ref_scale, transform.ref_softcap
            q, _ = exponentials(ref_z, own.ref_shift, *ref, t, keep_d, scratch, "reference")
        chunk.write(
            out,
            gradient(
                p,
                q,
                targets[chunk.rows],
                own,
                coefficients.rows(chunk.rows),
                chunk.direct(out, z.shape[1], p.e.dtype),
            ),
            needed,
        )
    zero_rows(out, needed)


def fused_loss(
    dlogits: Tensor,  # [B, T, V]; may be logits itself
    logits: Tensor,
    targets: Tensor,
    out: RowStats,
    value: Tensor,
    dlogp: Tensor,
    inputs: TokenInputs,
    ref_logits: Tensor | None,
    temperature: Tensor | None,
    transform: LogitTransform,
    spec: LossSpec,
) -> None:
    """Statistics, token-local loss and gradient while a chunk of rows is in the cache.

    Fills `out`, for each row its share `value` of the loss and `dlogp`, and `dlogits` with the gradient of
    `sum(value)`.
    """
    present = targets != MASKED
    written = present.clone()
    scratch = Scratch()
    for chunk in row_chunks(present, *(x for x in (dlogits, logits, ref_logits) if x is not None)):
        z, ref_z = read(chunk, logits, ref_logits, transform)
        t = temperature_of(chunk, temperature, transform)
        stats, p, q = statistics(z, ref_z, targets[chunk.rows], t, transform, out, scratch)
        value[chunk.rows], own = row_loss(spec, stats, inputs.rows(chunk.rows))
        assert own.dlogp is not None
        dlogp[chunk.rows] = own.dlogp
        store(out, stats, chunk.rows)
        active = own.active() & present[chunk.rows]
        written[chunk.rows] = active
        # Picking rows copies them: worth it for few. What is written of others, zeros will replace.
        if active.device.type == "cpu" and 2 * int(active.sum()) < active.numel():
            picked = active.nonzero().view(-1)  # on the CPU: nothing waits
            chunk, stats, own, p = chunk.pick(picked), stats.rows(picked), own.rows(picked), p.pick(picked)
            q = None if q is None else q.pick(picked)
        chunk.write(
            dlogits,
            gradient(p, q, targets[chunk.rows], stats, own, chunk.direct(dlogits, z.shape[1], p.e.dtype)),
            written,
        )
    clear_masked((*out, value, dlogp), targets)
    zero_rows(dlogits, written)


def read(
    chunk: RowChunk, logits: Tensor, ref_logits: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor | None]:
    """The chunk's rows of both models, without the vocabulary's padding."""
    width = transform.vocab_size
    return chunk.read(logits)[:, :width], None if ref_logits is None else chunk.read(ref_logits)[:, :width]


def temperature_of(chunk: RowChunk, temperature: Tensor | None, transform: LogitTransform) -> Tensor | float:
    return transform.temperature if temperature is None else temperature[chunk.rows].unsqueeze(-1)


def store(out: RowStats, values: RowStats, rows: Rows) -> None:
    for target, value in zip(out, values, strict=True):
        if target is not None and value is not None:
            target[rows] = value


def clear_masked(out: Iterable[Tensor | None], targets: Tensor) -> None:
    masked = targets == MASKED
    for target in out:
        if target is not None:
            target.masked_fill_(masked, 0.0)


def zero_rows(out: Tensor, written: Tensor) -> None:
    """Rows of `out` that no chunk has written become zero. Off the CPU every row is in a chunk."""
    if written.device.type == "cpu" and not bool(written.all()):
        for chunk in row_chunks(~written, out):
            view = chunk.view(out)
            if isinstance(chunk.local, slice):
                view[chunk.local] = 0
            else:
                view.index_fill_(0, chunk.local, 0.0)
