"""Hard cases from logits at the token level: vocabulary sizes, strides, layouts, dtypes, empty batches.

test_hard_values.py explains what the tests of hard cases have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hard_cases import (
    INF,
    NAN,
    SPECS,
    SUM,
    TWO_BLOCKS,
    Options,
    View,
    assert_right,
    assert_same_bits,
    dtypes,
    every_tensor,
    not_contiguous,
    random_case,
    set_chunks,
    specs,
)
from parity import AGGREGATIONS, Case, Result, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import KL, LossSpec, PPOClip, Reinforce, grpo_loss
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import relative_error


@pytest.mark.parametrize("vocab", [1, 2, 31, 1023, 1025, TWO_BLOCKS, 50257, 151936])
@pytest.mark.parametrize(
    "name, dtype", [("PPOClip", torch.float32), ("PPOClip", torch.bfloat16), ("entropy", torch.float32)]
)
def test_case_11_vocabularies(path: Options, device: str, vocab: int, name: str, dtype: torch.dtype) -> None:
    """Cover a vocabulary of one token, odd sizes, sizes near a block, and sizes of real models."""
    case = random_case(SPECS[name], 1, 2, vocab, bare=True, dtype=dtype, device=device)
    case.completion_ids[:] = torch.tensor([0, vocab - 1])
    out, grad = assert_right(case.with_options(old_logps=None), **path)
    if vocab == 1:
        assert not grad.any() and not out.logps.any()
        assert out.entropy is None or not out.entropy.any()


class TestCase12Large:
    @pytest.mark.parametrize("shape", [(65537, 1), (1, 65537)], ids=["sequences", "tokens"])
    def test_more_rows_than_a_grid_is_wide(self, device: str, shape: tuple[int, int]) -> None:
        """The second dimension of a launch grid is at most 65535. Interpreting so many takes minutes."""
        case = random_case(LossSpec(PPOClip(), aggregation=SUM), *shape, 3, device=device, bare=True)
        case.logits.div_(3)  # among so many peaked rows, one would have no digits of 1 - p left
        got = run(grpo_loss, case, backend="triton" if device == "cuda" else "torch")
        want = run(reference_loss, case.wide())
        assert float(relative_error(got.grad, want.grad).max()) < 1e-4

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_more_than_2_31_elements(self) -> None:
        rows, vocab = 16400, 131072
        assert rows * vocab > 2**31
        needed = 3 * 2 * rows * vocab  # bytes: logits and gradient in bf16, and some room
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
        last = random_case(
            LossSpec(Reinforce(), aggregation=SUM),
            1,
            1,
            vocab,
            bare=True,
            dtype=torch.bfloat16,
            device="cuda",
        )
        leaf = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
        leaf[:, -1:] = last.logits
        leaf.requires_grad_()
        ids = torch.zeros(1, rows, dtype=torch.long, device="cuda")
        ids[:, -1:] = last.completion_ids
        out = grpo_loss(leaf, ids, last.advantages.expand(1, rows), spec=last.spec)
        out.loss.backward()
        want = run(reference_loss, last.wide())
        torch.testing.assert_close(out.logps[:, -1:].double(), want.out.logps, rtol=0, atol=1e-5)
        assert out.logps[0, -2].item() == pytest.approx(-math.log(vocab), abs=1e-5)
        assert float(relative_error(leaf.grad[:, -1:], want.grad).max()) < 2 * torch.finfo(torch.bfloat16).eps


class Allocations(TorchDispatchMode):
    """Record the address and the number of elements of every new storage."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                address = x.untyped_storage().data_ptr()
                if address not in self.known and address not in self.sizes:
                    self.sizes[address] = x.untyped_storage().nbytes() // x.element_size()
        return result


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "x[:, :-1]": lambda x: x[:, :-1],
    "x[:, P:]": lambda x: x[:, 2:],
    "x[..., :V]": lambda x: x[..., :67],
    "x[:, 1:-1, 1:V]": lambda x: x[:, 1:-1, 1:67],  # rows that are not aligned for 16-byte loads
    "every other row": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "one token": lambda x: x[:, -1:],
    "packed": lambda x: x[1, 1:],
}
views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


