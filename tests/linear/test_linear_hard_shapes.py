"""Hard cases from hidden states: vocabulary sizes, strides, layouts, dtypes and empty batches.

Hidden states and weights may have any strides. Only logits need stride 1 along the vocabulary, and here the
package computes the logits. test_linear_cost.py proves that it never holds all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hard_cases import NAN, SUM, TWO_BLOCKS, dtypes, not_contiguous
from linear_cases import (
    LinearResult,
    assert_gradients,
    assert_same,
    linear_oracle,
    local_and_not,
    random_case,
    run_linear,
)
from linear_hard_cases import (
    H,
    V,
    assert_no_gradient,
    assert_right,
    compacts,
    every_option,
    every_tensor,
    every_term,
    laid_out,
    layouts,
)
from parity import AGGREGATIONS
from torch import Tensor

from grpo_kernels import LossSpec, linear_grpo_loss
from grpo_kernels.testing import relative_error


@local_and_not
@dtypes
@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, TWO_BLOCKS, 50257, 151936])
def test_case_11_vocabularies(
    spec: LossSpec, vocab: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Cover a vocabulary of one token, odd sizes, sizes near a block, and sizes of real models."""
    case = random_case(
        replace(spec, entropy_coef=0.1), shape=(1, 2), H=3, V=vocab, dtype=dtype, device=device
    )
    case.completion_ids[:] = torch.tensor([0, vocab - 1])
    got = assert_right(case, backend=backend)
    if vocab == 1:
        assert_no_gradient(got)
        assert not got.out.logps.any() and not got.out.entropy.any()


@local_and_not
class TestCase12Large:
    @pytest.mark.parametrize("shape", [(65537, 1), (1, 65537)], ids=["sequences", "tokens"])
    def test_more_rows_than_a_grid_is_wide(self, spec: LossSpec, device: str, shape: tuple[int, int]) -> None:
        """The second dimension of a launch grid is at most 65535. Interpreting so many takes minutes."""
        case = random_case(spec, shape=shape, H=2, V=3, device=device)
        assert_right(case, chunk_tokens=65537, backend="triton" if device == "cuda" else "torch")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_more_than_2_31_elements(self, spec: LossSpec) -> None:
        """One chunk of logits has more than 2^31 elements."""
        rows, vocab = 16400, 131072
        assert rows * vocab > 2**31
        needed = (4 + 2 + 4) * rows * vocab  # bytes: logits in fp32, gradient in bf16, and room
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
        spec = replace(spec, aggregation=SUM)
        last = random_case(spec, shape=(1, 1), H=16, V=vocab, dtype=torch.bfloat16, device="cuda")
        hidden = torch.zeros(rows, 1, 16, dtype=torch.bfloat16, device="cuda")
        hidden[-1:] = last.hidden
        ids = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
        ids[-1:] = last.completion_ids
        case = last._replace(hidden=hidden, completion_ids=ids, advantages=last.advantages.expand(rows))
        got, want = run_linear(case, chunk_tokens=rows), linear_oracle(last)
        assert got.out.logps[-2].item() == pytest.approx(-math.log(vocab), abs=1e-5)
        truth = want.by_logits.truth.out.logps
        torch.testing.assert_close(got.out.logps[-1:].double(), truth, rtol=0, atol=1e-5)
        assert_gradients(
            (got.grads[0][-1:],), want.eager[:1], want.truth[:1], want.terms[:1], want.lengths, "last row"
        )


def next_to_nan(x: Tensor, dim: int, *, first: bool = False) -> Tensor:
    """Return `x` with NaN on one side."""
    outside = torch.full_like(x, NAN)
    return torch.cat([outside, x] if first else [x, outside], dim)


# For each layout of the hidden states: a function that allocates memory, and the view that holds them.
STRIDES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "x[:, :-P]": (lambda x: next_to_nan(x, 1), lambda x: x[:, :4]),
    "x[:, P:]": (lambda x: next_to_nan(x, 1, first=True), lambda x: x[:, 4:]),
    "x[..., :H]": (lambda x: next_to_nan(x, 2), lambda x: x[..., :H]),
    "x[..., H:]": (lambda x: next_to_nan(x, 2, first=True), lambda x: x[..., H:]),
    "every other number": (lambda x: x.repeat_interleave(2, -1), lambda x: x[..., ::2]),
    "batch transposed": (lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
    "tokens innermost": (lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2)),
    "packed": (lambda x: next_to_nan(x.flatten(0, 1), 0, first=True), lambda x: x[12:]),
}
WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "transposed": (lambda x: x.t().contiguous(), Tensor.t),
    "x[:V]": (lambda x: next_to_nan(x, 0), lambda x: x[:V]),
    "x[:, H:]": (lambda x: next_to_nan(x, 1, first=True), lambda x: x[:, H:]),
}


@local_and_not
@pytest.mark.parametrize(
    "strides, weights",
    [*((strides, "transposed") for strides in STRIDES), *(("x[:, P:]", weights) for weights in WEIGHTS)],
)
def test_case_13_strides(spec: LossSpec, strides: str, weights: str, backend: str, device: str) -> None:
    """The gradients are correct within the view and 0 outside it."""
    case = random_case(spec, shape=(3, 4), device=device)
    memory, views = [], []
    for x, (allocate, view) in ((case.hidden, STRIDES[strides]), (case.weight, WEIGHTS[weights])):
        memory.append(allocate(x).requires_grad_())
        views.append(view)
    plain = laid_out(case, strides == "packed")
    out = linear_grpo_loss(
        *(view(x) for view, x in zip(views, memory, strict=True)),
        plain.completion_ids,
        plain.advantages,
        spec=spec,
        backend=backend,
        **plain.options,
    )
    grads = torch.autograd.grad(out.loss, memory)
    want = run_linear(plain, backend=backend)
    torch.testing.assert_close(out.logps, want.out.logps, rtol=1e-5, atol=1e-5)
    for grad, view, expected in zip(grads, views, want.grads, strict=True):
        assert relative_error(view(grad).flatten(), expected.flatten()) < 1e-5
        outside = torch.ones_like(grad)
        view(outside).zero_()
        assert not grad[outside == 1].any()


