"""slime's `policy_loss_function` and ours, from packed logits: values, gradients and metrics, in fp32.

The real functions are used if slime is installed, with a stand-in for Megatron's `mpu` on one rank. The
stand-ins have the formulas of slime 0.3.1 (commit 624b824), `slime/backends/megatron_utils/loss.py`, lines
935 to 1192, and of `cp_utils.py`, lines 50 to 124.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers import Trainer, gradient, trainer
from torch import Tensor

from grpo_kernels import LossSpec, policy_loss

V = 11
PROMPTS, RESPONSES = [2, 3, 1], [5, 2, 4]
TOTALS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
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


def policy_loss_function(args: Any, batch: Any, logits: Tensor, total: Callable[[Tensor], Tensor]) -> Any:
    lengths = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    _, found = get_log_probs_and_entropy(logits, args=args, **lengths)
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
    else:
        loss = torch.maximum(-ratio * advantages, -bounded * advantages)
        if args.eps_clip_c is not None:
            loss = torch.where(advantages < 0, torch.min(loss, -args.eps_clip_c * advantages), loss)
    terms = {"pg_loss": total(loss), "entropy_loss": total(torch.cat(found["entropy"]))}
    terms["ppo_kl"] = total(-log_ratio)
    value = terms["pg_loss"] - args.entropy_coef * terms["entropy_loss"]
    if args.use_kl_loss:
        plain = torch.exp(logp - torch.cat(old)) if args.use_unbiased_kl else None
        kl = compute_approx_kl(logp, torch.cat(batch["ref_log_probs"]), args.kl_loss_type, plain)
        terms["kl_loss"] = total(kl)
        value = value + args.kl_loss_coef * terms["kl_loss"]
    return value, {name: x.detach() for name, x in terms.items()} | {"loss": value.detach()}


@pytest.fixture(scope="module")
def slime() -> Iterator[Trainer]:
    functions = {
        "mpu": MPU,
        "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
        "get_log_probs_and_entropy": get_log_probs_and_entropy,
        "get_sum_of_sample_mean": get_sum_of_sample_mean,
        "compute_approx_kl": compute_approx_kl,
        "policy_loss_function": policy_loss_function,
    }
    module = "slime.backends.megatron_utils.loss"
    needs = {"megatron": {}, "megatron.core": {"mpu": MPU}}
    with trainer(module, "slime", {module: functions}, version="0.3.1", needs=needs) as found:
        yield found


def arguments(**options: Any) -> Namespace:
    return Namespace(
        **{
            "advantage_estimator": "grpo",
            "eps_clip": 0.2,
            "eps_clip_high": 0.28,
            "eps_clip_c": None,
            "entropy_coef": 0.0,
            "use_kl_loss": False,
            "use_unbiased_kl": False,
            "kl_loss_type": "low_var_kl",
            "kl_loss_coef": 0.1,
            "use_rollout_logprobs": False,
            "use_opsm": False,
            "use_tis": False,
            "get_mismatch_metrics": False,
            "rollout_temperature": 0.9,
            "rollout_top_p": 1.0,
            "log_probs_chunk_size": -1,
            "allgather_cp": False,
            "calculate_per_token_loss": False,
            **options,
        }
    )


def micro_batch() -> tuple[Tensor, dict[str, Any]]:
    """Logits `[1, N, V]` of three packed samples, the first two of one rollout, and slime's batch."""
    torch.manual_seed(0)
    logits = torch.randn(1, sum(TOTALS), V)
    tokens = [torch.randint(0, V, (total,)) for total in TOTALS]
    masks = [torch.ones(length) for length in RESPONSES]
    masks[0][2] = 0

    def near(scale: float) -> list[Tensor]:
        lengths = {"unconcat_tokens": tokens, "total_lengths": TOTALS, "response_lengths": RESPONSES}
        _, found = get_log_probs_and_entropy(logits, args=arguments(), **lengths)
        return [x + scale * torch.randn_like(x) for x in found["log_probs"]]

    return logits, {
        "unconcat_tokens": tokens,
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        "rollout_mask_sums": [torch.tensor(6.0), torch.tensor(6.0), torch.tensor(4.0)],
        "advantages": [torch.randn(length) for length in RESPONSES],
        "log_probs": near(0.4),
        "rollout_log_probs": near(0.4),
        "ref_log_probs": near(0.5),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dual clip": {"eps_clip_c": 1.5},
    "cispo": {"advantage_estimator": "cispo"},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05, "eps_clip_high": 0.06},
    "to the sampler": {"use_rollout_logprobs": True},
    "KL and entropy": {"use_kl_loss": True, "entropy_coef": 0.05},
    "unbiased KL": {"use_kl_loss": True, "use_unbiased_kl": True, "kl_loss_type": "k3"},
    "per token": {"calculate_per_token_loss": True, "eps_clip_c": 1.5},
}


