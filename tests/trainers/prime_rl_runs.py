"""Runs of prime-rl's own RL trainer on a tiny model, with its own loss and with ours.

A run goes from TOML through the configuration of the command `rl` and the JSON that it passes to the trainer,
to `prime_rl.trainer.rl.train.train`. Rollouts go through prime-rl's packing and its transport by files. On a
CPU this needs stand-ins:

* `prime_rl_mocks.py`: packages that are imported, but not called.
* `Cpu`: the device "cuda" is the CPU. Two functions of `torch.cuda` and the use of FLOPs return constants.
* gloo for NCCL, and PyTorch's attention for flash-attn's.
* FSDP computes in fp32 instead of bf16, and `torch.compile` is off.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from tiny_models import SIZES
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

pytest.importorskip("prime_rl.configs.trainer")

import prime_rl_mocks  # noqa: F401  (before prime-rl's modules, which import what it replaces)
from prime_rl import monitors
from prime_rl.configs.rl import RLConfig
from prime_rl.configs.trainer import TrainerConfig
from prime_rl.orchestrator.algo.routing import stamp_loss_routing
from prime_rl.orchestrator.train_sink import _prune_zero_advantages
from prime_rl.trainer import model as models
from prime_rl.trainer import parallel_dims, perf, world
from prime_rl.trainer.batch import build_bin_cost, prepare_batch
from prime_rl.trainer.models.layers.attn import FlashAttention
from prime_rl.trainer.rl import train as trainer
from prime_rl.transports.rollouts import FileSystemMicroBatchSender, TrainingSample
from prime_rl.utils.config import cli, dump_resolved_config
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, STEPS = 100, 32, 3


class Cpu(TorchFunctionMode):
    """Replaces the device "cuda" by the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: cpu_for_cuda(x) for name, x in (kwargs or {}).items()}
        return func(*map(cpu_for_cuda, args), **kwargs)


def cpu_for_cuda(x: Any) -> Any:
    return "cpu" if isinstance(x, str) and x == "cuda" else x


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any, causal: bool) -> Tensor:
    """flash-attn's attention within packed sequences, `[N, heads, size]`."""
    assert causal
    lengths = starts.diff().tolist()
    sequences = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    of_each = [scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in sequences]
    return torch.cat(of_each, 1).transpose(0, 1)


def fp32(*_: Any, **__: Any) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)


@contextmanager
def on_cpu(store: dist.Store | None, precision: Any = fp32) -> Iterator[list[Any]]:
    """Replace what needs a GPU. The list receives the trainer's model.

    Args:
        store: the store of the process group; None: one for a single process.
        precision: in place of FSDP's MixedPrecisionPolicy.
    """
    found: list[Any] = []
    setup = trainer.setup_model

    def setup_model(*args: Any) -> Any:
        found.append(setup(*args))
        return found[0]

    def setup_gloo(**_: Any) -> None:
        here = world.get_world()
        dist.init_process_group(
            "gloo", store=store or dist.HashStore(), rank=here.rank, world_size=here.world_size
        )

    replacements = [
        (trainer, "setup_model", setup_model),
        (trainer, "setup_torch_distributed", setup_gloo),
        (models, "MixedPrecisionPolicy", precision),
        (parallel_dims, "device_type", "cpu"),
        (perf.PerfCounter, "get_step_mfu", lambda *_: 0.0),
        (torch.cuda, "reset_peak_memory_stats", lambda: None),
        (torch.cuda, "max_memory_reserved", lambda: 0),
        (monitors, "MONITORS", []),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(FlashAttention._funcs, {2: attention}))
        stack.enter_context(Cpu())
        yield found


def save_model(path: Path) -> Any:
    """Save a Llama, for which prime-rl has an implementation of its own, and return it."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(path)
    return model


BASE = """
max_steps = {steps}
seq_len = {length}
output_dir = "{folder}"
orchestrator = {{ renderer = {{ name = "default" }} }}
inference = {{}}
rollout_transport = {{ type = "filesystem" }}
weight_broadcast = {{ type = "filesystem" }}

[model]
name = "{folder}/model"

[trainer]
matmul_precision = "highest"
{top}

[trainer.model]
attn = "flash_attention_2"
compile = "None"
ac = "None"
ac_offloading = "None"
optim_cpu_offload = false
fused_lm_head_token_chunk_size = {chunk}

[trainer.optim]
type = "sgd"
lr = 0.3
max_norm = 0.1

