"""Runs of OpenRLHF's `train_ppo_ray` on tiny models, with and without the edits of docs/trainers.md.

A run is the module `openrlhf.cli.train_ppo_ray` with a command line. `openrlhf_stand_ins.py` has what a CPU
lacks.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import SIZES
from torch import Tensor

pytest.importorskip("openrlhf")

# Also with a GPU at hand. DeepSpeed reads it when it is imported.
os.environ["DS_ACCELERATOR"] = "cpu"

pytest.importorskip("deepspeed")
pytest.importorskip("torchdata")

import deepspeed
import openrlhf_stand_ins
import transformers
from deepspeed import comm
from deepspeed.utils import groups
from openrlhf import utils
from openrlhf.utils import utils as dtypes
from safetensors.torch import load_file

with openrlhf_stand_ins.installed():
    from openrlhf.models import actor
    from openrlhf.trainer.ray import ppo_actor

SYMBOLS = ["<pad>", "<eos>", *"0123456789+="]
DOCS = Path(__file__).parents[2] / "docs" / "trainers.md"
REWARD = """
import zlib

def reward_func(queries, prompts, labels):
    return {"rewards": float(zlib.crc32(queries[0].encode()) % 4)}
"""
AGENT = """
import torch
import zlib
from openrlhf.utils import agent

class Turns(agent.AgentInstanceBase):
    def __init__(self):
        self.turns = 0

    async def step(self, state_dict, **_):
        self.turns += 1
        state_dict["sampling_params"].max_tokens = 5
        reward = zlib.crc32(repr((state_dict["observation_text"], AgentExecutor.count)).encode()) % 4
        AgentExecutor.count += 1
        return {"rewards": torch.tensor(float(reward)), "environment_feedback": "+=", "done": self.turns == 2}

class AgentExecutor(agent.MultiTurnAgentExecutor):
    count = 0

    def __init__(self):
        super().__init__(Turns)
"""
# Variables that OpenRLHF sets. It would ask Ray for the last one, if it were not set.
ENVIRONMENT = ["MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"]
ENVIRONMENT += ["VLLM_ALLOW_INSECURE_SERIALIZATION", "RAY_ADDRESS"]
# Four optimizer steps: two generations of two prompts with four samples, two steps of two micro-batches each.
# In the second step of a generation, ratios are not 1. With a large epsilon, Adam does not divide noise by
# noise.
COMMON: dict[str, Any] = {
    "actor.num_gpus_per_node": 1,
    "critic.num_gpus_per_node": 1,
    "ref.num_gpus_per_node": 1,
    "vllm.num_engines": 1,
    "rollout.batch_size": 2,
    "rollout.n_samples_per_prompt": 4,
    "rollout.micro_batch_size": 4,
    "rollout.max_new_tokens": 6,
    "rollout.temperature": 0.9,
    "train.batch_size": 4,
    "train.micro_batch_size": 2,
    "data.max_len": 16,
    "algo.advantage.estimator": "group_norm",
    "algo.kl.init_coef": 0,
    "ds.attn_implementation": "sdpa",
    "actor.adam.lr": 0.3,
    "actor.adam.eps": 1.0,
    "actor.lr_scheduler": "constant",
    "actor.lr_warmup_ratio": 0,
    "actor.max_norm": 0,
}


class Run(NamedTuple):
    """The metrics of each micro-batch, and the parameters that OpenRLHF saved at the end."""

    logs: list[dict[str, Any]]
    after: dict[str, Tensor]

    def column(self, key: str) -> Tensor:
        """Return all values of a metric: numbers, or one number per sequence."""
        found = [torch.as_tensor(log[key], dtype=torch.float64).flatten() for log in self.logs if key in log]
        return torch.cat(found)


class Edit(NamedTuple):
    """An edit of a file of OpenRLHF."""

    module: str
    line: int
    old: str
    new: str


def section() -> str:
    """Return OpenRLHF's section of docs/trainers.md."""
    return DOCS.read_text().split("\n## OpenRLHF\n")[1].split("\n## ")[0]


def documented() -> list[Edit]:
    """Return the two edits of OpenRLHF's files that the section gives as code."""
    pattern = r"`openrlhf/([\w/]+)\.py`, line (\d+), instead\s+of\s+`([^`]*)`.*?```python\n(.*?)```"
    found = re.findall(pattern, section(), flags=re.DOTALL)
    return [
        Edit(f"openrlhf.{file.replace('/', '.')}", int(line), " ".join(old.split()), new)
        for file, line, old, new in found
    ]


def source_line(module: str, line: int) -> str:
    """Return a line of OpenRLHF's source. The first is 1."""
    return Path(str(sys.modules[module].__file__)).read_text().splitlines()[line - 1].strip()