@local_and_not
class TestCase14Layouts:
    """For every layout and dtype, the results are those of contiguous fp32 and int64."""

    @not_contiguous
    def test_layouts(
        self, spec: LossSpec, layout: Callable[[Tensor], Tensor], backend: str, device: str
    ) -> None:
        case = every_option(every_term(spec), 3, 4, 37, device=device)
        got = run_linear(every_tensor(case, lambda x: layout(x) if x.dim() == 2 else x), backend=backend)
        assert_same(got, run_linear(case, backend=backend), case, backend=backend)

    def test_expanded(self, spec: LossSpec, backend: str, device: str) -> None:
        case = every_option(every_term(spec), 3, 4, 37, inactive=0, device=device)
        case = every_tensor(case, lambda x: x[:1].expand(3, *x.shape[1:]))
        repeated = every_tensor(case, Tensor.contiguous)
        got, want = (run_linear(x, backend=backend) for x in (case, repeated))
        assert_same(got, want, repeated, backend=backend)

    @layouts
    @pytest.mark.parametrize(
        "ids, mask",
        [
            (torch.int32, torch.bool),
            (torch.int64, torch.uint8),
            (torch.int32, torch.int32),
            (torch.int64, torch.int64),
            (torch.int32, torch.float32),
            (torch.int64, torch.bfloat16),
        ],
    )
    def test_ids_and_masks(
        self, spec: LossSpec, ids: torch.dtype, mask: torch.dtype, packed: bool, backend: str, device: str
    ) -> None:
        case = laid_out(every_option(spec, 3, 4, 37, device=device), packed)
        got = case.with_options(completion_mask=case.options["completion_mask"].to(mask))
        got = got._replace(completion_ids=case.completion_ids.to(ids))
        assert_same(*(run_linear(x, backend=backend) for x in (got, case)), case, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_values(self, spec: LossSpec, dtype: torch.dtype, backend: str, device: str) -> None:
        """Advantages, log-probabilities, weights and temperatures hold values that all these dtypes have."""

        def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
            return lambda x: x.to(dtype) if x.dim() == 2 and x.is_floating_point() else x

        case = every_option(every_term(spec), 3, 4, 37, device=device)
        for rounding in (torch.bfloat16, torch.float16, torch.float32):
            case = every_tensor(case, to(rounding))
        got = run_linear(every_tensor(case, to(dtype)), backend=backend)
        assert_same(got, run_linear(case, backend=backend), case, backend=backend)


@compacts
@local_and_not
class TestCase15Empty:
    @staticmethod
    def assert_nothing(got: LinearResult) -> None:
        assert not got.out.loss
        assert_no_gradient(got)
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @pytest.mark.parametrize(
        "shape", [(0, 4), (3, 0), (2, 3)], ids=["no sequences", "no tokens", "all masked"]
    )
    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_nothing(
        self,
        spec: LossSpec,
        shape: tuple[int, int],
        aggregation: str,
        compact: bool,
        backend: str,
        device: str,
    ) -> None:
        spec = replace(every_term(spec), aggregation=aggregation, max_tokens=4)
        case = random_case(spec, shape=shape, device=device).with_options(
            completion_mask=torch.zeros(shape, device=device)
        )
        case = case.with_options(ref_hidden=case.hidden, ref_lm_head_weight=case.weight)
        case = case.with_options(prompt_ids=torch.arange(shape[0], device=device))
        got = run_linear(case, compact=compact, backend=backend)
        self.assert_nothing(got)
        assert got.out.logps.shape == got.out.entropy.shape == shape

    @pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
    def test_nothing_packed(
        self, spec: LossSpec, lengths: list[int], compact: bool, backend: str, device: str
    ) -> None:
        case = random_case(spec, shape=(len(lengths), 0), device=device)
        case = every_tensor(case, lambda x: x.flatten(0, 1) if x.dim() > 1 else x)
        case = case.with_options(seq_lens=torch.tensor(lengths, dtype=torch.long))
        self.assert_nothing(run_linear(case, compact=compact, backend=backend))

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(
        self, spec: LossSpec, aggregation: str, compact: bool, backend: str, device: str
    ) -> None:
        """An empty sequence counts in B, as in TRL. It gives no NaN. Packed, it has no rows."""
        spec = replace(spec, aggregation=aggregation, max_tokens=4)
        case = every_option(spec, 3, 4, 37, masked=0, inactive=0, device=device)
        mask = case.options["completion_mask"]
        mask[1] = False
        prompts = {"prompt_ids": torch.tensor([2, 1, 2], device=device)}
        padded = assert_right(case.with_options(**prompts), compact=compact, backend=backend)
        if spec.uses_callable:  # a callable couples along the last dimension, which differs in a packed batch
            return
        packed = every_tensor(case, lambda x: x[mask])
        packed = packed.with_options(seq_lens=torch.tensor([4, 0, 4]), **prompts)
        got = run_linear(packed, compact=compact, backend=backend)
        torch.testing.assert_close(got.out.loss, padded.out.loss)
        torch.testing.assert_close(got.grads[0], padded.grads[0][mask])
        torch.testing.assert_close(got.grads[1:], padded.grads[1:])
