"""The public functions: check what comes in, lay it out by rows, call autograd, shape what goes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import objective
from .aggregation import aggregation_weights, safe_divide
from .autograd import KnownGradient, RowConfig, fused_loss, row_statistics
from .backend import choose_backend, log_once
from .batch import Batch, check_logits
from .metrics import metrics
from .objective import TokenInputs
from .spec import PRESETS, LogitTransform, LogRatio, LossSpec, Surrogate, check_choice, check_number


class LossOutput(NamedTuple):
    """What a loss returns; see `grpo_loss`."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor
    ref_logps: Tensor | None
    entropy: Tensor | None


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    spec: LossSpec | str = "grpo",
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
    return_entropy: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """A GRPO-style policy loss from logits, with its gradient in one pass over them.

    Padded batches have `B` sequences of `T` tokens, packed ones `N` tokens of `S` sequences end to end.
    Formulas: docs/math.md; the losses' papers stand at the surrogates' classes.

    Args:
        logits: `[B, T, V]` or `[N, V]`, fp16, bf16, fp32 or fp64. `logits[b, t]` predicts `completion_ids[b,
            t]`. Any strides but the last, which must be 1; never copied.
        completion_ids: `[B, T]` or `[N]`, int32 or int64.
        advantages: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`.
        spec: a `LossSpec`, or a preset's name.
        completion_mask: `[B, T]` or `[N]`, bool, int or float; 0: not a completion token. What any argument
            holds at such a position never matters.
        seq_lens: packed only: `[S]` integers that sum to `N`; on the device of the logits, lest the host
            wait.
        ref_logits: the reference model's logits, as `logits`; no gradient.
        ref_logps: `[B, T]` or `[N]`, nats: its log-probabilities instead. Not both.
        old_logps: `[B, T]` or `[N]`, nats: the behaviour policy's. None: on-policy, the ratio is exactly 1.
        token_weights: `[B, T]`, `[B, 1]` or `[N]`: constant factor on the surrogate, before the KL term.
        temperature: a float, or `[B]`, `[B, 1]`, `[B, T]`, packed `[S]`, `[N]`.
        logit_scale, logit_softcap: `z -> softcap * tanh(z * scale / softcap)`, then `/ temperature`.
        ref_logit_scale, ref_logit_softcap: the reference's; None: as the policy's.
        vocab_size: columns from here on are padding: they take no part and get zero gradient.
        normalizer: replaces the denominator of the aggregation: the tokens (sequences) of all micro-batches
            and ranks. Where gradients are averaged over ranks, as DDP and FSDP do, divided by the number of
            ranks.
        return_entropy: fill `entropy` and `metrics["entropy"]`.
        inplace: the gradient overwrites `logits`, at the latest in the backward. Autograd reports an
            operation that still needs the old values, as for any in-place operation; do not use them
            afterwards.
        backend: "triton", "torch", or "auto": triton on GPU tensors, torch elsewhere.

    Returns:
        LossOutput with `loss` (0-dim fp32, fp64 for fp64 logits), `metrics` (detached 0-dim tensors: means
        over the unmasked tokens of `log_ratio`, `ratio`, `clip_fraction`, `clip_fraction_low`,
        `clip_fraction_high`, `kl`, `kl_exact`, `entropy`, `active_fraction`, where they apply), and detached
        `[B, T]` or `[N]` tensors `logps`, `ref_logps`, `entropy` in nats, 0 at masked positions.

    Raises:
        ValueError: a wrong shape, dtype, device, enum value or a missing companion; TypeError: a wrong type.
            An unmasked id outside the vocabulary makes the loss NaN; with GRPO_KERNELS_DEBUG=1 it raises
            ValueError.
    """
    spec = _spec(spec)
    batch = Batch.of(logits, completion_ids, completion_mask, seq_lens, vocab_size)
    _check_reference(spec, ref_logits, ref_logps)
    if ref_logits is not None:
        padded = vocab_size is not None
        check_logits("ref_logits", ref_logits, like=logits, vocab_size=batch.vocab_size, padded=padded)
        ref_logits = batch.by_rows(ref_logits.detach())
    if inplace:
        batch.check_writable()
    config = RowConfig(
        LogitTransform(
            batch.vocab_size,
            logit_scale,
            logit_softcap,
            logit_scale if ref_logit_scale is None else ref_logit_scale,
            logit_softcap if ref_logit_softcap is None else ref_logit_softcap,
            1.0 if isinstance(temperature, Tensor) else temperature,
        ),
        choose_backend(backend, logits),
        entropy=return_entropy or bool(spec.entropy_coef),
        kl_forward=spec.exact_kl is not None and spec.exact_kl.kind == "exact_forward",
        kl_gradient=spec.exact_kl is not None,
        inplace=inplace,
    )
    row_weights = _row_weights(spec, batch, normalizer)
    inputs = TokenInputs(
        mask=batch.mask,
        advantages=batch.per_token("advantages", advantages, per_sequence=True),
        row_weights=row_weights,
        old_logps=batch.optional("old_logps", old_logps),
        ref_logps=batch.optional("ref_logps", ref_logps),
        token_weights=batch.optional("token_weights", token_weights, columns=True),
        entropy_weights=_entropy_weights(spec, batch, row_weights, normalizer),
    )
    tensors = (batch.logits, ref_logits, batch.targets, batch.temperatures(temperature))

    fused = inplace and _can_fuse(spec, logits)
    if not torch.compiler.is_compiling():
        path = "fused loss and gradient" if fused else "statistics, then gradient in the backward"
        log_once(f"{path}, {config.backend} backend, {logits.dtype}")
    if fused:
        loss, dlogp, stats = fused_loss(*tensors, inputs, spec, config)
        derivatives = objective.coefficients(spec, inputs, dlogp)
    else:
        live = row_statistics(*tensors, config)
        stats = live.detach()
        values, derivatives = objective.row_loss(spec, stats, inputs, batch.shape)
        loss = KnownGradient.apply(
            values.sum(), derivatives, live.logps, live.entropy, live.kl, live.kl_forward
        )

    reference = objective.reference_logps(stats, inputs)
    return LossOutput(
        loss,
        metrics(spec, stats, inputs, derivatives),
        batch.shaped(stats.logps),
        None if reference is None else batch.shaped(reference),
        None if stats.entropy is None else batch.shaped(stats.entropy),
    )


