"""Runs of SkyRL's own trainer on tiny models, in this process: with its own loss, or with ours."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import SIZES
from torch import Tensor

pytest.importorskip("skyrl")

import datasets
import loguru
import skyrl_cpu
import transformers
from skyrl.backends.skyrl_train.workers import worker as skyrl_worker
from skyrl.train import trainer as skyrl_trainer
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.utils import validate_cfg

# SkyRL would send the messages of every logger to the terminal.
skyrl_trainer.configure_ray_worker_logging = skyrl_worker.configure_ray_worker_logging = lambda: None
loguru.logger.remove()
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()
SYMBOLS = ["<pad>", "<eos>", *map(str, range(98))]  # padding microbatches have ids below 100
TINY = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(SYMBOLS), "tie_word_embeddings": False}
MIXED = "fsdp_config.mixed_precision"
COMMON = {
    "trainer.placement.colocate_all": False,
    "trainer.placement.colocate_policy_ref": False,
    "trainer.train_batch_size": 4,
    "trainer.policy_mini_batch_size": 2,
    "trainer.micro_train_batch_size_per_gpu": 2,
    "trainer.micro_forward_batch_size_per_gpu": 4,
    "generator.n_samples_per_prompt": 4,
    "trainer.epochs": 1,
    "trainer.algorithm.eps_clip_low": 0.004,
    "trainer.algorithm.eps_clip_high": 0.006,
    "trainer.algorithm.use_kl_loss": False,
    "trainer.policy.optimizer_config.lr": 1e-3,
    f"trainer.policy.{MIXED}.param_dtype": "fp32",
    f"trainer.ref.{MIXED}.param_dtype": "fp32",
    "trainer.bf16": False,
    "trainer.flash_attn": False,
    "trainer.remove_microbatch_padding": False,
    "trainer.eval_interval": -1,
    "trainer.ckpt_interval": -1,
    "trainer.resume_mode": "none",
    "trainer.logger": "console",
    "trainer.enable_ray_gpu_monitor": False,
    "trainer.print_example_interval": -1,
    "generator.inference_engine.enable_ray_prometheus_stats": False,
    "data.dataloader.num_workers": 0,
}


def prepare(folder: Path) -> dict[str, Any]:
    """Save policy, reference, tokenizer and prompts, and return the options that name them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    fast.chat_template = "{{ messages[0]['content'] }}"
    for seed, name in enumerate(["policy", "ref"]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**TINY)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    prompts = [" ".join(str(3 * i + j) for j in range(1 + i % 3)) for i in range(12)]
    rows = [{"prompt": [{"role": "user", "content": prompt}], "env_class": "none"} for prompt in prompts]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "trainer.policy.model.path": folder / "policy",
        "trainer.ref.model.path": folder / "ref",
        "trainer.export_path": folder / "exports",
        "trainer.ckpt_path": folder / "checkpoints",
        "trainer.log_path": folder / "logs",
        "data.train_data": f"[{folder / 'rows.jsonl'}]",
    }


class Run(NamedTuple):
    """What SkyRL logged in each step, and the policy's parameters at the end."""

    logs: list[dict[str, Any]]
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        return torch.tensor([log[key] for log in self.logs], dtype=torch.float64)


class Workers:
    """SkyRL's policy and reference workers in this process, called as its `WorkerDispatch` calls Ray's."""

    def __init__(self, cfg: Any, steps: int, packed: bool, call: dict[str, Any]) -> None:
        kinds: dict[str, Any] = {"policy": skyrl_cpu.PolicyWorker, "ref": skyrl_cpu.RefWorker}
        if not (cfg.algorithm.use_kl_loss or cfg.algorithm.use_kl_in_reward):
            del kinds["ref"]
        self.call = call
        self.workers: dict[str, Any] = {}
        for name, kind in kinds.items():
            place = {"world_size": 1, "rank": 0, "local_rank": 0, "sequence_parallel_size": 1}
            worker = kind(cfg=cfg, **place, master_addr="localhost", master_port=1)
            self.workers[name] = worker
            worker.init_worker_process_group()
            options = {"num_training_steps": steps} if name == "policy" else {}
            worker.init_model(str(getattr(cfg, name).model.path), **options)
            worker.model.remove_microbatch_padding = packed

    def get_lcm_dp_size(self) -> int:
        return 1

    def stage_data(self, model: str, data: Any, boundaries: list[tuple[int, int]]) -> list[Any]:
        return [data[start:end] for start, end in boundaries]

    def forward(self, model: str, data: Any) -> Any:
        return self.workers[model].forward(data)

    def forward_backward_from_staged(self, model: str, data: Any) -> Any:
        return self.workers[model].forward_backward(data, **self.call)

    def optim_step(self, model: str) -> Any:
        return self.workers[model].optim_step()

    def empty_cache(self, model: str | None = None) -> None:
        pass

    async def save_weights_for_sampler(self) -> None:
        pass

    forward_from_staged = forward
    init_weight_sync_state = empty_cache


class Here(skyrl_cpu.Experiment):
    """An experiment whose workers are in this process."""

    def train(self, packed: bool, call: dict[str, Any]) -> Run:
        self.logs: list[dict[str, Any]] = []
        trainer = skyrl_trainer.RayPPOTrainer(
            cfg=self.cfg,
            tracker=self,
            tokenizer=self.tokenizer,
            train_dataset=self.train_dataset,
            inference_engine_client=self.get_inference_client(),
            generator=self.get_generator(self.cfg, self.tokenizer),
        )
        workers = Workers(self.cfg.trainer, trainer.total_training_steps, packed, call)
        trainer.dispatch, trainer.ref_model = workers, workers.workers.get("ref")
        asyncio.run(trainer.train())
        model = workers.workers["policy"].model.model
        return Run(self.logs, {name: p.full_tensor().clone() for name, p in model.state_dict().items()})

    def log(self, data: dict[str, Any], **_: Any) -> None:
        self.logs.append(data)

    def finish(self) -> None:
        pass


def train(folder: Path, loss: str, *, packed: bool = False, call: Any = None, **options: Any) -> Run:
    """Train for three steps of two updates each.

    Args:
        folder: an empty folder.
        loss: a name in SkyRL's registry.
        packed: whether the workers remove the padding of a microbatch, as with flash-attn.
        call: options of each call of `forward_backward`.
        options: SkyRL's, without the prefix "trainer.algorithm."
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    cfg = SkyRLTrainConfig.from_cli_overrides(command_line(folder, loss, **options))
    validate_cfg(cfg)
    return Here(cfg).train(packed, call or {})


def command_line(folder: Path, loss: str, **options: Any) -> list[str]:
    """Return the options of SkyRL's command for a tiny run in `folder`."""
    found = {**COMMON, **prepare(folder)}
    for name, value in {"policy_loss_type": loss, **options}.items():
        full = name.startswith(("trainer.", "generator."))
        found[name if full else f"trainer.algorithm.{name}"] = value
    return [f"{name}={value}" for name, value in found.items()]
