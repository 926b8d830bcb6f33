"""slime's own parser and a training step's functions, with its loss and with ours. Skipped without slime.

From the arguments to the logged metrics all is slime's: `parse_args`, `compute_advantages_and_returns`,
`get_batch`, `loss_function` and `reduce_train_step_metrics`. Stand-ins: Megatron's parser and `mpu`, and what
the modules only import. The model is a table of logits.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers import Trainer, trainer
from slime_stand_ins import LOSS, MPU
from torch import Tensor
from torch import distributed as dist

if importlib.util.find_spec("slime") is None:
    pytest.skip("slime is not installed", allow_module_level=True)

V = 13
PROMPTS, RESPONSES = [2, 3, 1, 4, 2], [5, 2, 4, 1, 7]
TOTALS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
MICRO_BATCHES = [[0], [3], [1, 2], [4]]
FUNCTION = "grpo_kernels.integrations.slime.policy_loss_function"
PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def megatron_arguments(extra_args_provider: Any, ignore_unknown_args: bool) -> Namespace:
    """What slime's validation reads of Megatron's arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--load", "--save", "--tokenizer-model", "--tokenizer-type"):
        parser.add_argument(name)
    for name in ("--seed", "--save-interval", "--eval-interval", "--vocab-size", "--seq-length"):
        parser.add_argument(name, type=int)
    for name in ("--global-batch-size", "--micro-batch-size", "--max-position-embeddings", "--ckpt-step"):
        parser.add_argument(name, type=int)
    parser.add_argument("--fp16", action="store_true")
    assert ignore_unknown_args
    return extra_args_provider(parser).parse_known_args()[0]


@pytest.fixture(scope="module")
def slime() -> Iterator[Trainer]:
    module = "slime.backends.megatron_utils.loss"
    needs: dict[str, dict[str, Any]] = {
        "megatron": {},
        "megatron.core": {"mpu": MPU},
        "megatron.core.packed_seq_params": {"PackedSeqParams": SimpleNamespace},
        "megatron.training": {},
        "megatron.training.arguments": {"parse_args": megatron_arguments, "validate_args": None},
        "megatron.training.tokenizer": {},
        "megatron.training.tokenizer.tokenizer": {"_vocab_size_with_padding": None},
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.server_args": {"ServerArgs": None},
        "sglang_router": {},
        "sglang_router.launch_router": {"RouterArgs": None},
        "transformers": {"AutoConfig": None, "AutoTokenizer": None},
        "wandb": {},
    }
    with trainer(module, "slime", {module: LOSS}, version="0.3.1", needs=needs) as found:
        yield found


@pytest.fixture(autouse=True)
def one_process(slime: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = importlib.import_module("slime.utils.accelerator")
    for name in ("device", "current_device"):
        monkeypatch.setattr(accelerator, name, lambda: "cpu")
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: None)
    for name, x in {
        "is_pipeline_last_stage": True,
        "get_data_parallel_group": None,
        "get_data_parallel_world_size": 1,
        "get_tensor_model_parallel_world_size": 1,
        "get_virtual_pipeline_model_parallel_world_size": None,
    }.items():
        monkeypatch.setattr(MPU, name, lambda x=x, **options: x, raising=False)


