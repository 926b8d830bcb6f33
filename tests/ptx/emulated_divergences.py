"""Distillation losses in the emulator, and their comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from distillation_cases import Case, Result, assert_parity, batch, eager, run
from option_cases import PACKED_V, PADDED_V
from parity import DTYPES
from products import on_a_grid
from torch import Tensor

from benchmarks.machine_code.cases import mixed_products
from grpo_kernels import linear_distillation_loss, pack_sampling_mask
from grpo_kernels.spec import LogitTransform
from grpo_kernels.spec.divergence import Divergence
from grpo_kernels.vocab.divergence import SMALL, divergences, gradient, terms, wanted
from grpo_kernels.vocab.rows import MASKED, Rows, as_rows


def padded(case: Case) -> Case:
    """Add padding columns, more to the teacher than to the student."""
    wide = [
        torch.cat([x, x.new_full((*x.shape[:-1], columns), value)], -1)
        for x, columns, value in ((case.logits, 5, torch.nan), (case.teacher, 9, torch.inf))
    ]
    return Case(*wide, {**case.options, "vocab_size": case.logits.shape[-1]})


def temperatures(case: Case) -> Case:
    mask = case.options["completion_mask"]
    values = torch.linspace(0.6, 1.6, mask.numel()).view(mask.shape)
    return case.with_options(temperature=values.masked_fill(~mask, torch.nan))


OPTIONS: dict[str, Callable[[Case], Case]] = {
    "softcap": lambda case: case.with_options(logit_softcap=9.0, temperature=1.2),
    "only the teacher capped": lambda case: case.with_options(ref_logit_softcap=6.0, temperature=0.9),
    "two scales": lambda case: case.with_options(logit_scale=0.6, ref_logit_scale=0.7),
    "temperature per token": temperatures,
    "vocabulary padded": padded,
}


@dataclass(frozen=True)
class Distillation:
    """A distillation from logits.

    Attributes:
        kind: "reverse_kl", "forward_kl" or "jsd".
        dtype: A name in `DTYPES`.
        option: A name in `OPTIONS`.
        near: Whether the models nearly agree, so that a KL takes the pass without cancellation. In column 5
            they do not.
        packed: Whether the batch is packed. Its rows are then not aligned, and those of others are.
        dropped: Whether a sampling mask drops columns, which hold NaN in either model.
        inplace: An option of `distillation_loss`.
        size: Number of columns, if another than that of option_cases.py.
    """

    kind: str
    dtype: str = "fp32"
    option: str | None = None
    near: bool = False
    packed: bool = False
    dropped: bool = False
    inplace: bool = False
    size: int | None = None

    def kept(self, shape: tuple[int, ...]) -> Tensor:
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        kept[..., 5] = True
        return kept

    def case(self) -> Case:
        size = self.size or (PACKED_V if self.packed else PADDED_V)
        distance = 0.02 if self.near else 1.0
        case = batch(DTYPES[self.dtype], kind=self.kind, packed=self.packed, vocab=size, distance=distance)
        if self.near and size > 5:
            case.logits[..., 5], case.teacher[..., 5] = 1.75, 4.0
        if self.dropped:
            kept = self.kept(tuple(case.logits.shape))
            case.logits[..., 1:4].masked_fill_(~kept[..., 1:4], torch.nan)
            case.teacher[..., 6:9].masked_fill_(~kept[..., 6:9], torch.nan)
            case = case.with_options(sampling_mask=pack_sampling_mask(kept))
        return case if self.option is None else OPTIONS[self.option](case)

    def run(self) -> Result:
        return run(self.case(), return_entropy=True, backend="triton", inplace=self.inplace)

    def check(self, *, approximate: bool) -> None:
        case = self.case()
        got = assert_parity(case, backend="triton", inplace=self.inplace, what=self.kind)
        assert (float(got.out.loss.detach()) < SMALL) == self.near
        if self.dropped:
            dropped = ~self.kept(tuple(got.grad.shape))
            assert not got.grad[dropped].any(), "gradient of dropped columns"


@dataclass(frozen=True)
class LinearDistillation:
    """A distillation from bf16 hidden states. Their products are fp32 logits, and exact (products.py)."""

    kind: str

    def tensors(self) -> list[Tensor]:
        """Return hidden states and weight of the student, and then of the teacher."""
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 3, 16), (PADDED_V, 16), (2, 3, 12), (PADDED_V, 12)
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        return [on_a_grid(x).bfloat16() for x in drawn]

    def run(self) -> tuple[Tensor, ...]:
        """Return the loss and the gradients of hidden states and weight."""
        hidden, weight, teacher_hidden, teacher_weight = self.tensors()
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        with mixed_products:
            out = linear_distillation_loss(
                *leaves,
                teacher_hidden=teacher_hidden,
                teacher_lm_head_weight=teacher_weight,
                divergence=self.kind,  # type: ignore[arg-type]
                chunk_tokens=4,
                backend="triton",
            )
            return (out.loss.detach(), *torch.autograd.grad(out.loss, leaves))

    def check(self, *, approximate: bool) -> None:
        """Each entry of the gradients may err by two roundings to bf16 of the terms of its sum."""
        hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in self.tensors())
        options = {"divergence": self.kind}
        truth = eager(Case(hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), options))
        loss, *grads = self.run()
        torch.testing.assert_close(loss.double(), truth.out.loss.detach(), rtol=1e-5, atol=0)
        rows, tokens = truth.grad.flatten(0, 1), hidden.flatten(0, 1)
        products = (
            (rows @ weight, rows.abs() @ weight.abs()),
            (rows.t() @ tokens, rows.abs().t() @ tokens.abs()),
        )
        for got, (exact, size) in zip(grads, products, strict=True):
            error = (got.double().view(exact.shape) - exact).abs()
            assert bool((error <= 2 * torch.finfo(torch.bfloat16).eps * size).all()), (
                "the error of a gradient"
            )


@dataclass(frozen=True)
class Parts:
    """The columns of a vocabulary that is split over ranks, without the communication.

    Each part gets the sums of the whole rows. Its values add up, and its gradient is that of the whole.
    """

    kind: str
    starts: tuple[int, ...] = (0, 8, 520, PADDED_V)

    def run(self) -> dict[str, Tensor]:
        case = batch(kind=self.kind, vocab=PADDED_V)
        targets = torch.where(case.options["completion_mask"].flatten(), PADDED_V, MASKED)
        transform = LogitTransform(PADDED_V)
        models = as_rows(case.logits), as_rows(case.teacher)
        rows = Rows(*models, targets, None, None, None, transform, "triton")
        spec = Divergence(self.kind, 0.3)  # type: ignore[arg-type]
        whole = divergences(rows, spec, wanted(spec, entropy=False, shard=None))
        coefficient = torch.linspace(-1, 2, len(targets))
        grad, of_parts = torch.empty_like(case.logits), torch.zeros_like(case.logits)
        gradient(rows, whole.sums, whole.slope, coefficient, spec, grad)
        total = torch.zeros_like(whole.value)
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            part = rows._replace(
                logits=rows.logits[..., start:stop],
                ref_logits=models[1][..., start:stop],
                transform=replace(transform, vocab_size=stop - start),
            )
            value, slope = torch.empty_like(total), torch.empty_like(total)
            terms(part, whole.sums, targets != MASKED, spec, value, slope)
            total += value
            gradient(part, whole.sums, whole.slope, coefficient, spec, of_parts[..., start:stop])
        return {"value": whole.value, "sum": total, "gradient": grad, "gradients of parts": of_parts}

    def check(self, *, approximate: bool) -> None:
        got: dict[str, Any] = self.run()
        assert bool(got["value"].any()) and bool(got["gradient"].any())
        torch.testing.assert_close(got["sum"], got["value"], rtol=1e-5, atol=0)
        largest = float(got["gradient"].abs().max())
        torch.testing.assert_close(got["gradients of parts"], got["gradient"], rtol=1e-5, atol=1e-6 * largest)
