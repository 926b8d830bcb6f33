"""Worker: the unchanged loops of docs/integrations.md under DDP and FSDP2, with left-padded prompts."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from distributed.worker import Cases
from grpo_kernels import LossSpec, linear_grpo_loss
from grpo_kernels.normalizers import global_normalizer

cases = Cases()

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
V, B, P, T = 23, 3, 5, 4
MICRO_BATCHES = 2


def block(marker: str) -> str:
    """Return the Python block of the page that contains `marker`."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (code for code in blocks if marker in code)
    return found


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def make_batch(seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(V, (B, P + T), generator=generator)
    prompts = torch.randint(1, P, (B, 1), generator=generator)  # the first position is always padding
    completions = torch.randint(1, T + 1, (B, 1), generator=generator)
    attention_mask = (torch.arange(P + T) >= P - prompts).long()
    return SimpleNamespace(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        ids=input_ids[:, P:],
        mask=torch.arange(T) < completions,
        advantages=torch.randn(B, generator=generator),
    )


def gradients_without_padding(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return gradients of single sequences. On-policy, PPO-clip has the gradient of `-A * logp`."""
    model = make_model().to(dtype)
    batches = [make_batch(seed) for seed in range(MICRO_BATCHES * dist.get_world_size())]
    tokens = sum(int(b.mask.sum()) for b in batches)
    for b in batches:
        for row in range(B):
            ids = b.input_ids[row][b.attention_mask[row].bool()]
            logps = model(ids[None]).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[1:, None])[-T:, 0]
            (-b.advantages[row] * logps[b.mask[row]].sum() / tokens).backward()
    return {name: p.grad.float() for name, p in model.named_parameters()}


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - x).norm() / x.norm()) for name, x in wanted.items()}


LOOPS = {
    "ddp": "policy = DistributedDataParallel(Policy(model))",
    "inside": "policy = fully_shard(Policy(model))",
    "outside": "fully_shard(model.model)",
}


@cases.add(loop=["ddp", "inside", "outside"], dtype=[torch.float32])
@cases.add(loop=["inside", "outside"], dtype=[torch.bfloat16])
def same_gradients(loop: str, dtype: torch.dtype) -> None:
    """With bf16 the parameters stay in fp32, and FSDP2 casts them in each forward."""
    model, rank = make_model(), dist.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    names: dict[str, Any] = {
        "nn": nn,
        "contextlib": contextlib,
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": functools.partial(fully_shard, mp_policy=policy),
        "linear_grpo_loss": linear_grpo_loss,
        "global_normalizer": global_normalizer,
        "spec": LossSpec.preset("dapo"),
        "model": model,
        "micro_batches": [make_batch(MICRO_BATCHES * rank + i) for i in range(MICRO_BATCHES)],
    }
    if loop == "inside":  # this loop uses the class in the block for DDP
        exec(block(LOOPS["ddp"]).split("policy = ")[0], names)
    exec(block(LOOPS[loop]), names)
    grads = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}
    wanted = gradients_without_padding()
    tolerance = 1e-5
    if dtype == torch.bfloat16:  # three times the error of plain PyTorch with all parameters in bf16
        tolerance = 3 * max(errors(gradients_without_padding(dtype), wanted).values())
    for name, error in errors(whole, wanted).items():
        assert error < tolerance, f"{name}: {error}, {tolerance} allowed"


if __name__ == "__main__":
    cases.main()