def parsed(monkeypatch: pytest.MonkeyPatch, *options: str) -> Namespace:
    """The arguments as slime's `parse_args` returns them."""
    own = importlib.import_module("slime.utils.arguments")
    megatron = importlib.import_module("slime.backends.megatron_utils.arguments")
    monkeypatch.setattr(megatron, "validate_args", lambda args: None)
    given = ["--debug-train-only", "--num-rollout", "1", "--rollout-batch-size", "2"]
    given += ["--n-samples-per-prompt", "2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, *options])
    return own.parse_args()


def step(slime: Trainer, given: Namespace, loss_type: str, without: tuple[str, ...] = ()) -> Any:
    """Loss, gradient and metrics of a step over the micro-batches."""
    args = Namespace(**{**vars(given), "loss_type": loss_type})
    data = importlib.import_module("slime.backends.megatron_utils.data")
    logged = importlib.import_module("slime.observability.train_metric_utils")
    cut = importlib.import_module("slime.backends.megatron_utils.cp_utils").slice_log_prob_with_cp
    torch.manual_seed(0)
    table = torch.randn(V, V, requires_grad=True)
    tokens = [torch.randint(V, (total,)) for total in TOTALS]
    masks = [torch.ones(length, dtype=torch.int) for length in RESPONSES]
    masks[0][2] = 0
    masks[3][:] = args.advantage_estimator == "reinforce_plus_plus"  # which refuses a sample without tokens

    def logps(scale: float) -> list[Tensor]:
        rows = ((table.detach() + scale * torch.randn(V, V)) / args.rollout_temperature).log_softmax(-1)
        whole = [rows[x[-n - 1 : -1], x[-n:]] for x, n in zip(tokens, RESPONSES, strict=True)]
        return [cut(x, *lengths) for x, *lengths in zip(whole, TOTALS, RESPONSES, strict=True)]

    ids, offsets = [], []
    for taken, length in zip(tokens, RESPONSES, strict=True):
        nuclei = [sorted({*torch.randperm(V)[:6].tolist(), int(x)}) for x in taken[-length:]]
        ids.append(torch.tensor([x for nucleus in nuclei for x in nucleus], dtype=torch.int32))
        offsets.append(torch.tensor([0, *map(len, nuclei)], dtype=torch.int32).cumsum(0))
    rollout: dict[str, Any] = {
        "tokens": tokens,
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        # The first two are of one rollout.
        "rollout_mask_sums": torch.tensor([6.0, 6.0, 4.0, float(masks[3].sum()), 7.0]),
        "rewards": [1.0, -0.5, 0.3, 2.0, -1.2],
        "micro_batch_indices": MICRO_BATCHES,
        "log_probs": logps(0.3),
        "rollout_log_probs": logps(0.3),
        "ref_log_probs": logps(0.4),
        "values": [x.exp() for x in logps(1.0)],
        "rollout_top_p_token_ids": ids,
        "rollout_top_p_token_offsets": offsets,
    }
    slime.theirs.compute_advantages_and_returns(args, rollout)
    keys = [name for name in rollout if name not in (*without, "rewards", "micro_batch_indices", "kl")]
    (batches,) = data.get_data_iterator(rollout)
    total, logs = torch.tensor(0.0), []
    for _ in MICRO_BATCHES:
        batch = data.get_batch(batches, [*keys, *without, "multimodal_train_inputs"], 16, args.allgather_cp)
        batch |= dict.fromkeys(without)
        logits = table[batch["tokens"][0]][None]
        loss, _, log = slime.theirs.loss_function(args, batch, len(MICRO_BATCHES), 4, logits)
        assert loss.requires_grad
        total = total + loss
        logs.append(log)
    (grad,) = torch.autograd.grad(total, table)
    found = logged.reduce_train_step_metrics(
        logs,
        calculate_per_token_loss=args.calculate_per_token_loss,
        step_global_batch_size=4,
        cp_size=MPU.get_context_parallel_world_size(),
        dp_with_cp_group=None,
    )
    return total.detach(), grad, found


ESTIMATORS = ["grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"]
REFERENCE = f"--use-kl-loss --kl-loss-coef 0.1 --ref-load {Path(__file__).parent}"
OPTIONS = {
    "defaults": "",
    "bounds": "--eps-clip 0.1 --eps-clip-high 0.3 --eps-clip-c 1.1 --rollout-temperature 0.8",
    "per token": "--calculate-per-token-loss",
    "to the sampler": "--use-rollout-logprobs",
    "KL and entropy": f"{REFERENCE} --entropy-coef 0.05 --kl-loss-type low_var_kl",
    "unbiased KL": f"{REFERENCE} --use-unbiased-kl --kl-loss-type k3 --calculate-per-token-loss",
    "recomputed": "--recompute-loss-function",
    "top-p": "--rollout-top-p 0.9",
}


def compare(slime: Trainer, args: Namespace, without: tuple[str, ...] = ()) -> None:
    theirs, ours = (step(slime, args, name, without) for name in ("policy_loss", "custom_loss"))
    assert ours[2].keys() == theirs[2].keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("estimator, name", list(product(ESTIMATORS, OPTIONS)))
def test_a_step(slime: Trainer, monkeypatch: pytest.MonkeyPatch, estimator: str, name: str) -> None:
    """Loss, gradient and all logged metrics are those of slime, without a file."""
    given = ["--custom-loss-function-path", FUNCTION, "--advantage-estimator", estimator]
    given += ["--normalize-advantages"] if estimator.startswith("reinforce") else []
    args = parsed(monkeypatch, *given, *OPTIONS[name].split())
    compare(slime, args)
    if name == "defaults":
        compare(slime, args, without=("log_probs",))
        compare(slime, args, without=("rollout_log_probs",))


@pytest.mark.parametrize("estimator, rank", list(product(["grpo", "cispo"], [0, 1])))
def test_context_parallelism(
    slime: Trainer, monkeypatch: pytest.MonkeyPatch, estimator: str, rank: int
) -> None:
    """Each of two ranks has a part of each sequence, and of some micro-batches none."""
    monkeypatch.setattr(MPU, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(MPU, "get_context_parallel_rank", lambda: rank)
    given = ["--custom-loss-function-path", FUNCTION, "--advantage-estimator", estimator]
    for options in (OPTIONS["KL and entropy"], OPTIONS["per token"]):
        compare(slime, parsed(monkeypatch, *given, *options.split()))


def test_documented_lines(slime: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """slime parses the three arguments and the file of docs/trainers.md, and its step uses them."""
    section = PAGE.read_text(encoding="utf-8").split("\n## slime\n")[1]
    _, lines, _, file = section.split("```")[:4]
    (tmp_path / "ours.yaml").write_text(file.removeprefix("yaml\n"), encoding="utf-8")
    given = [str(tmp_path / x) if x == "ours.yaml" else x for x in lines.split()]
    args = parsed(monkeypatch, *given)
    assert args.loss_type == "custom_loss"
    surrogate = slime.ours.spec_of_args(args).surrogate
    assert (type(surrogate).__name__, surrogate.tau_neg) == ("SAPO", 1.1)
    (_, grad, metrics), (_, other, others) = (step(slime, args, x) for x in ("custom_loss", "policy_loss"))
    assert not torch.allclose(grad, other)
    assert others.keys() - metrics.keys() == {"pg_clipfrac"}  # SAPO has no clip range


def test_numbers_of_the_file(slime: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its options win over slime's. YAML reads 3e-4 as a string, which raises."""
    file = tmp_path / "ours.yaml"
    given = ["--custom-config-path", str(file), "--advantage-estimator", "gspo", "--eps-clip", "4e-4"]
    file.write_text("grpo_kernels:\n  eps_low: 3.0e-4\n", encoding="utf-8")
    surrogate = slime.ours.spec_of_args(parsed(monkeypatch, *given)).surrogate
    assert (surrogate.eps_low, surrogate.eps_high) == (3e-4, 4e-4)
    file.write_text("grpo_kernels:\n  eps_low: 3e-4\n", encoding="utf-8")
    with pytest.raises(TypeError, match="eps_low must be a number, got '3e-4'"):
        slime.ours.spec_of_args(parsed(monkeypatch, *given))
