"""Launches the split kernel in the place of `fused_loss`, by a plan of parts, chunks and registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from grpo_kernels.kernels import fused
from grpo_kernels.kernels.device import (
    KL_ESTIMATORS,
)
from grpo_kernels.kernels.launch import compile_options, on_device_of, row_strides, rows_aligned
from grpo_kernels.kernels.token_loss import loss_arguments

from .kernel import LANES, split_loss_kernel

SLICE_UNIT = 64  # elements; a slice of any dtype starts at a whole 128-byte line of its row
REGISTERS = 65536  # of a multiprocessor


class Plan(NamedTuple):
    """How rows are split over blocks."""

    PARTS: int
    CHUNKS: int  # of a slice, each with one 16-byte load per thread
    BLOCK: int
    THREADS: int
    GROUP: int
    PREFETCH: bool
    num_warps: int
    maxnreg: int  # registers per thread: so few that the whole grid is resident
    groups: int  # of PARTS blocks each


def plan_for(
    logits: Tensor,
    vocab_size: int,
    kinds: int,
    *,
    prefetch: bool = False,
    held_bytes: int | None = None,
    registers: int | None = None,
) -> Plan:
    """For the current GPU. A thread holds up to `held_bytes` of each row, and has so many `registers`.

    The defaults are what compiles without spills. Less is held where a row does not begin on 16 bytes (a
    register holds one logit then), and of the next row where that is loaded beside a reference.
    """
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    if target.backend != "cuda":
        # Of a volatile load Triton's AMD backend makes a plain one, which never sees another block's word.
        raise ValueError("split_fused_loss needs an NVIDIA GPU")
    multiprocessors = driver.utils.get_device_properties(driver.get_current_device())["multiprocessor_count"]
    itemsize = logits.element_size()
    aligned = rows_aligned(logits) and vocab_size * itemsize % 16 == 0
    held = (held_bytes or (128 if aligned and not (prefetch and kinds > 1) else 64)) // itemsize
    # A warp has a lane for each part's word, and one for the taken token's.
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
    """Equal slices: a short last one would leave its multiprocessor idle."""
    return triton.cdiv(triton.cdiv(vocab_size, parts), SLICE_UNIT) * SLICE_UNIT


def split_fused_loss(
    out: Tensor,  # [B, T, V]; logits itself
    logits: Tensor,  # [B, T, V] bf16 or fp32; any batch and time stride
    targets: Tensor,  # [B * T] int64; MASKED: the row is not read and its gradient is zero
    value: Tensor,  # the row's share of the loss; [B * T] fp32, as all that is per token
    dlogp: Tensor,
    logps: Tensor,
    entropy: None,
    ref_logps: Tensor | None,
    kl: Tensor | None,  # where None: not computed
    kl_forward: None,
    advantages: Tensor,
    row_weights: Tensor,
    old_logps: Tensor | None,
    given_ref_logps: Tensor | None,
    token_weights: Tensor | None,
    entropy_weights: None,
    *,
    ref_logits: Tensor | None,
    temperatures: Tensor | None,
    vocab_size: int,
    scale: float,
    softcap: None,
    ref_scale: float,
    ref_softcap: None,
    temperature: float,
    plan: Callable[[Tensor, int, int], Plan] = plan_for,
    **loss: Any,  # see `token_loss.loss_arguments`
) -> None:
    """In the place of `grpo_kernels.kernels.fused.fused_loss`, where that works in place.

    Raises ValueError for what it does not do: another `out`, fp16, fp64, softcap, entropy, an exact KL in
    the loss; and for a GPU other than NVIDIA's.
    """
    kl_kind = loss["kl_kind"]
    unsupported = {
        "out, other than logits": (out.data_ptr(), out.stride(), out.dtype)
        != (logits.data_ptr(), logits.stride(), logits.dtype),
        str(logits.dtype): logits.dtype not in (torch.bfloat16, torch.float32),
        "softcap": softcap is not None or ref_softcap is not None,
        "ref_logits, aligned otherwise than logits": ref_logits is not None
        and rows_aligned(ref_logits) != rows_aligned(logits),
        "entropy": entropy is not None or entropy_weights is not None,
        "kl_forward": kl_forward is not None,
        f"kl_kind {kl_kind!r}": kl_kind not in (None, *KL_ESTIMATORS),
    }
    for name, given in unsupported.items():
        if given:
            raise ValueError(f"split_fused_loss does not support {name}")
    numbers, loss_shape = loss_arguments(**loss)
    with on_device_of(logits):
        rows = targets.numel()
        kinds = 1 if ref_logits is None else 2 if kl is None else 3
        planned = plan(logits, vocab_size, kinds)
        words = torch.zeros(rows * kinds * (planned.PARTS + 1), dtype=torch.int64, device=logits.device)
        split_loss_kernel[(planned.PARTS * min(planned.groups, rows),)](
            logits, *row_strides(logits),
            ref_logits, *row_strides(ref_logits),
            words, targets, temperatures,
            advantages, row_weights, old_logps, given_ref_logps, token_weights,
            value, dlogp, logps, ref_logps, kl,
            rows, logits.shape[1], vocab_size, logits.shape[2], slice_length(vocab_size, planned.PARTS),
            temperature, scale, ref_scale,
            *numbers, **loss_shape,
            PAIRS=logits.dtype == torch.bfloat16 and planned.GROUP > 1, KINDS=kinds,
            PREFETCH=planned.PREFETCH, PARTS=planned.PARTS,
            CHUNKS=planned.CHUNKS, BLOCK=planned.BLOCK, THREADS=planned.THREADS, GROUP=planned.GROUP,
            num_warps=planned.num_warps, num_stages=1, maxnreg=planned.maxnreg, launch_cooperative_grid=True,
            **compile_options(),
        )  # fmt: skip


def in_place_of_fused(**options: Any) -> Any:
    """Within: `grpo_loss(inplace=True)` runs this kernel, by `plan_for(..., **options)`."""
    split = partial(split_fused_loss, plan=partial(plan_for, **options))
    return mock.patch.object(fused, "fused_loss", split)


VARIANTS: dict[str, dict[str, Any]] = {
    "split": {},
    "split, more parts": {"held_bytes": 96, "registers": 96},
    "split, prefetch": {"prefetch": True},
}
