"""Launches the split kernel in place of `fused_loss`, and plans how to split rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from grpo_kernels.kernels import fused
from grpo_kernels.kernels.kl import ESTIMATORS
from grpo_kernels.kernels.launch import compile_options, on_device_of, row_strides, rows_aligned
from grpo_kernels.kernels.token_loss import KernelLoss
from grpo_kernels.tokens.inputs import TokenInputs
from grpo_kernels.vocab.rows import FusedOutput, Rows

from .kernel import LANES, split_loss_kernel

SLICE_UNIT = 64  # elements; slices of any dtype start at a multiple of 128 bytes in their row
REGISTERS = 65536  # per multiprocessor


class Plan(NamedTuple):
    """How rows are split over blocks. The names in capitals are the kernel's constants."""

    PARTS: int
    CHUNKS: int  # per slice; each takes one 16-byte load per thread
    BLOCK: int
    THREADS: int
    GROUP: int
    PREFETCH: bool
    num_warps: int
    maxnreg: int  # registers per thread, few enough for the whole grid to be resident
    groups: int  # each has PARTS blocks


def plan_for(
    logits: Tensor,
    vocab_size: int,
    kinds: int,
    *,
    prefetch: bool = False,
    held_bytes: int | None = None,
    registers: int | None = None,
) -> Plan:
    """A plan for the current GPU. A thread has `registers` registers and holds up to `held_bytes` of a row.

    The defaults compile without spills. A thread holds less if rows are not aligned to 16 bytes, because a
    register then holds one logit, and if the next row is loaded in addition to reference logits.
    """
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    if target.backend != "cuda":
        # Triton's AMD backend compiles a volatile load to a plain one, which never sees another block's word.
        raise ValueError("split_fused_loss needs an NVIDIA GPU")
    multiprocessors = driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]
    itemsize = logits.element_size()
    aligned = rows_aligned(logits) and vocab_size * itemsize % 16 == 0
    held = (held_bytes or (128 if aligned and not (prefetch and kinds > 1) else 64)) // itemsize
    # A warp needs a lane for the word of each part, and one for that of the taken token.
    fitting = (w for w in (4, 8, 16) if triton.cdiv(vocab_size, 32 * w * held) < LANES.value)
    num_warps = next(fitting, None)
    if num_warps is None:
        raise ValueError(f"vocab_size is {vocab_size}: more than {LANES.value - 1} blocks can hold")
    threads = 32 * num_warps
    parts = triton.cdiv(vocab_size, threads * held)
    block = threads * 16 // itemsize
    crowded = prefetch or kinds == 3 or not aligned or target.arch >= 100
    registers = registers or (128 if crowded else 96)
    return Plan(
        PARTS=parts,
        CHUNKS=triton.cdiv(slice_length(vocab_size, parts), block),
        BLOCK=block,
        THREADS=threads,
        GROUP=16 // itemsize if aligned else 1,
        PREFETCH=prefetch,
        num_warps=num_warps,
        maxnreg=registers,
        groups=multiprocessors * (REGISTERS // (registers * threads)) // parts,
    )


def slice_length(vocab_size: int, parts: int) -> int:
    """The columns of a slice. Slices are equal, because a short one would leave its multiprocessor idle."""
    return triton.cdiv(triton.cdiv(vocab_size, parts), SLICE_UNIT) * SLICE_UNIT


def split_fused_loss(
    rows: Rows,
    loss: KernelLoss,
    inputs: TokenInputs,
    out: FusedOutput,
    *,
    plan: Callable[[Tensor, int, int], Plan] = plan_for,
) -> None:
    """Does the same as `fused_loss` of this package when that works in place.

    Raises:
        ValueError: For what is not supported: an `out` other than the logits, fp16, fp64, softcap, entropy,
            an exact KL in the loss, and GPUs not from NVIDIA.
    """
    logits, ref_logits, stats, transform = rows.logits, rows.ref_logits, out.stats, rows.transform
    target = out.dlogits
    unsupported = {
        "out, other than logits": (target.data_ptr(), target.stride(), target.dtype)
        != (logits.data_ptr(), logits.stride(), logits.dtype),
        str(logits.dtype): logits.dtype not in (torch.bfloat16, torch.float32),
        "softcap": transform.softcap is not None or transform.ref_softcap is not None,
        "ref_logits, aligned otherwise than logits": ref_logits is not None
        and rows_aligned(ref_logits) != rows_aligned(logits),
        "entropy": stats.entropy is not None or inputs.entropy_weights is not None,
        "kl_forward": stats.kl_forward is not None,
        f"kl_kind {loss.kl_kind!r}": loss.kl_kind not in (None, *ESTIMATORS),
    }
    for name, given in unsupported.items():
        if given:
            raise ValueError(f"split_fused_loss does not support {name}")
    with on_device_of(logits):
        count = rows.num_rows
        kinds = 1 if ref_logits is None else 2 if stats.kl is None else 3
        planned = plan(logits, transform.vocab_size, kinds)
        words = torch.zeros(count * kinds * (planned.PARTS + 1), dtype=torch.int64, device=logits.device)
        split_loss_kernel[(planned.PARTS * min(planned.groups, count),)](
            logits, *row_strides(logits),
            ref_logits, *row_strides(ref_logits),
            words, rows.targets, rows.temperatures,
            inputs.advantages, inputs.row_weights, inputs.old_logps, inputs.ref_logps, inputs.token_weights,
            out.value, out.dlogp, stats.logps, stats.ref_logps, stats.kl,
            count, logits.shape[1], transform.vocab_size, logits.shape[2],
            slice_length(transform.vocab_size, planned.PARTS),
            transform.temperature, transform.scale, transform.ref_scale,
            *loss.numbers, **loss.constants,
            PAIRS=logits.dtype == torch.bfloat16 and planned.GROUP > 1, KINDS=kinds,
            PREFETCH=planned.PREFETCH, PARTS=planned.PARTS,
            CHUNKS=planned.CHUNKS, BLOCK=planned.BLOCK, THREADS=planned.THREADS, GROUP=planned.GROUP,
            num_warps=planned.num_warps, num_stages=1, maxnreg=planned.maxnreg, launch_cooperative_grid=True,
            **compile_options(),
        )  # fmt: skip


def in_place_of_fused(**options: Any) -> Any:
    """Inside, `grpo_loss(inplace=True)` launches this kernel with `plan_for(..., **options)`."""
    split = partial(split_fused_loss, plan=partial(plan_for, **options))
    return mock.patch.object(fused, "fused_loss", split)


VARIANTS: dict[str, dict[str, Any]] = {
    "split": {},
    "split, more parts": {"held_bytes": 96, "registers": 96},
    "split, prefetch": {"prefetch": True},
}
