"""slime's `policy_loss_function` and ours, from packed logits: values, gradients and metrics, in fp32.

The real functions are used if slime is installed, with a stand-in for Megatron's `mpu` on one rank, elsewhere
those of `slime_stand_ins.py`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from other_trainers import Trainer, gradient, trainer
from slime_stand_ins import LOSS, MPU, get_log_probs_and_entropy
from torch import Tensor

from grpo_kernels import LossSpec, policy_loss
from grpo_kernels.log import warn_once

V = 11
PROMPTS, RESPONSES = [2, 3, 1], [5, 2, 4]
TOTALS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.fixture(scope="module")
def slime() -> Iterator[Trainer]:
    module = "slime.backends.megatron_utils.loss"
    needs = {"megatron": {}, "megatron.core": {"mpu": MPU}}
    with trainer(module, "slime", {module: LOSS}, version="0.3.1", needs=needs) as found:
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
        "log_probs": near(0.6),
        "rollout_log_probs": near(0.6),
        "ref_log_probs": near(0.5),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dual clip": {"eps_clip_c": 1.1},
    "cispo": {"advantage_estimator": "cispo"},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.15, "eps_clip_high": 0.2},
    "to the sampler": {"use_rollout_logprobs": True},
    "KL and entropy": {"use_kl_loss": True, "entropy_coef": 0.05},
    "unbiased KL": {"use_kl_loss": True, "use_unbiased_kl": True, "kl_loss_type": "k3"},
    "per token": {"calculate_per_token_loss": True, "eps_clip_c": 1.1},
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
    assert {"pg_clipfrac", "train_rollout_logprob_abs_diff"} <= own_metrics.keys()
    assert metrics["pg_clipfrac"] > 0
    torch.testing.assert_close(own_metrics, metrics, rtol=1e-5, atol=1e-6)


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


def test_what_the_sampler_did_not_return(slime: Trainer) -> None:
    """Without the sampler's log-probabilities there is no metric of them, and no loss relative to them."""
    logits, batch = micro_batch()
    batch["rollout_log_probs"] = None
    args = arguments()
    for function in (slime.theirs.policy_loss_function, slime.ours.policy_loss_function):
        _, metrics = function(args, batch, logits, reducer(slime, args, batch))
        assert "train_rollout_logprob_abs_diff" not in metrics
    with pytest.raises(ValueError, match="the batch has no rollout_log_probs"):
        args = arguments(use_rollout_logprobs=True)
        slime.ours.policy_loss_function(args, batch, logits, reducer(slime, args, batch))


@pytest.mark.parametrize("preset", ["log_ratio", "opmd"])
def test_no_reference(slime: Trainer, preset: str) -> None:
    """slime does not compute the reference without a KL, and a loss relative to it raises."""
    logits, batch = micro_batch()
    batch["ref_log_probs"] = None
    args = arguments(grpo_kernels={"preset": preset})
    with pytest.raises(ValueError, match="needs a reference"):
        slime.ours.policy_loss_function(args, batch, logits, reducer(slime, args, batch))


def test_debug_dump(slime: Trainer) -> None:
    """`--save-debug-train-data` gets the log-probabilities that the loss computes."""
    logits, batch = micro_batch()
    batch["partition"] = [4, 0, 7]
    args = arguments(use_rollout_logprobs=True, save_debug_train_data="{rollout_id}.pt")
    found = []
    for function in (slime.theirs.policy_loss_function, slime.ours.policy_loss_function):
        slime.theirs.enable_log_prob_capture()
        function(args, batch, logits, reducer(slime, args, batch))
        found.append(slime.theirs.drain_captured_log_probs())
    assert found[0].keys() == {4, 0, 7}
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_another_aggregation(slime: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    """A warning says if slime's aggregation is not that of the file."""
    for options, per_token, warns in [
        (None, True, False),
        ({"preset": "gspo"}, False, False),
        ({"preset": "gspo"}, True, True),
        ({"aggregation": "seq-mean-token-sum"}, False, True),
    ]:
        warn_once.cache_clear()
        caplog.clear()
        args = arguments(grpo_kernels=options, calculate_per_token_loss=per_token)
        assert slime.ours.spec_of_args(args).aggregation == "token-sum"
        assert ("slime's own aggregation decides" in caplog.text) == warns


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


def test_a_preset_without_its_key(slime: Trainer) -> None:
    logits, batch = micro_batch()
    with pytest.raises(TypeError, match="grpo_kernels must be a mapping"):
        slime.ours.policy_loss_function(arguments(grpo_kernels="sapo"), batch, logits, lambda x: x.sum())


def test_context_parallelism(slime: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with a part of each sequence cannot compute a ratio of the sequence."""
    logits, batch = micro_batch()
    monkeypatch.setattr(slime.theirs.mpu, "get_context_parallel_world_size", lambda: 2)
    args = arguments(advantage_estimator="gspo")
    with pytest.raises(ValueError, match="context parallelism splits the sequences"):
        slime.ours.policy_loss_function(args, batch, logits, lambda x: x.sum())
