"""The parity oracle: computes every loss in plain eager PyTorch, from the formulas in docs/math.md.

It serves tests, benchmarks and docs. It is slow and needs much memory on purpose: it computes the full
`log_softmax`, loops over sequences and takes derivatives with autograd. It shares no code with the rest of
the package. It reads only the fields of a `LossSpec`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
    """The result of `reference_loss`.

    Attributes:
        loss: 0-dim, with a graph.
        metrics: means over the unmasked tokens, 0-dim.
        logps: `[B, T]` or packed `[N]`, nats; 0 at masked tokens. The same holds for the other two.
        ref_logps: log-probabilities of the reference; None without a reference.
        entropy: entropies of the policy.

    Examples:
        >>> from grpo_kernels.reference import ReferenceOutput
        >>> ReferenceOutput._fields
        ('loss', 'metrics', 'logps', 'ref_logps', 'entropy')
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor
    ref_logps: Tensor | None
    entropy: Tensor | None


def reference_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    spec: Any,
    completion_mask: Tensor | None = None,
    seq_lens: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    normalizer: float | Tensor | None = None,
    prompt_ids: Tensor | None = None,
) -> ReferenceOutput:
    """Compute a loss. Arguments and shapes are those of `grpo_loss`.

    fp64 logits are computed in fp64, all others in fp32.

    Examples:
        >>> import torch
        >>> from grpo_kernels import LossSpec, grpo_loss
        >>> from grpo_kernels.reference import reference_loss
        >>> from grpo_kernels.testing import make_batch
        >>> batch, spec = make_batch(2, 3, 11)[:3], LossSpec.preset("cispo")
        >>> slow, fused = reference_loss(*batch, spec=spec), grpo_loss(*batch, spec=spec)
        >>> torch.allclose(slow.loss, fused.loss, atol=1e-4)
        True
    """
    shape = logits.shape[:-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mask = torch.ones(shape, dtype=torch.bool) if completion_mask is None else completion_mask != 0
    mask = mask.to(logits.device)
    sequences = _sequence_numbers(shape, seq_lens, logits.device)
    count = shape[0] if len(shape) == 2 else (None if seq_lens is None else len(seq_lens))

    def tokens(x: Tensor | float) -> Tensor:
        """Return the values of a per-token or per-sequence argument for the M unmasked tokens, `[M]`."""
        x = x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype, device=logits.device)
        if len(shape) == 1 and x.dim() == 1 and x.shape != shape:
            x = x[sequences]
        elif len(shape) == 2 and x.dim() == 1:
            x = x[:, None]
        return x.expand(shape)[mask].to(dtype)

    def distribution(z: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Return the log-probabilities `[M, V]` of the unmasked tokens."""
        z = z[mask][:, : vocab_size or z.shape[-1]].to(dtype) * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z / tokens(temperature)[:, None], -1)

    ids = completion_ids[mask].long()[:, None]
    log_p = distribution(logits, logit_scale, logit_softcap)
    lp = log_p.gather(-1, ids)[:, 0]
    entropy = _expectation(log_p.exp(), log_p)
    log_q = rp = None
    if ref_logits is not None:
        log_q = distribution(
            ref_logits.detach(),
            logit_scale if ref_logit_scale is None else ref_logit_scale,
            logit_softcap if ref_logit_softcap is None else ref_logit_softcap,
        )
        rp = log_q.gather(-1, ids)[:, 0]
    elif ref_logps is not None:
        rp = tokens(ref_logps)
    old = None if old_logps is None else tokens(old_logps)
    A = tokens(advantages)
    w = None if token_weights is None else tokens(token_weights)

    row = (sequences if len(shape) == 1 else sequences[:, None]).expand(shape)[mask]

    def sum_of_sequence(x: Tensor) -> Tensor:
        """Return for each token the sum over its sequence, `[M]`."""
        return x.new_zeros(int(row.max()) + 1 if len(row) else 0).index_add(0, row, x)[row]

    n = sum_of_sequence(torch.ones_like(lp.detach()))

    def ratio_to(anchor: Tensor | None) -> Tensor:
        log_ratio = lp - (lp.detach() if anchor is None else anchor)
        if spec.level == "sequence":
            log_ratio = sum_of_sequence(log_ratio) / n
        elif spec.level == "sequence-token":
            log_ratio = lp - lp.detach() + (sum_of_sequence(log_ratio) / n).detach()
        if spec.log_ratio_clamp is not None:
            log_ratio = _bounded(log_ratio, -spec.log_ratio_clamp, spec.log_ratio_clamp)
        return log_ratio.exp()

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(shape, dtype=dtype, device=x.device).masked_scatter(mask, x)

    metrics: dict[str, Tensor] = {}
    anchor = rp if getattr(spec.surrogate, "anchor", "old") == "ref" else old
    if spec.surrogate is None:
        loss = torch.zeros_like(lp)
    elif callable(spec.surrogate):
        loss = spec.surrogate(spread(lp), spread(old), spread(rp), spread(A), mask)[mask]
    elif type(spec.surrogate).__name__ in ("VESPO", "GMPO"):
        clamp = math.inf if spec.log_ratio_clamp is None else spec.log_ratio_clamp
        # VESPO multiplies its sequence ratio by a per-sequence weight once, not once per token.
        once = token_weights is not None and token_weights.shape != shape
        loss = _coupled(spec.surrogate, lp, anchor, A, w, sum_of_sequence, n, clamp, once)
        w = None
    elif type(spec.surrogate).__name__ == "DRO" and spec.level == "sequence":
        total = sum_of_sequence(lp - (lp.detach() if anchor is None else anchor))
        loss = -A * lp + spec.surrogate.beta / 2 * total**2 / n
    else:
        loss = _surrogate(spec.surrogate, lp, anchor, A, ratio_to)
    if anchor is not None or getattr(spec.surrogate, "uses_ratio", False):
        metrics["ratio"] = ratio_to(anchor)
        metrics["log_ratio"] = torch.zeros_like(lp) if anchor is None else lp - anchor
        if spec.level != "token":
            metrics["log_ratio"] = sum_of_sequence(metrics["log_ratio"]) / n
        token_log_ratio = torch.zeros_like(lp) if anchor is None else lp - anchor
        metrics |= _clip_fractions(spec.surrogate, metrics["ratio"], token_log_ratio, lp, A)
    if w is not None:
        loss = loss * w
    exact = None if log_q is None else _divergence(log_p, log_q)
    if spec.kl is not None and spec.kl.beta:
        if spec.kl.kind in ("exact", "exact_forward"):
            assert log_q is not None
            kl = _divergence(log_p, log_q) if spec.kl.kind == "exact" else _divergence(log_q, log_p)
        else:
            assert rp is not None
            kl = _sampled_kl(spec.kl, lp, rp, ratio_to(old))
        loss = loss + spec.kl.beta * kl
        metrics["kl"] = kl
    if exact is not None:
        metrics["kl_exact"] = exact
    metrics["entropy"] = entropy

    width = spec.max_tokens or 1  # only "seq-mean-token-sum-norm" reads it, and its spec sets it
    unit = row  # of tokens that are averaged together
    if spec.aggregation == "prompt-mean":
        assert prompt_ids is not None
        # Each prompt is one long sequence.
        found = prompt_ids.tolist()
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(found))}
        count = len(number)
        unit = torch.tensor([number[x] for x in found], dtype=torch.long, device=row.device)[row]
    total = _aggregate(spec.aggregation, loss, unit, count, width, normalizer)
    if spec.entropy_coef:
        if normalizer is None:
            bonus = entropy.sum() / len(entropy) if len(entropy) else entropy.sum()
        else:
            bonus = _aggregate(spec.aggregation, entropy, unit, count, width, normalizer)
        total = total - spec.entropy_coef * bonus
    means = {
        key: x.detach().to(dtype).mean() if len(x) else torch.zeros((), dtype=dtype)
        for key, x in metrics.items()
    }
    detached = [None if x is None else spread(x.detach()) for x in (lp, rp, entropy)]
    return ReferenceOutput(total, means, detached[0], detached[1], detached[2])  # type: ignore[arg-type]


def reference_logps(logits: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the log-probabilities of `ids` `[B, T]` from a `log_softmax` of the logits `[B, T, V]`.

    fp64 logits are computed in fp64, all others in fp32.

    Examples:
        >>> import torch
        >>> from grpo_kernels.reference import reference_logps
        >>> reference_logps(torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[2]]))
        tensor([[-0.4076]])
    """
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return torch.log_softmax(wide / temperature, -1).gather(-1, ids.long()[..., None])[..., 0]


def _sequence_numbers(shape: torch.Size, seq_lens: Tensor | None, device: torch.device) -> Tensor:
    if len(shape) == 2:
        return torch.arange(shape[0], device=device)
    if seq_lens is None:
        return torch.zeros(shape, dtype=torch.long, device=device)
    # This may be slow, because it is for tests.
    return torch.tensor(
        [s for s, n in enumerate(seq_lens.tolist()) for _ in range(n)], dtype=torch.long, device=device
    )


def _expectation(p: Tensor, log_p: Tensor) -> Tensor:
    """Return the entropy, with 0 log 0 = 0."""
    return -torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (torch.where(p > 0, log_p, 0.0) - torch.where(p > 0, log_q, 0.0)), 0.0).sum(
        -1
    )


