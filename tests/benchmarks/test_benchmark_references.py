"""The benchmarks of losses with a reference: exact KL, given log-probabilities, figures, `make bench`."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.speed import gate
from benchmarks.speed.test_cpu import EXTRA, ROWS, Result, side_by_side
from benchmarks.work import providers
from benchmarks.work.batch import Batch, make_batch, masked_mean
from benchmarks.work.providers import PROVIDERS
from benchmarks.work.workload import Workload

LOGITS = Workload("logits", "grpo_kl", 64, 333, dtype=torch.float32)
LINEAR = Workload("linear", "log_ratio", 64, 333, 128, dtype=torch.float32)
WITH_KL = {
    ("logits", "eager + exact KL"): providers.eager_with_kl,
    ("linear", "eager + exact KL"): providers.eager_linear_with_kl,
    ("logits", "torch.compile + exact KL"): providers.compiled_with_kl,
    ("linear", "torch.compile + exact KL"): providers.compiled_linear_with_kl,
}
KL_NAMES = sorted({name for _, name in WITH_KL})


def exact_kl(batch: Batch) -> Tensor:
    """KL(policy || reference) in fp64, mean over the unmasked tokens."""
    if batch.work.form == "logits":
        both = [x[:, :-1].double() for x in (batch.logits, batch.ref_logits)]
    else:
        heads = ((batch.hidden, batch.weight), (batch.ref_hidden, batch.ref_weight))
        both = [hidden.double() @ weight.double().t() for hidden, weight in heads]
    log_p, log_q = (torch.log_softmax(x, -1) for x in both)
    return masked_mean(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), batch.mask)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * name.startswith("torch.compile")) for name in KL_NAMES],
)
@pytest.mark.parametrize("work", [LOGITS, LINEAR], ids=str)
def test_the_exact_kl_is_computed(work: Workload, name: str, device: str) -> None:
    batch, provider = make_batch(replace(work, masked=0.5), device), PROVIDERS[work.form][name]
    found = WITH_KL[work.form, name](batch, *provider.inputs(batch))
    truth = exact_kl(batch)
    assert truth > 1e-3 and not found.kl.requires_grad
    torch.testing.assert_close(found.kl.double(), truth, rtol=1e-4, atol=0)
    assert provider.loss(batch, *provider.inputs(batch)) == found.loss
    assert gate.check(provider, batch).wrong is None


@pytest.mark.parametrize("name", KL_NAMES)
@pytest.mark.parametrize("work", [replace(LOGITS, loss="grpo"), replace(LINEAR, given_ref=True)], ids=str)
def test_an_exact_kl_needs_a_reference(work: Workload, name: str) -> None:
    reason = PROVIDERS[work.form][name].reason_against(work, torch.device("cpu"))
    assert reason == "needs a reference's logits"


def test_given_ref_needs_a_loss_with_a_reference() -> None:
    with pytest.raises(ValueError, match="given_ref needs a loss of"):
        replace(LOGITS, loss="grpo", given_ref=True)


@pytest.mark.parametrize("base", [LOGITS, LINEAR], ids=str)
def test_a_given_reference_is_that_of_the_logits(base: Workload) -> None:
    """The batch has the same loss, from log-probabilities instead of logits."""
    of_logits, given = make_batch(base), make_batch(replace(base, given_ref=True))
    assert given.ref_logps is not None and of_logits.ref_logps is None
    assert given.ref_logits is given.ref_hidden is given.ref_weight is None
    torch.testing.assert_close(given.truth.loss, of_logits.truth.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.truth.dlogps, of_logits.truth.dlogps, rtol=0, atol=1e-6)


def test_figures_show_each_loss_with_a_reference() -> None:
    plot = pytest.importorskip("benchmarks.plot", exc_type=ImportError)
    works = [LOGITS, replace(LOGITS, loss="log_ratio"), replace(LOGITS, loss="log_ratio", given_ref=True)]
    works += [replace(LOGITS, loss="grpo"), replace(LOGITS, masked=0.5)]
    found = [plot.Point("eager", asdict(work), 1.0, 1.0, 1.0, 1.0, 1.0) for work in works]
    groups = plot.with_reference(found, found[3].work)
    assert {name: group for name, group in groups.items() if group} == {
        "grpo_kl": found[:1],
        "log_ratio": found[1:2],
        "log_ratio,\ngiven ref_logps": found[2:3],
    }
    older = found[0]._replace(work={k: x for k, x in found[0].work.items() if k != "given_ref"})
    assert plot.with_reference([older], older.work)["grpo_kl"] == [older]


def test_make_bench_compares_every_workload_with_compiled_eager() -> None:
    names: dict[Workload, set[str]] = {}
    for work, name in ROWS:
        names.setdefault(work, set()).add(name)
        assert name in PROVIDERS[work.form] | EXTRA
    for work, found in names.items():
        assert {"torch.compile", "grpo_kernels"} <= found
        assert ("torch.compile + exact KL" in found) == work.reference


def test_make_bench_prints_ratios() -> None:
    """Time relative to compiled eager, and memory relative to the logits."""
    work = replace(LOGITS, T=2048, V=32000)
    times = {"grpo_kernels": 30.0, "torch.compile": 60.0, "torch.compile + exact KL": 120.0}
    table = side_by_side([Result(work, name, ms, 125.0) for name, ms in times.items()])
    assert f"| {work} | grpo_kernels | 30 | 0.50 | 0.25 | 125 | 0.50 |\n|  | torch.compile | 60 |" in table
    alone = side_by_side([Result(work, "grpo_kernels", 30.0, 125.0)])
    assert "| grpo_kernels | 30 |  |  | 125 | 0.50 |" in alone
