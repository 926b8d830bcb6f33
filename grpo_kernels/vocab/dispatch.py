"""Chooses between the Triton kernels and PyTorch. Both compute the same statistics and gradients of rows.

If a call is `traced`, `row_stats` and `dlogits` are opaque operators.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..checks.choices import BACKENDS, Backend
from ..checks.scalars import check_choice
from ..checks.tensors import traced
from ..tokens.dispatch import kernel_loss
from ..tokens.loss import BatchLoss
from ..tokens.statistics import Coefficients, RowStats
from . import token_ids, torch_backend
from .operators import ROWS, flatten_rows, pack_fields, register, unflatten_rows, unpack_fields
from .rows import FusedOutput, Rows

HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(backend: Backend, logits: Tensor) -> str:
    """Return "triton" or "torch". Raise ValueError if the backend that was asked for cannot run."""
    check_choice("backend", backend, BACKENDS)
    on_gpu = logits.is_cuda  # also true for ROCm
    if backend == "auto":
        return "triton" if on_gpu and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError("backend='triton', but the triton package is not installed")
        from ..kernels.launch import INTERPRETED

        # Tensors on "meta" stand for those of a GPU that kernels are compiled for.
        if not (on_gpu or logits.is_meta or INTERPRETED):
            raise ValueError(
                f"backend='triton' needs GPU tensors, got logits on {logits.device}; with "
                "TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter"
            )
    return backend


def row_stats(rows: Rows, out: RowStats) -> None:
    """Fill `out` with the statistics of every row. Masked rows are not read and get zeros."""
    if not traced(rows.logits):
        fill_row_stats(rows, out)
        return
    names, tensors = pack_fields(out)
    ops.row_stats(tensors, names, *flatten_rows(rows))


def dlogits(rows: Rows, stats: RowStats, coefficients: Coefficients, out: Tensor) -> None:
    """Fill `out` `[B, T, V]`, which may be the logits, with the gradient.

    Rows whose coefficients are all zero are not read and get zeros. `stats` include shifts and sums.
    """
    if not traced(rows.logits):
        fill_dlogits(rows, stats, coefficients, out)
        return
    names, tensors = pack_fields(stats, coefficients)
    ops.dlogits(out, tensors, names, *flatten_rows(rows))


def fused_loss(rows: Rows, loss: BatchLoss, out: FusedOutput) -> None:
    """Fill `out` with statistics, loss and gradient, if the loss does not couple tokens."""
    if rows.num_rows == 0:
        return
    if rows.backend == "torch":
        torch_backend.fused_loss(rows, loss, out)
        return
    from ..kernels import fused

    fused.fused_loss(rows, kernel_loss(loss.spec), loss.inputs, out)


def scale_rows(x: Tensor, factor: Tensor, backend: str) -> None:
    """Multiply `x` by `factor` in place, on a GPU without a sync. Kernel and CPU skip a factor of 1."""
    if x.numel() == 0:
        return
    if backend == "torch":
        if x.device.type != "cpu" or factor != 1:
            x.mul_(factor)
        return
    from ..kernels import fused

    fused.scale_rows(x, factor)


def fill_row_stats(rows: Rows, out: RowStats) -> None:
    """Run `row_stats` on the backend of `rows`."""
    if rows.num_rows == 0:
        return
    if rows.transform.vocab_size == 0:  # an empty part of a vocabulary that is split over ranks
        for name, x in zip(out._fields, out):
            if x is not None:
                x.fill_(torch.finfo(x.dtype).min if name.endswith("shift") else 0.0)
        return
    if rows.ids is not None:
        taken = token_ids.taken_logits(rows)
        fill_row_stats(token_ids.with_likeliest(rows, taken), out._replace(id_logps=None))
        token_ids.write_logps(rows, taken, out)
        return
    if rows.backend == "torch":
        torch_backend.row_stats(rows, out)
        return
    from ..kernels import row_stats

    row_stats.row_stats(rows, out)


def fill_dlogits(rows: Rows, stats: RowStats, coefficients: Coefficients, out: Tensor) -> None:
    """Run `dlogits` on the backend of `rows`."""
    if rows.num_rows == 0:
        return
    if rows.transform.vocab_size == 0:
        out.zero_()
        return
    if rows.ids is not None:
        taken = token_ids.taken_logits(rows)  # before `out`, which may be the logits, is written
        others = token_ids.with_target(rows, rows.transform.vocab_size)
        fill_dlogits(others, stats, token_ids.of_rows(coefficients), out)
        token_ids.write_entries(rows, taken, stats, coefficients, out)
        return
    if rows.backend == "torch":
        torch_backend.dlogits(rows, stats, coefficients, out)
        return
    from ..kernels import dlogits

    dlogits.dlogits(rows, stats, coefficients, out)


# --- Operators, which `row_stats` and `dlogits` call if a call is traced. ---


def row_stats_operator(out: Sequence[Tensor], names: str, *rows: Any) -> None:
    fill_row_stats(unflatten_rows(*rows), unpack_fields(names, out)[0])


def dlogits_operator(out: Tensor, known: Sequence[Tensor], names: str, *rows: Any) -> None:
    fill_dlogits(unflatten_rows(*rows), *unpack_fields(names, known), out)


register("row_stats", row_stats_operator, f"Tensor(a!)[] out, str names, {ROWS}")
register("dlogits", dlogits_operator, f"Tensor(a!) out, Tensor[] known, str names, {ROWS}")