def _surrogate(surrogate: Any, lp: Tensor, anchor: Any, A: Tensor, ratio_to: Any) -> Tensor:
    name = type(surrogate).__name__
    if name == "LogRatio":
        return -A * (lp - anchor)
    if name == "Reinforce":
        return -A * lp
    ratio = ratio_to(anchor)
    if name == "ImportanceRatio":
        return -A * (ratio if surrogate.max_ratio is None else _bounded(ratio, high=surrogate.max_ratio))
    if name == "PPOClip":
        bounded = ratio if surrogate.delta is None else _bounded(ratio, high=surrogate.delta)
        clipped = _bounded(ratio, 1 - surrogate.eps_low, 1 + surrogate.eps_high)
        loss = -torch.minimum(bounded * A, clipped * A)
        if surrogate.dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -surrogate.dual_clip * A), loss)
        return loss
    if name == "CISPO":
        return -ratio.clamp(surrogate.ratio_min, surrogate.ratio_max).detach() * A * lp
    if name == "SAPO":
        tau = _either(A > 0, surrogate.tau_pos, surrogate.tau_neg, A)
        return -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if name == "DRO":
        return -(A * lp - surrogate.beta / 2 * ratio.log() ** 2)
    if name == "DPPO":
        inside = _inside_region(surrogate, lp.detach(), lp.detach() if anchor is None else anchor, A)
        capped = ratio if surrogate.ratio_cap is None else ratio.clamp(max=surrogate.ratio_cap)
        return -A * capped.detach() * lp * inside
    raise ValueError(f"the reference does not know {name}")