class TestCase13Strides:
    @staticmethod
    def case(view: View, dtype: torch.dtype, device: str) -> Case:
        """Return `[3, 4, 256]` logits, and the other arguments for a view of them."""
        wide = random_case(LossSpec(PPOClip(), KL("exact")), 3, 4, 256, dtype=dtype, seed=1, device=device)
        ids = view(wide.completion_ids[..., None].expand(3, 4, 256))[..., 0].clamp(max=65)
        options = {
            "old_logps": torch.full(ids.shape, -3.0, device=device),
            "ref_logits": view(wide.options["ref_logits"]),
        }
        advantages = torch.linspace(-1, 1, ids.numel(), device=device).view(ids.shape)
        return Case(wide.spec, wide.logits, ids, advantages, options)

    @dtypes
    @views
    def test_values(self, path: Options, device: str, view: View, dtype: torch.dtype) -> None:
        assert_right(self.case(view, dtype, device), view, **path)

    @views
    def test_no_hidden_copy(
        self,
        path: Options,
        device: str,
        view: View,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        case = self.case(view, torch.float32, device)
        leaf = view(case.logits).detach().requires_grad_()
        logits = torch.empty_strided(leaf.shape, leaf.stride(), device=device).copy_(leaf)
        # The torch backend allocates numbers per token and chunks of rows. Here a chunk has one row.
        set_chunks(256, monkeypatch)
        with Allocations(logits, *case.options.values()) as forward:
            out = grpo_loss(
                logits, case.completion_ids, case.advantages, spec=case.spec, **case.options, **path
            )
        with Allocations(logits, *case.options.values()) as backward:
            (gradient,) = torch.autograd.grad(out.loss, logits)
        large = {address: size for address, size in (forward.sizes | backward.sizes).items() if size > 256}
        assert forward.sizes
        assert large == ({} if path["inplace"] else {gradient.data_ptr(): logits.numel()})

    def test_vocabulary_stride(self, path: Options, device: str) -> None:
        logits = torch.zeros(2, 5, 3, device=device).transpose(1, 2)
        ids = torch.zeros(2, 3, dtype=torch.long, device=device)
        with pytest.raises(
            ValueError, match=r"^logits must have stride 1 along the vocabulary.*\(15, 1, 3\)"
        ):
            grpo_loss(logits, ids, torch.ones(2, device=device), **path)


class TestCase14Layouts:
    """For every layout and dtype of tensors per token, the bits are those of contiguous fp32 and int64."""

    @not_contiguous
    def test_layouts(self, path: Options, device: str, layout: Callable[[Tensor], Tensor]) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 3, 4, 37, device=device)
        case = case.with_options(ref_logits=None, ref_logps=case.options["old_logps"] - 0.1)
        got = run(grpo_loss, every_tensor(case, lambda _, x: layout(x) if x.dim() == 2 else x), **path)
        assert_same_bits(got, run(grpo_loss, case, **path))

    def test_expanded(self, path: Options, device: str) -> None:
        case = random_case(LossSpec(PPOClip()), 3, 4, 37, device=device)
        case = every_tensor(case, lambda _, x: x[:1].expand(3, 4) if x.dim() == 2 else x)
        repeated = every_tensor(case, lambda _, x: x.contiguous())
        assert_same_bits(run(grpo_loss, case, **path), run(grpo_loss, repeated, **path))

    @pytest.mark.parametrize("ids", [torch.int32, torch.int64])
    @pytest.mark.parametrize(
        "mask", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16]
    )
    def test_ids_and_masks(self, path: Options, device: str, ids: torch.dtype, mask: torch.dtype) -> None:
        case = random_case(SPECS["PPOClip"], 3, 4, 37, device=device)
        got = case.with_options(completion_mask=case.options["completion_mask"].to(mask))
        got = got._replace(completion_ids=case.completion_ids.to(ids))
        assert_same_bits(run(grpo_loss, got, **path), run(grpo_loss, case, **path))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_values(self, path: Options, device: str, dtype: torch.dtype) -> None:
        case = random_case(LossSpec(PPOClip(), KL("k3")), 3, 4, 37, device=device)
        case = case.with_options(ref_logits=None, ref_logps=case.options["old_logps"] - 0.1)

        def rounded(x: Tensor) -> Tensor:
            """Round to numbers that all these dtypes can represent."""
            return x.bfloat16().half().float() if x.dim() == 2 and x.is_floating_point() else x

        case = every_tensor(case, lambda _, x: rounded(x))
        narrow = every_tensor(case, lambda _, x: x.to(dtype) if x.dim() == 2 and x.is_floating_point() else x)
        assert_same_bits(run(grpo_loss, narrow, **path), run(grpo_loss, case, **path))

    def test_advantages(self, path: Options, device: str) -> None:
        case = random_case(SPECS["k3"], 3, 4, 37, inactive=0, device=device)
        want = run(grpo_loss, case, **path)
        per_sequence = case.advantages[:, 0]
        for advantages in (per_sequence, per_sequence[:, None]):
            assert_same_bits(run(grpo_loss, case._replace(advantages=advantages), **path), want)
        packed = every_tensor(case, lambda _, x: x.flatten(0, 1)).with_options(
            seq_lens=torch.tensor([4, 4, 4])
        )
        for advantages in (per_sequence, per_sequence.repeat_interleave(4)):
            out, grad = run(grpo_loss, packed._replace(advantages=advantages), **path)
            padded = out._replace(logps=out.logps.view(3, 4), ref_logps=out.ref_logps.view(3, 4))
            assert_same_bits(Result(padded, grad.view(3, 4, 37)), want)


