"""What every launcher needs: block shapes, strides, and the tensor's own device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET, which Triton heeds when a kernel is defined: this holds for the life of the process."""

PER_ROW = (
    *("targets_ptr", "temperature_ptr", "logps_ptr", "shift_ptr", "sum_exp_ptr", "entropy_ptr"),
    *("ref_logps_ptr", "ref_shift_ptr", "ref_sum_exp_ptr", "kl_ptr", "kl_forward_ptr", "top1_ptr"),
    *("dlogp_ptr", "dentropy_ptr", "dkl_ptr", "dkl_forward_ptr", "value_ptr"),
    *("advantages_ptr", "row_weights_ptr", "old_logps_ptr", "given_ref_logps_ptr", "token_weights_ptr"),
    *("entropy_weights_ptr", "mask_ptr", "ran_ptr"),
)
"""Of these a program takes one element: alignment is of no use, and any slice of a batch has one variant."""

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Blocking(NamedTuple):
    """How a row is cut: BLOCK columns at a time, of which a thread holds GROUP neighbours in one load.

    What is left of the row, less than BLOCK, comes TAIL columns at a time: its elements are predicated one by
    one, and as many of them as a block has would take more registers than all else in a kernel.
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
    num_warps: int = 4,
) -> Blocking:
    """For a pass over `tensors`, and over the reference where it is given.

    A block is as large as its registers allow: smaller for two rows at once, under a softcap and in fp64. A
    small vocabulary takes smaller ones. GROUP is 1 where rows are not aligned for 16-byte loads, else what
    such a load holds of the narrowest tensor: Triton gives a thread as many neighbours of wider ones.
    """
    given = [*tensors] if ref_logits is None else [*tensors, ref_logits]
    itemsize = min(tensor.element_size() for tensor in given)
    block = 4096 // (1 if ref_logits is None else 2) // (2 if capped else 1) // (4 if itemsize == 8 else 1)
    group = 16 // itemsize if all(map(rows_aligned, given)) else 1
    threads = num_warps * (32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size)
    fitting = 1 << (vocab.bit_length() - 1)
    block = max(threads * group, min(block, fitting))
    return Blocking(block, min(block, 8 * threads), threads, group, num_warps)


def rows_aligned(tensor: Tensor) -> bool:
    """Whether every row of `[B, T, V]` starts at a multiple of 16 bytes.

    The stride of a dimension of one counts too: a row by itself is then reduced in the order, and so to the
    bits, of the same row in a batch.
    """
    return tensor.data_ptr() % 16 == 0 and all(
        s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:2]
    )


@functools.cache
def compile_options() -> dict[str, bool]:
    """Options of every launch. They ask for FMA contraction, whose default differs between Triton's versions.

    Empty if this Triton does not have the option, because it would reject it. The interpreter drops options.
    """
    option = "enable_fp_fusion"
    if not INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if not hasattr(triton.compiler.make_backend(target).parse_options({}), option):
            return {}
    return {option: True}


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's. Does nothing for a tensor off the GPU."""
    return torch.cuda.device_of(tensor)
