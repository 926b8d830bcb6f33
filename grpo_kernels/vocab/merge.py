"""Merges the statistics of the parts of a vocabulary that is split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LogitTransform
from ..tokens.statistics import RowStats
from .rows import MASKED
from .shard import VocabShard


def nats_per_shift(
    transform: LogitTransform, temperatures: Tensor | None
) -> tuple[Tensor | float, Tensor | float]:
    """Return the nats per unit of `RowStats.shift` and of `ref_shift`."""
    scale = 1.0 if transform.softcap is not None else transform.scale
    ref_scale = 1.0 if transform.ref_softcap is not None else transform.ref_scale
    temperature = transform.temperature if temperatures is None else temperatures
    return scale / temperature, ref_scale / temperature


def merge(
    own: RowStats,  # of this rank's columns
    targets: Tensor,  # [N]: MASKED, the column of the taken token, or `width` if another rank holds it
    ids: Tensor | None,  # [N, K]: likewise, of several tokens
    width: int,
    nats: tuple[Tensor | float, Tensor | float],  # per unit of shift and ref_shift
    shard: VocabShard,
) -> RowStats:
    """Return the statistics of the whole vocabulary, from those of all parts, after one all-gather.

    With P_i the policy's probability of part i and Q_i the reference's: H = sum P_i (H_i - log P_i) and
    KL(p || q) = sum P_i (KL_i + log P_i - log Q_i). A part of probability 0 contributes 0.
    """
    dtype = own.logps.dtype
    given = {name: x for name, x in own._asdict().items() if x is not None and name != "id_logps"}
    here = (targets >= 0) & (targets < width)
    local = torch.stack([*given.values(), here.to(dtype)])
    # There are few numbers per token, so fp64 costs nothing.
    wide = dtype if local.device.type == "mps" else torch.float64
    *values, holds = shard.gather(local).to(wide).unbind(1)
    parts = RowStats(**dict(zip(given, values)))
    assert parts.shift is not None and parts.sum_exp is not None
    held = holds != 0

    def of_holder(x: Tensor) -> Tensor:
        """The value of the part that holds the taken token. NaN unless exactly one part does."""
        return torch.where(held.sum(0) == 1, torch.where(held, x, 0.0).sum(0), torch.nan)

    def merged(shift: Tensor, sum_exp: Tensor, unit: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """The row's shift and sum, and log P of each part, which keeps its digits if P is nearly 1."""
        row_shift = shift.amax(0)
        delta = (shift - row_shift) * unit
        masses = sum_exp * delta.exp()
        total = masses.sum(0)
        others = torch.stack([torch.cat([masses[:i], masses[i + 1 :]]).sum(0) for i in range(len(masses))])
        log_part = sum_exp.log() + delta - total.log()
        return row_shift, total, torch.where(masses > others, -torch.log1p(others / masses), log_part)

    def logps_of_holder(logps: Tensor, log_part: Tensor) -> Tensor:
        return of_holder(torch.where(log_part == -torch.inf, -torch.inf, logps + log_part))

    def expected(log_part: Tensor, each: Tensor) -> Tensor:
        # Rounding to the dtype of the arithmetic makes a tiny probability 0, as in a vocabulary that is not
        # split. `where` avoids 0 * inf.
        share = log_part.exp().to(dtype)
        return torch.where(share == 0, 0.0, share * each).sum(0).clamp(min=0)

    def divergence(each: Tensor, log_part: Tensor, log_other: Tensor) -> Tensor:
        infinite = log_other == -torch.inf  # `each` may then be NaN
        return expected(log_part, torch.where(infinite, torch.inf, each + log_part - log_other))

    shift, sum_exp, log_part = merged(parts.shift, parts.sum_exp, nats[0])
    found = RowStats(logps_of_holder(parts.logps, log_part), shift, sum_exp)
    if parts.entropy is not None:
        found = found._replace(entropy=expected(log_part, parts.entropy - log_part))
    if parts.ref_logps is not None:
        assert parts.ref_shift is not None and parts.ref_sum_exp is not None and parts.kl is not None
        ref_shift, ref_sum_exp, log_ref = merged(parts.ref_shift, parts.ref_sum_exp, nats[1])
        found = found._replace(
            ref_logps=logps_of_holder(parts.ref_logps, log_ref),
            ref_shift=ref_shift,
            ref_sum_exp=ref_sum_exp,
            kl=divergence(parts.kl, log_part, log_ref),
        )
        if parts.kl_forward is not None:
            found = found._replace(kl_forward=divergence(parts.kl_forward, log_ref, log_part))
    if parts.top1 is not None:
        found = found._replace(top1=of_holder(parts.top1 * (parts.shift == shift)))
    masked = targets == MASKED
    found = RowStats(*(None if x is None else torch.where(masked, 0.0, x).to(dtype) for x in found))  # type: ignore[arg-type]
    if ids is None:
        return found
    assert own.id_logps is not None
    id_logps = merged_id_logps(own.id_logps, (ids >= 0) & (ids < width), log_part[shard.rank], shard)
    id_logps = torch.where(masked.unsqueeze(-1), 0.0, id_logps)
    return found._replace(logps=id_logps.nan_to_num(-torch.inf).amax(-1), id_logps=id_logps)


def merged_id_logps(logps: Tensor, here: Tensor, log_part: Tensor, shard: VocabShard) -> Tensor:
    """Return the log-probabilities `[N, K]` of tokens of which each rank holds some, those that are `here`.

    `log_part` `[N]` is the logarithm of the probability of this rank's columns.
    """
    whole = torch.where(log_part.unsqueeze(-1) == -torch.inf, -torch.inf, logps + log_part.unsqueeze(-1))
    # Only one rank's addend is not 0, so that each sum is exact.
    found = torch.stack([torch.where(here, whole, 0.0), here.to(whole.dtype)])
    torch.distributed.all_reduce(found, group=shard.group)
    return torch.where(found[1] == 1, found[0], torch.nan).to(logps.dtype)
