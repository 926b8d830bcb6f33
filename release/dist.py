"""Builds wheel and sdist: `python -m release.dist OUT`. Two builds of the same files give the same bytes."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .files import PROJECT_FILES, ROOT, package_files, release_date

# The hook of setuptools with the name in the first argument. Its last line of output is the archive's name.
HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(out: Path) -> tuple[Path, Path]:
    """Return wheel and sdist. They are built from a copy of the files, so nothing else can enter."""
    date = release_date()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        copy_project(project)
        sdist = run_hook("build_sdist", project, out.resolve(), date)
        normalize(sdist, date)
        return run_hook("build_wheel", project, out.resolve(), date), sdist


def copy_project(folder: Path) -> None:
    """Copy what the archives are built from, with the same access rights in every checkout."""
    for name in (*PROJECT_FILES, *(f"grpo_kernels/{name}" for name in package_files())):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        target.chmod(0o644)


def run_hook(hook: str, project: Path, out: Path, date: int) -> Path:
    """Run a hook of the build backend without isolation. Return the archive that it wrote to `out`."""
    done = subprocess.run(
        [sys.executable, "-c", HOOK, hook, str(out)],
        cwd=project,
        env=os.environ | {"SOURCE_DATE_EPOCH": str(date)},
        umask=0o022,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{hook} failed:\n{done.stdout}{done.stderr}")
    return out / done.stdout.splitlines()[-1]


def normalize(sdist: Path, date: int) -> None:
    """Rewrite an sdist: sorted files, one date, no owner. setuptools does this for wheels only."""
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            if content is not None:  # no folder
                files[member.name] = content.read()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), date, 0o644
            archive.addfile(entry, io.BytesIO(content))
    sdist.write_bytes(gzip.compress(tar.getvalue(), mtime=date))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for path in build(parser.parse_args().out):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
