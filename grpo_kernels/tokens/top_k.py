"""Divergences of student and teacher over the teacher's K likeliest tokens, from K log-probabilities each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks.choices import Rest
from ..spec.divergence import Divergence

LEAST_REST = 1e-30
"""Least probability of all other tokens."""

ROUNDING = 2.0**-22
"""Relative error of a log-probability in fp32, with a margin."""


def top_k_divergence(
    logps: Tensor,  # [N, K], nats, of the student; differentiable
    teacher_logps: Tensor,  # [N, K], nats
    valid: Tensor,  # [N, K] bool: the entry is a token
    spec: Divergence,
    rest: Rest,
) -> Tensor:
    """Return the divergence of each row, `[N]`. A row without a valid entry gets 0.

    The outcomes are the valid tokens and, with rest="bucket", all other tokens together. With rest="drop" the
    tokens of both models are renormalized.
    """
    dtype = logps.dtype
    # There are few numbers per row, so fp64 costs nothing. In fp64 neither 1 - sum nor the KL cancels digits.
    if logps.device.type != "mps":
        logps, teacher_logps = logps.double(), teacher_logps.double()
    p, q = (outcomes(x, valid, rest) for x in (logps, teacher_logps))
    terms = divergence_of_outcomes(p, q, spec)
    # Without a valid entry, the renormalized terms are NaN. Their gradients reach no log-probability.
    return torch.where(valid.any(-1, keepdim=True), terms, 0.0).sum(-1).to(dtype)


def outcomes(logps: Tensor, valid: Tensor, rest: Rest) -> Tensor:
    """Return the log-probabilities of the outcomes, `[N, K + 1]` or `[N, K]`, -inf where not valid."""
    logps = torch.where(valid, logps, -torch.inf)
    # The derivative of logsumexp is NaN if all are -inf.
    possible = (logps > -torch.inf).any(-1, keepdim=True)
    total = torch.where(possible, logps, 0.0).logsumexp(-1, keepdim=True)
    total = torch.where(possible, total, -torch.inf)
    if rest == "drop":
        # If no token of the row is possible, neither model's renormalized distribution exists.
        return logps - total
    # The probability of the others is 1 - sum, or the error of the sum if that is larger. The error is small
    # if one token has nearly all the probability, because its log-probability is then exact. The derivative
    # is that of 1 - sum in both cases: a student that is too sure must not stay so.
    known = torch.where(valid, logps, 0.0).detach().clamp(min=-1e4)
    error = (known.exp() * known.abs() * valid).sum(-1, keepdim=True) * ROUNDING
    bounded = torch.minimum(total, torch.log1p(-error.clamp(min=LEAST_REST, max=0.5))).detach()
    others = torch.log(-torch.expm1(torch.where(possible, total + (bounded - total.detach()), total)))
    return torch.cat([logps, others], -1)


def divergence_of_outcomes(p: Tensor, q: Tensor, spec: Divergence) -> Tensor:
    """Return the terms of the divergence, from log-probabilities."""
    if spec.kind == "reverse_kl":
        return kl_terms(p, q)
    if spec.kind == "forward_kl":
        return kl_terms(q, p)
    w = spec.weight
    possible = (p > -torch.inf) | (q > -torch.inf)
    # The derivative of logaddexp is NaN if both are -inf.
    student, teacher = torch.where(possible, p, 0.0), torch.where(possible, q, 0.0)
    m = torch.logaddexp(student + math.log1p(-w), teacher + math.log(w))
    return w * kl_terms(q, m) + (1 - w) * kl_terms(p, m)


def kl_terms(own: Tensor, other: Tensor) -> Tensor:
    """Return `exp(own) (own - other)`, 0 and without a gradient if `own` is -inf."""
    possible = own != -torch.inf
    # The derivative of 0 * -inf would be NaN.
    log_own = torch.where(possible, own, 0.0)
    return torch.where(possible, log_own.exp() * (log_own - torch.where(possible, other, 0.0)), 0.0)
