"""The bytes and FLOPs that benchmarks/traffic counts for this package are those of docs/kernels.md."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="addresses are recorded in Triton's interpreter (TRITON_INTERPRET=1)",
)
pytest.importorskip("triton")

from benchmarks.tables import record  # noqa: E402
from benchmarks.traffic import counts, tables  # noqa: E402
from benchmarks.traffic.counts import KINDS, STEPS, Measurement  # noqa: E402
from benchmarks.work.batch import Batch, make_batch  # noqa: E402
from benchmarks.work.providers import PROVIDERS, Provider, ours  # noqa: E402
from benchmarks.work.workload import Workload  # noqa: E402

V = 600  # a block and a part of one
BASES = {"logits": Workload("logits", "grpo", 16, V), "linear": Workload("linear", "grpo", 16, V, 8)}
LOSSES = {"logits": ("grpo", "grpo_kl", "log_ratio"), "linear": ("grpo", "grpo_kl")}
idle = pytest.mark.parametrize(
    "fractions", [{}, {"masked": 0.5, "inactive": 0.5}], ids=["every row", "a quarter of the rows"]
)


def batch_of(form: str, loss: str = "grpo", **fractions: float) -> Batch:
    return make_batch(replace(BASES[form], loss=loss, **fractions))


def measured(name: str, batch: Batch) -> Measurement:
    return counts.measure(PROVIDERS[batch.work.form][name], batch)


def large(one: Measurement, step: str) -> dict[tuple[str, str], float]:
    """The bytes of tensors with a vocabulary, without zeros."""
    return {key: x for key, x in one.steps[step].moved.items() if x and key[0] != "per token"}


def expected(**moved: dict[str, float]) -> Any:
    return pytest.approx({(t, k): x for t, by in moved.items() for k, x in by.items() if x})


# Bytes per element for reading a row of bf16 logits, and for reading the taken token's logit separately.
ROW, TAKEN = 2, 2 / V


def once(work: Workload) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes for the statistics of policy and reference, which read each unmasked row once."""
    unmasked = 1 - work.masked
    row = {"reads": unmasked * (ROW + TAKEN), "rereads": unmasked * TAKEN}
    return row, {kind: x * work.reference for kind, x in row.items()}


@idle
@pytest.mark.parametrize("loss", LOSSES["logits"])
def test_two_kernels_read_rows_with_a_gradient_twice(loss: str, fractions: dict[str, float]) -> None:
    batch = batch_of("logits", loss, **fractions)
    work, one, learning = batch.work, measured("grpo_kernels", batch), counts.learning(batch)
    row, reference = once(work)
    assert large(one, "forward") == expected(logits=row, reference=reference)
    assert large(one, "backward") == expected(logits={"reads": learning * ROW}, gradient={"writes": ROW})
    total = sum(x for step in STEPS for (_, kind), x in large(one, step).items() if kind != "rereads")
    unmasked, rows_read = 1 - work.masked, 1 + work.reference
    assert total == pytest.approx(
        work.floor.amount / (work.T * V) + learning * ROW + unmasked * rows_read * TAKEN
    )


@idle
@pytest.mark.parametrize("loss", LOSSES["logits"])
def test_in_place_one_launch_reads_rows_twice(loss: str, fractions: dict[str, float]) -> None:
    batch = batch_of("logits", loss, **fractions)
    one, learning = measured("grpo_kernels inplace", batch), counts.learning(batch)
    row, reference = once(batch.work)
    logits = {kind: x + learning * ROW for kind, x in row.items()}
    assert large(one, "forward") == expected(logits=logits, reference=reference, gradient={"writes": ROW})
    assert not large(one, "backward")