class TestCase15Empty:
    @staticmethod
    def assert_nothing(got: Result) -> None:
        assert got.out.loss.item() == 0
        assert not got.grad.any()
        assert not any(x.isnan() for x in got.out.metrics.values()), got.out.metrics

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize(
        "shape", [(0, 4), (3, 0), (2, 3)], ids=["no sequences", "no tokens", "all masked"]
    )
    def test_nothing(self, path: Options, device: str, shape: tuple[int, int], aggregation: str) -> None:
        spec = LossSpec(PPOClip(), KL("exact"), aggregation=aggregation, entropy_coef=0.1, max_tokens=4)
        logits = torch.zeros(*shape, 37, device=device)
        options = {"ref_logits": logits, "completion_mask": torch.zeros(shape, device=device)}
        options["prompt_ids"] = torch.arange(shape[0], device=device)
        case = Case(
            spec,
            logits,
            torch.zeros_like(logits[..., 0], dtype=torch.long),
            torch.ones(shape[0], device=device),
            options,
        )
        got = run(grpo_loss, case, **path)
        self.assert_nothing(got)
        assert got.out.logps.shape == got.out.entropy.shape == shape

    @specs()
    def test_all_masked(self, path: Options, device: str, spec: LossSpec) -> None:
        case = random_case(spec, 2, 3, 37, device=device)
        self.assert_nothing(
            run(grpo_loss, case.with_options(completion_mask=torch.zeros(2, 3, device=device)), **path)
        )

    @pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
    def test_nothing_packed(self, path: Options, device: str, lengths: list[int]) -> None:
        seq_lens = torch.tensor(lengths, dtype=torch.long)
        ids = torch.zeros(0, dtype=torch.long, device=device)
        advantages = torch.zeros(len(lengths), device=device)
        case = Case(SPECS["k3"], torch.zeros(0, 37, device=device), ids, advantages, {"seq_lens": seq_lens})
        self.assert_nothing(
            run(grpo_loss, case.with_options(ref_logps=torch.zeros(0, device=device)), **path)
        )

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_an_empty_sequence_among_full_ones(self, path: Options, device: str, aggregation: str) -> None:
        """An empty sequence counts in B, as in TRL. It gives no NaN. Packed, it has no rows."""
        spec = LossSpec(PPOClip(), aggregation=aggregation, max_tokens=4)
        case = random_case(spec, 3, 4, 37, masked=0, inactive=0, device=device).with_options(ref_logits=None)
        mask = case.options["completion_mask"]
        mask[1] = False
        prompts = {"prompt_ids": torch.tensor([2, 1, 2], device=device)}
        out, grad = assert_right(case.with_options(**prompts), **path)
        packed = every_tensor(case, lambda _, x: x[mask])
        packed = packed.with_options(seq_lens=torch.tensor([4, 0, 4]), **prompts)
        got = run(grpo_loss, packed._replace(advantages=case.advantages[:, 0]), **path)
        torch.testing.assert_close(got.out.loss, out.loss)
        torch.testing.assert_close(got.grad, grad[mask])


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF])
def test_case_16_temperature(path: Options, device: str, temperature: float) -> None:
    """Other wrong arguments have their tests in the folder api."""
    case = random_case(LossSpec(), 1, 2, 5, bare=True, device=device).with_options(temperature=temperature)
    with pytest.raises(ValueError, match=f"^temperature must be finite and > 0, got {temperature}$"):
        run(grpo_loss, case, **path)
