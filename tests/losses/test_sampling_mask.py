"""Sampling masks: the loss of the kept columns alone, and exact zeros in the gradient of the others."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import assert_same_bits
from option_cases import EITHER, PACKED, PADDED, branches, every_option
from parity import DTYPES, EVERYTHING, KLS, NEEDS_DYNAMO, PAIRS, SURROGATES, Case, every_branch, oracle, run
from sampling_masks import JUNK, assert_masked_parity, spread
from torch import Tensor

from grpo_kernels import LossSpec, PPOClip, Reinforce, grpo_loss, pack_sampling_mask, selective_logps

FORWARD = LossSpec(PPOClip(), KLS["exact_forward"], entropy_coef=0.1)
both_ways = pytest.mark.parametrize("spec", [EVERYTHING, FORWARD], ids=["exact", "exact_forward"])
dtypes = pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
LARGE = 32003


def random_keep(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


class TestParity:
    """Compare with eager PyTorch on the kept columns alone. The others hold NaN, infinities and 1e4."""

    @pytest.mark.parametrize("surrogate, kl", PAIRS)
    def test_losses(self, surrogate: str, kl: str, path: dict[str, Any]) -> None:
        case = every_branch(LossSpec(SURROGATES[surrogate], KLS[kl]), 37, torch.float32)
        assert_masked_parity(oracle(case), spread(case, 101), **path)

    @every_option
    def test_options(self, packed: bool, option: str, path: dict[str, Any]) -> None:
        """Rows have a full block of the kernels and more, aligned to 16 bytes if they are not packed."""
        spec = replace(EVERYTHING, max_tokens=5)
        case = (EITHER | PADDED | PACKED)[option](branches(spec, "fp32", packed, "cpu"))
        masked = spread(case, 1329 if packed else 1328)
        assert_masked_parity(oracle(case), masked, return_entropy=True, **path)

    @both_ways
    @dtypes
    @pytest.mark.parametrize("V", [32, 33, 1000, 1320])
    def test_sizes(self, V: int, dtype: str, spec: LossSpec, path: dict[str, Any]) -> None:
        """A vocabulary may end in a word of the mask, and rows may be aligned or not."""
        case = every_branch(spec, 3 * V // 4, DTYPES[dtype])
        assert_masked_parity(oracle(case), spread(case, V), return_entropy=True, **path)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("V", [LARGE, LARGE - 3], ids=["rows not aligned", "rows aligned"])
    def test_few_of_many(self, V: int, dtype: str, path: dict[str, Any]) -> None:
        """Top-k sampling keeps few columns, so that whole blocks are dropped."""
        case = every_branch(EVERYTHING, 20, DTYPES[dtype])
        assert_masked_parity(oracle(case), spread(case, V), return_entropy=True, **path)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_all_kept(self, dtype: str, path: dict[str, Any]) -> None:
        """A mask that keeps all columns changes no bit."""
        case = every_branch(EVERYTHING, 1000, DTYPES[dtype])
        full = torch.full((4, 3, 32), -1, dtype=torch.int32)
        with_mask = run(grpo_loss, case.with_options(sampling_mask=full), **path)
        assert_same_bits(with_mask, run(grpo_loss, case, **path))

    @pytest.mark.parametrize("stride", ["expanded", "of wider words", "time first", "every other word"])
    def test_strides_of_the_mask(self, stride: str, path: dict[str, Any]) -> None:
        case = every_branch(EVERYTHING, 200, torch.float32)
        keep = random_keep(4, 3, 200)
        keep[..., :1] = True
        keep.scatter_(-1, case.completion_ids.clamp(min=0)[..., None], True)
        if stride == "expanded":
            keep = keep.any(1, keepdim=True).expand(4, 3, 200)
        words = pack_sampling_mask(keep)
        width = words.shape[-1]
        view = {
            "expanded": lambda: words[:, :1].expand(4, 3, width),
            "of wider words": lambda: torch.cat([words, ~words], -1)[..., :width],
            "time first": lambda: words.transpose(0, 1).contiguous().transpose(0, 1),
            "every other word": lambda: torch.stack([words, ~words], -1)[..., 0],
        }[stride]()
        want = run(grpo_loss, case.with_options(sampling_mask=words), **path)
        assert_same_bits(run(grpo_loss, case.with_options(sampling_mask=view), **path), want)


class TestEdges:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("V", [1, 31, 32, 33, 1000, LARGE])
    def test_one_kept(self, V: int, dtype: str, path: dict[str, Any]) -> None:
        """Every statistic and the gradient are exactly 0."""
        logits = torch.randn(1, 2, V, generator=torch.Generator().manual_seed(V)).to(DTYPES[dtype])
        ids = torch.tensor([[0, V - 1]])
        mask = pack_sampling_mask(torch.nn.functional.one_hot(ids, V).bool())
        case = Case(EVERYTHING, logits, ids, torch.ones(1), {"ref_logits": 2 * logits, "sampling_mask": mask})
        out, grad = run(grpo_loss, case, return_entropy=True, **path)
        for x in (out.logps, out.ref_logps, out.entropy, out.metrics["kl_exact"], grad):
            assert torch.equal(x, torch.zeros_like(x))

    @both_ways
    def test_none_kept(self, spec: LossSpec, path: dict[str, Any]) -> None:
        """The row is NaN, as one of -inf in eager PyTorch, but its gradient is 0."""
        case = every_branch(spec, 600, torch.float32)
        keep = random_keep(4, 3, 600).index_fill(1, torch.tensor([0]), False)
        ids = keep.int().argmax(-1)
        case = case._replace(completion_ids=ids).with_options(sampling_mask=pack_sampling_mask(keep))
        out, grad = run(grpo_loss, case, **path)
        assert out.logps[:3, 0].isnan().all() and out.loss.isnan()
        assert not grad[~keep].any()
        assert grad[1, 1:].isfinite().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_row_that_is_nan(self, value: float, path: dict[str, Any]) -> None:
        """The gradient of dropped columns is 0, also if a kept logit makes the row NaN."""
        case = every_branch(EVERYTHING, 600, torch.float32)
        keep = random_keep(4, 3, 600)
        keep[..., 5] = True
        case.logits[1, 0, 5] = value
        out, grad = run(grpo_loss, case.with_options(sampling_mask=pack_sampling_mask(keep)), **path)
        assert out.logps[1, 0].isnan() and grad[1, 0][keep[1, 0]].isnan().all()
        assert not grad[~keep].any()

    @pytest.mark.parametrize("V", [300, 1320])
    @both_ways
    def test_dropped_logits_change_no_bit(self, V: int, spec: LossSpec, path: dict[str, Any]) -> None:
        case = every_branch(spec, V // 2, torch.float32)
        want = run(grpo_loss, spread(case, V, junk=torch.zeros(1)).case, return_entropy=True, **path)
        got = run(grpo_loss, spread(case, V, junk=JUNK).case, return_entropy=True, **path)
        assert_same_bits(got, want)
        assert got.out.loss.isfinite()

    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_taken_token_dropped(self, softcap: float | None, path: dict[str, Any]) -> None:
        """Its log-probability is -inf and its entry 0. The others learn from it, as in eager PyTorch."""
        generator = torch.Generator().manual_seed(0)
        logits, ids = torch.randn(1, 2, 300, generator=generator), torch.tensor([[7, 299]])
        keep = random_keep(1, 2, 300).scatter(-1, ids[..., None], False)
        logits.scatter_(-1, ids[..., None], 99.0)  # also the largest logit of its row
        options = {"sampling_mask": pack_sampling_mask(keep), "logit_softcap": softcap}
        options["ref_logits"], options["ref_logit_softcap"] = 0.5 * logits, softcap
        case = Case(LossSpec(Reinforce()), logits, ids, torch.ones(1), options)
        out, grad = run(grpo_loss, case, **path)
        for logps in (out.logps, out.ref_logps):
            assert torch.equal(logps, torch.full((1, 2), -torch.inf))
        y = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
        want = y.masked_fill(~keep, -torch.inf).softmax(-1) / 2
        if softcap is not None:
            want *= 1 - (y / softcap) ** 2
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)
        assert not grad[~keep].any()
        clipped = case._replace(spec=LossSpec(PPOClip())).with_options(old_logps=torch.full((1, 2), -3.0))
        out, grad = run(grpo_loss, clipped, **path)
        assert float(out.loss.detach()) == 0 and not grad.any()

    def test_masked_positions(self, path: dict[str, Any]) -> None:
        """Their words are not read: no bit of them changes a result."""
        case = every_branch(EVERYTHING, 300, torch.float32)
        words = pack_sampling_mask(random_keep(4, 3, 300, share=0.9))
        other = torch.where(case.options["completion_mask"][..., None], words, ~words)
        got, want = (run(grpo_loss, case.with_options(sampling_mask=x), **path) for x in (other, words))
        assert_same_bits(got, want)

    def test_unknown_id(self, path: dict[str, Any]) -> None:
        """An id outside the vocabulary is NaN, not a dropped token."""
        case = every_branch(LossSpec(PPOClip()), 40, torch.float32)
        ids = case.completion_ids.clone()
        ids[1] = torch.tensor([40, -7, 2**40])
        mask = pack_sampling_mask(random_keep(4, 3, 40, share=0.9))
        out = run(grpo_loss, case._replace(completion_ids=ids).with_options(sampling_mask=mask), **path).out
        assert out.logps[1].isnan().all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["logits", "ref_logits"])
def test_debug_mode(name: str, inplace: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks accept NaN in dropped columns, and name one in a kept column."""
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    masked = spread(every_branch(EVERYTHING, 40, torch.float32), 101)
    how: dict[str, Any] = {"backend": backend, "inplace": inplace}
    assert run(grpo_loss, masked.case, **how).out.loss.isfinite()
    logits = masked.case.logits if name == "logits" else masked.case.options[name]
    column = int(masked.columns[1, 2, 3])
    logits[1, 2, column] = torch.nan
    with pytest.raises(ValueError, match=re.escape(f"{name}[1, 2, {column}] is nan")):
        run(grpo_loss, masked.case, **how)


