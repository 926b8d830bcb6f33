"""Whole runs of prime-rl's RL trainer on the CPU: with its own loss, with ours, with losses written by hand.

Run in prime-rl's environment (requirements/prime_rl.txt). `prime_rl_runs.py` lists what replaces the GPU.
Errors are relative to the largest value of a run. Both sides are fp32: 1e-6 per step.
"""

from __future__ import annotations

import inspect
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("prime_rl.configs.trainer")

import tomli_w
from prime_rl.configs.trainer import TrainerConfig
from prime_rl.utils.config import cli
from prime_rl_runs import Run, as_rank, configure, rollouts, save_model, send, train, trainer
from same_runs import TOLERANCE, assert_close, assert_same_parameters
from torch.distributed.fsdp import MixedPrecisionPolicy

from grpo_kernels.integrations import prime_rl as ours

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::DeprecationWarning"
)

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
DOCS = PAGE.split("\n## prime-rl\n")[1].split("\n## ")[0]
TOML = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)[0]
DEFAULT = {"low": 0.2, "high": 0.2, "ratio_cap": 1e9, "kl_tau": 1e-3}
# The default's region is wide, and its KL small. With these, many tokens are outside, and the KL counts.
NARROW = {"low": 1e-3, "high": 2e-3, "ratio_cap": 1e9, "kl_tau": 0.1}
STOCK_NARROW = {"dppo_mask_low": 1e-3, "dppo_mask_high": 2e-3, "kl_tau": 0.1}


def custom(path: str = "grpo_kernels.integrations.prime_rl.prime_rl_loss", **kwargs: Any) -> str:
    """The section of a custom loss."""
    loss = {"type": "custom", "import_path": path, "kwargs": kwargs}
    return tomli_w.dumps({"trainer": {"loss": loss}})


def stock(**options: float) -> str:
    """The section of prime-rl's default loss."""
    return tomli_w.dumps({"trainer": {"loss": {"type": "default", **options}}})


def by_hand(name: str, **kwargs: Any) -> str:
    """The section of a custom loss of this module."""
    return custom(f"{__name__}.{name}", **kwargs)


def summed(inputs: Any, token_loss: Tensor) -> Any:
    return SimpleNamespace(loss=torch.where(inputs.loss_mask, token_loss, 0.0).sum(), metrics={})


def cispo(inputs: Any, ratio_max: float) -> Any:
    ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp().detach()
    return summed(inputs, -inputs.advantages * ratio.clamp(max=ratio_max) * inputs.trainer_logprobs)


def gspo(inputs: Any, width: float) -> Any:
    log_ratio = (inputs.trainer_logprobs - inputs.inference_logprobs)[inputs.loss_mask]
    ratio = log_ratio.mean().exp()
    gain = torch.min(ratio * inputs.advantages, ratio.clamp(1 - width, 1 + width) * inputs.advantages)
    return summed(inputs, -gain)


def with_reference(inputs: Any, beta: float) -> Any:
    x = inputs.ref_logprobs - inputs.trainer_logprobs
    return summed(inputs, -inputs.advantages * inputs.trainer_logprobs + beta * (x.exp() - 1 - x))


Runs = Callable[..., Run]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of our loss."""
    found = []
    loss = ours.prime_rl_loss

    def spy(inputs: Any, **options: Any) -> Any:
        found.append(options)
        return loss(inputs, **options)

    monkeypatch.setattr(ours, "prime_rl_loss", spy)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """A function that trains with a section `[trainer.loss]` on a kind of rollouts, or on fake data."""

    def run(loss: str, kind: str = "grpo", *arguments: str, precision: Any = None, **options: Any) -> Run:
        config = prepare(tmp_path / str(len(list(tmp_path.iterdir()))), loss, kind, *arguments, **options)
        return train(config, **({} if precision is None else {"precision": precision}))

    return run


def prepare(folder: Path, loss: str, kind: str, *arguments: str, ranks: int = 1, **options: Any) -> Any:
    """Make a folder with a model, a configuration and rollouts. Return the configuration."""
    folder.mkdir()
    model = save_model(folder / "model")
    if kind == "fake":
        options["top"] = "data = { fake = { batch_size = 2 } }"
    config = configure(folder, loss, *arguments, **options)
    if kind != "fake":
        send(config, rollouts(model, kind), ranks)
    return config


def assert_same_runs(got: Run, wanted: Run, *, loss: bool = True, tolerance: float = TOLERANCE) -> None:
    """Assert that gradient norms, prime-rl's metrics, final parameters and, if asked, the losses agree."""
    keys = ["optim/grad_norm", "entropy/all/mean", "mismatch_kl/all/mean"]
    for key in [*keys, "loss/mean"] if loss else keys:
        assert_close(key, got.column(key), wanted.column(key), tolerance)
    assert float(wanted.column("optim/grad_norm").min()) > 1e-3
    assert_same_parameters(got.after, wanted.after, tolerance)


