"""Kernels read and write each element as often as documented, and nothing outside of their tensors.

Triton's interpreter shows every address. Compiled kernels execute the same loads and stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="addresses are recorded in Triton's interpreter (TRITON_INTERPRET=1)",
)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks.traffic.addresses import Traffic, recording  # noqa: E402
from grpo_kernels import (  # noqa: E402
    KL,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    pack_sampling_mask,
    selective_logps,
)
from grpo_kernels.testing import make_batch  # noqa: E402

BLOCK = 512  # the smallest block of the kernels, for fp32
# Less than a block, one block, and several blocks with a tail, which is processed 1024 columns at a time.
sizes = pytest.mark.parametrize("vocab", [37, BLOCK, 4096 + 1029])


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    with recording() as seen:
        yield seen


# Two of six tokens have a gradient, one is clipped, one has no advantage, and two are masked.
ACTIVE, IDLE, MASKED = [0, 4], [1, 3], [2, 5]
UNMASKED = ACTIVE + IDLE
SPECS = {
    "PPO": LossSpec(PPOClip()),
    "entropy": LossSpec(PPOClip(), entropy_coef=0.1),
    "LogRatio": LossSpec(LogRatio()),
    "exact KL": LossSpec(PPOClip(), KL("exact")),
    "forward KL": LossSpec(None, KL("exact_forward")),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def arguments(spec: LossSpec, vocab: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    batch = make_batch(2, 3, vocab, dtype=dtype)
    logps = torch.log_softmax(batch.logits.float(), -1).gather(-1, batch.completion_ids[..., None])[..., 0]
    given = {
        "logits": batch.logits,
        "completion_ids": batch.completion_ids,
        "advantages": torch.tensor([[1.0, 1.0, 1.0], [0.0, -1.0, 1.0]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 0]]),
        "old_logps": logps - torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 0.0]]),
        "spec": spec,
        "backend": "triton",
    }
    needs_reference = isinstance(spec.surrogate, LogRatio) or spec.kl is not None
    return {**given, "ref_logits": batch.ref_logits} if needs_reference else given


def active(spec: LossSpec) -> list[int]:
    """The tokens with a gradient: all unmasked ones with entropy or an exact KL. LogRatio does not clip."""
    if spec.kl is not None or spec.entropy_coef:
        return UNMASKED
    return [0, 1, 4] if isinstance(spec.surrogate, LogRatio) else ACTIVE


def rows(counts: Tensor, index: list[int]) -> Tensor:
    return counts.flatten(0, -2)[index]


def without_taken(counts: Tensor, ids: Tensor) -> Tensor:
    """Subtracts the separate read of the taken token's logit, if there was one."""
    taken = counts.gather(-1, ids[..., None])
    return counts.scatter(-1, ids[..., None], torch.where(taken > 1, taken - 1, taken))


@sizes
@specs
def test_forward_and_backward(traffic: Traffic, spec: LossSpec, vocab: int) -> None:
    """The forward reads unmasked rows once, the backward rows with a gradient. Outputs are written once."""
    given = arguments(spec, vocab)
    logits, ref_logits, ids = (
        given["logits"].requires_grad_(),
        given.get("ref_logits"),
        given["completion_ids"],
    )
    out = grpo_loss(**given)
    for x in (logits, ref_logits):
        if x is not None:
            assert (rows(without_taken(traffic.reads(x), ids), UNMASKED) == 1).all()
            assert not rows(traffic.reads(x), MASKED).any()
            assert not traffic.writes(x).any()
    assert (traffic.writes(out.logps) == 1).all()

    traffic.reset()
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert (traffic.writes(grad) == 1).all() and not traffic.reads(grad).any()
    computed = active(spec)
    skipped = [row for row in range(6) if row not in computed]
    reads = traffic.reads(logits)
    assert (rows(reads, computed) == 1).all() and not rows(reads, skipped).any()
    if ref_logits is not None:
        by_reference = rows(traffic.reads(ref_logits), computed)
        assert (by_reference == (1 if spec.kl is not None else 0)).all()
        assert not rows(traffic.reads(ref_logits), skipped).any()


