"""The files that a release is built from, and their date."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grpo_kernels"

# What an sdist has apart from the package.
PROJECT_FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")

FIXED_DATE = 1767225600  # 2026-01-01, if neither SOURCE_DATE_EPOCH nor a commit gives a date


def package_files(package: Path = PACKAGE) -> list[str]:
    """Return the names of the package's files in a fixed order, relative to its folder."""
    found = [*package.rglob("*.py"), package / "py.typed"]
    return sorted(path.relative_to(package).as_posix() for path in found)


def release_date() -> int:
    """Return the date of every archived file, in seconds since 1970.

    It is SOURCE_DATE_EPOCH from the environment, else the last commit's date, else FIXED_DATE.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    try:
        done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # there is no git
        return FIXED_DATE
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else FIXED_DATE