@idle
@pytest.mark.parametrize("loss", LOSSES["linear"])
def test_from_hidden_states(loss: str, fractions: dict[str, float]) -> None:
    """Logits of a chunk are fp32 and are read again for a bf16 gradient. There are three products."""
    batch = batch_of("linear", loss, **fractions)
    unmasked, learning = 1 - batch.work.masked, counts.learning(batch)
    products = 2 * unmasked * (1 + batch.work.reference)
    one = measured("grpo_kernels", batch)
    rows_read = unmasked * (1 + batch.work.reference)
    taken = rows_read * 2 * TAKEN
    logits = {"reads": (rows_read + learning) * 2 * ROW + taken, "rereads": learning * 2 * ROW + taken}
    assert large(one, "forward") == expected(logits=logits, gradient={"writes": learning * ROW})
    assert not large(one, "backward")
    assert one.steps["forward"].products == pytest.approx(products + 4 * learning)
    assert one.steps["backward"].products == 0
    two_passes = measured("grpo_kernels linear_logps", batch)
    assert two_passes.steps["forward"].products == pytest.approx(products)
    assert two_passes.steps["backward"].products == pytest.approx(6 * learning)
    if learning < unmasked:
        skipping = measured("grpo_kernels skip_inactive", batch)
        assert skipping.steps["forward"].products == pytest.approx(6 * learning)


@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_distillation(kind: str, masked: float) -> None:
    """A JSD, and a KL of equal rows, reads both rows twice in the forward. The gradient needs both again."""
    batch = batch_of("logits", "log_ratio", masked=masked)
    unmasked = 1 - masked
    for equal, passes in ((False, 2 if kind == "jsd" else 1), (True, 2)):
        one = counts.distillation(kind, batch, equal=equal)
        reads = {"reads": passes * unmasked * ROW}
        assert large(one, "forward") == expected(logits=reads, reference=reads)
        reads = {"reads": unmasked * ROW}
        assert large(one, "backward") == expected(logits=reads, reference=reads, gradient={"writes": ROW})


def test_the_counts_can_fail() -> None:
    batch = batch_of("logits", masked=0.5)

    def without_mask(batch: Batch, logits: Tensor) -> Tensor:
        return ours(batch._replace(mask=torch.ones_like(batch.mask)), logits)

    def twice(batch: Batch, logits: Tensor) -> Tensor:
        return ours(batch, logits) + ours(batch, logits)

    forward = {
        loss: counts.measure(Provider("", loss), batch).steps["forward"].moved
        for loss in (ours, without_mask, twice)
    }
    reads = {loss: moved["logits", "reads"] for loss, moved in forward.items()}
    assert reads[without_mask] == reads[twice] == 2 * reads[ours]
    # Reads of another launch are not rereads.
    assert forward[twice]["logits", "rereads"] == pytest.approx(TAKEN)


def test_products_in_place_are_counted() -> None:
    """TRL uses `addmm_`, which FlopCounterMode itself does not count."""

    def loss(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.zeros(16, V, dtype=hidden.dtype)
        return logits.addmm_(hidden.flatten(0, 1), weight.t()).sum()

    one = counts.measure(Provider("", loss), batch_of("linear"))
    assert [one.steps[step].products for step in STEPS] == [2, 4]


def test_every_provider_has_its_rows(tmp_path: Path) -> None:
    """A row has counts, or a reason if there are none."""
    batches = {form: batch_of(form) for form in BASES}
    absent = Provider("absent", ours, package="no-such-package")
    found = [measured("grpo_kernels", batches["logits"]), counts.measure(absent, batches["logits"])]
    found += [measured(name, batches["linear"]) for name in ("grpo_kernels", "eager")]
    path = tmp_path / "traffic.csv"
    record.write_table(path, [row for one in found for row in tables.traffic_rows(one)])
    rows = record.read_table(path)
    assert len(rows) == 2 * 4 + 1 + 2 * 3 + 1
    for row in rows:
        assert all((row[f"{kind}_E"] == "") == bool(row["note"]) for kind in KINDS)
    text = tables.traffic_tables(path)
    assert "absent: no-such-package is not installed" in text and "eager: no Triton kernel" in text
    assert "| grpo, floor 4 | grpo_kernels | 2 + 2 | 0 + 0 | 0 + 2 |" in text
    assert "| grpo | grpo_kernels | 8.01 + 0 | 2 + 0 |" in text
    record.write_table(path, [row for one in found[2:] for row in tables.operations_rows(one)])
    assert "| grpo_kernels | 6 |\n| eager | 6 |\n| floor | 6 |" in tables.operations_table(path)