def _inside_region(surrogate: Any, lp: Tensor, old_lp: Tensor, A: Tensor) -> Tensor:
    p, old = lp.exp(), old_lp.exp()
    if surrogate.kind == "tv":
        return torch.where(A > 0, p - old <= surrogate.high, old - p <= surrogate.low)
    rest, old_rest = (1 - p).clamp(min=0), (1 - old).clamp(min=0)
    kl = (
        torch.where(old == 0, 0.0, old * (old_lp - lp)) + old_rest * ((old_rest + 1e-8) / (rest + 1e-8)).log()
    )
    raised, lowered = (kl <= surrogate.high) | (p <= old), (kl <= surrogate.low) | (p >= old)
    return torch.where(A > 0, raised, lowered)


def _bounded(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Clamp `x`. A value on its bound keeps its gradient: `Tensor.clamp`'s is 0 there from torch 2.14 on."""
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


def _either(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))


def _coupled(
    surrogate: Any,
    lp: Tensor,
    anchor: Any,
    A: Tensor,
    w: Any,
    sum_of_sequence: Any,
    n: Tensor,
    clamp: float,
    once: bool,
) -> Tensor:
    log_ratio = lp - (lp.detach() if anchor is None else anchor)
    if type(surrogate).__name__ == "VESPO":
        bound = min(clamp, 20.0)
        log_w = sum_of_sequence(log_ratio.detach().clamp(-bound, bound))
        if w is not None:
            log_weights = w.log().clamp(math.log(1e-8), 20)
            log_w = log_w + (log_weights if once else sum_of_sequence(log_weights))
        log_w = log_w.clamp(math.log(1e-8), 20)
        k = _either(A >= 0, surrogate.k_pos, surrogate.k_neg, A)
        rate = _either(A >= 0, surrogate.lambda_pos, surrogate.lambda_neg, A).clamp(min=1e-4)
        return -(rate + k * log_w - rate * log_w.exp()).exp() * A * lp
    bounded = torch.where(
        A > 0,
        _bounded(log_ratio, high=surrogate.eps_high),
        torch.where(A < 0, _bounded(log_ratio, low=-surrogate.eps_low), 0 * log_ratio),
    )
    loss = -sum_of_sequence(A) / n * _bounded(sum_of_sequence(bounded) / n, -clamp, clamp).exp()
    return loss if w is None else loss * (sum_of_sequence((w + 1e-10).log()) / n).exp()