@sizes
@specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_in_place(traffic: Traffic, spec: LossSpec, vocab: int, dtype: torch.dtype) -> None:
    """One launch reads rows with a gradient twice, other unmasked rows once, and writes all rows once."""
    given = arguments(spec, vocab, dtype)
    leaf, ids = given["logits"].requires_grad_(), given["completion_ids"]
    logits = leaf.clone()
    out = grpo_loss(**{**given, "logits": logits}, inplace=True)
    reads = without_taken(traffic.reads(logits), ids)
    computed = active(spec)
    assert (rows(reads, computed) == 2).all()
    assert (rows(reads, [row for row in UNMASKED if row not in computed]) == 1).all()
    assert not rows(reads, MASKED).any()
    assert (traffic.writes(logits) == 1).all()
    assert (traffic.writes(out.logps) == 1).all()
    if "ref_logits" in given:
        by_reference = without_taken(traffic.reads(given["ref_logits"]), ids)
        assert (rows(by_reference, computed) == (2 if spec.kl is not None else 1)).all()
        assert not rows(by_reference, MASKED).any() and not traffic.writes(given["ref_logits"]).any()

    traffic.reset()
    out.loss.backward()
    assert torch.equal(leaf.grad, logits)
    assert not traffic.reads(logits).any() and not traffic.writes(logits).any()


def test_a_factor_costs_one_pass(traffic: Traffic) -> None:
    given = arguments(SPECS["PPO"], 4096 + 5)
    logits = given.pop("logits").requires_grad_().clone()
    loss = grpo_loss(logits, **given, inplace=True).loss
    traffic.reset()
    (2 * loss).backward()
    assert (traffic.reads(logits) == 1).all() and (traffic.writes(logits) == 1).all()


@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
def test_tokens(traffic: Traffic, inplace: bool) -> None:
    """Loss and metrics read tensors per token at most twice, never masked tokens, and write them once."""
    given = arguments(LossSpec(PPOClip(), KL("k3")), 37)
    logits, ref_logits = given.pop("logits").requires_grad_().clone(), given.pop("ref_logits")
    given["token_weights"] = torch.ones(2, 3)
    out = grpo_loss(logits, **given, ref_logps=torch.zeros(2, 3), inplace=inplace)
    numbers = [x for x in traffic.storages.values() if x.numel() == 6 and x.is_floating_point()]
    assert len(numbers) >= 4
    for x in numbers:
        assert (traffic.reads(x) <= 2).all() and (traffic.writes(x) <= 1).all()
        assert not traffic.reads(x)[MASKED].any()
    assert not traffic.reads(ref_logits).any() and out.ref_logps is not None


