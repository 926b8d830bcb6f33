"""The table of machine code: every kernel variant of this package and, where installed, the peers' kernels.

    python -m benchmarks.compiled            # --quick: only what the comparison with the peers needs

compiles for GPUs that are not here, writes benchmarks/results/compiled.csv and prints tables of it. What is
counted is said at `machine_code.Pass`; kernels around matrix products have no passes over a row. Peers run as
called by their providers, at V = 151936 and temperature 1, both of which are constants in the peers' kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from . import record, report
from .cases import CASES
from .machine_code import OURS, Figures, compiled
from .providers import PROVIDERS, Provider
from .sass import TARGETS
from .workload import SEQUENCES, Batch, Workload

COMPARED = ("sm_80", "sm_90", "sm_100")


class Peer(NamedTuple):
    """A provider whose kernels are wanted, and what it is called with."""

    provider: Provider
    work: Workload
    device: str  # "cpu" where masks or sorts look at values


FROM_LOGITS = Workload("logits", "grpo", 4096, 151936)
FROM_HIDDEN = Workload("linear", "grpo", 128, 151936, 64)
WITH_REFERENCE = Workload("logits", "grpo_kl", 4096, 151936)
PEERS = {
    "liger": Peer(PROVIDERS["logits"]["liger"], WITH_REFERENCE, "meta"),
    "trl": Peer(PROVIDERS["logits"]["trl"], FROM_LOGITS, "meta"),
    "trl, chunked head": Peer(PROVIDERS["linear"]["trl"], FROM_HIDDEN, "cpu"),
    "cut-cross-entropy": Peer(PROVIDERS["linear"]["cut-cross-entropy"], FROM_HIDDEN, "cpu"),
}
# Where TRL asks for the device, and takes PyTorch for others than a GPU.
GATES = ("trl.trainer.utils._supports_trl_loss_kernel", "trl.kernels.chunked_logprob._use_triton")


class Job(NamedTuple):
    what: str
    of: str  # the pass
    kernels: dict[str, str]  # of each provider, with its variant, but without the shape of its blocks


JOBS = (
    Job(
        "log-probability",
        "statistics",
        {OURS: "row_stats bf16", "liger": "grpo_loss.grpo_loss_fwd bf16"},
    ),
    Job(
        "log-probability and entropy",
        "statistics",
        {OURS: "row_stats bf16 entropy", "trl": "logprob_entropy.forward bf16 has_mask"},
    ),
    Job(
        "gradient",
        "gradient",
        {
            OURS: "dlogits bf16",
            "liger": "grpo_loss.grpo_loss_bwd bf16",
            "trl": "logprob_entropy.backward bf16 has_mask has_logprob_grad",
        },
    ),
    Job(
        "chunk of the head: log-probability and entropy",
        "statistics",
        {OURS: "row_stats fp32 entropy top1", "trl": "chunked_logprob.forward bf16 has_entropy"},
    ),
    Job(
        "chunk of the head: gradient",
        "gradient",
        {
            OURS: "fused_loss fp32->bf16 surrogate=ppo_clip anchor=old",
            "trl": "chunked_logprob.backward bf16 has_logprob_grad",
        },
    ),
)
CASES_OF_JOBS = ("bfloat16 policy only", "bfloat16 entropy", "linear, one pass", "linear, token statistics")
PEERS_OF_JOBS = ("liger", "trl", "trl, chunked head")

Row = dict[str, str]  # of the CSV: one for each pass of a kernel, or for a kernel without


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled")
    parser.add_argument("--quick", action="store_true", help="only what the comparison with the peers needs")
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=COMPARED)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/compiled.csv; --quick: none")
    args = parser.parse_args()
    started = time.monotonic()
    peers = [name for name in (PEERS_OF_JOBS if args.quick else PEERS) if installed(name)]
    cases = CASES_OF_JOBS if args.quick else CASES
    calls = [*(partial(call_peer, name) for name in peers), *(CASES[name] for name in cases)]
    found = compile_all(calls, args.targets)
    rows = [row for one in found for row in rows_of(one)]
    print(f"{comparison(rows)}\n{every_variant(rows)}")
    output = args.output or (None if args.quick else record.RESULTS / "compiled.csv")
    if output is not None:
        record.write_table(output, rows)
        print(output)
    print(f"{len(found)} kernels in {time.monotonic() - started:.0f} s")


def installed(peer: str) -> bool:
    return PEERS[peer].provider.version != ""


def call_peer(name: str) -> None:
    """Forward and backward."""
    provider, work, device = PEERS[name]
    batch = empty_batch(work, device)
    inputs = provider.inputs(batch)
    with contextlib.ExitStack() as patches:
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        for gate in GATES if provider.name == "trl" else ():
            patches.enter_context(mock.patch(gate, lambda *args: True))
        provider.loss(batch, *inputs).backward()


def empty_batch(work: Workload, device: str) -> Batch:
    """Tensors of the right shapes and dtypes, whatever they hold; no row is masked."""
    B, L, V, H = SEQUENCES, work.T // SEQUENCES, work.V, work.H

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    logits = ref_logits = hidden = weight = None
    if work.form == "logits":
        logits = new(B, L + 1, V, dtype=work.dtype)
        ref_logits = torch.empty_like(logits) if work.reference else None
    else:
        hidden, weight = new(B, L, H, dtype=work.dtype), new(V, H, dtype=work.dtype)
    ids, mask = new(B, L, dtype=torch.int64), torch.ones(B, L, dtype=torch.bool, device=device)
    given = (logits, ref_logits, hidden, weight, None, None)
    return Batch(work, ids, mask, new(B), new(B, L), *given, truth=None)


def compile_all(calls: Iterable[Callable[[], None]], targets: Iterable[str]) -> list[Figures]:
    """On all cores; each kernel once, those of this package first."""
    found: dict[tuple[str, ...], Figures] = {}
    # A compiler's threads do not survive a fork.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in [pool.submit(compiled, call, target) for call in calls for target in targets]:
            for one in result.result():
                same = found.setdefault((one.package, one.kernel, one.variant, one.target), one)
                assert same == one, f"two kernels have one name: {same}, {one}"
    order = [*TARGETS]
    return sorted(
        found.values(),
        key=lambda f: (f.package != OURS, f.package, f.kernel, f.variant, order.index(f.target)),
    )


def rows_of(figures: Figures) -> Iterator[Row]:
    known = {
        "provider": provider_of(figures.package),
        "version": importlib.metadata.version(figures.package),
        **{"kernel": figures.kernel, "variant": figures.variant, "target": figures.target},
        **asdict(figures.resources),
    }
    for p in figures.passes or [None]:
        read = {
            "pass": p and p.name,
            "instructions_per_element": p and round(p.instructions, 3),
            "exponentials_per_element": p and round(p.exponentials, 3),
            "narrowest_bits": p and p.narrowest_bits,
        }
        row = known | read | record.versions()
        yield {name: "" if value is None else str(value) for name, value in row.items()}


def provider_of(package: str) -> str:
    """By the name that it has in all results."""
    names = {p.package.replace("-", "_"): p.name for f in PROVIDERS.values() for p in f.values() if p.package}
    return names.get(package, package)


def tables(path: Path) -> str:
    """Of the CSV, for docs/benchmarks.md."""
    rows = record.read_table(path)
    versions = dict.fromkeys(f"{r['provider']} {r['version']}" for r in rows if r["provider"] != OURS)
    where = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, commit {rows[0]['commit']}"
    hidden = f"<details>\n<summary>Every variant</summary>\n\n{every_variant(rows)}\n</details>"
    return f"{'; '.join([where, *versions])}.\n\n{comparison(rows)}\n{hidden}\n"


def comparison(rows: Sequence[Row]) -> str:
    """Instructions per element of the kernels that do the same."""
    targets = tuple(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for job in JOBS:
        for provider, kernel in job.kernels.items():
            of = [r for r in rows if (r["provider"], r["pass"], unshaped(r)) == (provider, job.of, kernel)]
            if of:
                instructions = (across([row], "instructions_per_element", ".1f") for row in of)
                exponentials = across(of, "exponentials_per_element", ".3g")
                rest = (across(of, name) for name in ("registers", "spills"))
                lines.append((job.what, provider, of[0]["kernel"], *instructions, exponentials, *rest))
    head = ("per element read", "provider", "kernel", *targets, "exponentials", "registers", "spills")
    return report.markdown(head, lines, text_columns=3)


def unshaped(row: Row) -> str:
    words = (word for word in row["variant"].split() if not word.startswith(("block", "group")))
    return " ".join([row["kernel"], *words])


def every_variant(rows: Sequence[Row]) -> str:
    """Instructions per element in columns of their own; where targets differ, a value for each of them."""
    used = ("registers", "spills", "shared_bytes", "threads")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["provider"], row["kernel"], row["variant"]), []).append(row)
    lines = []
    for names, of in groups.items():
        passes = [[row for row in of if row["pass"] == what] for what in ("statistics", "gradient")]
        instructions = (across(part, "instructions_per_element", ".1f") for part in passes)
        exponentials = (across(part, "exponentials_per_element", ".3g") for part in passes if part)
        once = [row for row in of if row["pass"] == of[0]["pass"]]
        resources = (across(once, name) for name in used)
        lines.append((*names, *instructions, ", ".join(exponentials), *resources))
    head = ("provider", "kernel", "variant", "statistics", "gradient", "exponentials", *used)
    return report.markdown(head, lines, text_columns=3)


def across(rows: Sequence[Row], column: str, digits: str = "g") -> str:
    """The value on all targets, or those of each."""
    values = [f"{float(row[column]):{digits}}" for row in rows]
    return " / ".join(values if len(set(values)) > 1 else values[:1])


if __name__ == "__main__":
    main()