def reducer(slime: Trainer, args: Namespace, batch: dict[str, Any]) -> Any:
    return slime.theirs.get_sum_of_sample_mean(
        batch["total_lengths"],
        batch["response_lengths"],
        batch["loss_masks"],
        batch["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_its_own_losses(slime: Trainer, name: str) -> None:
    """Loss, gradient of the logits and metrics are those of slime. Its arithmetic is fp32, as ours."""
    logits, batch = micro_batch()
    args = arguments(**OPTIONS[name])
    found = []
    for function in (slime.theirs.policy_loss_function, slime.ours.policy_loss_function):
        leaf = logits.clone().requires_grad_()
        loss, metrics = function(args, batch, leaf, reducer(slime, args, batch))
        assert not any(x.requires_grad for x in metrics.values())
        found.append((loss, gradient(loss, leaf), metrics))
    (loss, grad, metrics), (own_loss, own_grad, own_metrics) = found
    torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_grad, grad, rtol=1e-5, atol=1e-6)
    for key in own_metrics:
        if key != "ppo_kl" or name != "gspo":  # slime's is weighted by the sequence's mean there
            torch.testing.assert_close(own_metrics[key], metrics[key], rtol=1e-5, atol=1e-6)


def test_on_policy(slime: Trainer) -> None:
    """Without old log-probabilities, the ratio is 1."""
    logits, batch = micro_batch()
    del batch["log_probs"]
    batch["log_probs"] = None
    args = arguments()
    for function in (slime.theirs.policy_loss_function, slime.ours.policy_loss_function):
        loss, metrics = function(args, batch, logits.requires_grad_(), reducer(slime, args, batch))
        assert metrics["ppo_kl"] == 0
        batch.setdefault("found", loss)
    torch.testing.assert_close(loss, batch["found"])


def test_another_surrogate(slime: Trainer) -> None:
    """`args.grpo_kernels` chooses a preset, whose bounds are slime's or its own options."""
    logits, batch = micro_batch()
    for options, spec in [
        ({"preset": "sapo", "tau_pos": 1.3}, LossSpec.preset("sapo", tau_pos=1.3)),
        (
            {"preset": "gspo_token", "eps_low": 0.01},
            LossSpec.preset("gspo_token", eps_low=0.01, eps_high=0.28),
        ),
        ({"preset": "log_ratio"}, LossSpec.preset("log_ratio")),
    ]:
        args = arguments(grpo_kernels=options, calculate_per_token_loss=True)
        leaf, same = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, _ = slime.ours.policy_loss_function(args, batch, leaf, reducer(slime, args, batch))
        lengths = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
        _, found = get_log_probs_and_entropy(same, args=args, **lengths)
        expected = policy_loss(
            torch.cat(found["log_probs"]),
            torch.cat(batch["advantages"]),
            spec=LossSpec(spec.surrogate, level=spec.level, aggregation="token-sum"),
            completion_mask=torch.cat(batch["loss_masks"]),
            seq_lens=torch.tensor(RESPONSES),
            old_logps=torch.cat(batch["log_probs"]),
            ref_logps=torch.cat(batch["ref_log_probs"]),
        ).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient(loss, leaf), gradient(expected, same), rtol=1e-5, atol=1e-6)


def test_in_a_checkpoint(slime: Trainer) -> None:
    """`--recompute-loss-function` calls the loss inside a checkpoint."""
    logits, batch = micro_batch()
    args, grads = arguments(), []
    for checkpointed in (False, True):
        leaf = logits.clone().requires_grad_()
        given = slime.ours.policy_loss_function, args, batch, leaf, reducer(slime, args, batch)
        if checkpointed:
            loss, _ = torch.utils.checkpoint.checkpoint(*given, use_reentrant=False)
        else:
            loss, _ = given[0](*given[1:])
        grads.append(gradient(loss, leaf))
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_tis": True}, "does not support these options of slime: use_tis"),
        ({"use_opsm": True, "get_mismatch_metrics": True}, "get_mismatch_metrics, use_opsm"),
        ({"grpo_kernels": {"preset": "gppo"}}, "preset must be one of"),
        ({"grpo_kernels": {"temperature": 2}}, "has no option temperature"),
        ({"grpo_kernels": {"entropy_coef": 0.1}}, "no KL and no entropy bonus"),
    ],
)
def test_what_is_refused(slime: Trainer, options: dict[str, Any], message: str) -> None:
    """An option that would do nothing raises."""
    logits, batch = micro_batch()
    with pytest.raises(ValueError, match=message):
        slime.ours.policy_loss_function(arguments(**options), batch, logits, lambda x: x.sum())


def test_context_parallelism(slime: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with a part of each sequence cannot compute a ratio of the sequence."""
    logits, batch = micro_batch()
    monkeypatch.setattr(slime.theirs.mpu, "get_context_parallel_world_size", lambda: 2)
    args = arguments(advantage_estimator="gspo")
    with pytest.raises(ValueError, match="context parallelism splits the sequences"):
        slime.ours.policy_loss_function(args, batch, logits, lambda x: x.sum())
