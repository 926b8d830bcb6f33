"""Runs of NeMo-RL's `examples/run_grpo.py` on tiny models, with and without the lines of docs/trainers.md.

A run is the script's `main()`, from the command line to the last step of the optimizer.
`nemo_rl_stand_ins.py` says what is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nemo_rl_stand_ins  # makes nemo_rl importable
import pytest
import torch
from tiny_models import SIZES
from torch import Tensor

pytest.importorskip("nemo_rl")

import nemo_rl
import transformers
import yaml
from nemo_rl.algorithms import grpo

ROOT = Path(nemo_rl.__file__).parents[1]
DOCS = Path(__file__).parents[2] / "docs" / "trainers.md"
SYMBOLS = ["<pad>", "<eos>", *"0123456789+="]
SETTINGS: dict[str, Any] = {
    "defaults": str(ROOT / "examples/configs/grpo_math_1B.yaml"),
    # Each rollout serves two steps. In the second, the ratios are not 1.
    "grpo": {"num_prompts_per_step": 4, "num_generations_per_prompt": 4, "max_num_steps": 3, "val_period": 0},
    "policy": {
        "tokenizer": {"chat_template": None},
        "train_global_batch_size": 8,
        "train_micro_batch_size": 2,
        "max_total_sequence_length": 32,
        "precision": "float32",
        # With a small eps Adam would divide rounding errors of gradients by themselves.
        "optimizer": {"kwargs": {"lr": 0.2, "eps": 0.01}},
        "sequence_packing": {"sequence_length_round": 1},
        "dynamic_batching": {"sequence_length_round": 1},
    },
    "data": {
        # A prompt of 8 tokens is cut off, and its completions are masked.
        "max_input_seq_length": 8,
        "shuffle": False,
        "num_workers": 0,
        "train": {"dataset_name": "ResponseDataset", "split_validation_size": 0},
        "default": {"prompt_file": None},
    },
    "checkpointing": {"enabled": False},
    "logger": {"monitor_gpus": False},
}


def save_inputs(folder: Path) -> Path:
    """Save a model, a tokenizer with one token per character, prompts and a configuration.

    Returns:
        The path of the configuration.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    folder.mkdir()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, vocab_size=len(SYMBOLS), tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    rows = [{"input": f"{7 ** (i % 6)}+{i % 6}=", "output": ""} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = json.loads(json.dumps(SETTINGS))
    settings["policy"]["model_name"] = str(folder / "model")
    settings["data"]["train"]["data_path"] = str(folder / "rows.jsonl")
    settings["logger"]["log_dir"] = str(folder / "logs")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def documented_lines() -> str:
    """Return the lines for `run_grpo.py` in docs/trainers.md."""
    section = DOCS.read_text().split("\n## NeMo-RL\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


def script(lines: str = "") -> str:
    """Return the text of `run_grpo.py` with `lines` before the `try:` that starts the training."""
    above, found, below = (ROOT / "examples/run_grpo.py").read_text().partition("\n    try:\n")
    assert found and "setup(" in above
    return above + "\n" + "".join(f"    {line}\n" for line in lines.splitlines()) + found + below


class Run(NamedTuple):
    """A finished run.

    Attributes:
        logs: the metrics of each step.
        after: the parameters at the end.
        loss_fn: the loss object.
        builder: positional and keyword arguments of the worker; the first is its name.
        trained: keyword arguments and results of the worker's `train`, for each call.
    """

    logs: list[dict[str, Any]]
    after: dict[str, Tensor]
    loss_fn: Any
    builder: Any
    trained: list[tuple[dict[str, Any], Any]]

    def column(self, key: str) -> Tensor:
        return torch.tensor([log[key] for log in self.logs], dtype=torch.float64)


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch, nemo_rl_stand_ins.without_gpus(patch):
        yield patch


def train(folder: Path, overrides: str, lines: str = "") -> Run:
    """Run the script with `lines` added.

    Args:
        folder: a new folder, which is created.
        overrides: arguments of the command line, such as "loss_fn.use_cispo=true", with spaces between them.
        lines: see `script`.
    """
    torch.set_num_threads(1)
    config = save_inputs(folder)
    logs: list[dict[str, Any]] = []
    names: dict[str, Any] = {"__name__": "run_grpo", "__file__": str(ROOT / "examples/run_grpo.py")}
    losses: list[Any] = []
    policy: list[Any] = []
    with patched() as patch:
        exec(compile(script(lines), names["__file__"], "exec"), names)

        def log_metrics(self: Any, metrics: Any, step: int, prefix: str = "", **_: Any) -> None:
            if prefix == "train" and "grad_norm" in metrics:
                logs.append(dict(metrics))

        def grpo_train(*args: Any) -> None:
            policy.append(args[0])
            losses.append(args[5])
            grpo.grpo_train(*args)

        patch.setattr(grpo.Logger, "log_metrics", log_metrics)
        patch.setattr(sys, "argv", ["run_grpo.py", "--config", str(config), *overrides.split()])
        names |= {"init_ray": lambda: None, "grpo_train": grpo_train}
        names["main"]()
        group = policy[0].worker_group
        (worker,) = group.workers
        # The older worker's parameters are DTensors.
        parameters = worker.target.model.named_parameters()
        after = {name: getattr(p, "full_tensor", p.clone)().detach() for name, p in parameters}
    return Run(logs, after, losses[0], group.builder, worker.trained)