def _clip_fractions(
    surrogate: Any, ratio: Tensor, log_ratio: Tensor, lp: Tensor, A: Tensor
) -> dict[str, Tensor]:
    name = type(surrogate).__name__
    bounds = {
        "PPOClip": lambda: (1 - surrogate.eps_low, 1 + surrogate.eps_high),
        "CISPO": lambda: (surrogate.ratio_min, surrogate.ratio_max),
    }
    if name in bounds:
        lower, upper = bounds[name]()
        low, high = (ratio < lower) & (A < 0), (ratio > upper) & (A > 0)
        return {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
    if name == "ImportanceRatio" and surrogate.max_ratio is not None:
        return {"clip_fraction": (ratio > surrogate.max_ratio) & (A != 0)}
    if name == "GMPO":
        high, low = (A > 0) & (log_ratio > surrogate.eps_high), (A < 0) & (log_ratio < -surrogate.eps_low)
        return {"clip_fraction": high | low}
    if name == "DPPO":
        return {"clip_fraction": ~_inside_region(surrogate, lp, lp - log_ratio, A) & (A != 0)}
    return {}


def _sampled_kl(kl: Any, lp: Tensor, rp: Tensor, ratio: Tensor) -> Tensor:
    free = rp - lp
    x = free if kl.clamp is None else _bounded(free, -kl.clamp, kl.clamp)
    value = {"k1": -x, "abs": x.abs(), "k2": x**2 / 2, "k3": torch.expm1(x) - x}[kl.kind]
    if kl.output_clamp is not None:
        value = _bounded(value, -kl.output_clamp, kl.output_clamp)
    if kl.straight_through:
        value = value.detach() + free**2 / 2 - (free**2 / 2).detach()
    return value * ratio if kl.ratio_corrected else value


def _aggregate(
    how: str, loss: Tensor, row: Tensor, count: int | None, width: int, normalizer: float | Tensor | None
) -> Tensor:
    if how == "token-mean":
        default: float | None = len(loss)
    elif how == "token-sum":
        default = 1.0
    else:
        default = count
        sums = [loss[row == s] for s in range(count or int(row.max()) + 1 if len(row) else 0)]
        if how in ("seq-mean-token-mean", "prompt-mean"):
            sums = [s.mean() for s in sums if len(s)]
        else:
            sums = [s.sum() for s in sums]
        loss = torch.stack(sums) if sums else loss
        if how == "seq-mean-token-sum-norm":
            loss = loss / width
    denominator = default if normalizer is None else normalizer
    return loss.sum() / denominator if denominator else loss.sum() * 0.0