def log_ratio_loss(
    logits: Tensor,
    ref_logits: Tensor,
    completion_ids: Tensor,
    rewards: Tensor,
    *,
    aggregation: str = "token-mean",
    **options: Any,
) -> LossOutput:
    """`-aggregate(rewards * (logp - ref_logp))`: the reward-weighted log-ratio of policy and reference.

    Exactly `grpo_loss(logits, completion_ids, rewards, spec=LossSpec(LogRatio(), aggregation=aggregation),
    ref_logits=ref_logits, **options)`; see there for shapes, options, return value and errors. Its gradient
    is REINFORCE's: the reference is a constant in it. What does hold the policy near the reference:
    docs/math.md.
    """
    if "spec" in options:
        raise TypeError("log_ratio_loss has a fixed spec; use grpo_loss for another")
    spec = LossSpec(LogRatio(), aggregation=aggregation)
    return grpo_loss(logits, completion_ids, rewards, spec=spec, ref_logits=ref_logits, **options)


class GRPOLoss(nn.Module):
    """`grpo_loss` as a module: the spec and the options that stay the same are given once.

    ```python
    loss_fn = GRPOLoss("dapo", temperature=0.9)
    out = loss_fn(logits, completion_ids, advantages, completion_mask=mask, old_logps=old_logps)
    ```
    """

    def __init__(self, spec: LossSpec | str = "grpo", **options: Any) -> None:
        super().__init__()
        self.spec = _spec(spec)
        unknown = options.keys() - (grpo_loss.__kwdefaults__ or {}).keys()
        if unknown:
            raise TypeError(f"GRPOLoss has no option {', '.join(sorted(unknown))}")
        self.options = options

    def forward(
        self, logits: Tensor, completion_ids: Tensor, advantages: Tensor, **options: Any
    ) -> LossOutput:
        """As `grpo_loss`; options given here win over the module's."""
        return grpo_loss(logits, completion_ids, advantages, **{"spec": self.spec, **self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.spec), *(f"{key}={value!r}" for key, value in self.options.items())])


