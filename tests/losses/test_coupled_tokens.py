"""Losses that couple the tokens of a sequence: an infinity affects its own sequence and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hard_cases import INF, SUM, Options, assert_same_bits, random_case
from parity import SURROGATES, Case, run

from grpo_kernels import CISPO, DPPO, GMPO, KL, ImportanceRatio, LossSpec, PPOClip, grpo_loss
from grpo_kernels.tokens.sequences import sequences_within


class TestSequences:
    """If a loss couples tokens, an infinite token affects its own sequence only."""

    @staticmethod
    def two_sequences(spec: LossSpec, device: str, *, tail: int = 0) -> Case:
        """Return two sequences with `tail` masked tokens. The first token has an old probability of 0."""
        case = random_case(spec, 2, 3 + tail, 37, bare=True, device=device)
        mask = torch.arange(3 + tail, device=device).expand(2, -1) < 3
        old_logps = torch.full((2, 3 + tail), -3.0, device=device)
        old_logps[0, 0] = -INF
        return case.with_options(completion_mask=mask, old_logps=old_logps, ref_logps=old_logps.clamp(min=-4))

    @pytest.mark.parametrize(
        "surrogate", [GMPO(), PPOClip(), ImportanceRatio()], ids=["GMPO", "PPO", "ratio"]
    )
    @pytest.mark.parametrize("tail", [0, 2])
    def test_infinite_ratio(self, path: Options, device: str, surrogate: Any, tail: int) -> None:
        """Masked tokens of the sequence have gradient 0, not the NaN of 0 * inf."""
        level = "token" if isinstance(surrogate, GMPO) else "sequence"
        spec = LossSpec(surrogate, KL("k3", ratio_corrected=True), level, aggregation=SUM)
        case = self.two_sequences(spec, device, tail=tail)
        got = run(grpo_loss, case._replace(advantages=-torch.ones_like(case.advantages)), **path)
        assert got.out.loss == INF
        assert got.grad[1].isfinite().all() and got.grad[1, :3].any()
        assert not got.grad[:, 3:].any()

    def test_tokens_without_gradient(self, path: Options, device: str) -> None:
        """In GMPO, tokens without advantage or beyond the bound have gradient 0, not the NaN of inf * 0."""
        case = self.two_sequences(LossSpec(GMPO(), aggregation=SUM), device)
        advantages = torch.tensor([[0.0, -1.0, -1.0], [1.0, 1.0, 1.0]], device=device)
        old_logps = case.options["old_logps"].clone()
        old_logps[0, :2] = torch.tensor([-3.0, -INF])
        got = run(grpo_loss, case._replace(advantages=advantages).with_options(old_logps=old_logps), **path)
        assert not got.grad[0, 0].any() and got.grad[1].isfinite().all()

    @pytest.mark.parametrize("name", ["CISPO", "DRO", "DPPO(tv)", "DPPO(kl)", "DPPO(no cap)"])
    def test_impossible_token(self, path: Options, device: str, name: str) -> None:
        """A weight of 0 times a log-probability of -inf is not NaN."""
        case = random_case(LossSpec(SURROGATES[name]), 1, 2, 37, bare=True, device=device)
        case.logits[0, 0, case.completion_ids[0, 0]] = -INF
        advantages = torch.tensor([[0.0 if name == "DRO" else 1.0, 1.0]], device=device)
        old_logps = torch.full((1, 2), -3.0, device=device)
        if name == "CISPO":
            case = case._replace(spec=LossSpec(CISPO(ratio_max=5.0)))
        got = run(grpo_loss, case._replace(advantages=advantages).with_options(old_logps=old_logps), **path)
        assert not got.out.loss.isnan()

    @pytest.mark.parametrize("old_logp", [-INF, -200.0, 1e-7])
    def test_region_of_certain_and_impossible_tokens(
        self, path: Options, device: str, old_logp: float
    ) -> None:
        """The divergence is not NaN if the old probability is 0, or above 1 by rounding."""
        case = random_case(LossSpec(DPPO("kl", low=10.0, high=10.0)), 1, 1, 37, bare=True, device=device)
        case = case.with_options(old_logps=torch.full((1, 1), old_logp, device=device))
        for advantage in (1.0, -1.0):
            got = run(grpo_loss, case._replace(advantages=torch.full((1,), advantage, device=device)), **path)
            assert got.out.metrics["clip_fraction"] == 0 and got.grad.any()

    @pytest.mark.parametrize("lengths", [[2, 300], [3, -2, 4], [-1, 6], [0, 0], [5], []], ids=str)
    def test_unchecked_lengths(self, lengths: list[int]) -> None:
        """Sums over sequences stay within the batch even if lengths are wrong, which GPUs do not check."""
        held, ids = sequences_within(torch.tensor(lengths, dtype=torch.long), 5)
        assert (held >= 0).all() and held.sum() <= 5 and ids.shape == (5,) and (ids >= 0).all()
        assert len(lengths) == 0 or (ids < len(lengths)).all()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
    def test_lengths_of_any_dtype(self, path: Options, device: str, dtype: torch.dtype) -> None:
        case = random_case(LossSpec(PPOClip(), level="sequence"), 2, 3, 37, bare=True, device=device)
        case = case._replace(
            logits=case.logits.flatten(0, 1),
            completion_ids=case.completion_ids.flatten(),
            advantages=case.advantages.flatten(),
        ).with_options(old_logps=torch.full((6,), -3.0, device=device))
        want, got = (
            run(grpo_loss, case.with_options(seq_lens=torch.tensor([2, 4], dtype=each)), **path)
            for each in (torch.int64, dtype)
        )
        assert_same_bits(got, want)
