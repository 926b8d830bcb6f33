"""slime 0.3: `policy_loss_function`, for its `--custom-loss-function-path`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from slime.backends.megatron_utils import loss as theirs
from torch import Tensor

from ..spec import LossSpec
from ..spec.surrogates import CISPO
from ..tokens.batch import Batch
from ..tokens.metrics import clipped_tokens, ratios
from .shared import surrogate_spec, token_weights_of, weighted_loss, with_bounds

UNSUPPORTED = ("use_tis", "get_mismatch_metrics", "use_opsm", "custom_pg_loss_reducer_function_path")


def policy_loss_function(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """Compute slime's policy loss and its metrics, with a surrogate of this package.

    Log-probabilities, aggregation, KL and entropy bonus are slime's. `args.grpo_kernels`, a mapping in the
    file of `--custom-config-path`, has `preset` and options of `LossSpec.preset`; without it, the loss is
    that of `advantage_estimator`. Raises ValueError for options of slime that are not supported, and for
    `use_rollout_logprobs` without these log-probabilities.
    """
    spec = spec_of_args(args)
    if spec.couples_tokens and theirs.mpu.get_context_parallel_world_size() > 1:
        raise ValueError(f"context parallelism splits the sequences, and {spec} needs whole ones")
    part = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    part |= theirs.get_rollout_top_p_logprob_kwargs(args, batch)
    _, own = theirs.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **part)
    if getattr(args, "save_debug_train_data", None) is not None:
        theirs._maybe_capture_log_probs(batch, own["log_probs"])
    logps, entropy = torch.cat(own["log_probs"]), sum_of_sample_mean(torch.cat(own["entropy"]))
    sampler: Any = torch.cat(batch["rollout_log_probs"]) if batch.get("rollout_log_probs") else None
    if args.use_rollout_logprobs and sampler is None:
        raise ValueError("use_rollout_logprobs is set, but the batch has no rollout_log_probs")
    if args.use_rollout_logprobs:
        old = sampler
    else:
        old = torch.cat(batch["log_probs"]) if batch.get("log_probs") else logps.detach()
    ref = torch.cat(batch["ref_log_probs"]) if batch.get("ref_log_probs") else None
    weights = token_weights_of(sum_of_sample_mean, logps)
    options: dict[str, Any] = {"completion_mask": weights != 0, "old_logps": old, "ref_logps": ref}
    if spec.couples_tokens:
        options["seq_lens"] = torch.tensor(batch["response_lengths"], device=logps.device)
    advantages = torch.cat(batch["advantages"])
    pg_loss = weighted_loss(spec, logps, advantages, weights, **options).loss
    # Without tokens on this rank, the backward still has to reach the logits.
    loss = pg_loss - args.entropy_coef * entropy + (0 if logps.numel() else 0 * logits.sum())
    found = {"pg_loss": pg_loss, "entropy_loss": entropy, "ppo_kl": sum_of_sample_mean(old - logps)}
    if (clipped := clipped_of(spec, logps.detach(), advantages, **options)) is not None:
        found["pg_clipfrac"] = sum_of_sample_mean(clipped.to(logps.dtype))
    if sampler is not None:
        trained = logps if args.use_rollout_logprobs else old
        found["train_rollout_logprob_abs_diff"] = sum_of_sample_mean((trained - sampler).abs())
    if args.use_kl_loss:
        ratio = torch.exp(logps - old) if args.use_unbiased_kl else None
        kl = theirs.compute_approx_kl(logps, ref, kl_loss_type=args.kl_loss_type, importance_ratio=ratio)
        found["kl_loss"] = sum_of_sample_mean(kl)
        loss = loss + args.kl_loss_coef * found["kl_loss"]
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **found}.items()}


def clipped_of(
    spec: LossSpec,
    logps: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor,
    old_logps: Tensor,
    seq_lens: Tensor | None = None,
    ref_logps: Tensor | None = None,
) -> Tensor | None:
    """Return which tokens `pg_clipfrac` counts, `[N]` bool, or None if the surrogate has no such rule.

    They are those of `clip_fraction`. For CISPO they are all whose ratio is outside the bounds, as in slime.
    """
    surrogate: Any = spec.surrogate
    if surrogate.clip is None:
        return None
    sequences = Batch.of(logps[:, None], completion_mask, seq_lens, name="logps").sequences
    log_ratio, ratio = ratios(spec, logps, old_logps, sequences)
    if isinstance(surrogate, CISPO):
        return ratio != ratio.clamp(surrogate.ratio_min, surrogate.ratio_max)
    return clipped_tokens(surrogate, surrogate.clip, logps, log_ratio, ratio, advantages)["clip_fraction"]


def spec_of_args(args: Any) -> LossSpec:
    if found := [name for name in UNSUPPORTED if getattr(args, name, None)]:
        raise ValueError(f"grpo_kernels does not support these options of slime: {', '.join(found)}")
    given = getattr(args, "grpo_kernels", None) or {}
    if not isinstance(given, Mapping):
        raise TypeError(f"grpo_kernels must be a mapping, such as {{preset: sapo}}, got {given!r}")
    options = {"max_tokens": 1, **given}
    known = {"gspo": "gspo", "cispo": "cispo"}
    mean: Any = "token-mean" if args.calculate_per_token_loss else "seq-mean-token-mean"
    if not options.keys() & {"preset", "aggregation"}:  # then there is nothing to warn of
        mean = "any"
    preset = options.pop("preset", known.get(args.advantage_estimator, "grpo"))
    spec = surrogate_spec("slime", LossSpec.preset(preset, **options), mean, reference=True)
    low, high = args.eps_clip, args.eps_clip_high
    bounds = {"eps_low": low, "eps_high": high, "dual_clip": args.eps_clip_c}
    bounds |= {"ratio_min": max(0.0, 1 - low), "ratio_max": 1 + high}
    return with_bounds(spec, **{name: bounds[name] for name in bounds if name not in options})
