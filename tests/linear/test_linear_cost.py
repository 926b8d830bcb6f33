"""What the linear form costs: FLOPs of its matrix products, lengths of its chunks, memory and syncs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from linear_cases import LOCAL_AND_NOT, LinearCase, local_and_not, random_case, run_linear
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import KL, LossSpec, PPOClip, linear_grpo_loss, linear_logps
from grpo_kernels.linear import chunks


class TestFlops:
    """FLOPs of the matrix products, in units of T V H with T the number of tokens."""

    def units(self, case: LinearCase, frozen: str = "", **options: Any) -> float:
        hidden, weight = (
            x.clone().requires_grad_(name != frozen)
            for name, x in (("hidden", case.hidden), ("weight", case.weight))
        )
        tokens, (V, H) = case.completion_ids.numel(), weight.shape
        with FlopCounterMode(display=False) as counter:
            out = linear_grpo_loss(
                *(hidden, weight, case.completion_ids, case.advantages),
                spec=case.spec,
                chunk_tokens=7,
                **{**case.options, **options},
            )
            if out.loss.requires_grad:
                out.loss.backward()
        return counter.get_total_flops() / (tokens * V * H)

    def test_one_pass(self) -> None:
        assert self.units(random_case()) == 6
        assert self.units(random_case(), "weight") == 4
        assert self.units(random_case(), "hidden") == 4

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_two_passes(self, dtype: torch.dtype) -> None:
        """Callables, fp16 (whose gradients need a GradScaler) and fp64 (for gradcheck) take two passes."""
        for case in (random_case(LOCAL_AND_NOT["callable"]), random_case(dtype=dtype)):
            assert self.units(case) == 8
            assert self.units(case, "weight") == 6

    @local_and_not
    def test_without_gradient(self, spec: LossSpec) -> None:
        with torch.no_grad():
            assert self.units(random_case(spec)) == 2

    @local_and_not
    def test_reference(self, spec: LossSpec) -> None:
        """The reference's logits are computed once, and again if the backward needs them for the exact KL."""
        case = random_case(spec)
        options = {"ref_hidden": case.hidden, "ref_lm_head_weight": case.weight}
        assert self.units(case, **options) == self.units(case) + 2
        exact = LossSpec(spec.surrogate, KL("exact"))
        extra = 2 if spec.uses_callable else 0
        assert self.units(case._replace(spec=exact), **options) == self.units(case) + 2 + extra

    @local_and_not
    def test_masked_tokens_cost_nothing(self, spec: LossSpec) -> None:
        case = random_case(spec)
        mask = torch.arange(64).view(4, 16) % 4 == 0
        assert self.units(case, completion_mask=mask) == self.units(case) / 4
        assert self.units(case, completion_mask=mask, compact=False) == self.units(case)

    def test_tokens_without_gradient_run_forward_only(self) -> None:
        case = random_case()
        case.advantages[:2] = 0
        assert self.units(case) == (6 + 2) / 2
        assert self.units(case, skip_inactive=True) == 6 / 2
        assert self.units(case, compact=False) == 6
        weights = torch.ones(4, 16)
        weights[2] = 0
        assert self.units(case, token_weights=weights) == (1 * 6 + 3 * 2) / 4
        # A KL term and an entropy bonus give every token a gradient.
        assert self.units(case._replace(spec=LossSpec(PPOClip(), entropy_coef=0.1))) == 6
        assert (
            self.units(case._replace(spec=LossSpec(PPOClip(), KL("k3"))), ref_logps=torch.zeros(4, 16)) == 6
        )

    def test_two_passes_skip_tokens_with_a_derivative_of_zero(self) -> None:
        """The backward knows every derivative, so it skips clipped tokens as well."""
        case = random_case(dtype=torch.float64)
        case.advantages[:] = 1
        old_logps = torch.full((4, 16), -100.0, dtype=torch.float64)
        assert self.units(case, old_logps=old_logps) == 2

    def test_logps(self) -> None:
        case = random_case()
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            logps = linear_logps(hidden, weight, case.completion_ids)
            logps[:2].sum().backward()
        assert counter.get_total_flops() == (2 + 6 / 2) * case.hidden.numel() * weight.shape[0]


class TestChunks:
    def test_the_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        # Even chunks, the longest a power of two.
        assert chunks.choose_chunk_tokens(2048, 4 * 32000, cpu) == 512
        assert chunks.choose_chunk_tokens(600, 4 * 32000, cpu) == 300
        assert chunks.choose_chunk_tokens(10, 4 * 32000, cpu) == 10
        assert chunks.choose_chunk_tokens(5, 1 << 40, cpu) == 1
        monkeypatch.setattr(chunks, "free_memory", lambda device: 80 << 30)
        assert chunks.choose_chunk_tokens(16384, 6 * 151936, gpu) == 8192
        assert chunks.choose_chunk_tokens(9000, 6 * 151936, gpu) == 4608
        monkeypatch.setattr(chunks, "free_memory", lambda device: 4 << 30)
        assert chunks.choose_chunk_tokens(16384, 6 * 151936, gpu) == 1024
        assert chunks.choose_chunk_tokens(16384, 6 * 151936, gpu, reserved=2 << 30) == 512
        monkeypatch.setattr(chunks, "free_memory", lambda device: 0)
        assert chunks.choose_chunk_tokens(16384, 6 * 151936, gpu) == 128

    def test_it_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        case = random_case()
        case.advantages[0] = 0
        with caplog.at_level(logging.DEBUG, "grpo_kernels"):
            run_linear(case, chunk_tokens=24)
        assert "64 of 64 tokens run, 48 with a gradient, in chunks of 24" in caplog.text

    @local_and_not
    def test_logits_are_never_held(self, spec: LossSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        """No tensor is larger than the weight, the hidden states or a chunk of logits."""
        case = random_case(spec, shape=(4, 64), V=512)
        largest = 0

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    largest = max(largest, out.untyped_storage().nbytes())
                return out

        with Sizes():
            run_linear(case, chunk_tokens=16)
        assert largest == 4 * max(case.weight.numel(), case.hidden.numel(), 16 * 512)

    def test_no_device_sync(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With compact=False nothing syncs with the device. On "meta", reading a value would fail."""
        monkeypatch.setattr("grpo_kernels.checks.tensors.has_data", lambda x: True)
        case = random_case(LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1))

        def meta(x: Tensor) -> Tensor:
            return x.to("meta")

        for spec in (case.spec, LOCAL_AND_NOT["callable"]):
            arguments = [meta(x).requires_grad_() for x in (case.hidden, case.weight)]
            options: dict[str, Any] = {
                "spec": spec,
                "completion_mask": meta(torch.ones(4, 16)),
                "ref_hidden": meta(case.hidden),
                "ref_lm_head_weight": meta(case.weight),
            }
            arguments += [meta(case.completion_ids), meta(case.advantages)]
            linear_grpo_loss(*arguments, **options, compact=False).loss.backward()
            assert arguments[1].grad is not None
            with pytest.raises((RuntimeError, NotImplementedError)):
                linear_grpo_loss(*arguments, **options)  # counts the rows, which syncs
