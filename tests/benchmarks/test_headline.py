"""The headline shapes, their providers and predictions, and the table of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import memory, report
from benchmarks.__main__ import arguments, pairs
from benchmarks.experiments import headline as predictions
from benchmarks.speed import gate
from benchmarks.speed.plans import FIRST, LAST, headline, turn
from benchmarks.work import from_hidden
from benchmarks.work.batch import Batch, make_batch
from benchmarks.work.providers import PROVIDERS, Provider
from benchmarks.work.workload import Workload

LINEAR = Workload("linear", "grpo", 64, 333, 128, dtype=torch.float32, entropy=True)
LOGITS = Workload("logits", "cross_entropy", 64, 333, dtype=torch.float32, entropy=True)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_names_of_providers() -> None:
    names = {name for form in PROVIDERS.values() for name in form}
    assert {*FIRST, *LAST} <= names
    peers = {p.name for form in PROVIDERS.values() for p in form.values() if p.package is not None}
    assert peers <= {*FIRST, *LAST}  # variants of this package and of eager PyTorch come between
    assert {name for form in predictions.COSTS.values() for name in form} <= names


def test_the_order_of_the_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shapes take the first turn before any takes the second."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--headline", "--device", "cpu"])
    found = pairs(arguments())
    turns = [turn(work, provider.name) for work, provider in found]
    assert turns == sorted(turns) and set(turns) == {0, 1, 2}
    assert [turn(LINEAR, name) for name in ("trl", "eager", "torch.compile")] == [0, 1, 2]
    assert [turn(replace(LOGITS, loss=loss), "torch.compile") for loss in ("grpo", "grpo_kl")] == [2, 0]
    assert [work for work, provider in found if provider.name == "grpo_kernels"] == headline()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--headline", "--tiny", "--device", "cpu"])
    assert {(work.T, work.dtype) for work, _ in pairs(arguments())} == {(16, torch.float32)}


@pytest.mark.parametrize("work", [LINEAR, replace(LINEAR, masked=0.5, loss="grpo_kl"), LOGITS], ids=str)
def test_providers_of_entropies_are_right(work: Workload, device: str) -> None:
    batch = make_batch(work, device)
    able = [p for p in PROVIDERS[work.form].values() if p.reason_against(work, torch.device(device)) is None]
    assert "grpo_kernels" in {p.name for p in able} and all(p.entropies for p in able)
    for provider in able:
        assert gate.check(provider, batch).wrong is None, provider.name
    assert PROVIDERS[work.form]["eager"].reason_against(work, CPU) == "computes no entropy"


def test_entropies_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    for name in ("linear_grpo_loss", "linear_logps"):
        function = getattr(from_hidden, name)

        def record(*args: Any, function: Any = function, **options: Any) -> Any:
            seen.append(options.get("return_entropy"))
            return function(*args, **options)

        monkeypatch.setattr(from_hidden, name, record)
    for entropy in (False, True):
        batch = make_batch(replace(LINEAR, entropy=entropy))
        for name in ("grpo_kernels", "grpo_kernels linear_logps"):
            provider = PROVIDERS["linear"][name]
            provider.loss(batch, *provider.inputs(batch))
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("loss", ["grpo", "grpo_kl", "cross_entropy"])
def test_ligers_fused_head_is_right_on_a_cpu(loss: str, entropy: bool) -> None:
    """Its fallback takes the same arguments as its kernels."""
    pytest.importorskip("liger_kernel")
    batch = make_batch(replace(LINEAR, loss=loss, entropy=entropy, masked=0.5))
    assert gate.check(PROVIDERS["linear"]["liger fused"], batch).wrong is None


@pytest.mark.parametrize("loss", ["grpo", "cross_entropy"])
def test_quack_is_called_with_what_it_takes(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QuACK needs a GPU to be imported. Its functions of the same names and arguments stand for it."""
    import types

    import torch.nn.functional as F

    def chunked_linear_cross_entropy(
        x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100,
        reduction: str = "mean", tuned: bool = True,
    ) -> Tensor:  # fmt: skip
        assert x.dim() == 2 and target.dim() == 1 and reduction == "mean"
        return F.cross_entropy(x @ weight.t(), target, ignore_index=ignore_index)

    def linear_cross_entropy_func(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int = -100,
        reduction: str = "mean", inplace_backward: bool = False,
    ) -> Tensor:  # fmt: skip
        assert x.dim() == 2 and bias is None
        return F.cross_entropy(x @ weight.t(), target, ignore_index=ignore_index, reduction=reduction)

    module = types.ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked_linear_cross_entropy  # type: ignore[attr-defined]
    module.linear_cross_entropy_func = linear_cross_entropy_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    batch = make_batch(replace(LINEAR, loss=loss, entropy=False, masked=0.5))
    assert gate.check(PROVIDERS["linear"]["quack"], batch).wrong is None


@pytest.mark.parametrize("name", ["quack", "unsloth", "liger fused", "cut-cross-entropy", "verl"])
def test_peers_give_reasons(name: str) -> None:
    provider, work = PROVIDERS["linear"][name], replace(LINEAR, entropy=False)
    assert provider.reason_against(work, CPU)
    absent = replace(provider, package="no-such")
    assert absent.reason_against(work, GPU) == "no-such is not installed"


