"""The kernels of the divergences read and write each element as often as documented, and nothing else.

Triton's interpreter shows every address. Compiled kernels execute the same loads and stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="addresses are recorded in Triton's interpreter (TRITON_INTERPRET=1)",
)
pytest.importorskip("triton")

from benchmarks.traffic.addresses import Traffic, recording  # noqa: E402
from grpo_kernels import distillation_loss, pack_sampling_mask  # noqa: E402

BLOCK = 512  # the smallest block of the kernels, for fp32
# Less than a block, one block, and several blocks with a tail, which is processed 1024 columns at a time.
sizes = pytest.mark.parametrize("vocab", [37, BLOCK, 4096 + 1029, 4096 + 1032])
# Passes over both rows in the forward, for rows that differ and for nearly equal ones.
PASSES = {"reverse_kl": (1, 2), "forward_kl": (1, 2), "jsd": (2, 2)}
kinds = pytest.mark.parametrize("kind", PASSES)
MASK = torch.tensor([[1, 1, 0], [1, 1, 0]])
UNMASKED, MASKED = [0, 1, 3, 4], [2, 5]


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    with recording() as seen:
        yield seen


def models(vocab: int, distance: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    student, noise = (torch.randn(2, 3, vocab, generator=generator) for _ in range(2))
    return student.requires_grad_(), student.detach() + distance * noise


def rows(counts: Tensor, index: list[int]) -> Tensor:
    return counts.flatten(0, -2)[index]


@sizes
@kinds
@pytest.mark.parametrize("near", [False, True], ids=["rows that differ", "nearly equal rows"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new gradient", "in place"])
def test_forward_and_backward(traffic: Traffic, kind: str, near: bool, inplace: bool, vocab: int) -> None:
    """A JSD, and a KL of nearly equal rows, takes two passes in the forward. Masked rows are never read."""
    leaf, teacher = models(vocab, 0.01 if near else 1.0)
    logits = leaf.clone()
    out = distillation_loss(
        logits,
        teacher_logits=teacher,
        divergence=kind,  # type: ignore[arg-type]
        completion_mask=MASK,
        inplace=inplace,
        backend="triton",
    )
    for x in (logits, teacher):
        assert (rows(traffic.reads(x), UNMASKED) == PASSES[kind][near]).all()
        assert not rows(traffic.reads(x), MASKED).any() and not traffic.writes(x).any()

    traffic.reset()
    (grad,) = torch.autograd.grad(out.loss, logits)
    for x in (logits, teacher):
        assert (rows(traffic.reads(x), UNMASKED) == 1).all() and not rows(traffic.reads(x), MASKED).any()
    assert (traffic.writes(logits if inplace else grad) == 1).all() and not traffic.writes(teacher).any()


@kinds
def test_a_sure_student_takes_two_passes(traffic: Traffic, kind: str) -> None:
    """A reverse KL of a student that is sure of its token is computed again. A forward KL is not."""
    logits, teacher = models(BLOCK, 1.0)
    with torch.no_grad():
        logits[0, 0, 3] += 20
    out = distillation_loss(logits, teacher_logits=teacher, divergence=kind, backend="triton")  # type: ignore[arg-type]
    assert out.loss.requires_grad
    assert (rows(traffic.reads(logits), [0]) == (1 if kind == "forward_kl" else 2)).all()
    assert (rows(traffic.reads(logits), [1]) == PASSES[kind][0]).all()


@sizes
@kinds
def test_a_sampling_mask_is_read_once_per_pass(traffic: Traffic, kind: str, vocab: int) -> None:
    """Each thread reads the word of its columns. Neighbors share a word, and a warp requests it once."""
    logits, teacher = models(vocab, 1.0)
    keep = torch.rand(2, 3, vocab, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[..., :2] = True
    mask = pack_sampling_mask(keep)
    distillation_loss(
        logits,
        teacher_logits=teacher,
        divergence=kind,  # type: ignore[arg-type]
        completion_mask=MASK,
        sampling_mask=mask,
        backend="triton",
    ).loss.backward()
    threads = 32 // (4 if vocab % 4 == 0 else 1)  # that share a word
    assert (rows(traffic.reads(mask), UNMASKED) == threads * (PASSES[kind][0] + 1)).all()
    assert not rows(traffic.reads(mask), MASKED).any() and not traffic.writes(mask).any()


@kinds
def test_views_and_padding(traffic: Traffic, kind: str) -> None:
    """Padding columns are written and never read. What lies between the rows of a view is not touched."""
    vocab, width = BLOCK + 37, BLOCK + 48
    wide, teacher = (torch.randn(3, 4, width + n).requires_grad_() for n in (8, 16))
    view = wide.clone()[:, 1:, 4 : width + 4]
    reference = teacher.detach()[:, :-1]
    out = distillation_loss(
        view,
        teacher_logits=reference,
        divergence=kind,  # type: ignore[arg-type]
        vocab_size=vocab,
        inplace=True,
        backend="triton",
    )
    out.loss.backward()
    for x in (view, reference):
        reads = traffic.reads(x)
        assert reads[..., :vocab].all() and not reads[..., vocab:].any()
        assert traffic.stays_within(x)
    assert (traffic.writes(view) == 1).all() and not view[..., vocab:].any()