def selective_logps(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the taken tokens, differentiable; with `return_entropy`, the entropies too.

    Args:
        logits: `[B, T, V]` or `[N, V]`, as in `grpo_loss`, as are the options.
        ids: `[B, T]` or `[N]`, int32 or int64.
        mask: `[B, T]` or `[N]`; where 0 the row is not read: log-probability, entropy and gradient are 0.

    Returns:
        `[B, T]` or `[N]` fp32 (fp64 for fp64 logits) in nats, or a pair of such. A row whose upstream
        gradient is exactly zero costs nothing in the backward but its zeros.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    batch = Batch.of(logits, ids, mask, None, vocab_size, ids_name="ids", mask_name="mask")
    scalar = 1.0 if isinstance(temperature, Tensor) else temperature
    transform = LogitTransform(batch.vocab_size, logit_scale, logit_softcap, temperature=scalar)
    config = RowConfig(transform, choose_backend(backend, logits), entropy=return_entropy)
    stats = row_statistics(batch.logits, None, batch.targets, batch.temperatures(temperature), config)
    if stats.entropy is not None:
        return batch.shaped(stats.logps), batch.shaped(stats.entropy)
    return batch.shaped(stats.logps)


def _spec(spec: LossSpec | str) -> LossSpec:
    if isinstance(spec, str):
        check_choice("spec", spec, tuple(PRESETS))
        return PRESETS[spec]
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec must be a LossSpec or the name of a preset, got {spec!r}")
    return spec


def _check_reference(spec: LossSpec, ref_logits: Tensor | None, ref_logps: Tensor | None) -> None:
    if ref_logits is not None and ref_logps is not None:
        raise ValueError("ref_logits and ref_logps are both given: give one")
    if spec.exact_kl is not None and ref_logits is None:
        raise ValueError(f"KL({spec.exact_kl.kind!r}) runs over the vocabulary: it needs ref_logits")
    if ref_logits is None and ref_logps is None:
        if isinstance(spec.surrogate, Surrogate) and spec.surrogate.anchor == "ref":
            raise ValueError(f"{spec.surrogate} needs a reference: give ref_logits or ref_logps")
        if spec.sampled_kl is not None:
            raise ValueError(f"{spec.sampled_kl} needs a reference: give ref_logits or ref_logps")


def _row_weights(spec: LossSpec, batch: Batch, normalizer: float | Tensor | None) -> Tensor:
    """The aggregation as a weight per row; raises ValueError where it lacks what it needs."""
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a float or a 0-dim tensor, got shape {tuple(normalizer.shape)}"
            )
        normalizer = normalizer.detach().to(batch.logits.device)
    elif normalizer is not None:
        check_number("normalizer", normalizer, low=0.0)
    if spec.aggregation == "seq-mean-token-mean" or (
        spec.aggregation.startswith("seq-") and normalizer is None
    ):
        batch.require_sequences(f"aggregation {spec.aggregation!r}")
    if spec.aggregation == "seq-mean-token-sum-norm" and spec.max_tokens is None and batch.packed:
        raise ValueError(f"aggregation {spec.aggregation!r} on a packed batch needs LossSpec(max_tokens=...)")
    return aggregation_weights(
        spec, batch.shaped(batch.mask), batch.sequence_ids, batch.num_sequences, normalizer, batch.dtype
    )


def _entropy_weights(
    spec: LossSpec, batch: Batch, row_weights: Tensor, normalizer: float | Tensor | None
) -> Tensor | None:
    """The bonus is a mean over the unmasked tokens; a normalizer makes it aggregate as the loss does."""
    if not spec.entropy_coef:
        return None
    if normalizer is None:
        row_weights = safe_divide(batch.mask.to(batch.dtype), batch.mask.sum())
    return -spec.entropy_coef * row_weights


def _can_fuse(spec: LossSpec, logits: Tensor) -> bool:
    """Whether loss and gradient may be made in the forward, over the logits.

    Not for fp16, whose gradients underflow before a GradScaler's factor reaches them in the backward; nor for
    fp64, which is for gradcheck. torch.compile takes the two steps as well: they are the operators it knows.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and not spec.uses_callable
        and logits.dtype in (torch.bfloat16, torch.float32)
        and not torch.compiler.is_compiling()
    )
