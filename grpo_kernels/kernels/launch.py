"""Helpers of the launchers: block shapes, strides, compile options, and the current device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..spec import LogitTransform

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET is set. Triton reads it when a kernel is defined, so it cannot change later."""

# Strides are separate arguments of the kernels. If a stride is in a tuple with its pointer, Triton 3.7.1
# ignores `do_not_specialize` for it, and would compile a kernel again for almost every layout.
PER_ROW = (
    *("targets_ptr", "temperature_ptr", "logps_ptr", "shift_ptr", "sum_exp_ptr", "entropy_ptr"),
    *("ref_logps_ptr", "ref_shift_ptr", "ref_sum_exp_ptr", "kl_ptr", "kl_forward_ptr", "top1_ptr"),
    *("dlogp_ptr", "dentropy_ptr", "dkl_ptr", "dkl_forward_ptr", "value_ptr"),
    *("advantages_ptr", "row_weights_ptr", "old_logps_ptr", "given_ref_logps_ptr", "token_weights_ptr"),
    *("entropy_weights_ptr", "mask_ptr", "known_ptr", "sampling_mask_ptr"),
)
"""Pointers to one element per row, and to the words of a sampling mask, which are loaded one by one.

Without specialization on their alignment, every slice of a batch uses the same variant.
"""

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Blocking(NamedTuple):
    """Division of a row into blocks of BLOCK columns. A thread loads GROUP adjacent columns at once.

    The rest of the row, less than BLOCK columns, is processed TAIL columns at a time. Its loads are
    predicated per element. The predicates of a whole BLOCK would need more registers than the rest of the
    kernel.
    """

    BLOCK: int
    TAIL: int
    THREADS: int
    GROUP: int
    num_warps: int


def blocking(
    vocab: int,
    *tensors: Tensor,
    ref_logits: Tensor | None = None,
    capped: bool = False,
    sampling_mask: Tensor | None = None,
    num_warps: int = 4,
) -> Blocking:
    """Choose the division of rows for a pass over `tensors`, and over `ref_logits` if they are given.

    A block is as large as the registers allow: smaller for two rows at once, with a softcap, in fp64, for a
    small vocabulary, and for a sampling mask with GROUP = 1, which takes a word per column. GROUP is 1 if
    rows are not aligned for 16-byte loads. Otherwise such a load has GROUP elements of the narrowest tensor,
    and a thread also gets GROUP adjacent elements of each wider tensor.
    """
    given = [*tensors] if ref_logits is None else [*tensors, ref_logits]
    itemsize = min(tensor.element_size() for tensor in given)
    block = 4096 // (1 if ref_logits is None else 2) // (2 if capped else 1) // (4 if itemsize == 8 else 1)
    group = 16 // itemsize if all(map(rows_aligned, given)) else 1
    if group == 1 and sampling_mask is not None:
        block //= 2
    threads = num_warps * (32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size)
    fitting = 1 << (vocab.bit_length() - 1)
    block = max(threads * group, min(block, fitting))
    return Blocking(block, min(block, 8 * threads), threads, group, num_warps)


def rows_aligned(tensor: Tensor) -> bool:
    """Return whether every row of `[B, T, V]` starts at a multiple of 16 bytes.

    The stride of a dimension of size 1 counts too. So a single row is reduced in the same order, and to the
    same bits, as in a batch.
    """
    return tensor.data_ptr() % 16 == 0 and all(
        s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:2]
    )


@functools.cache
def compile_options() -> dict[str, bool]:
    """Return the compile options of every launch: FMA contraction, whose default depends on Triton's version.

    They are empty if this Triton would reject the option. The interpreter ignores options.
    """
    option = "enable_fp_fusion"
    if not INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if not hasattr(triton.compiler.make_backend(target).parse_options({}), option):
            return {}
    return {option: True}


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Return the batch and time strides, zeros for None."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches there. Does nothing for a CPU tensor."""
    return torch.cuda.device_of(tensor)


def transform_arguments(transform: LogitTransform) -> tuple[float, float, float, float, float]:
    """Return `temperature, scale, softcap, ref_scale, ref_softcap`, with 1 (unused) for a missing softcap."""
    return (
        transform.temperature,
        transform.scale,
        transform.softcap or 1.0,
        transform.ref_scale,
        transform.ref_softcap or 1.0,
    )


def transform_constants(transform: LogitTransform) -> dict[str, bool]:
    """Return which models have a softcap, as compile-time arguments."""
    return {"CAPPED": transform.softcap is not None, "REF_CAPPED": transform.ref_softcap is not None}