def test_gradcheck(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 1, 2, 9, generator=generator, dtype=torch.float64)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool).expand(1, 2, 9)
    ids, mask = torch.tensor([[0, 5]]), pack_sampling_mask(keep)

    def loss(logits: Tensor, spec: LossSpec, softcap: float | None) -> Tensor:
        given: dict[str, Any] = {"ref_logits": ref_logits, "sampling_mask": mask, "logit_softcap": softcap}
        given["old_logps"] = torch.tensor([[-1.5, -1.1]])
        return grpo_loss(logits, ids, torch.ones(1), spec=spec, backend=backend, **given).loss

    for spec in (EVERYTHING, FORWARD):
        for softcap in (None, 3.0):
            assert torch.autograd.gradcheck(loss, (logits.clone().requires_grad_(), spec, softcap))


@NEEDS_DYNAMO
class TestCompile:
    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    def test_loss(self, backend: str) -> None:
        case = spread(every_branch(EVERYTHING, 25, torch.float32), 37).case
        compiled = torch.compile(grpo_loss, fullgraph=True, backend="aot_eager")
        got, want = (run(f, case, backend=backend, return_entropy=True) for f in (compiled, grpo_loss))
        near = {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(got.grad, want.grad, **near)
        torch.testing.assert_close(tuple(got.out), tuple(want.out), **near)

    def test_selective_logps(self, backend: str) -> None:
        case = spread(every_branch(EVERYTHING, 25, torch.float32), 37).case
        keep, ids = case.options["sampling_mask"], case.completion_ids[..., None].expand(4, 3, 2)
        compiled = torch.compile(selective_logps, fullgraph=True, backend="aot_eager")
        mask = case.options["completion_mask"]
        found = []
        for function in (selective_logps, compiled):
            leaf = case.logits.clone().requires_grad_()
            logps = function(leaf, ids, mask=mask, sampling_mask=keep, backend=backend)
            found.append((logps.detach(), *torch.autograd.grad(logps.sum(), leaf)))
        torch.testing.assert_close(*found, rtol=0, atol=0)


WORDS = torch.zeros(2, 3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "error", "parts"),
    [
        (WORDS[..., :1], ValueError, ["shape (2, 3, 2)", "40 columns", "(2, 3, 1)"]),
        (WORDS[0], ValueError, ["shape (2, 3, 2)", "(3, 2)"]),
        (torch.zeros(2, 3, 40, dtype=torch.int32), ValueError, ["shape (2, 3, 2)", "(2, 3, 40)"]),
        (WORDS.long(), ValueError, ["int32", "torch.int64"]),
        (torch.zeros(2, 3, 40, dtype=torch.bool), ValueError, ["int32", "torch.bool", "pack_sampling_mask"]),
        (WORDS.to("meta"), ValueError, ["meta", "cpu"]),
        ([[[0, 0]]], TypeError, ["tensor", "list"]),
    ],
    ids=["width", "packed", "a word per column", "int64", "bool", "device", "list"],
)
def test_errors(mask: Any, error: type[Exception], parts: list[str]) -> None:
    logits, ids = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.long)
    message = "^sampling_mask.*" + ".*".join(map(re.escape, parts))
    with pytest.raises(error, match=message):
        grpo_loss(logits, ids, torch.ones(2), sampling_mask=mask)
    with pytest.raises(error, match=message):
        selective_logps(logits, ids, sampling_mask=mask)


def test_width_of_a_padded_vocabulary() -> None:
    """The mask has the words of `vocab_size`, or a word more is an error."""
    logits, ids = torch.randn(2, 3, 70), torch.zeros(2, 3, dtype=torch.long)
    assert selective_logps(logits, ids, vocab_size=40, sampling_mask=~WORDS).isfinite().all()
    wide = torch.zeros(2, 3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\), a bit for each of 40 columns, got \(2, 3, 3\)"):
        selective_logps(logits, ids, vocab_size=40, sampling_mask=wide)