@pytest.mark.parametrize("kind", ["fake", "grpo", "pruned", "mixed"])
@pytest.mark.parametrize("chunk", ['"disabled"', 5])
def test_default(runs: Runs, calls: list[Any], kind: str, chunk: Any) -> None:
    """Our options for prime-rl's default loss give its gradients, with both of its heads."""
    wanted = runs("", kind, chunk=chunk)
    assert not calls
    got = runs(custom(**DEFAULT), kind, chunk=chunk)
    assert calls and all(call == DEFAULT for call in calls)
    assert_same_runs(got, wanted, loss=False)


@pytest.mark.parametrize("kind", ["grpo", "pruned", "mixed"])
def test_outside_of_the_region(runs: Runs, kind: str) -> None:
    """The same where the region and the KL count, also with rl weights of 0 and 1 and with other losses."""
    wanted = runs(stock(**STOCK_NARROW), kind)
    got = runs(custom(**NARROW), kind)
    assert_same_runs(got, wanted, loss=False)
    clipped = wanted.column("is_masked_low/mean") + wanted.column("is_masked_high/mean")
    assert_close("clip_fraction", got.column("clip_fraction/mean"), clipped)
    assert 0.05 < float(clipped.mean()) < 0.95
    if kind == "mixed":
        assert_close("nll", got.column("nll/mean"), wanted.column("nll/mean"))
        assert_close("ref_kl", got.column("ref_kl/mean"), wanted.column("ref_kl/mean"))


@pytest.mark.parametrize("kind", ["grpo", "pruned", "mixed"])
def test_the_value(runs: Runs, kind: str) -> None:
    """Without the region, the losses agree too. The gradient is not clipped."""
    wanted = runs(stock(dppo_mask_low=2.0, dppo_mask_high=2.0, kl_tau=0.05), kind)
    assert_same_runs(runs(custom(preset="importance_ratio", kl_tau=0.05), kind), wanted)


def test_rl_weights(runs: Runs) -> None:
    """Rl weights multiply the loss of each token. With a KL, the run ends with our ValueError."""
    wanted = runs(stock(**{**STOCK_NARROW, "kl_tau": 0.0}), "weighted")
    got = runs(custom(**{**NARROW, "kl_tau": 0.0}), "weighted")
    assert_same_runs(got, wanted, loss=False)
    with pytest.raises(ValueError, match="need rl weights of 0 and 1"):
        runs(custom(**NARROW), "weighted")


def test_lines_of_the_docs(runs: Runs, calls: list[Any], tmp_path: Path) -> None:
    """The TOML of docs/trainers.md trains with CISPO. prime-rl's exports of tokens work with it."""
    wanted = runs(by_hand("cispo", ratio_max=5.0))
    got = runs(TOML, top="enable_token_export = true")
    assert calls and all(call == {"preset": "cispo", "ratio_max": 5.0} for call in calls)
    assert_same_runs(got, wanted)
    # The trainer's forward over packed sequences is that of the sampler, apart from the sampler's noise.
    assert 0.03 < float(got.column("mismatch_kl/all/mean")[0]) < 0.06
    assert len(list(tmp_path.rglob("token_exports/*/rank_0.jsonl"))) == 3


def test_gspo(runs: Runs) -> None:
    """A ratio of the sequence is that of one sequence of a packed micro-batch."""
    got = runs(custom(preset="gspo", eps_low=0.05, eps_high=0.05))
    assert_same_runs(got, runs(by_hand("gspo", width=0.05)))
    assert 0 < float(got.column("clip_fraction/mean").mean()) < 1