def apply(edits: Sequence[Edit], patch: pytest.MonkeyPatch) -> None:
    """Run the edited files again in their modules, whose contents are restored with `patch`."""
    for name in {edit.module for edit in edits}:
        module = sys.modules[name]
        path = Path(str(module.__file__))
        lines = path.read_text().splitlines(keepends=True)
        for edit in edits:
            if edit.module == name:
                assert edit.old in lines[edit.line - 1], (edit, lines[edit.line - 1])
                lines[edit.line - 1] = lines[edit.line - 1].replace(edit.old, edit.new.rstrip("\n"))
        before = dict(vars(module))
        exec(compile("".join(lines), str(path), "exec"), vars(module))
        after = dict(vars(module))
        vars(module).update(before)
        for key, value in after.items():
            if before.get(key) is not value:
                patch.setattr(module, key, value, raising=False)


def save_model(folder: Path) -> None:
    """Save a Llama and a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(SYMBOLS), tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def train(folder: Path, edits: Sequence[Edit] = (), *, dtype: str = "fp32", **options: Any) -> Run:
    """Train with OpenRLHF, after edits of its files.

    Args:
        folder: an empty folder.
        edits: lines of OpenRLHF to replace.
        dtype: "bf16" (OpenRLHF's default), or "fp32", which its command line does not offer.
        options: of its command line, over `COMMON`. True for a flag, a list for several values. `agent`: each
            sample has two turns, between which are tokens that are not trained.
    """
    with pytest.MonkeyPatch.context() as patch, openrlhf_stand_ins.installed():
        openrlhf_stand_ins.without_cuda(patch)
        for name in ENVIRONMENT:
            patch.setenv(name, "0")
        apply(edits, patch)
        on_a_cpu(patch, dtype)
        logs = watch(patch)
        save_model(folder / "model")
        (folder / "reward.py").write_text(REWARD)
        (folder / "agent.py").write_text(AGENT)
        rows = [json.dumps({"input": f"{i}+{i + 1}="}) for i in range(4)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        given = {
            "actor.model_name_or_path": folder / "model",
            "reward.remote_url": folder / "reward.py",
            "data.prompt_dataset": folder / "rows.jsonl",
            "ckpt.output_dir": folder / "output",
            "ckpt.path": folder / "checkpoints",
        }
        if options.pop("agent", False):
            given["train.agent_func_path"] = folder / "agent.py"
        patch.setattr(sys, "argv", ["train_ppo_ray", *words({**COMMON, **given, **options})])
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            comm.comm.cdb = None
    saved = [load_file(path) for path in (folder / "output").glob("*.safetensors")]
    return Run(logs, {name: p for file in saved for name, p in file.items()})


def words(options: dict[str, Any]) -> Iterator[str]:
    """Yield the words of a command line."""
    for key, value in options.items():
        yield f"--{key}"
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def on_a_cpu(patch: pytest.MonkeyPatch, dtype: str) -> None:
    """Replace what DeepSpeed would compile, its buffer of 2 GB, attention that needs a GPU, and the dtype."""
    initialize, get_strategy = deepspeed.initialize, utils.get_strategy
    to_dtype = dtypes.convert_to_torch_dtype

    def initialized(*args: Any, config: dict[str, Any], **given: Any) -> Any:
        if "optimizer" in config:
            config["optimizer"]["params"]["torch_adam"] = True
            config["zero_optimization"]["reduce_bucket_size"] = 10_000
        return initialize(*args, config=config, **given)

    def strategy(args: Any) -> Any:
        args.ds.attn_implementation, args.ds.param_dtype = "sdpa", dtype
        return get_strategy(args)

    patch.setattr(deepspeed, "initialize", initialized)
    patch.setattr(utils, "get_strategy", strategy)
    patch.setattr(dtypes, "convert_to_torch_dtype", lambda x: torch.float32 if x == "fp32" else to_dtype(x))
    # DeepSpeed keeps its process groups, which each run creates anew.
    for name in [name for name in vars(groups) if "GROUP" in name]:
        patch.setattr(groups, name, copy.copy(getattr(groups, name)))
    patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    patch.setattr(actor, "compute_entropy", actor.compute_entropy._torchdynamo_orig_callable)


def watch(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that gets the metrics of each micro-batch."""
    logs: list[dict[str, Any]] = []
    step = ppo_actor.ActorPPOTrainer.training_step

    def watched(self: Any, *args: Any, **given: Any) -> Any:
        found = step(self, *args, **given)
        logs.append(dict(found["metrics"]))
        return found

    patch.setattr(ppo_actor.ActorPPOTrainer, "training_step", watched)
    return logs
