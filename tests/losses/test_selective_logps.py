"""Values and gradients of `selective_logps`, compared with plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import selective_logps
from grpo_kernels.testing import make_batch, relative_error


class TestSelectiveLogps:
    @staticmethod
    def eager(logits: Tensor, ids: Tensor, temperature: Any = 1.0) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"]
    )
    @pytest.mark.parametrize(
        "upstream", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["logps", "entropy", "both"]
    )
    def test_values_and_gradients(
        self, device: str, backend: str, dtype: torch.dtype, upstream: tuple[float, float]
    ) -> None:
        batch = make_batch(2, 3, 67, dtype=dtype, device=device)
        temperature = torch.tensor([[0.7], [1.5]], device=device, dtype=torch.float64)
        weights = torch.tensor([[1.0, 0.0, -2.5], [0.3, 0.0, 1e-3]], device=device, dtype=torch.float64)
        by_logps, by_entropy = upstream
        leaf = batch.logits.clone().requires_grad_()
        got = selective_logps(
            leaf, batch.completion_ids, temperature=temperature, return_entropy=True, backend=backend
        )
        (weights * (by_logps * got[0] + by_entropy * got[1])).sum().backward()
        wide = batch.logits.double().requires_grad_()
        want = self.eager(wide, batch.completion_ids, temperature[..., None])
        (weights * (by_logps * want[0] + by_entropy * want[1])).sum().backward()
        exact = dtype == torch.float64
        for value, truth in zip(got, want, strict=True):
            assert value.dtype == (torch.float64 if exact else torch.float32)
            torch.testing.assert_close(value.double(), truth, rtol=0, atol=1e-12 if exact else 1e-5)
        bound = 1e-11 if exact else 2 * torch.finfo(dtype).eps + 1e-5
        assert float(relative_error(leaf.grad, wide.grad).max()) < bound
        assert not leaf.grad[:, 1].any()

    def test_rows_without_upstream_gradient_are_not_read(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 67, device=device)
        leaf = batch.logits.clone().requires_grad_()
        logps, entropy = selective_logps(leaf, batch.completion_ids, return_entropy=True, backend=backend)
        wanted = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 2.0]], device=device)
        # Write NaN to these rows without autograd. The backward must not read them.
        leaf.data[wanted == 0] = torch.nan
        (grad,) = torch.autograd.grad((wanted * (logps + entropy)).sum(), leaf)
        assert not grad[wanted == 0].any()
        assert grad[wanted != 0].isfinite().all() and (grad[wanted != 0] != 0).any(-1).all()

    def test_mask(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 67, device=device, seed=2)
        mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
        logits = batch.logits.masked_fill(mask[..., None] == 0, torch.nan).requires_grad_()
        logps, entropy = selective_logps(
            logits, batch.completion_ids, mask=mask, return_entropy=True, backend=backend
        )
        (logps + entropy).sum().backward()
        want = self.eager(batch.logits, batch.completion_ids)
        for value, truth in zip((logps, entropy), want, strict=True):
            torch.testing.assert_close(value, truth * mask, rtol=1e-5, atol=1e-5)
        assert not logits.grad[mask == 0].any() and logits.grad[mask != 0].any()

    def test_transform_of_the_logits(self, device: str, backend: str) -> None:
        """Cover padding columns, scale and softcap on a packed batch."""
        batch = make_batch(1, 5, 67, device=device)
        ids, leaf = batch.completion_ids[0].clamp(max=59), batch.logits[0].clone().requires_grad_()
        logps = selective_logps(
            leaf, ids, vocab_size=60, logit_scale=1.5, logit_softcap=4.0, temperature=0.9, backend=backend
        )
        logps.sum().backward()
        wide = batch.logits[0].double().requires_grad_()
        want, _ = self.eager(4 * torch.tanh(wide[:, :60] * 1.5 / 4), ids, 0.9)
        want.sum().backward()
        torch.testing.assert_close(logps.double(), want, rtol=0, atol=1e-5)
        assert float(relative_error(leaf.grad, wide.grad).max()) < 1e-5
        assert not leaf.grad[:, 60:].any()

    def test_gradcheck(self, device: str, backend: str) -> None:
        batch = make_batch(1, 2, 5, dtype=torch.float64, device=device)

        def call(logits: Tensor) -> tuple[Tensor, ...]:
            return selective_logps(
                logits, batch.completion_ids, logit_softcap=3.0, return_entropy=True, backend=backend
            )

        assert torch.autograd.gradcheck(call, batch.logits.requires_grad_())