def test_reference(runs: Runs) -> None:
    """A KL to the reference, if every sample has one. prime-rl gives zeros to those that have none."""
    section = custom(preset="reinforce", kl={"kind": "k3", "beta": 0.2})
    got = runs(section, "reference")
    assert_same_runs(got, runs(by_hand("with_reference", beta=0.2), "reference"))
    assert float(got.column("kl/mean").min()) > 0
    for kind in ("grpo", "some references"):
        with pytest.raises(ValueError, match="needs a reference"):
            runs(section, kind)


def test_command_line(runs: Runs, calls: list[Any]) -> None:
    """Options as JSON are numbers. By name, those that the file lacks are strings, which we refuse."""
    for name, value, expected in [
        ("", '{"kl_tau": 1e-3}', {"ratio_max": 5.0, "kl_tau": 1e-3}),
        (".ratio_max", "4.0", {"ratio_max": 4.0}),
    ]:
        calls.clear()
        runs(TOML, "fake", f"--trainer.loss.kwargs{name}", value)
        assert calls and all(call == {"preset": "cispo", **expected} for call in calls)
    with pytest.raises(TypeError, match="kl_tau must be a number, got '1e-3'"):
        runs(TOML, "fake", "--trainer.loss.kwargs.kl_tau", "1e-3")


def test_command_of_the_trainer(tmp_path: Path) -> None:
    """Without the command `rl`, the docs' section is `[loss]`."""
    (tmp_path / "trainer.toml").write_text(TOML.replace("[trainer.loss]", "[loss]"))
    config = cli(TrainerConfig, args=["@", str(tmp_path / "trainer.toml")])
    assert config.loss.kwargs == {"preset": "cispo", "ratio_max": 5.0}


def test_two_ranks(tmp_path: Path, runs: Runs) -> None:
    """The mean is over the tokens of all ranks: two ranks train as one does, with either loss.

    With one sample per step, the second rank has a micro-batch without tokens.
    """
    penalty = custom(preset="reinforce", kl={"kind": "k3", "beta": 0.2})
    cases = [(stock(**STOCK_NARROW), "pruned"), (custom(**NARROW), "pruned"), (penalty, "one")]
    configs = [prepare(tmp_path / f"ranks{i}", *case, ranks=2) for i, case in enumerate(cases)]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=as_rank, args=(rank, 2, configs, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    wanted, *got = (Run(*run) for run in torch.load(tmp_path / "runs"))
    assert_same_runs(got[0], wanted, loss=False)
    for both, case in zip(got, cases[1:], strict=True):
        for name, parameter in runs(*case).after.items():
            assert_close(name, both.after[name], parameter)


def test_in_bf16(runs: Runs) -> None:
    """With the trainer's own precision. A gradient that is rounded otherwise differs by 2^-8."""
    wanted = runs(stock(**STOCK_NARROW), precision=MixedPrecisionPolicy)
    got = runs(custom(**NARROW), precision=MixedPrecisionPolicy)
    assert_same_runs(got, wanted, loss=False, tolerance=2**-8)


def test_log_probabilities(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docs' line replaces the one that it names, and trains as prime-rl's own line does."""
    number = int(re.search(r"train\.py`, line (\d+)", DOCS).group(1))  # type: ignore[union-attr]
    imports, line = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0].strip().splitlines()
    lines, first = inspect.getsourcelines(trainer.train)
    stock_line = lines[number - first]
    assert stock_line.strip() == 'out["logprobs"] = selective_log_softmax(scaled_logits, labels)'
    wanted = runs("")
    lines[number - first] = stock_line.split("out")[0] + line + "\n"
    names = vars(trainer)
    monkeypatch.setattr(trainer, "train", trainer.train)  # restored after the test, as is the next
    monkeypatch.setattr(trainer, "selective_logps", None, raising=False)
    exec(imports + "\n" + "".join(lines), names)
    monkeypatch.setattr(trainer, "selective_log_softmax", None)
    assert_same_runs(runs(""), wanted)
