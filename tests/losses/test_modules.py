"""`GRPOLoss` and `log_ratio_loss` give the results of `grpo_loss`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Result, run, small
from torch import Tensor

from grpo_kernels import GRPOLoss, LogRatio, LossSpec, grpo_loss, log_ratio_loss
from grpo_kernels.testing import make_batch


class TestOtherForms:
    """Functions and modules that call `grpo_loss`."""

    @staticmethod
    def assert_same(got: Result, want: Result) -> None:
        torch.testing.assert_close(tuple(got.out), tuple(want.out), rtol=0, atol=0)
        assert torch.equal(got.grad, want.grad)

    def test_module(self, device: str, backend: str) -> None:
        case = small(device)
        want = run(grpo_loss, case.with_options(temperature=0.7), backend=backend)

        def call(module: GRPOLoss, **more: Any) -> Result:
            return run(lambda *args, spec, **options: module(*args, **options, **more), case)

        self.assert_same(call(GRPOLoss(case.spec, temperature=0.7, backend=backend)), want)
        # Options of a call override options of the module.
        self.assert_same(call(GRPOLoss(case.spec, temperature=2.0), temperature=0.7, backend=backend), want)
        self.assert_same(call(GRPOLoss("dapo"), spec=case.spec, temperature=0.7, backend=backend), want)

    def test_module_has_no_state_and_says_what_it_is(self) -> None:
        module = GRPOLoss("dapo", temperature=0.7)
        assert not list(module.parameters()) and not module.state_dict()
        assert "eps_high=0.28" in repr(module) and "temperature=0.7" in repr(module)

    @pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "prompt-mean"])
    def test_log_ratio_loss(self, device: str, backend: str, aggregation: str) -> None:
        case = small(device, LossSpec(LogRatio(), aggregation=aggregation))

        def by_name(
            logits: Tensor, ids: Tensor, rewards: Tensor, *, spec: Any, ref_logits: Tensor, **options: Any
        ) -> Any:
            return log_ratio_loss(logits, ref_logits, ids, rewards, aggregation=aggregation, **options)

        self.assert_same(run(by_name, case, backend=backend), run(grpo_loss, case, backend=backend))

    def test_log_ratio_loss_by_hand(self, device: str, backend: str) -> None:
        batch = make_batch(2, 3, 37, device=device)
        args = (batch.logits, batch.ref_logits, batch.completion_ids, batch.advantages)
        out = log_ratio_loss(*args, completion_mask=batch.completion_mask, backend=backend)
        ids = batch.completion_ids[..., None]
        policy, reference = (
            x.log_softmax(-1).gather(-1, ids)[..., 0] for x in (batch.logits, batch.ref_logits)
        )
        terms = batch.advantages[:, None] * (policy - reference)
        torch.testing.assert_close(out.loss, -terms[batch.completion_mask].mean())
