"""The CSVs of results. Each row of a run names the machine, the versions and the commit."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One row of a run. The columns before `pct_of_floor` are those of Liger's benchmark data."""

    kernel_name: str  # form and loss: "logits grpo"
    kernel_provider: str
    kernel_operation_mode: str  # forward, backward or full
    metric_name: str  # speed or memory
    metric_unit: str  # ms or MiB
    x_name: str
    x_label: str
    x_value: int
    y_value_50: float | None  # median; None unless `status` is "ok"
    y_value_20: float | None  # 20th percentile
    y_value_80: float | None  # 80th percentile
    extra_benchmark_config_str: str  # JSON: the workload
    gpu_name: str  # or the name of the CPU
    timestamp: str
    pct_of_floor: float | None  # speed of a full step, in percent of the floor's
    floor: str  # formula of the floor
    rate: float | None  # bytes or FLOPs of the floor, divided by the time
    rate_unit: str
    max_rel_err: float | None  # error of the worst row of a gradient, relative to fp64
    status: str  # ok, wrong, failed, skipped or not run, with the reason
    provider_version: str
    torch: str
    triton: str
    commit: str


def row(device: torch.device, **values: object) -> Row:
    """A row of `values`, with the machine, the time and the versions. Other columns stay empty."""
    empty = {f.name: None if "None" in str(f.type) else "" for f in fields(Row)}
    here = {"gpu_name": device_name(device), "timestamp": timestamp()}
    axis = {"x_name": "T", "x_label": "tokens", "x_value": 0}
    return Row(**(empty | axis | here | versions() | values))


class Table:
    """A CSV that is flushed after each row, so an aborted run keeps its results."""

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        """Replaces the file by one that begins with `rows`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, [f.name for f in fields(Row)], lineterminator="\n")
        self._writer.writeheader()
        self._end = self._file.tell()
        for row in rows:
            self.add(row)

    def add(self, row: Row, *, draft: bool = False) -> None:
        """A draft is replaced by the next row. It stays if the process ends before that."""
        self._file.seek(self._end)
        self._file.truncate()
        values = asdict(row)
        self._writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})
        self._file.flush()
        if not draft:
            self._end = self._file.tell()


def read(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield Row(**{f.name: parse(line[f.name], str(f.type)) for f in fields(Row)})


def pair(row: Row) -> tuple[str, ...]:
    """Identifies the workload and the provider of a row."""
    return pair_of(row.kernel_name, row.kernel_provider, config(row) if row.x_value else {})


def pair_of(name: str, provider: str, work: Mapping[str, object]) -> tuple[str, ...]:
    """As `pair`, from a configuration without its prediction, which depends on the machine's rates."""
    rest = {key: value for key, value in work.items() if key != "predicted_ms"}
    return name, provider, json.dumps(rest, sort_keys=True)


def finished(rows: Sequence[Row]) -> list[Row]:
    """The rows of a run that a later call need not measure again: rates, and pairs that were completed.

    A pair was completed if it has a row of memory, which is the last, or one that says why there is none.
    """
    complete = {
        pair(row)
        for row in rows
        if row.metric_name == "memory" or (row.status != "ok" and not row.status.startswith("not run"))
    }
    return [row for row in rows if row.kernel_name == "floor" or pair(row) in complete]


def parse(text: str, kind: str) -> object:
    if kind == "int":
        return int(text)
    return (float(text) if text else None) if kind.startswith("float") else text


def config(row: Row) -> dict[str, object]:
    return json.loads(row.extra_benchmark_config_str)


def timestamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


@cache
def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}


def commit() -> str:
    """The commit of the checkout, with a "+" if files have changed; $COMMIT if there is no git."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
        ).stdout

    try:
        head = git("rev-parse", "--short=10", "HEAD").strip()
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs"
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "")
    return head + ("+" if changed.strip() else "")


def short_name(device: torch.device) -> str:
    """A name for files: "nvidia-h200" or "cpu"."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-").lower()


def is_run(path: Path) -> bool:
    """Whether the CSV is that of a run. The results folder also has other tables."""
    with path.open(encoding="utf-8") as file:
        return next(csv.reader(file), []) == [f.name for f in fields(Row)]


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a CSV whose columns are the keys of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
