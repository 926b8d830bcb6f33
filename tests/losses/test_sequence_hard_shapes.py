"""Hard cases from logits with a sequence-level ratio: layouts, empty batches and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hard_cases import assert_right, assert_same_bits, every_tensor
from parity import AGGREGATIONS, Case, Result, run
from sequence_cases import every_term, laid_out, layouts, levels, losses, random_case
from torch import Tensor

from grpo_kernels import LossSpec, PPOClip, grpo_loss


@layouts
class TestCase14Layouts:
    """For every layout and dtype, the bits are those of contiguous fp32 and int64."""

    @levels
    def test_layouts_and_dtypes(self, backend: str, device: str, level: str, packed: bool) -> None:
        case = laid_out(random_case(LossSpec(PPOClip(), level=level), 3, 4, 37, device=device), packed)

        def other(name: str, x: Tensor) -> Tensor:
            x = x.int() if name == "completion_ids" else x.bfloat16() if name == "completion_mask" else x
            return x if name in ("logits", "ref_logits") else torch.stack([x, x], -1)[..., 0]

        got = run(grpo_loss, every_tensor(case, other), backend=backend)
        assert_same_bits(got, run(grpo_loss, case, backend=backend))

    @levels
    def test_advantages_per_token(self, backend: str, device: str, level: str, packed: bool) -> None:
        case = random_case(LossSpec(PPOClip(), level=level), 3, 4, 37, device=device)
        per_token = case._replace(advantages=case.advantages[:, None].expand(3, 4))
        want = run(grpo_loss, laid_out(case, packed), backend=backend)
        assert_same_bits(run(grpo_loss, laid_out(per_token, packed), backend=backend), want)


class TestCase15Empty:
    @losses
    @layouts
    def test_all_masked(self, backend: str, device: str, spec: LossSpec, packed: bool) -> None:
        case = random_case(every_term(spec), 2, 3, 37, device=device)
        case = case.with_options(completion_mask=torch.zeros(2, 3, device=device))
        self.assert_nothing(run(grpo_loss, laid_out(case, packed), backend=backend))

    @losses
    @pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
    @layouts
    def test_nothing(
        self, backend: str, device: str, spec: LossSpec, shape: tuple[int, int], packed: bool
    ) -> None:
        """A packed `[3, 0]` batch has three sequences without tokens."""
        logits = torch.zeros(*shape, 37, device=device)
        logps = torch.zeros(shape, device=device)
        ids, advantages = logps.long(), torch.ones(shape[0], device=device)
        case = Case(spec, logits, ids, advantages, {"old_logps": logps, "ref_logps": logps})
        self.assert_nothing(run(grpo_loss, laid_out(case, packed), backend=backend))

    @staticmethod
    def assert_nothing(got: Result) -> None:
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @levels
    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(
        self, backend: str, device: str, aggregation: str, level: str
    ) -> None:
        """An empty sequence counts in B, as in TRL. It gives no NaN. Packed, it has no rows."""
        spec = LossSpec(PPOClip(), level=level, aggregation=aggregation, max_tokens=4)
        case = random_case(spec, 3, 4, 37, masked=0, inactive=0, device=device).with_options(ref_logits=None)
        mask = case.options["completion_mask"]
        mask[1] = False
        case = case.with_options(prompt_ids=torch.tensor([2, 1, 2], device=device))
        out, grad = assert_right(case, backend=backend)
        packed = every_tensor(case, lambda _, x: x[mask] if x.dim() > 1 else x)
        packed = packed.with_options(seq_lens=torch.tensor([4, 0, 4]))
        got = run(grpo_loss, packed, backend=backend)
        torch.testing.assert_close(got.out.loss, out.loss)
        torch.testing.assert_close(got.grad, grad[mask])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"advantages": torch.ones(3)}, "advantages"),
        ({"seq_lens": torch.tensor([2, 3])}, "seq_lens"),
        ({"seq_lens": torch.tensor([2.0, 4.0])}, "seq_lens"),
        ({"seq_lens": torch.tensor([[2, 4]])}, "seq_lens"),
        ({"seq_lens": None}, "seq_lens"),
        ({"old_logps": torch.zeros(2)}, "old_logps"),
    ],
    ids=str,
)
def test_case_16_refused(backend: str, device: str, change: dict[str, Any], message: str) -> None:
    """The batch is packed, with 2 + 4 tokens. Other wrong arguments have their tests in the folder api."""
    spec = LossSpec(PPOClip(), level="sequence")
    logits, ids = torch.randn(6, 37, device=device), torch.zeros(6, dtype=torch.long, device=device)
    options = {"advantages": torch.ones(2), "seq_lens": torch.tensor([2, 4]), **change}
    options = {name: None if x is None else x.to(device) for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        grpo_loss(logits, ids, spec=spec, **options, backend=backend)
