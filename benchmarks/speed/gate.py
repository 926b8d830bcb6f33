"""Compares loss and gradients of a provider with fp64. A provider with a wrong result is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..work.batch import Batch, exact_dlogits, row_chunks
from ..work.providers import Provider

# Bounds of the relative error of the loss, and of each gradient in L2, by form and bytes of the dtype. In the
# linear form, eager PyTorch rounds logits to bf16, which changes a log-probability by a few hundredths.
TOLERANCE = {("logits", 2): 1e-2, ("linear", 2): 5e-2, ("logits", 4): 1e-4, ("linear", 4): 1e-3}
# Bound of the worst row's error, relative to the norm of this row or of a typical row, whichever is larger.
# A completely wrong row has an error of about 1 here, and hardly changes the error of the whole gradient.
ROW_TOLERANCE = 0.25


class Verdict(NamedTuple):
    error: float  # of the worst row of any gradient
    wrong: str | None  # why the provider is wrong, or None


class Errors(NamedTuple):
    """Norms of some rows of a gradient."""

    error: Tensor  # [rows], of the difference from fp64
    truth: Tensor  # [rows], of the gradient in fp64


def check(provider: Provider, batch: Batch) -> Verdict:
    inputs = provider.inputs(batch)
    loss = provider.loss(batch, *inputs)
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(loss, wanted)
    tolerance = TOLERANCE[batch.work.form, batch.work.dtype.itemsize]

    loss_error = float((loss.detach().double() - batch.truth.loss).abs() / batch.truth.token_loss)
    found = {"loss": loss_error}
    worst = [torch.zeros((), dtype=torch.float64, device=loss.device)]
    for name, chunks in differences(batch, gradients):
        norms = [Errors(*(x.norm(dim=-1) for x in (got.double() - truth, truth))) for got, truth in chunks]
        error, truth = (torch.cat(part) for part in zip(*norms, strict=True))
        # The mean norm, weighted by the norm, because most rows of a head's gradient are tiny.
        typical = truth.square().sum() / truth.sum()
        found[name] = float(error.norm() / truth.norm())
        worst.append((error / truth.clamp(min=typical)).max())
    worst_row = float(torch.stack(worst).max())  # NaN if any row has a NaN
    wrong = [f"{name} errs {x:.1e}" for name, x in found.items() if not x <= tolerance]
    if not wrong and not worst_row <= ROW_TOLERANCE:
        wrong = [f"a row of a gradient errs {worst_row:.1e}"]
    return Verdict(worst_row, ", ".join(wrong) or None)


def differences(
    batch: Batch, gradients: tuple[Tensor, ...]
) -> Iterator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]:
    """Yields each gradient's name and its chunks, as pairs of computed and exact rows."""
    if batch.logits is not None:
        (dlogits,) = gradients
        chunks = row_chunks(*batch.ids.shape, batch.work.V)
        yield "dlogits", ((dlogits[b, rows], exact_dlogits(batch, b, rows)) for b, rows in chunks)
        return
    for name, got in zip(("dhidden", "dweight"), gradients, strict=False):  # a frozen head has no gradient
        truth = getattr(batch.truth, name)
        yield name, iter([(got.flatten(0, -2), truth.double().flatten(0, -2))])
