"""No speed for a wrong answer: loss and gradients against fp64, on the very batch that is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..work.batch import Batch, exact_dlogits, row_chunks
from ..work.providers import Provider

# Relative L2 error of the loss and of each gradient as a whole. bf16 logits that were multiplied and rounded
# before the loss saw them (the linear form in eager PyTorch) cost a log-probability a few hundredths.
TOLERANCE = {("logits", 2): 1e-2, ("linear", 2): 5e-2, ("logits", 4): 1e-4, ("linear", 4): 1e-3}
# And of the worst row, over its own norm or that of a typical row, whichever is larger: a row that is wrong
# altogether shows about 1, and hardly at all in the whole.
ROW_TOLERANCE = 0.25


class Verdict(NamedTuple):
    error: float  # of the worst row of a gradient
    wrong: str | None  # why the provider is not to be timed


class Errors(NamedTuple):
    """Of one gradient. Squares are summed over a chunk of its rows."""

    error: Tensor  # [rows] norms
    truth: Tensor  # [rows]


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
        # The mean norm, weighted by itself: most rows of a head's gradient are next to nothing.
        typical = truth.square().sum() / truth.sum()
        found[name] = float(error.norm() / truth.norm())
        worst.append((error / truth.clamp(min=typical)).max())
    worst_row = float(torch.stack(worst).max())  # NaN, if there is one
    wrong = [f"{name} errs {x:.1e}" for name, x in found.items() if not x <= tolerance]
    if not wrong and not worst_row <= ROW_TOLERANCE:
        wrong = [f"a row of a gradient errs {worst_row:.1e}"]
    return Verdict(worst_row, ", ".join(wrong) or None)


def differences(
    batch: Batch, gradients: tuple[Tensor, ...]
) -> Iterator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]:
    """For each gradient its rows beside the true ones, a chunk at a time."""
    if batch.logits is not None:
        (dlogits,) = gradients
        chunks = row_chunks(*batch.ids.shape, batch.work.V)
        yield "dlogits", ((dlogits[b, rows], exact_dlogits(batch, b, rows)) for b, rows in chunks)
        return
    for name, got in zip(("dhidden", "dweight"), gradients, strict=False):  # a frozen head has none
        truth = getattr(batch.truth, name)
        yield name, iter([(got.flatten(0, -2), truth.double().flatten(0, -2))])