def test_more_packages_are_needed_on_a_gpu_only() -> None:
    def loss(batch: Batch, *inputs: Tensor) -> Tensor:
        raise AssertionError

    provider = Provider("x", loss, "torch", also=("no-such",))
    work = replace(LINEAR, entropy=False)
    assert provider.reason_against(work, CPU) is None
    assert provider.reason_against(work, GPU) == "no-such is not installed"


def test_torch_computes_every_loss() -> None:
    import torch.nn.functional as F

    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    for loss in ("grpo", "grpo_kl", "cross_entropy"):
        batch = make_batch(replace(LINEAR, loss=loss, entropy=False, masked=0.5))
        assert gate.check(PROVIDERS["linear"]["torch linear_cross_entropy"], batch).wrong is None


def test_the_predictions() -> None:
    """Every headline shape has a prediction for ours. Targets are near it, or it says that they are hard."""
    lines = [line.split(" | ") for line in predictions.table().splitlines()[2:]]
    heads = [line[0].lstrip("| ") for line in lines]
    assert [head for head in heads if head] == [str(work) for work in headline()]
    text = predictions.table()
    assert text.count("under 45") == text.count("under 18") == text.count("under 0.85") == 1
    first = lines[0]
    assert first[1] == "grpo_kernels" and float(first[2]) < 45
    (half,) = [line for line in lines if "under 18" in line[-1]]
    assert float(half[3]) < 1.06 * 18  # the products alone take 16.3 ms at the assumed rate
    (statistics,) = [line for line in lines if "statistics" in line[2]]
    assert float(statistics[2].split()[-1]) < 0.89  # what others have published for the same


def test_the_table_of_memory() -> None:
    table = memory.predicted().splitlines()
    assert len(table) == 2 + len(memory.WAYS) * len(memory.CHUNKS[memory.ON_GPU])
    by_way = {line.split(" | ")[1]: float(line.split("**")[1]) for line in table[2:5]}
    # What is held without a buffer: 4 V H in fp32, and 2 V H more when it is returned.
    assert by_way["returned"] - by_way["into fp32"] > 6 * 151936 * 4096 / 2**30 - 0.8


def test_the_page_has_the_tables() -> None:
    """`make bench-docs` would change no prediction and no formula."""
    text = (report.DOCS / "dev" / "tuning.md").read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 3
    for section in report.SECTION.finditer(text):
        assert section[0] == report.with_table(section), section[2]


def test_what_memory_is_measured_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every way, with chunks of that length, after a first call, and with no gradient left from before."""
    seen: list[tuple[int, torch.dtype | None]] = []
    loss = memory.linear_grpo_loss

    def watched(hidden: Tensor, weight: Tensor, *given: Tensor, **how: Any) -> Any:
        assert hidden.grad is None and weight.grad is None
        into = how["accumulate_into"]
        seen.append((how["chunk_tokens"], None if into is None else into.dtype))
        return loss(hidden, weight, *given, **how)

    def peak(step: Callable[[], None], device: torch.device) -> int:
        assert seen and seen.count(seen[-1]) == 1
        step()
        return 3 * 2**20

    monkeypatch.setattr(memory, "linear_grpo_loss", watched)
    monkeypatch.setattr(memory, "peak_memory", peak)
    lines = memory.measured(memory.TINY, CPU).splitlines()[2:]
    ways = (None, torch.float32, torch.bfloat16)
    assert seen == [(chunk, way) for chunk in memory.CHUNKS[memory.TINY] for way in ways for _ in range(2)]
    assert [line.split(" | ")[3].rstrip(" |") for line in lines] == ["3"] * len(memory.WAYS)


@pytest.mark.parametrize(
    "argv, head",
    [
        (["--device", "cuda"], memory.ON_GPU),
        (["--device", "cpu"], memory.ON_CPU),
        (["--device", "cpu", "--tiny"], memory.TINY),
    ],
    ids=["GPU", "CPU", "tiny"],
)
def test_the_head_depends_on_the_device(
    argv: list[str], head: memory.Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[memory.Head] = []
    monkeypatch.setattr(memory, "measured", lambda head, device: taken.append(head))
    monkeypatch.setattr(sys, "argv", ["memory", *argv])
    memory.main()
    assert taken == [head]


def test_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured peaks are near the formulas, apart from what the process allocates otherwise."""
    pytest.importorskip("psutil")
    head = memory.Head(256, 512, 24000, torch.float32)
    monkeypatch.setitem(memory.CHUNKS, head, (32,))
    lines = [line.strip("| ").split(" | ") for line in memory.measured(head, CPU).splitlines()[2:]]
    found = {way: (float(formula), float(got)) for _, way, formula, got in lines}
    weight = 4 * head.V * head.H / 2**20
    logits, sums = 4 * 32 * head.V / 2**20, 4 * head.T * head.H / 2**20
    assert found["returned"][0] == round(weight + logits + sums) and found["into fp32"][0] < weight / 4
    assert found["returned"][1] > 0.8 * weight  # held
    assert found["into fp32"][1] < 0.8 * weight and found["into bf16"][1] < 0.8 * weight
