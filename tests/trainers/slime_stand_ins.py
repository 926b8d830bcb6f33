"""What stands in for slime where it is not installed, and for Megatron's `mpu` everywhere.

The formulas are those of slime 0.3.1 (commit 624b824), `slime/backends/megatron_utils/loss.py`, lines 38 to
80 and 934 to 1173, and of `cp_utils.py`, lines 47 to 124.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

captured: list[dict[int, Tensor]] = []
MPU = SimpleNamespace(
    get_context_parallel_world_size=lambda: 1,
    get_context_parallel_rank=lambda: 0,
    get_context_parallel_group=lambda: None,
    get_tensor_model_parallel_group=lambda: None,
    get_tensor_model_parallel_rank=lambda: 0,
)


def get_log_probs_and_entropy(
    logits: Tensor, *, args: Any, unconcat_tokens: Any, total_lengths: Any, response_lengths: Any, **_: Any
) -> Any:
    """Slice each response's rows, one to the left of its tokens."""
    found: dict[str, list[Tensor]] = {"log_probs": [], "entropy": []}
    end = 0
    for tokens, total, length in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        end += total
        rows = torch.log_softmax(logits[0, end - length - 1 : end - 1] / args.rollout_temperature, -1)
        found["log_probs"].append(rows.gather(-1, tokens[-length:, None])[:, 0])
        found["entropy"].append(-(rows.exp() * rows).sum(-1))
    return None, found


def get_sum_of_sample_mean(
    total_lengths: Any, response_lengths: Any, loss_masks: Any, counts: Any, per_token: bool = False
) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        parts = zip(x.split(response_lengths), loss_masks, counts, strict=True)
        return torch.stack([(y * mask).sum() / (1 if per_token else count) for y, mask, count in parts]).sum()

    return total


def compute_approx_kl(logp: Tensor, ref: Tensor, kl_loss_type: str, importance_ratio: Any = None) -> Tensor:
    x = ref - logp
    kl = {"k1": -x, "k2": x * x / 2}.get(kl_loss_type, x.exp() - 1 - x)
    kl = kl if importance_ratio is None else importance_ratio * kl
    return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl


def enable_log_prob_capture() -> None:
    captured.append({})


def drain_captured_log_probs() -> dict[int, Tensor]:
    return captured.pop()


def _maybe_capture_log_probs(batch: Any, log_probs: list[Tensor]) -> None:
    if captured and batch.get("partition"):
        captured[-1].update(zip(batch["partition"], [x.detach().clone() for x in log_probs], strict=True))


def policy_loss_function(args: Any, batch: Any, logits: Tensor, total: Callable[[Tensor], Tensor]) -> Any:
    lengths = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    _, found = get_log_probs_and_entropy(logits, args=args, **lengths)
    _maybe_capture_log_probs(batch, found["log_probs"])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch["log_probs"]
    old = old or [x.detach() for x in found["log_probs"]]
    change = [a - b for a, b in zip(found["log_probs"], old, strict=True)]
    logp = torch.cat(found["log_probs"])
    if args.advantage_estimator == "gspo":
        pairs = zip(change, batch["loss_masks"], strict=True)
        change = [((x * mask).sum() / mask.sum()).expand_as(x) for x, mask in pairs]
    log_ratio, advantages = torch.cat(change), torch.cat(batch["advantages"])
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    if args.advantage_estimator == "cispo":
        loss = -bounded.detach() * advantages * logp
        clipped = bounded != ratio
    else:
        loss = torch.maximum(-ratio * advantages, -bounded * advantages)
        clipped = -bounded * advantages > -ratio * advantages
        if args.eps_clip_c is not None:
            loss = torch.where(advantages < 0, torch.min(loss, -args.eps_clip_c * advantages), loss)
    terms = {"pg_loss": total(loss), "entropy_loss": total(torch.cat(found["entropy"]))}
    terms |= {"ppo_kl": total(-log_ratio), "pg_clipfrac": total(clipped.float())}
    if batch["rollout_log_probs"]:
        trained = logp if args.use_rollout_logprobs else torch.cat(old)
        away = trained - torch.cat(batch["rollout_log_probs"])
        terms["train_rollout_logprob_abs_diff"] = total(away.abs())
    value = terms["pg_loss"] - args.entropy_coef * terms["entropy_loss"]
    if args.use_kl_loss:
        plain = torch.exp(logp - torch.cat(old)) if args.use_unbiased_kl else None
        kl = compute_approx_kl(logp, torch.cat(batch["ref_log_probs"]), args.kl_loss_type, plain)
        terms["kl_loss"] = total(kl)
        value = value + args.kl_loss_coef * terms["kl_loss"]
    return value, {name: x.detach() for name, x in terms.items()} | {"loss": value.detach()}


NAMES = (
    "get_log_probs_and_entropy",
    "get_sum_of_sample_mean",
    "compute_approx_kl",
    "enable_log_prob_capture",
    "drain_captured_log_probs",
    "_maybe_capture_log_probs",
    "policy_loss_function",
)
LOSS = {
    "mpu": MPU,
    "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
    **{name: globals()[name] for name in NAMES},
}
