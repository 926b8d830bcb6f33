"""Worker: sampling masks and several tokens per position, with a vocabulary that is split over the ranks."""

from __future__ import annotations

import torch
from parity import every_branch, run
from several_tokens import assert_tokens, loss_of, token_case

from distributed.vocab_parts import BACKENDS, FULL, SPLITS, V, joined, part_of, shard_of
from distributed.worker import Cases
from grpo_kernels import grpo_loss, linear_logps, pack_sampling_mask, selective_logps

cases = Cases()


@cases.add(backend=BACKENDS, split=SPLITS, tokens=[1, 5], dtype=[torch.float32, torch.float64])
def several_tokens(backend: str, split: str, tokens: int, dtype: torch.dtype) -> None:
    case, shard = token_case(vocab=V, tokens=tokens, dtype=dtype), shard_of(split, V)
    part = case.logits[..., shard.start : shard.stop].clone().requires_grad_()
    found = selective_logps(part, case.ids, mask=case.mask, return_entropy=True, shard=shard, backend=backend)
    loss_of(case, *found).backward()
    grad = joined(part.grad, split, V, -1)
    assert_tokens(case, *(x.detach() for x in found), grad)


@cases.add(backend=BACKENDS, split=SPLITS)
def several_tokens_from_hidden_states(backend: str, split: str) -> None:
    case, shard = token_case(vocab=V, dtype=torch.float64), shard_of(split, V)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, 8, generator=generator, dtype=torch.float64).requires_grad_()
    part = weight.detach()[shard.start : shard.stop].clone().requires_grad_()
    wanted = linear_logps(hidden, weight, case.ids, mask=case.mask, return_entropy=True, backend=backend)
    dhidden, dweight = torch.autograd.grad(loss_of(case, *wanted), (hidden, weight))
    found = linear_logps(
        hidden, part, case.ids, mask=case.mask, return_entropy=True, shard=shard, backend=backend
    )
    got = torch.autograd.grad(loss_of(case, *found), (hidden, part))
    everywhere = joined(got[1], split, V, 0)
    for mine, theirs in zip((*found, got[0], everywhere), (*wanted, dhidden, dweight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@cases.add(backend=BACKENDS, split=SPLITS, inplace=[False, True])
def sampling_mask(backend: str, split: str, inplace: bool) -> None:
    """The bits count from the first column of each part. A part may have no kept token."""
    case, shard = every_branch(FULL, V, torch.float32), shard_of(split, V)
    keep = torch.rand(case.logits.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0, :, V // 4 :] = False
    keep.scatter_(-1, case.completion_ids.clamp(min=0)[..., None], True)
    whole = case.with_options(sampling_mask=pack_sampling_mask(keep))
    wanted = run(grpo_loss, whole, backend=backend, inplace=inplace)
    mask = pack_sampling_mask(keep[..., shard.start : shard.stop])
    got = run(
        grpo_loss, part_of(case, shard).with_options(sampling_mask=mask), backend=backend, inplace=inplace
    )
    grad = joined(got.grad, split, V, -1)
    torch.testing.assert_close(got.out.loss, wanted.out.loss)
    torch.testing.assert_close(got.out.logps, wanted.out.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted.grad, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    cases.main()
