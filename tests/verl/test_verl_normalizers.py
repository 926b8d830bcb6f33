"""`global_normalizer` is the number that verl's `agg_loss` divides by, for each micro-batch, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grpo_kernels import LossSpec
from grpo_kernels.normalizers import global_normalizer
from grpo_kernels.policy_loss import policy_loss

pytest.importorskip("verl.trainer.ppo.core_algos")

from verl.trainer.ppo import core_algos

RANKS, MAX_TOKENS = 4, 11
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")


def token_losses(logps: Tensor, *unused: Tensor | None) -> Tensor:
    """A surrogate that is the log-probability itself."""
    return logps


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_of_several_ranks(mode: str) -> None:
    """The losses of all micro-batches equal verl's.

    verl gets the number of tokens on all ranks, and the number of sequences, including those without a token.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [torch.randint(8, (n,), generator=generator) for n in (3, 1, 2, 4)]
    lengths[0][0] = 0
    masks = [torch.arange(7) < x[:, None] for x in lengths]
    spec = LossSpec(token_losses, aggregation=mode, max_tokens=MAX_TOKENS)
    normalizer = global_normalizer(masks, aggregation=mode) / RANKS  # the test has one process
    for mask in masks:
        losses = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        got = policy_loss(
            losses, torch.ones(len(mask)), spec=spec, completion_mask=mask, normalizer=normalizer
        )
        want = core_algos.agg_loss(
            losses,
            mask.double(),
            mode,
            dp_size=RANKS,
            batch_num_tokens=sum(int(x.sum()) for x in masks),
            global_batch_size=sum(map(len, masks)),
            loss_scale_factor=MAX_TOKENS,
        )
        # verl adds 1e-8 to a sequence's number of tokens.
        torch.testing.assert_close(got.loss, want, rtol=2e-8, atol=0)
