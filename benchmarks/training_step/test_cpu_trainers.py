"""Times a micro-batch in each trainer on a CPU: the model's forward, the loss and the backward, in fp32.

    make bench

The model is a Llama with two layers, 256 dimensions and 32,000 vocabulary entries. The batch has 8
completions of 256 tokens. Each trainer is timed as it is and with the functions of this package. Before
timing, gradients are compared with those of the unchanged trainer. `extra_memory` is the largest growth of
the process during one micro-batch in MiB, including 68 MiB of gradients. verl runs in its own environment, if
`make test-verl` has created it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import pytest
import torch
from torch import Tensor

from benchmarks.work.workload import CLIP
from grpo_kernels import linear_grpo_loss
from grpo_kernels.testing import peak_memory, relative_error

transformers = pytest.importorskip("transformers")

B, T, H, V = 8, 256, 256, 32000
ROUNDS = 5


class Batch(NamedTuple):
    ids: Tensor  # [B, 1 + T]
    old_logps: Tensor  # [B, T]
    advantages: Tensor  # [B]


class Subject(NamedTuple):
    model: Any
    loss: Callable[[Batch], Tensor]


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=2 * H,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=T + 1,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def clipped_loss(logps: Tensor, batch: Batch) -> Tensor:
    ratio, advantages = torch.exp(logps - batch.old_logps), batch.advantages[:, None]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def plain(folder: Path) -> Subject:
    """The loss in eager PyTorch: logits, log_softmax, gather, clipped ratio, mean."""
    model = make_model()

    def loss(batch: Batch) -> Tensor:
        logits = model(batch.ids, use_cache=False).logits[:, :-1]
        return clipped_loss(torch.log_softmax(logits, -1).gather(-1, batch.ids[:, 1:, None])[..., 0], batch)

    return Subject(model, loss)


def plain_linear(folder: Path) -> Subject:
    model = make_model()

    def loss(batch: Batch) -> Tensor:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state[:, :-1]
        tensors = hidden, model.lm_head.weight, batch.ids[:, 1:], batch.advantages
        return linear_grpo_loss(*tensors, spec="bnpo", old_logps=batch.old_logps).loss

    return Subject(model, loss)


def trl(folder: Path, *, fused_loss: bool = False, fused_logps: bool = False) -> Subject:
    pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from benchmarks.training_step import trainers
    from grpo_kernels.integrations.trl import FusedGRPOTrainer

    trainer = trainers.grpo_trainer(
        FusedGRPOTrainer if fused_loss else trl.GRPOTrainer,
        make_model(),
        folder,
        B,
        per_device_train_batch_size=B,
        max_completion_length=T,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer.current_gradient_accumulation_steps = 1

    def loss(batch: Batch) -> Tensor:
        with trainers.fused_logps() if fused_logps else nullcontext():
            return trainer._compute_loss(trainer.model, trainers.grpo_inputs(*batch))

    return Subject(trainer.model, loss)


def verl(folder: Path, *, fused_logps: bool = False) -> Subject:
    monkey_patch = pytest.importorskip("verl.models.transformers.monkey_patch")
    from verl.utils.experimental import torch_functional

    stock = torch_functional.FusedLinearForPPOFunction
    from grpo_kernels.integrations.verl.logps import FusedLinearForPPOFunction

    model = make_model()
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")

    def loss(batch: Batch) -> Tensor:
        torch_functional.FusedLinearForPPOFunction = FusedLinearForPPOFunction if fused_logps else stock
        return clipped_loss(model(batch.ids, use_cache=False, return_dict=True).log_probs[:, :-1], batch)

    return Subject(model, loss)


ROWS: dict[str, tuple[Callable[[Path], Subject], float]] = {
    "plain PyTorch": (plain, 0.0),
    "plain PyTorch: linear_grpo_loss": (plain_linear, 0.0),
    "plain PyTorch: linear_grpo_loss, half without advantage": (plain_linear, 0.5),
    "TRL": (trl, 0.0),
    "TRL: fuse_trl_logps": (partial(trl, fused_logps=True), 0.0),
    "TRL: FusedGRPOTrainer": (partial(trl, fused_loss=True), 0.0),
    "TRL: FusedGRPOTrainer, half without advantage": (partial(trl, fused_loss=True), 0.5),
    "verl": (verl, 0.0),
    "verl: use_fused_kernels": (partial(verl, fused_logps=True), 0.0),
}


def make_batch(idle: float) -> Batch:
    """Random tokens, with old log-probabilities near the model's. `idle` is the share of zero advantages."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (B, 1 + T), generator=generator)
    model = make_model()
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        log_p = torch.log_softmax(model.lm_head(hidden), -1)
    old_logps = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    old_logps += 0.1 * torch.randn(B, T, generator=generator)
    advantages = torch.where(torch.arange(B) < idle * B, 0.0, torch.randn(B, generator=generator))
    return Batch(ids, old_logps, advantages)


def gradients(subject: Subject, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(subject.loss(batch), list(subject.model.parameters())))


@pytest.mark.parametrize("name", ROWS)
def test_micro_batch(benchmark, tmp_path: Path, name: str) -> None:
    make, idle = ROWS[name]
    subject, batch = make(tmp_path), make_batch(idle)
    stock = gradients(ROWS[name.split(":")[0]][0](tmp_path), batch)
    found = gradients(subject, batch)
    error = max(float(relative_error(x.flatten(), y.flatten())) for x, y in zip(found, stock, strict=True))
    assert error < 1e-4, f"{name} is not timed: its gradients differ by {error:.2g}"
    del stock, found

    extra = peak_memory(lambda: gradients(subject, batch)) / 2**20
    benchmark.extra_info["extra_memory"] = round(extra)
    benchmark.pedantic(gradients, args=(subject, batch), rounds=ROUNDS, warmup_rounds=1)
    print(f"\n{name}: median {1e3 * benchmark.stats['median']:.0f} ms, extra memory {extra:.0f} MiB")
