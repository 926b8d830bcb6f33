"""Sampling masks in log-probabilities and in the forms from hidden states, and how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import DTYPES, EVERYTHING
from torch import Tensor

from grpo_kernels import (
    LossSpec,
    Reinforce,
    linear_grpo_loss,
    linear_logps,
    pack_sampling_mask,
    selective_logps,
)
from grpo_kernels.logps import linear_token_stats
from grpo_kernels.reference import reference_loss
from grpo_kernels.testing import assert_no_worse_than_eager

B, T, V, H = 2, 3, 1330, 8
KEEP = torch.rand(B, T, V, generator=torch.Generator().manual_seed(1)) < 0.4
WORDS = pack_sampling_mask(KEEP)
WEIGHTS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def tokens(count: int, *, dropped: bool = False) -> Tensor:
    """Return random tokens `[B, T]` or `[B, T, K]`, which are kept unless `dropped`."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(B, T, V, generator=generator) * (KEEP if not dropped else ~KEEP)
    ids = chosen.argsort(-1, descending=True)[..., : max(1, count)]
    return ids if count else ids[..., 0]


def random_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(3))).to(dtype)


def eager(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies of logits that are -inf where they were dropped."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.masked_fill(~KEEP, -torch.inf).log_softmax(-1)
    logps = log_p.gather(-1, ids if ids.dim() == 3 else ids[..., None])
    terms = torch.where(KEEP, log_p.exp() * log_p.where(KEEP, 0.0), 0.0)
    return logps if ids.dim() == 3 else logps[..., 0], -terms.sum(-1)


def weighted(logps: Tensor, entropy: Tensor | None) -> Tensor:
    weights = WEIGHTS.to(logps.dtype)
    total = (logps * (weights if logps.dim() == 2 else weights[..., None])).sum()
    return total if entropy is None else total + (0.3 * weights * entropy).sum()


class TestSelectiveLogps:
    @pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
    @pytest.mark.parametrize("count", [0, 1, 4])
    @pytest.mark.parametrize("entropy", [False, True])
    def test_parity(self, entropy: bool, count: int, dtype: str, backend: str) -> None:
        ids, logits = tokens(count), random_logits(DTYPES[dtype])
        leaf = logits.masked_fill(~KEEP, torch.nan).requires_grad_()
        got = selective_logps(leaf, ids, sampling_mask=WORDS, return_entropy=entropy, backend=backend)
        pair = got if isinstance(got, tuple) else (got, None)
        found: list[Tensor] = []
        for z in (logits.double(), logits):
            z = z.requires_grad_()
            logps, spread = eager(z, ids)
            (grad,) = torch.autograd.grad(weighted(logps, spread if entropy else None), z)
            found += [logps.detach(), spread.detach(), grad]
        near = {"rtol": 0, "atol": 1e-12 if dtype == "fp64" else 1e-5}
        torch.testing.assert_close(pair[0].double(), found[0], **near)
        if pair[1] is not None:
            torch.testing.assert_close(pair[1].double(), found[1], **near)
        (grad,) = torch.autograd.grad(weighted(*pair), leaf)
        epsilon = 1e-12 if dtype == "fp64" else 2 * torch.finfo(DTYPES[dtype]).eps + 1e-5
        learning = WEIGHTS != 0
        rows = (x[learning] for x in (grad, found[5], found[2]))
        assert_no_worse_than_eager(*rows, epsilon=epsilon, what="gradient")
        assert not grad[~KEEP].any()

    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("count", [0, 1, 4])
    def test_dropped_tokens(self, count: int, softcap: float | None, backend: str) -> None:
        """Their log-probabilities are -inf, and their entries of the gradient 0. Their logits are NaN."""
        ids, logits = tokens(count, dropped=True), random_logits()
        if count:
            ids[..., 0] = tokens(1)[..., 0]  # among others that were dropped
        leaf = logits.masked_fill(~KEEP, torch.nan).requires_grad_()
        got = selective_logps(leaf, ids, sampling_mask=WORDS, logit_softcap=softcap, backend=backend)
        kept = KEEP.gather(-1, ids if count else ids[..., None]).view(ids.shape)
        assert bool((got[~kept] == -torch.inf).all()) and got[kept].isfinite().all()
        (grad,) = torch.autograd.grad(got, leaf, torch.ones_like(got))
        assert not grad[~KEEP].any() and grad[KEEP].isfinite().all()

    @pytest.mark.parametrize("count", [0, 3])
    def test_rows_that_are_nan(self, count: int, backend: str) -> None:
        """The entries of dropped tokens are 0 there, too."""
        ids, logits = tokens(count, dropped=True), random_logits()
        leaf = logits.masked_fill(KEEP, torch.nan).requires_grad_()
        got = selective_logps(leaf, ids, sampling_mask=WORDS, backend=backend)
        (grad,) = torch.autograd.grad(got, leaf, torch.ones_like(got))
        assert grad[KEEP].isnan().all() and not grad[~KEEP].any()


class TestFromHiddenStates:
    """The products are compared with those of eager PyTorch in fp64."""

    @pytest.fixture
    def head(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        shapes = ((B, T, H), (V, H), (V,), (B, T, H), (V, H))
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    @pytest.mark.parametrize("dtype", ["fp64", "fp32"])
    @pytest.mark.parametrize("compact", [True, False])
    @pytest.mark.parametrize(
        "spec", [EVERYTHING, LossSpec(Reinforce(), entropy_coef=0.1)], ids=["KL", "none"]
    )
    def test_loss(self, spec: LossSpec, compact: bool, dtype: str, head: list[Tensor], backend: str) -> None:
        mask, advantages = torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([1.3, -0.7])
        ids, old_logps = tokens(0), torch.full((B, T), -5.0)
        leaves = [x.requires_grad_() for x in head[:3]]
        hidden, weight, bias = leaves
        logits = (hidden @ weight.t() + bias).masked_fill(~KEEP, -torch.inf)
        ref_logits = (head[3] @ head[4].t()).masked_fill(~KEEP, -torch.inf)
        given = {"spec": spec, "completion_mask": mask, "old_logps": old_logps}
        with_ref = {} if spec.kl is None else {"ref_logits": ref_logits}
        truth = reference_loss(logits, ids, advantages, **given, **with_ref)
        wanted = torch.autograd.grad(truth.loss, leaves)

        narrow = [x.detach().to(DTYPES[dtype]).requires_grad_() for x in head]
        with_ref = {} if spec.kl is None else {"ref_hidden": narrow[3], "ref_lm_head_weight": narrow[4]}
        how: dict[str, Any] = {"compact": compact, "chunk_tokens": 2, "backend": backend}
        out = linear_grpo_loss(
            *(narrow[0], narrow[1], ids, advantages),
            **given, **with_ref, **how, lm_head_bias=narrow[2], sampling_mask=WORDS,
        )  # fmt: skip
        near = {"rtol": 1e-10, "atol": 1e-12} if dtype == "fp64" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(out.loss.double(), truth.loss, **near)
        for got, want in zip(torch.autograd.grad(out.loss, narrow[:3]), wanted, strict=True):
            torch.testing.assert_close(got.double(), want, **near)

    @pytest.mark.parametrize("count", [0, 1, 4])
    def test_logps(self, count: int, head: list[Tensor], backend: str) -> None:
        hidden, weight, bias = (x.requires_grad_() for x in head[:3])
        ids = tokens(count)
        want = eager(hidden @ weight.t() + bias, ids)
        how: dict[str, Any] = {"chunk_tokens": 2, "return_entropy": True, "backend": backend}
        got = linear_logps(hidden, weight, ids, lm_head_bias=bias, sampling_mask=WORDS, **how)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(weighted(*pair), [hidden, weight, bias]) for pair in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


class TestPack:
    @pytest.mark.parametrize("V", [1, 31, 32, 33, 100])
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
    def test_bools(self, shape: Sequence[int], V: int) -> None:
        keep = torch.rand(*shape, V, generator=torch.Generator().manual_seed(V)) < 0.5
        words = pack_sampling_mask(keep)
        assert words.dtype == torch.int32 and words.shape == (*shape, -(-V // 32))
        v = torch.arange(V)
        assert torch.equal((words[..., v // 32] >> v % 32) & 1 != 0, keep)
        unused = torch.arange(V, 32 * words.shape[-1])
        assert not ((words[..., unused // 32] >> unused % 32) & 1).any()

    def test_strides(self) -> None:
        keep = torch.rand(64, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
        for x in (keep.permute(2, 1, 0), keep.permute(1, 2, 0), keep[::2].transpose(0, 2), keep[..., 0].t()):
            assert torch.equal(pack_sampling_mask(x), pack_sampling_mask(x.contiguous()))

    def test_no_columns(self) -> None:
        assert pack_sampling_mask(torch.empty(4, 3, 0, dtype=torch.bool)).shape == (4, 3, 0)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("size", [1, 32, 97])
    def test_lists(self, size: int, dtype: torch.dtype) -> None:
        """Lists give the words of the bools, whatever their order, with repeated ids and empty lists."""
        keep = torch.rand(5, size, generator=torch.Generator().manual_seed(size)) < 0.5
        keep[1] = False
        rows, ids = (torch.cat([x, x[: len(x) // 2]]) for x in keep.nonzero(as_tuple=True))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        order = order[rows[order].argsort(stable=True)]
        offsets = torch.cat([torch.zeros(1), rows.bincount(minlength=5).cumsum(0)])
        got = pack_sampling_mask(ids[order].to(dtype), offsets.to(dtype), size)
        assert torch.equal(got, pack_sampling_mask(keep))

    def test_no_lists(self) -> None:
        none = torch.empty(0, dtype=torch.int64)
        assert pack_sampling_mask(none, torch.tensor([0]), 40).shape == (0, 2)
        assert torch.equal(
            pack_sampling_mask(none, torch.tensor([0, 0]), 40), torch.zeros(1, 2, dtype=torch.int32)
        )

    IDS, OFFSETS = torch.tensor([0, 3, 39]), torch.tensor([0, 2, 3])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((torch.tensor([0, 40, 3]), OFFSETS, 40), r"kept has the id 40, outside \[0, 40\)"),
            ((torch.tensor([0, -1, 3]), OFFSETS, 40), r"kept has the id -1, outside \[0, 40\)"),
            ((IDS, torch.tensor([1, 2, 3]), 40), "offsets must ascend from 0 to 3"),
            ((IDS, torch.tensor([0, 2]), 40), "offsets must ascend from 0 to 3"),
            ((IDS, torch.tensor([0, 3, 2, 3]), 40), "offsets must ascend from 0 to 3"),
            ((IDS, torch.tensor([0.0, 3.0]), 40), "offsets must be integers"),
            ((IDS, torch.empty(0, dtype=torch.int64), 40), "offsets must be integers"),
            ((IDS, None, 40), "offsets and vocab_size"),
            ((IDS, OFFSETS, None), "offsets and vocab_size"),
            ((IDS, OFFSETS, 0), "vocab_size"),
            ((IDS[None], OFFSETS, 40), "kept must be bool"),
            ((IDS.float(), OFFSETS, 40), "kept must be bool"),
            ((torch.tensor(True), None, None), "kept must be"),
            ((torch.ones(2, 3).bool(), OFFSETS, None), "offsets and vocab_size go with ids"),
            ((IDS, OFFSETS.to("meta"), 40), "offsets"),
        ],
    )
    def test_errors(self, given: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pack_sampling_mask(*given)

    def test_types(self) -> None:
        with pytest.raises(TypeError, match="kept must be a tensor"):
            pack_sampling_mask([1, 2])
        with pytest.raises(TypeError, match="offsets must be a tensor"):
            pack_sampling_mask(self.IDS, [0, 3], 40)
        with pytest.raises(TypeError, match="vocab_size"):
            pack_sampling_mask(self.IDS, self.OFFSETS, 40.5)


def test_top1(backend: str) -> None:
    """A dropped token is never the likeliest, and a kept one is although a dropped one has a larger logit."""
    hidden, weight = torch.eye(3), torch.zeros(40, 3)
    weight[7], weight[30] = 5.0, 2.0
    words = pack_sampling_mask(torch.arange(40) != 7).expand(3, 2)
    found = linear_token_stats(
        hidden, weight, torch.tensor([7, 30, 31]), top1=True, sampling_mask=words, backend=backend
    )
    assert found.top1.tolist() == [False, True, False]
