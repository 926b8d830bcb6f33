"""Rows of compiled.csv, and the Markdown tables made from them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..tables import record
from ..tables.markdown import markdown
from ..work.providers import PROVIDERS
from .figures import OURS, Figures

COMPARED = ("sm_80", "sm_90", "sm_100")


class Job(NamedTuple):
    """Something that kernels of several providers do."""

    what: str
    of: str  # a pass: "statistics" or "gradient"
    kernels: dict[str, str]  # by provider: kernel and variant, without block sizes


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
Row = dict[str, str]  # of the CSV: one for each pass of a kernel, or one for a kernel without passes


def rows_of(figures: Figures) -> Iterator[Row]:
    """The rows of a kernel in the CSV."""
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
    """The name that the package has in all results: that of its first provider."""
    known = (p for form in PROVIDERS.values() for p in form.values() if p.package)
    return next((p.name for p in known if p.package.replace("-", "_") == package), package)


def tables(path: Path) -> str:
    """The tables of docs/benchmarks.md."""
    rows = record.read_table(path)
    versions = dict.fromkeys(f"{r['provider']} {r['version']}" for r in rows if r["provider"] != OURS)
    where = f"torch {rows[0]['torch']}, Triton {rows[0]['triton']}, commit {rows[0]['commit']}"
    hidden = f"<details>\n<summary>Every variant</summary>\n\n{every_variant(rows)}\n</details>"
    return f"{'; '.join([where, *versions])}.\n\n{comparison(rows)}\n{hidden}\n"


def comparison(rows: Sequence[Row]) -> str:
    """A table of instructions per element. It groups kernels that do the same."""
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
    return markdown(head, lines, text_columns=3)


def unshaped(row: Row) -> str:
    """Kernel and variant without block sizes."""
    words = (word for word in row["variant"].split() if not word.startswith(("block", "group")))
    return " ".join([row["kernel"], *words])


def every_variant(rows: Sequence[Row]) -> str:
    """A table with a line for each variant. A cell has several values if the targets differ."""
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
    return markdown(head, lines, text_columns=3)


def across(rows: Sequence[Row], column: str, digits: str = "g") -> str:
    """The value of a column, or one value per target if they differ."""
    values = [f"{float(row[column]):{digits}}" for row in rows]
    return " / ".join(values if len(set(values)) > 1 else values[:1])
