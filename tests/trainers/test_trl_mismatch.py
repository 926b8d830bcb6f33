"""`importance_weights` and `off_policy_sequence_mask` equal what TRL's own trainer computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import V

from grpo_kernels import importance_weights, mismatch_metrics
from grpo_kernels.weights import off_policy_sequence_mask

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

B, T = 6, 5
LENGTHS = torch.tensor([5, 3, 1, 4, 5, 2])
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Sampled:
    """Completions with the log-probabilities of trainer and sampler. vLLM returned none for two tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.arange(T) < LENGTHS[:, None]
        log_ratio = 0.5 * torch.randn(B, T, generator=generator)
        self.logps = (-3 * torch.rand(B, T, generator=generator)).masked_fill(~mask, 0)
        self.sampler_logps = (self.logps - log_ratio).masked_fill(~mask, 0)
        self.sampler_logps[0, 1] = self.sampler_logps[4, 4] = torch.nan
        self.tool_mask = torch.ones(B, T, dtype=torch.long)
        self.tool_mask[3, 1] = 0
        self.tool_mask[1] = 0  # a sequence without a token
        self.ids = torch.randint(2, V, (B, T), generator=generator)
        self.mask = mask * self.tool_mask

    def lists(self, x: Tensor) -> list[list[Any]]:
        """One list per completion, without padding. vLLM's NaN is None."""
        rows = [row[:length].tolist() for row, length in zip(x, LENGTHS.tolist(), strict=True)]
        return [[None if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows]


@pytest.fixture
def from_vllm(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of TRL's options that runs the trainer's own step from completions to its batch.

    Generation, the model's log-probabilities and rewards are given.
    """
    sampled = Sampled()
    completions = (
        [[2, 3]] * B,
        sampled.lists(sampled.ids),
        sampled.lists(sampled.tool_mask),
        ["2"] * B,
        sampled.lists(sampled.sampler_logps),
        {},
        None,
        None,
    )
    given = {
        "_generate": lambda prompts: completions,
        "_get_per_token_logps_and_entropies": lambda *args, **options: (sampled.logps, None, None),
        "_calculate_rewards": lambda *args: torch.zeros(B, 1),
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
    }
    for name, value in given.items():
        monkeypatch.setattr(trainer, name, value)

    def run(**options: Any) -> dict[str, Tensor]:
        for name, value in options.items():
            assert hasattr(trainer, name)
            monkeypatch.setattr(trainer, name, value)
        return trainer._generate_and_score_completions([{"prompt": "1 2"}] * B)

    return run


@pytest.mark.parametrize("low, high", [(None, 3.0), (None, 1.2), (0.8, 1.2), (0.7, None)])
@pytest.mark.parametrize("mode", MODES)
def test_importance_sampling_modes(from_vllm: Any, mode: str, low: float | None, high: float | None) -> None:
    """TRL's modes are `f"{level}_{mode}"`, also with tool tokens, missing values and an empty sequence."""
    options = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    batch = from_vllm(**options)
    sampled = Sampled()
    torch.testing.assert_close(batch["sampling_per_token_logps"], sampled.sampler_logps, equal_nan=True)
    level, how = mode.split("_")
    got = importance_weights(
        batch["old_per_token_logps"],
        batch["sampling_per_token_logps"],
        batch["completion_mask"] * batch["tool_mask"],
        level=level,
        mode=how,
        low=low,
        high=high,
    )
    # Sums of a few fp32 numbers, here in fp64.
    torch.testing.assert_close(got, batch["importance_sampling_ratio"], rtol=1e-5, atol=0)


def test_largest_difference(from_vllm: Any, trainer: Any) -> None:
    batch = from_vllm()
    mask = batch["completion_mask"] * batch["tool_mask"]
    got = mismatch_metrics(batch["old_per_token_logps"], batch["sampling_per_token_logps"], mask)
    mode = "train" if trainer.model.training else "eval"
    logged = trainer._metrics[mode]["sampling/sampling_logp_difference/max"][-1]
    assert float(got["abs_max"]) == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("per_token", [False, True])
def test_off_policy_mask(trainer: Any, threshold: float, per_token: bool) -> None:
    sampled = Sampled()
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(B, T if per_token else 1, generator=generator)
    want = trainer.get_off_policy_mask(
        advantages, sampled.logps, sampled.sampler_logps, sampled.mask, threshold
    )
    got = off_policy_sequence_mask(
        advantages, sampled.logps, sampled.sampler_logps, sampled.mask, threshold=threshold
    )
    assert torch.equal(got * sampled.mask, (want * sampled.mask).float())
    flat = [x.reshape(-1) for x in (sampled.logps, sampled.sampler_logps, sampled.mask)]
    seq_lens = torch.full((B,), T)
    packed = off_policy_sequence_mask(advantages.view(-1), *flat, threshold=threshold, seq_lens=seq_lens)
    assert torch.equal(packed.view(B, T) * sampled.mask, got * sampled.mask)
