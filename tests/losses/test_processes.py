"""The losses give the same results in several threads and in forked workers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from products import assert_same_products, magnitudes, on_a_grid
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from grpo_kernels import KL, LossSpec, grpo_loss, linear_grpo_loss
from grpo_kernels.testing import make_batch

SPEC = LossSpec.preset("grpo", kl=KL("exact", beta=0.1), entropy_coef=0.01)


def results(seed: int, device: str, backend: str, *, linear: bool) -> list[Tensor]:
    """Return loss, log-probabilities and gradient of a batch with a shape that depends on the seed."""
    x = make_batch(2, 3 + seed % 4, 300 + seed, seed=seed, device=device)
    options = {
        "spec": SPEC,
        "completion_mask": x.completion_mask,
        "old_logps": x.old_logps,
        "backend": backend,
    }
    if linear:
        generator = torch.Generator().manual_seed(seed)
        shapes = (*x.completion_ids.shape, 16), (x.logits.shape[-1], 16)
        hidden, weight = (on_a_grid(torch.randn(shape, generator=generator)).to(device) for shape in shapes)
        hidden.requires_grad_()
        reference = {"ref_hidden": hidden.detach().flip(-1), "ref_lm_head_weight": weight, "chunk_tokens": 4}
        out = linear_grpo_loss(hidden, weight, x.completion_ids, x.advantages, **options, **reference)
        leaf = hidden
    else:
        leaf = x.logits.requires_grad_()
        out = grpo_loss(leaf, x.completion_ids, x.advantages, ref_logits=x.ref_logits, **options)
    out.loss.backward()
    return [out.loss.detach(), out.logps, leaf.grad]


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_two_threads_at_once(backend: str, device: str, linear: bool) -> None:
    """Two threads at once give the results of one. Autograd runs the backward of each device in a thread."""
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter keeps one program's state for the whole process")
    seeds = range(8)
    alone = [results(seed, device, backend, linear=linear) for seed in seeds]
    with magnitudes():
        sizes = [results(seed, device, backend, linear=linear)[-1] for seed in seeds]
    start = Barrier(2)

    def all_of_them(_: int) -> list[list[Tensor]]:
        start.wait()
        return [results(seed, device, backend, linear=linear) for seed in seeds]

    with ThreadPoolExecutor(2) as pool:
        for together in pool.map(all_of_them, range(2)):
            for seed, got, expected, size in zip(seeds, together, alone, sizes, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got[:-1], expected[:-1], strict=True))
                if linear:
                    assert_same_products(got[-1], expected[-1], size, 300 + seed, "gradient of hidden")
                else:
                    assert torch.equal(got[-1], expected[-1])


class Losses(Dataset):
    """Losses that a worker of a data loader computes on the CPU.

    They have no gradient, because PyTorch for GPUs refuses a backward in a fork if the parent ran one.
    """

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        x = make_batch(2, 3 + index, 300, seed=index)
        given = {"completion_mask": x.completion_mask, "old_logps": x.old_logps, "ref_logits": x.ref_logits}
        return grpo_loss(x.logits, x.completion_ids, x.advantages, spec=SPEC, **given).loss


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_workers() -> None:
    """Forked workers compute losses after the parent has run a backward."""
    results(0, "cpu", "torch", linear=False)
    alone = [Losses()[index] for index in range(4)]
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=600)
    torch.testing.assert_close(torch.stack(list(loader)), torch.stack(alone))
