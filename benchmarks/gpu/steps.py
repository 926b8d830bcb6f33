"""The steps of `make gpu`, in their order: what to run, for how long, and how to rehearse it on a CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence

import torch

from ..experiments.plan import EXPERIMENTS
from ..speed.plans import headline, plan, turn
from ..work.providers import PROVIDERS, Provider
from ..work.workload import Workload
from .session import Part, Setting

PYTHON = sys.executable
GPU = torch.device("cuda")
# Seconds on a GPU: to draw a batch with its fp64 truth, to check and time a provider, and to compile one.
BATCH, PAIR, COMPILE = 2.5, 3.0, 20.0
VARIANT = 2.5
START = 12  # imports torch, and creates a context
END = 24  # seconds that a run may need besides its limit, to start and to end its last pair

# Tests that only a compiled kernel can fail: parity of the kernels with fp64, finite masks (case 23), sure
# tokens (case 24), more than 2^31 elements, graphs, the compiler, a trainer.
CHECKS = (
    "tests/kernels/test_on_gpu.py",
    "tests/trainers/test_trl_three_steps.py",
    "tests/losses/test_finite_masks.py",
    "tests/losses/test_sure_tokens.py",
    "tests/linear/test_linear_sure_tokens.py",
    "tests/losses/test_hard_shapes.py::TestCase12Large",
    "tests/linear/test_linear_hard_shapes.py::TestCase12Large",
    "tests/losses/test_parity.py",
)
# A few of each for a rehearsal in the interpreter.
DRY_CHECKS = (
    "tests/kernels/test_on_gpu.py",
    "tests/trainers/test_trl_three_steps.py",
    "tests/losses/test_finite_masks.py::test_a_taken_token_that_is_masked",
    "tests/linear/test_linear_sure_tokens.py::test_linear_logps",
    "tests/losses/test_hard_shapes.py::TestCase12Large",
)
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SANITIZED = ("tests/kernels/test_launches.py", "tests/kernels/test_token_statistics.py")
# Folders of tests, those first that a GPU tells most about, with estimated seconds.
SUITE = {
    "kernels": 60, "losses": 150, "linear": 120, "distillation": 60, "trainers": 60, "api": 20,
    "benchmarks": 60, "docs": 30, "distributed": 120,
}  # fmt: skip
NO_COMPILE = ("-m", "not compile and not ptx")


def pytest(*arguments: str, jobs: bool = True) -> list[str]:
    """A call of pytest, in several processes if pytest-xdist is there.

    Tests are handed out one by one, because the first ones take longest. A file that cannot be imported stops
    no other.
    """
    several = jobs and importlib.util.find_spec("xdist") is not None
    workers = ["-n", str(min(14, os.cpu_count() or 1)), "--maxschedchunk=1"] if several else []
    how = ("-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return [PYTHON, "-m", "pytest", *how, *workers, *arguments]


def device(setting: Setting) -> list[str]:
    """The arguments that choose device and sizes. Without its GPU a run ends at once."""
    return ["--tiny", "--device", "cpu"] if setting.dry else ["--device", "cuda"]


def module(name: str, *arguments: str, setting: Setting, csv: str = "", resume: bool = True) -> list[str]:
    """A call of a module that writes `csv` into OUT. It ends by itself before it would be stopped."""
    limit = max(1, round(setting.seconds - END))
    command = [PYTHON, "-m", name, *arguments, "--limit", str(limit), "--output", str(setting.out / csv)]
    command += ["--resume"] if resume else []
    return [*command, *device(setting)]


def machine(setting: Setting) -> list[str]:
    command = [PYTHON, "-m", "benchmarks.gpu.machine", "--output", str(setting.out / "machine.json")]
    return [*command, *device(setting)]


def checks(setting: Setting) -> list[str]:
    if setting.dry:
        return pytest(*DRY_CHECKS, *NO_COMPILE, "-k", "not torch", "--pairwise", jobs=False)
    how = ("--pairwise", "--hypothesis-profile=quick", "--maxfail=40")
    return pytest(*CHECKS, *NO_COMPILE, "-k", "not torch", *how)


def sanitize(setting: Setting) -> list[str]:
    tests = pytest(*SANITIZED, "-k", "not torch", jobs=False)
    if setting.dry:
        return tests
    return [SANITIZER, "--tool", "memcheck", "--error-exitcode", "1", *tests]


def rest(setting: Setting) -> list[str]:
    # A rehearsal takes the small plan, in tiny sizes.
    quick = ("--quick",) if setting.dry else ()
    return module("benchmarks", *quick, setting=setting, csv="rest.csv")


def training_step(setting: Setting) -> list[str]:
    few = ("--loss", "grpo", "--steps", "1") if setting.dry else ()
    return module("benchmarks.training_step", *few, setting=setting, csv="training_step.csv", resume=False)


def memory(setting: Setting) -> list[str]:
    return [PYTHON, "-m", "benchmarks.memory", *device(setting)]


def accuracy(setting: Setting) -> list[str]:
    sizes = ("--H", "64", "--V", "500") if setting.dry else ("--H", "4096", "--V", "151936")
    where = "cpu" if setting.dry else "cuda"
    return [PYTHON, "docs/figures/linear_accuracy.py", "--device", where, *sizes]


def tests_of(folder: str) -> Part:
    def command(setting: Setting) -> list[str]:
        few = ("--collect-only",) if setting.dry else ()
        return pytest(f"tests/{folder}", *NO_COMPILE, *few, jobs=not setting.dry)

    return Part(7, f"tests/{folder}", SUITE[folder], 2 * SUITE[folder] + 30, command)


def able(work: Workload) -> list[Provider]:
    """The providers that would run on a GPU with the packages that are installed here."""
    return [p for p in PROVIDERS[work.form].values() if p.reason_against(work, GPU) is None]


def headline_seconds(works: Sequence[Workload]) -> float:
    """Each shape's batch is drawn once for each turn."""
    total = 0.0
    for work in works:
        names = [provider.name for provider in able(work)]
        compiled = sum(name.startswith("torch.compile") or name == "unsloth" for name in names)
        total += BATCH * len({turn(work, name) for name in names}) + PAIR * len(names) + COMPILE * compiled
    return total


