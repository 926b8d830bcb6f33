"""The kernels of the divergences compile for every GPU without spills."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
pytest.importorskip("triton")

from benchmarks.machine_code.figures import compiled  # noqa: E402
from benchmarks.machine_code.no_gpu import TARGETS  # noqa: E402
from grpo_kernels import distillation_loss  # noqa: E402

# Registers per thread on sm_90. The series of a JSD need twice as many as a loss: three blocks of 128 threads
# fit a multiprocessor instead of six.
REGISTERS = {"reverse_kl": 128, "forward_kl": 128, "jsd": 168}


def distillation(divergence: str, dtype: torch.dtype) -> None:
    def new() -> torch.Tensor:
        return torch.empty(8, 512, 151936, dtype=dtype, device="meta")

    logits = new().requires_grad_()
    distillation_loss(logits, teacher_logits=new(), divergence=divergence, backend="triton").loss.backward()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("divergence", REGISTERS)
def test_compiles_without_spills(divergence: str, dtype: torch.dtype, target: str) -> None:
    kernels = compiled(partial(distillation, divergence, dtype), target, read=False)
    own = [k for k in kernels if k.kernel.startswith("divergence")]
    assert len(own) == 2
    for k in own:
        assert k.resources.spills == 0, k
        assert target != "sm_90" or k.resources.registers <= REGISTERS[divergence], k
