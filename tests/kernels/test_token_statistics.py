"""`linear_token_stats` tells whether the taken token was the likeliest."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from products import on_a_grid

from grpo_kernels.logps import linear_logps, linear_token_stats

B, T, V, H = 3, 5, 2053, 16  # V: two full blocks of a kernel and a partial tail


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top1_is_argmax(device: str, backend: str, softcap: float | None, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H), (V, H)  # the products are exact: products.py
    hidden, weight = (on_a_grid(torch.randn(shape, generator=generator)).to(device) for shape in shapes)
    likeliest = (hidden @ weight.t()).argmax(-1)
    taken = torch.rand(B, T, generator=generator).to(device) < 0.5
    ids = torch.where(taken, likeliest, torch.randint(V, (B, T), generator=generator).to(device))
    mask = torch.rand(B, T, generator=generator).to(device) < 0.8
    options = {"mask": mask, "temperature": temperature, "logit_softcap": softcap, "backend": backend}
    found = linear_token_stats(hidden, weight, ids, entropy=True, top1=True, **options)
    assert found.top1 is not None and found.top1.dtype == torch.bool
    assert torch.equal(found.top1, (ids == likeliest) & mask)
    assert 0 < found.top1.sum() < mask.sum()
    logps, entropy = linear_logps(hidden, weight, ids, return_entropy=True, **options)
    assert torch.equal(found.logps, logps) and torch.equal(found.entropy, entropy)


def test_the_same_defaults() -> None:
    """`linear_logps` passes its options on to `linear_token_stats`."""
    public, private = (signature(f).parameters for f in (linear_logps, linear_token_stats))
    shared = public.keys() & private.keys()
    assert shared == public.keys() - {"return_entropy"}
    assert {name: public[name].default for name in shared} == {name: private[name].default for name in shared}
