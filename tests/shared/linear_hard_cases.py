"""Batches and assertions of the hard cases from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import random_case as logits_case
from linear_cases import LinearCase, LinearResult, assert_gradients, from_logits, linear_oracle, run_linear
from torch import Tensor

from grpo_kernels import KL, LossSpec

V, H = 128, 24

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
compacts = pytest.mark.parametrize("compact", [True, False], ids=["compact", "in place"])


def every_term(spec: LossSpec) -> LossSpec:
    return replace(spec, kl=KL("exact"), entropy_coef=0.01)


def every_tensor(case: LinearCase, change: Callable[[Tensor], Tensor]) -> LinearCase:
    """Change every tensor that is per token or per sequence."""
    options = {
        name: change(x) if isinstance(x, Tensor) and "lm_head" not in name else x
        for name, x in case.options.items()
    }
    tensors = {name: change(getattr(case, name)) for name in ("hidden", "completion_ids", "advantages")}
    return case._replace(**tensors, options=options)


def laid_out(case: LinearCase, packed: bool) -> LinearCase:
    """Return the same tokens, packed if `packed`."""
    if not packed:
        return case
    sequences, tokens = case.completion_ids.shape
    case = every_tensor(case, lambda x: x.flatten(0, 1) if x.dim() > 1 else x)
    return case.with_options(seq_lens=torch.full((sequences,), tokens))


def every_option(spec: LossSpec, *shape: int, device: str, **how: Any) -> LinearCase:
    """Return a batch with a mask, a reference, a bias and every option per token."""
    return from_logits(logits_case(spec, *shape, device=device, **how))


def assert_right(case: LinearCase, expected: LinearCase | None = None, **options: Any) -> LinearResult:
    """Compare outputs and gradients with the reference on `expected`, by default on `case`."""
    wanted = linear_oracle(case if expected is None else expected)
    got, truth = run_linear(case, **options), wanted.by_logits.truth.out
    for name in ("logps", "entropy", "ref_logps"):
        if (value := getattr(got.out, name)) is not None:
            torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(got.out.loss.double(), truth.loss.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(got.grads, wanted.eager, wanted.truth, wanted.terms, wanted.lengths, "")
    return got


def assert_no_gradient(got: LinearResult) -> None:
    assert not any(x.any() for x in got.grads)
