"""Registers, spills, shared memory and threads of a compiled kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .sass import cuobjdump


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel, for NVIDIA and AMD."""

    registers: int  # per thread
    spills: int  # 32-bit words per thread in local memory
    shared_bytes: int  # per block
    threads: int


def resources(kernel: Any) -> Resources:
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    if "cubin" in kernel.asm:
        registers, *local_bytes = map(int, cuobjdump("-res-usage", kernel.asm["cubin"], _USAGE))
        return Resources(registers, sum(local_bytes) // 4, kernel.metadata.shared, threads)
    said = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE))
    # Scalar registers spill into lanes of vector registers, not to memory.
    spills = max(int(said["vgpr_spill_count"]), int(said["private_segment_fixed_size"]) // 4)
    return Resources(int(said["vgpr_count"]), spills, kernel.metadata.shared, threads)


# ptxas spills to the stack.
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
