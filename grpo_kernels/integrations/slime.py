"""slime 0.3: `policy_loss_function`, for its `--custom-loss-function-path`."""

from __future__ import annotations

from typing import Any

import torch
from slime.backends.megatron_utils import loss as theirs
from torch import Tensor

from ..spec import LossSpec
from .shared import surrogate_spec, token_weights_of, weighted_loss, with_bounds

UNSUPPORTED = ("use_tis", "get_mismatch_metrics", "use_opsm", "custom_pg_loss_reducer_function_path")


def policy_loss_function(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """Compute slime's policy loss and its metrics, with a surrogate of this package.

    Log-probabilities, aggregation, KL and entropy bonus are slime's. `args.grpo_kernels`, a mapping in the
    file of `--custom-config-path`, has `preset` and options of `LossSpec.preset`; without it, the loss is
    that of `advantage_estimator`. Raises ValueError for options of slime that are not supported.
    """
    spec = spec_of_args(args)
    if spec.couples_tokens and theirs.mpu.get_context_parallel_world_size() > 1:
        raise ValueError(f"context parallelism splits the sequences, and {spec} needs whole ones")
    part = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    part |= theirs.get_rollout_top_p_logprob_kwargs(args, batch)
    _, own = theirs.get_log_probs_and_entropy(logits, args=args, with_entropy=True, **part)
    logps, entropy = torch.cat(own["log_probs"]), sum_of_sample_mean(torch.cat(own["entropy"]))
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(old) if old else logps.detach()
    ref = torch.cat(batch["ref_log_probs"]) if batch.get("ref_log_probs") else None
    weights = token_weights_of(sum_of_sample_mean, logps)
    options = {"completion_mask": weights != 0, "old_logps": old, "ref_logps": ref}
    if spec.couples_tokens:
        options["seq_lens"] = torch.tensor(batch["response_lengths"], device=logps.device)
    pg_loss = weighted_loss(spec, logps, torch.cat(batch["advantages"]), weights, **options).loss
    # Without tokens on this rank, the backward still has to reach the logits.
    loss = pg_loss - args.entropy_coef * entropy + (0 if logps.numel() else 0 * logits.sum())
    found = {"pg_loss": pg_loss, "entropy_loss": entropy, "ppo_kl": sum_of_sample_mean(old - logps)}
    if args.use_kl_loss:
        ratio = torch.exp(logps - old) if args.use_unbiased_kl else None
        kl = theirs.compute_approx_kl(logps, ref, kl_loss_type=args.kl_loss_type, importance_ratio=ratio)
        found["kl_loss"] = sum_of_sample_mean(kl)
        loss = loss + args.kl_loss_coef * found["kl_loss"]
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **found}.items()}


def spec_of_args(args: Any) -> LossSpec:
    if found := [name for name in UNSUPPORTED if getattr(args, name, None)]:
        raise ValueError(f"grpo_kernels does not support these options of slime: {', '.join(found)}")
    options = {"max_tokens": 1, **(getattr(args, "grpo_kernels", None) or {})}
    known = {"gspo": "gspo", "cispo": "cispo"}
    preset = options.pop("preset", known.get(args.advantage_estimator, "grpo"))
    spec = surrogate_spec("slime", LossSpec.preset(preset, **options), "any", reference=True)
    low, high = args.eps_clip, args.eps_clip_high
    bounds = {"eps_low": low, "eps_high": high, "dual_clip": args.eps_clip_c}
    bounds |= {"ratio_min": max(0.0, 1 - low), "ratio_max": 1 + high}
    return with_bounds(spec, **{name: bounds[name] for name in bounds if name not in options})
