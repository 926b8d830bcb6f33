"""Compiles the split kernel without a GPU, and tabulates its resources."""

from __future__ import annotations

import itertools
from typing import Any

from ...machine_code.figures import constants
from ...machine_code.no_gpu import TARGETS, launches_for
from ...machine_code.resources import resources
from ...tables.markdown import markdown
from ...work.batch import empty_batch
from ...work.providers import PROVIDERS, ours_inplace
from ...work.workload import Workload
from .launch import REGISTERS, VARIANTS, in_place_of_fused, slice_length

WORK = [Workload("logits", loss, 16384, V) for loss in ("grpo", "grpo_kl") for V in (32000, 128256, 151936)]


def compiled(work: Workload, target: str, **options: Any) -> Any:
    """The kernel that a workload launches, compiled for a target without a GPU."""
    batch = empty_batch(work, "meta")
    (leaf,) = PROVIDERS["logits"]["grpo_kernels"].inputs(batch)
    with launches_for(TARGETS[target]) as kernels, in_place_of_fused(**options):
        ours_inplace(batch, leaf * 1, backend="triton")
    return kernels[0]


def print_resources() -> None:
    """Prints a line for each variant, workload and target."""
    lines = []
    targets = ("sm_80", "sm_90", "sm_100")
    for (name, options), work, target in itertools.product(VARIANTS.items(), WORK, targets):
        kernel = compiled(work, target, **options)
        used, parts = resources(kernel), constants(kernel)["PARTS"]
        blocks = REGISTERS // (used.registers * used.threads)
        width = slice_length(work.V, parts)
        kib = blocks * width * work.dtype.itemsize * (1 + work.reference) / 1024
        taken = (used.threads, used.registers, used.spills, blocks, round(kib))
        lines.append((name, work.loss, target, *map(str, (work.V, parts, width, *taken))))
    sizes = ("V", "parts", "slice", "threads", "registers", "spills", "blocks", "KiB")
    print(markdown(("variant", "loss", "GPU", *sizes), lines, text_columns=3))
