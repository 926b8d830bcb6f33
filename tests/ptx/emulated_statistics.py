"""Losses from hidden states, and statistics without a loss, in the emulator, and their comparisons."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from emulated_losses import V, log_softmax_of, option_case
from linear_cases import LinearCase, assert_gradients, from_logits, linear_oracle, run_linear
from parity import DTYPES, assert_outputs, assert_rows_no_worse
from torch import Tensor

from benchmarks.machine_code.cases import mixed_products
from grpo_kernels import LossSpec, selective_logps
from grpo_kernels.logps import linear_token_stats
from grpo_kernels.testing import assert_no_worse_than_eager


@dataclass(frozen=True)
class FromHidden:
    """A loss from hidden states. Operands of 16 bits are multiplied as on a GPU, into `logits_dtype`."""

    spec: LossSpec
    dtype: str
    packed: bool = False
    option: str | None = None
    logits_dtype: torch.dtype = torch.float32

    def case(self) -> LinearCase:
        return from_logits(option_case(self.spec, self.dtype, self.packed, self.option))

    def run(self) -> Any:
        with mixed_products if DTYPES[self.dtype].itemsize == 2 else nullcontext():
            return run_linear(self.case(), backend="triton", chunk_tokens=5, logits_dtype=self.logits_dtype)

    def check(self, *, approximate: bool) -> None:
        expected, got = linear_oracle(self.case()), self.run()
        truth, eager = expected.by_logits.truth.out.logps, expected.by_logits.eager.out.logps
        if self.logits_dtype == torch.bfloat16:
            # One row's logits may be rounded more luckily than another's, so whole tensors are compared.
            pairs = zip(
                (got.out.logps, *got.grads), (eager, *expected.eager), (truth, *expected.truth), strict=True
            )
            for x, y, exact in pairs:
                flat = (z.detach().flatten() for z in (x, y, exact))
                assert_no_worse_than_eager(*flat, epsilon=2 * torch.finfo(torch.bfloat16).eps)
            return
        if DTYPES[self.dtype].itemsize > 2:
            assert_outputs(expected.by_logits, got.out, what="")
        else:  # eager PyTorch has 16-bit logits, so its metrics are no bar
            torch.testing.assert_close(got.out.logps.double(), truth.detach(), rtol=0, atol=1e-5)
        sizes = expected.truth, expected.terms, expected.lengths
        assert_gradients(got.grads, expected.eager, *sizes, what="")


@dataclass(frozen=True)
class Statistics:
    """`selective_logps`, and the gradient of the statistics `of`."""

    of: tuple[str, ...]  # "logps", "entropy"

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(V)
        return 2 * torch.randn(2, 3, V, generator=generator), torch.randint(V, (2, 3), generator=generator)

    def outputs(self, logits: Tensor, ids: Tensor, backend: str | None) -> list[Tensor]:
        """Return the gradient, log-probabilities, and entropies. Without a backend, eager PyTorch is run."""
        leaf = logits.detach().clone().requires_grad_()
        if backend is None:
            out = log_softmax_of(leaf, ids)
        elif "entropy" in self.of:
            out = selective_logps(leaf, ids, return_entropy=True, backend=backend)
        else:
            out = (selective_logps(leaf, ids, backend=backend),)
        weights = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
        named = dict(zip(("logps", "entropy"), out, strict=False))
        torch.autograd.backward([(named[name] * weights.to(leaf.dtype)).sum() for name in self.of])
        assert leaf.grad is not None
        return [leaf.grad, *(x.detach() for x in out)]

    def run(self) -> list[Tensor]:
        return self.outputs(*self.tensors(), "triton")

    def check(self, *, approximate: bool) -> None:
        logits, ids = self.tensors()
        (grad, *got), (truth, *exact) = self.run(), self.outputs(logits.double(), ids, None)
        eager = self.outputs(logits, ids, None)[0]
        assert_rows_no_worse(grad, eager, truth, ids=ids, logps=exact[0], what="gradient")
        for one, other in zip(got, exact, strict=False):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class HiddenStatistics:
    """`linear_token_stats` with entropies and top-1 flags. Every other token is the likeliest one."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, 16, generator=generator) for n in (6, V))
        ids = torch.randint(V, (6,), generator=generator)
        return hidden, weight, ids.where(torch.arange(6) % 2 == 0, (hidden @ weight.t()).argmax(-1))

    def run(self) -> Any:
        given = {"entropy": True, "top1": True, "chunk_tokens": 4}
        return linear_token_stats(*self.tensors(), **given, backend="triton")

    def check(self, *, approximate: bool) -> None:
        hidden, weight, ids = self.tensors()
        logits = hidden.double() @ weight.double().t()
        got = self.run()
        for one, other in zip(got[:2], log_softmax_of(logits, ids), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)
        assert torch.equal(got.top1, logits.argmax(-1) == ids)
        assert 0 < int(got.top1.sum()) < len(ids)
