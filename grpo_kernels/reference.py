"""The parity oracle: every loss in plain eager PyTorch, straight from the formulas of docs/math.md.

Slow and memory-hungry on purpose: full `log_softmax`, loops over sequences, derivatives by autograd. It
shares no code with the rest of the package; it reads a `LossSpec`'s fields and nothing else. For tests,
benchmarks and docs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ReferenceOutput(NamedTuple):
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
) -> ReferenceOutput:
    """Arguments and shapes as `grpo_loss`; half precision is computed in fp32, fp64 in fp64."""
    shape = logits.shape[:-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mask = torch.ones(shape, dtype=torch.bool) if completion_mask is None else completion_mask != 0
    mask = mask.to(logits.device)
    sequences = _sequence_numbers(shape, seq_lens, logits.device)
    count = shape[0] if len(shape) == 2 else (None if seq_lens is None else len(seq_lens))

    def tokens(x: Tensor | float) -> Tensor:
        """The unmasked tokens of a per-token or per-sequence argument, in order, `[M]`."""
        x = x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype, device=logits.device)
        if len(shape) == 1 and x.dim() == 1 and x.shape != shape:
            x = x[sequences]
        elif len(shape) == 2 and x.dim() == 1:
            x = x[:, None]
        return x.expand(shape)[mask].to(dtype)

    def distribution(z: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Log-probabilities `[M, V]` of the unmasked tokens."""
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

    def ratio_to(anchor: Tensor | None) -> Tensor:
        log_ratio = lp - (lp.detach() if anchor is None else anchor)
        if spec.log_ratio_clamp is not None:
            log_ratio = log_ratio.clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp)
        return log_ratio.exp()

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(shape, dtype=dtype, device=x.device).masked_scatter(mask, x)

    metrics: dict[str, Tensor] = {}
    anchor = rp if getattr(spec.surrogate, "anchor", "old") == "ref" else old
    if spec.surrogate is None:
        loss = torch.zeros_like(lp)
    elif callable(spec.surrogate):
        loss = spec.surrogate(spread(lp), spread(old), spread(rp), spread(A), mask)[mask]
    else:
        loss = _surrogate(spec.surrogate, lp, anchor, A, ratio_to)
    if anchor is not None or getattr(spec.surrogate, "uses_ratio", False):
        metrics["ratio"] = ratio_to(anchor)
        metrics["log_ratio"] = torch.zeros_like(lp) if anchor is None else lp - anchor
        if type(spec.surrogate).__name__ == "PPOClip":
            low = (metrics["ratio"] < 1 - spec.surrogate.eps_low) & (A < 0)
            high = (metrics["ratio"] > 1 + spec.surrogate.eps_high) & (A > 0)
            metrics |= {"clip_fraction": low | high, "clip_fraction_low": low, "clip_fraction_high": high}
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

    row = sequences.expand(shape)[mask] if len(shape) == 1 else sequences[:, None].expand(shape)[mask]
    width = spec.max_tokens if spec.max_tokens is not None else shape[-1]
    total = _aggregate(spec.aggregation, loss, row, count, width, normalizer)
    if spec.entropy_coef:
        if normalizer is None:
            bonus = entropy.sum() / len(entropy) if len(entropy) else entropy.sum()
        else:
            bonus = _aggregate(spec.aggregation, entropy, row, count, width, normalizer)
        total = total - spec.entropy_coef * bonus
    means = {
        key: x.detach().to(dtype).mean() if len(x) else torch.zeros((), dtype=dtype)
        for key, x in metrics.items()
    }
    detached = [None if x is None else spread(x.detach()) for x in (lp, rp, entropy)]
    return ReferenceOutput(total, means, detached[0], detached[1], detached[2])  # type: ignore[arg-type]


def reference_logps(logits: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities of `ids` `[B, T]` under fp32 (fp64) `log_softmax` of the whole logits `[B, T, V]`."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return torch.log_softmax(wide / temperature, -1).gather(-1, ids.long()[..., None])[..., 0]


def _sequence_numbers(shape: torch.Size, seq_lens: Tensor | None, device: torch.device) -> Tensor:
    if len(shape) == 2:
        return torch.arange(shape[0], device=device)
    if seq_lens is None:
        return torch.zeros(shape, dtype=torch.long, device=device)
    return torch.tensor(
        [s for s, n in enumerate(seq_lens.tolist()) for _ in range(n)], dtype=torch.long, device=device
    )


def _expectation(p: Tensor, log_p: Tensor) -> Tensor:
    """Entropy, with 0 log 0 = 0."""
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
        return -A * (ratio if surrogate.max_ratio is None else ratio.clamp(max=surrogate.max_ratio))
    if name == "PPOClip":
        bounded = ratio if surrogate.delta is None else ratio.clamp(max=surrogate.delta)
        clipped = ratio.clamp(1 - surrogate.eps_low, 1 + surrogate.eps_high)
        loss = -torch.minimum(bounded * A, clipped * A)
        if surrogate.dual_clip is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -surrogate.dual_clip * A), loss)
        return loss
    raise ValueError(f"the reference does not know {name}")


def _sampled_kl(kl: Any, lp: Tensor, rp: Tensor, ratio: Tensor) -> Tensor:
    free = rp - lp
    x = free if kl.clamp is None else free.clamp(-kl.clamp, kl.clamp)
    value = {"k1": -x, "abs": x.abs(), "k2": x**2 / 2, "k3": torch.expm1(x) - x}[kl.kind]
    if kl.output_clamp is not None:
        value = value.clamp(-kl.output_clamp, kl.output_clamp)
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
        if how == "seq-mean-token-mean":
            sums = [s.mean() for s in sums if len(s)]
        else:
            sums = [s.sum() for s in sums]
        loss = torch.stack(sums) if sums else loss
        if how == "seq-mean-token-sum-norm":
            loss = loss / width
    denominator = default if normalizer is None else normalizer
    return loss.sum() / denominator if denominator else loss.sum() * 0.0
