"""Several tokens per row: their log-probabilities, and their entries of the gradient.

The backends compute with one taken token per row. Here that is the likeliest of the row's tokens, because
only the likeliest token of a row can need the digits that this gives. The others are read from the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tokens.statistics import Coefficients, RowStats
from .rows import MASKED, Rows
from .sampling_mask import is_kept

PADDING = -1
"""In `Rows.ids`: no token. Its log-probability is 0, and it has no gradient."""


class TakenLogits(NamedTuple):
    """The logits of each row's tokens. The distribution is softmax(k * y)."""

    y: Tensor  # [N, K]; NaN for a token that is not in these columns, -inf for one that was not kept
    k: Tensor | float  # [N, 1] or a number
    slope: Tensor | float  # of k * y by the raw logit, [N, 1], [N, K] or a number
    kept: Tensor | None  # [N, K]: whether the sampling mask keeps the token; None: it keeps all


def taken_logits(rows: Rows) -> TakenLogits:
    """Read the logits of each row's tokens."""
    ids, transform = rows.ids, rows.transform
    assert ids is not None
    column = ids.clamp(0, transform.vocab_size - 1)
    shape = (*rows.logits.shape[:2], ids.shape[1])
    y = rows.logits.gather(-1, column.view(shape)).to(rows.dtype).view(ids.shape)
    temperature: Tensor | float = transform.temperature
    if rows.temperatures is not None:
        temperature = rows.temperatures.unsqueeze(-1)
    k = slope = transform.scale / temperature
    if transform.softcap is not None:
        capped = torch.tanh(y * (transform.scale / transform.softcap))
        y, k, slope = capped * transform.softcap, 1.0 / temperature, (1 - capped * capped) * slope
    kept = None
    if rows.sampling_mask is not None:
        kept = is_kept(rows.sampling_mask.flatten(0, 1), column)
        y = torch.where(kept, y, -torch.inf)
    return TakenLogits(torch.where(column == ids, y, torch.nan), k, slope, kept)


def likeliest(x: Tensor) -> Tensor:
    """Return the index `[N, 1]` of the largest number of each row `[N, K]`, the first of several."""
    return x.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax(-1, keepdim=True)


def with_likeliest(rows: Rows, logits: TakenLogits) -> Rows:
    """Return the rows with the likeliest of their tokens as the taken token."""
    assert rows.ids is not None
    target = rows.ids.gather(-1, likeliest(logits.y)).squeeze(-1)
    return with_target(rows, target.masked_fill(target == PADDING, rows.transform.vocab_size))


def with_target(rows: Rows, target: Tensor | int) -> Rows:
    """Return the rows with `target` as the taken token where they are not masked."""
    targets = torch.where(rows.targets == MASKED, rows.targets, target)
    return rows._replace(targets=targets, ids=None)


def write_logps(rows: Rows, logits: TakenLogits, stats: RowStats) -> None:
    """Fill `stats.id_logps`. The other statistics are those of `with_likeliest`."""
    assert rows.ids is not None
    assert stats.id_logps is not None and stats.shift is not None and stats.sum_exp is not None
    # If the likeliest token is sure, -logp has more digits than the logarithm of the sum.
    log_sum = torch.where(stats.logps > -0.5, -stats.logps, stats.sum_exp.log())
    logps = logits.k * (logits.y - stats.shift.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    own = rows.ids.gather(-1, likeliest(logits.y))
    # The likeliest token has the row's log-probability, wherever it is repeated, but only in these columns.
    taken = (rows.ids == own) & ~logps.isnan()
    logps = torch.where(taken, stats.logps.unsqueeze(-1), logps)
    stats.id_logps.copy_(logps.masked_fill_((rows.targets == MASKED).unsqueeze(-1), 0.0))


def without_padding(stats: RowStats, ids: Tensor | None) -> RowStats:
    """Return the statistics with log-probabilities of 0, without gradients, at the padding of `Rows.ids`."""
    if ids is None or stats.id_logps is None:
        return stats
    return stats._replace(id_logps=torch.where(ids == PADDING, 0.0, stats.id_logps))


def of_rows(coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of the columns that are no token's: of -p_v, the sum of all tokens' dlogp."""
    dlogp = coefficients.dlogp
    return coefficients._replace(dlogp=None if dlogp is None else dlogp.sum(-1))


def write_entries(
    rows: Rows, logits: TakenLogits, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """Overwrite the entries of each row's tokens in the gradient `out` `[B, T, V]`.

    The entry of token y is G - p_y sum_k g_k - dentropy p_y (log p_y + H), times dd/dz. G is the sum of g_k
    over all k with this token.
    """
    ids, logps, grads = rows.ids, stats.id_logps, coefficients.dlogp
    assert ids is not None and logps is not None
    if grads is None:
        return
    p = logps.exp()
    own = ids == ids.gather(-1, likeliest(logps))
    by_token = sum_by_token(ids, grads)
    # G - p sum g cancels if p is nearly 1, as that of the likeliest token may be.
    rest = torch.where(own, 0.0, grads).sum(-1, keepdim=True)
    entry = torch.where(
        own,
        -by_token * torch.expm1(logps) - p * rest,
        by_token - p * grads.sum(-1, keepdim=True),
    )
    if coefficients.dentropy is not None:
        assert stats.entropy is not None
        slope = torch.where(p > 0, p * (logps + stats.entropy.unsqueeze(-1)), 0.0)
        entry = entry - coefficients.dentropy.unsqueeze(-1) * slope
    active = (coefficients.active() & (rows.targets != MASKED)).unsqueeze(-1)
    if logits.kept is not None:
        active = active & logits.kept
    entry = torch.where(active, entry * logits.slope, 0.0)

    # A token that is not in these columns repeats the entry of one that is, or that of column 0.
    here = (ids >= 0) & (ids < rows.transform.vocab_size)
    some = here.to(torch.int8).argmax(-1, keepdim=True)
    column = torch.where(here, ids, torch.where(here.any(-1, keepdim=True), ids.gather(-1, some), 0))
    shape = (*out.shape[:2], ids.shape[1])
    values = torch.where(here, entry, entry.gather(-1, some)).to(out.dtype).view(shape)
    values = torch.where(here.any(-1).view(shape[:2]).unsqueeze(-1), values, out[..., :1])
    out.scatter_(-1, column.view(shape), values)


def sum_by_token(ids: Tensor, x: Tensor) -> Tensor:
    """Return for each k the sum of `x` `[N, K]` over all tokens of its row that equal `ids` `[N, K]` at k.

    The order of each sum depends on the row alone.
    """
    count = ids.shape[1]
    ids, order = ids.sort(dim=-1, stable=True)
    sums = x.gather(-1, order)
    step = 1
    while step < count:
        equal = ids[:, step:] == ids[:, :-step]
        sums = torch.cat([sums[:, :step], sums[:, step:] + torch.where(equal, sums[:, :-step], 0.0)], -1)
        step *= 2
    # Each token's last position has the whole sum.
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:, :-1] = ids[:, 1:] != ids[:, :-1]
    position = torch.arange(count, device=ids.device).masked_fill(~last, count)
    position = position.flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(x).scatter_(-1, order, sums.gather(-1, position))
