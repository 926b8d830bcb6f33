"""Hard cases from logits at the token level: relations between calls, and side effects of one call.

test_hard_values.py explains what the tests of hard cases have in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import (
    SPECS,
    SUM,
    TWO_BLOCKS,
    Options,
    assert_right,
    assert_same_bits,
    every_tensor,
    random_case,
    set_chunks,
)
from parity import AGGREGATIONS, Result, run
from torch import Tensor

from grpo_kernels import KL, LossSpec, PPOClip, grpo_loss, selective_logps
from grpo_kernels.testing import make_batch


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_case_17_uneven_micro_batches(path: Options, device: str, aggregation: str) -> None:
    """With a common normalizer, losses and gradients of the parts add up to those of the batch."""
    spec = LossSpec(PPOClip(), KL("k3"), aggregation=aggregation, entropy_coef=0.1, max_tokens=4)
    case = random_case(spec, 6, 4, 37, seed=1, device=device)
    defaults = {"token-mean": case.options["completion_mask"].sum(), "token-sum": 1.0, "prompt-mean": 3.0}
    prompt_ids = torch.tensor([5, -1, -1, -1, 7, 7], device=device)  # no prompt is in two parts
    case = case.with_options(normalizer=defaults.get(aggregation, 6.0), prompt_ids=prompt_ids)

    def part(rows: slice) -> Result:
        return run(grpo_loss, every_tensor(case, lambda _, x: x[rows] if x.dim() else x), **path)

    whole = part(slice(None))
    parts = [part(slice(*ends)) for ends in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(x.out.loss for x in parts), whole.out.loss)
    torch.testing.assert_close(torch.cat([x.grad for x in parts]), whole.grad, rtol=1e-6, atol=0)
    # Passing the default normalizer changes only the entropy bonus, which is a mean over tokens without it.
    plain = case._replace(spec=replace(spec, entropy_coef=0.0))
    assert_same_bits(
        run(grpo_loss, plain, **path), run(grpo_loss, plain.with_options(normalizer=None), **path)
    )


def test_case_18_inputs_are_never_written(device: str, backend: str) -> None:
    """The logits are a leaf, then the output of a tanh. Both have another use after the loss."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device=device)
    leaf = case.logits.requires_grad_()
    logits = torch.tanh(leaf)
    tensors = [leaf, logits, case.completion_ids, case.advantages, *case.options.values()]
    before = [(x.detach().clone(), x._version) for x in tensors]
    for x in (leaf, logits):
        out = grpo_loss(
            x, case.completion_ids, case.advantages, spec=case.spec, backend=backend, **case.options
        )
        (out.loss + x.square().sum()).backward()
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value) and x._version == version


def test_case_19_loss_times_1024(device: str, backend: str) -> None:
    """The gradient scales exactly, because 1024 is a power of two. test_autograd.py has other factors."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device=device)

    def scaled(*args: Any, **options: Any) -> Any:
        out = grpo_loss(*args, **options)
        return out._replace(loss=1024 * out.loss)

    once, many = (run(loss, case, backend=backend).grad for loss in (grpo_loss, scaled))
    assert torch.equal(1024 * once, many) and once.any()


class TestCase20SameBits:
    """The bits of a row depend on that row alone."""

    @pytest.fixture(autouse=True)
    def two_threads(self) -> Iterator[None]:
        """Use two threads: PyTorch splits a long row over its threads if there are no other rows."""
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("vocab", [37, 64, TWO_BLOCKS, 33001])
    def test_neighbors(
        self, path: Options, device: str, vocab: int, plain: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if vocab > 32768 and path["backend"] == "triton" and device == "cpu":
            pytest.skip("only PyTorch treats rows beyond 32768 otherwise, and the interpreter is slow")
        # With three rows per chunk, a row changes its place in a chunk, and the last chunk has one row.
        set_chunks(3 * vocab, monkeypatch)
        rows, row = 7, 4
        spec = replace(SPECS["Reinforce" if plain else "exact KL"], aggregation=SUM)
        case = random_case(spec, rows, 1, vocab, masked=0, inactive=0, device=device)
        case = case.with_options(normalizer=1.0)
        if plain:
            case = case.with_options(ref_logits=None, temperature=1.0)

        def call(index: list[int], masked: bool = False) -> list[Tensor]:
            chosen = every_tensor(case, lambda _, x: x[index])
            if masked:
                chosen.options["completion_mask"][:row] = chosen.options["completion_mask"][row + 1 :] = False
            out, grad = run(grpo_loss, chosen, **path)
            return [grad, out.logps] + ([] if plain else [out.ref_logps, out.entropy])

        everything = list(range(rows))
        want = call(everything)
        for index, masked in [
            (everything, False),
            (everything, True),
            ([row], False),
            ([0, row], False),
            ([6, 0, 1, 5, 3, 2, row], False),
            ([row] * 5, False),
        ]:
            names = ("grad", "logps", "ref_logps", "entropy")
            for name, got, whole in zip(names, call(index, masked), want, strict=False):
                for place in (place for place, source in enumerate(index) if source == row):
                    assert torch.equal(got[place], whole[row]), (
                        f"{name} of row {row} at {place} of {index}, {masked = }"
                    )

    def test_a_hundred_times(self, device: str, backend: str) -> None:
        batch = make_batch(1, 2, 37, device=device)
        first, *others = (selective_logps(*batch[:2], backend=backend) for _ in range(100))
        assert all(torch.equal(first, x) for x in others)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_case_22_a_device_that_is_not_the_current_one() -> None:
    """The loss runs on the device of its tensors. Triton would launch on the current device."""
    case = random_case(SPECS["exact KL"], 2, 3, 37, device="cuda:1")
    with torch.cuda.device(0):
        assert_right(case, backend="triton")
