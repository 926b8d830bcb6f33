"""Installs each archive into an environment of its own and tests it there: `python -m release.check FOLDER`.

The environments get PyTorch and Triton from the one that runs this script, so nothing is downloaded. A user
installs with dependencies: `pip install FOLDER/grpo_kernels-*.whl`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")  # options follow
SMOKE_TEST = Path(__file__).with_name("smoke.py")


def check(archive: Path) -> None:
    """Install a wheel or an sdist and run the smoke test. Raises RuntimeError if a step fails."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = archive if archive.suffix == ".whl" else wheel_of(archive, folder / "wheels")
        environment = folder / "environment"
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        # Before PyTorch's folder is on the path. It may have this package, which pip would leave in place.
        run(*PIP, "--python", python, "install", "--no-deps", wheel)
        (packages,) = environment.rglob("site-packages")
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        empty = folder / "empty"
        empty.mkdir()
        print(archive.name, run(python, "-I", SMOKE_TEST, cwd=empty).strip(), sep=": ")


def wheel_of(sdist: Path, out: Path) -> Path:
    """Build a wheel as pip does it from an sdist, with the setuptools at hand."""
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist)
    (wheel,) = out.glob("*.whl")
    return wheel


def run(*command: Any, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="has wheels and sdists, for example dist/")
    folder = parser.parse_args().folder.resolve()
    archives = [*sorted(folder.glob("*.whl")), *sorted(folder.glob("*.tar.gz"))]
    if not archives:
        sys.exit(f"{folder} has neither a wheel nor an sdist")
    for archive in archives:
        check(archive)