"""


def configure(
    folder: Path, loss: str, *arguments: str, chunk: Any = '"disabled"', top: str = ""
) -> TrainerConfig:
    """Parse TOML as the command `rl` does, and again, from the JSON that it writes, as the trainer does.

    Args:
        folder: with the model; also the output's.
        loss: the section `[trainer.loss]`; "" for prime-rl's default.
        arguments: of the command line.
        chunk: `fused_lm_head_token_chunk_size`.
        top: more lines of `[trainer]`.
    """
    base = BASE.format(steps=STEPS, length=LENGTH, folder=folder, chunk=chunk, top=top)
    (folder / "rl.toml").write_text(base + loss)
    config = cli(RLConfig, args=["@", str(folder / "rl.toml"), *arguments])
    (folder / "trainer.json").write_text(json.dumps(dump_resolved_config(config.trainer)))
    return cli(TrainerConfig, args=["@", str(folder / "trainer.json")])


def rollouts(model: Any, kind: str = "grpo") -> list[list[TrainingSample]]:
    """Six samples for each step, from the saved model and with noise on the sampler's log-probabilities.

    Args:
        kind: "grpo"; "pruned": some tokens have no advantage, and the orchestrator gives them a weight of 0;
            "mixed": also samples of the losses `ce` and `ref_kl`; "weighted": with other rl weights;
            "reference": with a reference; "some references": only one sample of each step has it; "one": a
            single sample, with a reference.
    """
    generator = torch.Generator().manual_seed(1)
    numbers = [5] if kind == "one" else range(6)
    return [[sample(model, kind, i, generator) for i in numbers] for _ in range(STEPS)]


@torch.no_grad()
def sample(model: Any, kind: str, number: int, generator: torch.Generator) -> TrainingSample:
    """Make a sample of 7 to 17 tokens, of which the first three are a prompt."""

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(length, generator=generator)

    length = 7 + 2 * number
    ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
    temperature = 0.7 + 0.1 * number
    logps = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)[:-1]
    logps = torch.cat([torch.zeros(1), logps.gather(-1, ids[1:, None])[:, 0]])
    mask = torch.arange(length) > 2
    advantages = torch.where(mask, noise(1.0) if kind in ("pruned", "weighted") else noise(1.0)[0], 0.0)
    given: dict[str, Any] = {}
    if kind == "pruned":
        advantages[4] = 0.0
    if kind == "weighted":
        given["rl_weights"] = (mask * (0.5 + noise(1.0).abs())).tolist()
    if kind in ("reference", "one") or (kind, number) in (("some references", 0), ("mixed", 4), ("mixed", 5)):
        given["ref_logprobs"] = ((logps + noise(0.5)).clamp(max=-1e-3) * mask).tolist()
    made = TrainingSample(
        token_ids=ids.tolist(),
        mask=mask.tolist(),
        logprobs=((logps + noise(0.3)).clamp(max=-1e-3) * mask).tolist(),
        temperatures=[temperature] * length,
        env_name=f"env{number % 2}",
        advantages=advantages.tolist(),
        **given,
    )
    if kind == "mixed" and number >= 2:
        stamp_loss_routing(made, "ce" if number < 4 else "ref_kl")
    assert _prune_zero_advantages(made)
    return made


def send(config: TrainerConfig, rollouts: list[list[TrainingSample]], ranks: int = 1) -> None:
    """Pack the rollouts of each step and send them to the trainer's ranks."""
    sender = FileSystemMicroBatchSender(config.output_dir, ranks, current_step=1)
    for samples in rollouts:
        asyncio.run(sender.send(prepare_batch(samples, LENGTH, ranks, build_bin_cost(None), 4)))


class Run(NamedTuple):
    """The logs of a finished run by name, one value per step, and its parameters at the end."""

    logs: dict[str, list[float]]
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        return torch.tensor(self.logs[key], dtype=torch.float64)


def train(config: TrainerConfig, *, store: dist.Store | None = None, precision: Any = fp32) -> Run:
    """Run the trainer. An error of the loss is raised as it is, not as the trainer's SystemExit."""
    with on_cpu(store, precision) as found:
        try:
            trainer.train.__wrapped__(config)
            after = {name: p.detach().full_tensor().clone() for name, p in found[0].named_parameters()}
        finally:
            dist.destroy_process_group()
    logs: dict[str, list[float]] = {}
    if world.get_world().is_master:
        for line in (config.output_dir / "metrics.jsonl").read_text().splitlines():
            for key, value in json.loads(line).items():
                logs.setdefault(key, []).append(value)
    return Run(logs, after)


def as_rank(rank: int, ranks: int, configs: list[TrainerConfig], folder: Path) -> None:
    """Be one of several ranks: run each configuration, and save the runs of rank 0 as `folder / "runs"`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(folder / "store"), ranks)
    runs = [train(config, store=dist.PrefixStore(str(i), store)) for i, config in enumerate(configs)]
    if rank == 0:
        torch.save([tuple(run) for run in runs], folder / "runs")