@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
@pytest.mark.parametrize("vocab", [37, BLOCK, 4096 + 1029, 4096 + 1032])
def test_a_sampling_mask_is_read_once_per_pass(traffic: Traffic, vocab: int, inplace: bool) -> None:
    """Each thread reads the word of its columns. Neighbors share a word, and a warp requests it once.

    So a pass takes V/8 bytes per row. Statistics also read the word of the taken token.
    """
    given = arguments(SPECS["exact KL"], vocab)
    ids, words = given["completion_ids"], -(-vocab // 32)
    keep = torch.rand(2, 3, vocab, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = pack_sampling_mask(keep.scatter(-1, ids[..., None], True))
    assert mask.shape == (2, 3, words) and mask.element_size() == 4
    logits = given.pop("logits").requires_grad_().clone()
    grpo_loss(logits, **given, sampling_mask=mask, inplace=inplace).loss.backward()
    threads = 32 // (4 if vocab % 4 == 0 else 1)  # that share a word
    wanted = torch.full((2, 3, words), 2 * threads)
    wanted.scatter_add_(-1, (ids // 32)[..., None], torch.ones(2, 3, 1, dtype=torch.long))
    assert torch.equal(rows(traffic.reads(mask), UNMASKED), rows(wanted, UNMASKED))
    assert not rows(traffic.reads(mask), MASKED).any() and not traffic.writes(mask).any()


@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1],
        lambda x: x[:, 1:, 1:],
        lambda x: x[..., :-3],
        lambda x: x.transpose(0, 1),
        lambda x: x[1],
    ],
    ids=["x[:, :-1]", "x[:, 1:, 1:]", "x[..., :-3]", "transposed", "packed"],
)
def test_views_touch_nothing_else(traffic: Traffic, view: Any, inplace: bool) -> None:
    vocab = BLOCK + 37
    wide = make_batch(3, 4, vocab, masked=0, inactive=0)
    leaf = wide.logits.requires_grad_()
    logits, ref_logits = view(leaf.clone()), view(wide.ref_logits)
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    ids.view(-1)[::2] = logits.shape[-1] - 1
    spec = LossSpec(Reinforce(), KL("exact"))
    out = grpo_loss(
        logits,
        ids,
        torch.ones(ids.shape),
        spec=spec,
        ref_logits=ref_logits,
        backend="triton",
        inplace=inplace,
    )
    for x in (logits, ref_logits):
        assert (without_taken(traffic.reads(x), ids) == 1 + inplace).all()
        assert traffic.stays_within(x)
    out.loss.backward()
    assert (without_taken(traffic.reads(logits), ids) == 2).all()
    assert traffic.stays_within(logits) and traffic.stays_within(ref_logits)


@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["uncapped", "softcap"])
def test_padding_columns_are_written_and_never_read(
    traffic: Traffic, softcap: float | None, inplace: bool
) -> None:
    """They are zero even in a row whose gradient is NaN."""
    given = arguments(SPECS["exact KL"], 4096 + 5)
    vocab = 4096 - 700
    given["completion_ids"] %= vocab
    logits = given.pop("logits")
    logits[0, 0, 0] = torch.nan
    ref_logits = given["ref_logits"]
    leaf = logits.requires_grad_()
    work = leaf.clone()
    out = grpo_loss(work, **given, vocab_size=vocab, logit_softcap=softcap, inplace=inplace)
    (grad,) = torch.autograd.grad(out.loss, work)
    assert grad[0, 0, :vocab].isnan().all() and grad[0, 1].isfinite().all()
    for x in (work, ref_logits):
        assert not traffic.reads(x)[..., vocab:].any() and rows(traffic.reads(x), UNMASKED)[..., :vocab].all()
    assert (traffic.writes(work if inplace else grad) == 1).all() and not grad[..., vocab:].any()


@pytest.mark.parametrize("wrong", [-100, -1, 37, 2**31, 2**40])
@pytest.mark.parametrize("inplace", [False, True], ids=["two steps", "in place"])
def test_wrong_ids_are_never_dereferenced(traffic: Traffic, wrong: int, inplace: bool) -> None:
    given = arguments(SPECS["exact KL"], 37)
    given["completion_ids"].fill_(wrong)
    logits = given.pop("logits").requires_grad_().clone()
    # `recording` fails if an address is outside of the tensors.
    grpo_loss(logits, **given, inplace=inplace).loss.backward()
    assert (traffic.reads(logits) <= 2).all()


@sizes
def test_selective_logps(traffic: Traffic, vocab: int) -> None:
    """For a row without an upstream gradient, the backward only writes zeros."""
    batch = make_batch(1, 4, vocab)
    logits, mask = batch.logits.requires_grad_(), torch.tensor([[1, 1, 1, 0]])
    logps, entropy = selective_logps(
        logits, batch.completion_ids, mask=mask, return_entropy=True, backend="triton"
    )
    assert (rows(without_taken(traffic.reads(logits), batch.completion_ids), [0, 1, 2]) == 1).all()
    assert not rows(traffic.reads(logits), [3]).any()
    traffic.reset()
    upstream = torch.tensor([[1.0, 0.0, 0.0, 1.0]]) * logps + torch.tensor([[0.0, 0.0, 2.0, 1.0]]) * entropy
    (grad,) = torch.autograd.grad(upstream.sum(), logits)
    assert (rows(traffic.reads(logits), [0, 2]) == 1).all() and not rows(traffic.reads(logits), [1, 3]).any()
    assert (traffic.writes(grad) == 1).all() and traffic.reads(grad).sum() == 0


@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def test_the_counts_can_fail(traffic: Traffic) -> None:
    x, y = torch.zeros(8), torch.zeros(1)
    with pytest.raises(Exception, match="8 reads outside of every tensor"):
        sum_kernel[(1,)](x, y, N=16)
    traffic.reset()
    sum_kernel[(2,)](x, y, N=8)
    assert (traffic.reads(x) == 2).all() and (traffic.writes(y) == 2).all() and not traffic.writes(x).any()