def rest_seconds(works: Sequence[Workload]) -> float:
    return sum(BATCH for work in works) + headline_seconds(works)


def experiment_seconds() -> float:
    works = sum(len(experiment.works) for experiment in EXPERIMENTS.values())
    pairs = sum(len(experiment.works) * len(experiment.variants) for experiment in EXPERIMENTS.values())
    return START + BATCH * works + VARIANT * pairs


def parts() -> list[Part]:
    """All parts. In nine minutes the first five steps come to their end, and the sixth begins."""
    full = plan(list(PROVIDERS), GPU, quick=False)
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the sanitizer knows the ends of every tensor
    return [
        Part(1, "machine", START + 5, 45, machine),
        Part(2, "tests of compiled kernels", 80, 90, checks),
        Part(
            3,
            "headline shapes",
            START + headline_seconds(headline()),
            150,
            lambda how: module("benchmarks", "--headline", setting=how, csv="headline.csv"),
            csv="headline.csv",
        ),
        Part(
            4,
            "experiments",
            experiment_seconds(),
            120,
            lambda how: module("benchmarks.experiments", setting=how, csv="experiments.csv"),
            csv="experiments.csv",
        ),
        Part(5, "memory checker", 45, 60, sanitize, variables=no_cache),
        Part(6, "memory", START + 15, 40, memory),
        Part(6, "training step", 150, 60, training_step),
        Part(6, "accuracy", START + 15, 40, accuracy),
        Part(6, "rest of the benchmark", START + rest_seconds(full), 600, rest, csv="rest.csv"),
        *(tests_of(folder) for folder in SUITE),
    ]
