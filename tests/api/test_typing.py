"""Type checkers find the package after `pip install -e .`, and refuse misspelt names and options."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import typing
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import grpo_kernels
from grpo_kernels import LossSpec, options
from grpo_kernels.spec import PresetOptions, surrogates

ROOT = Path(grpo_kernels.__file__).parents[1]
CALLS = Path(__file__).parent / "typed_calls"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"


def run(*command: Any, cwd: Path, succeeds: bool = True) -> str:
    paths = ("PYTHONPATH", "MYPYPATH")  # a checkout could be found there without an installation
    environment = {name: value for name, value in os.environ.items() if name not in paths}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or not succeeds, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def editable(tmp_path: Path) -> Path:
    """Install a copy of the project as `pip install -e .` does."""
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    shutil.copytree(ROOT / "grpo_kernels", project / "grpo_kernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("benchmarks", "tests", "docs", "examples"):  # these folders are no part of the package
        (project / name).mkdir()
        (project / name / "module.py").touch()
    wheel = run(sys.executable, "-c", BUILD, tmp_path, cwd=project).splitlines()[-1]
    return tmp_path / wheel


def test_an_editable_install_is_a_path(editable: Path) -> None:
    """Type checkers and editors follow a .pth file, but not the import hook of setuptools."""
    with zipfile.ZipFile(editable) as wheel:
        outside = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in outside] == [".pth"]
        assert wheel.read(outside[0]).decode().strip() == str(editable.parent / "project")


def errors_by_line(output: str) -> dict[str, dict[int, set[str]]]:
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file, line, code in re.findall(r"^(.+?):(\d+): error: .* \[([\w-]+)\]$", output, re.MULTILINE):
        found[Path(file).name][int(line)].add(code)
    return {file: dict(lines) for file, lines in found.items()}


def test_mypy_on_calls_of_the_installed_package(editable: Path, tmp_path: Path) -> None:
    """A user's files are checked in an environment that has the package installed with `pip install -e .`."""
    pytest.importorskip("mypy")
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    (packages,) = environment.rglob("site-packages")
    with zipfile.ZipFile(editable) as wheel:
        wheel.extractall(packages)
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib"))  # torch is installed here
    user = tmp_path / "user"
    shutil.copytree(CALLS, user)
    output = run(
        *(sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--python-executable", python),
        *("--cache-dir", tmp_path / "cache", "--config-file=", "right.py", "wrong.py"),
        cwd=user,
        succeeds=False,
    )
    expected = {
        number: {mark[1]}
        for number, line in enumerate((user / "wrong.py").read_text().splitlines(), 1)
        if (mark := re.search(r"# error: ([\w-]+)$", line))
    }
    assert len(expected) > 40
    assert errors_by_line(output) == {"wrong.py": expected}, output


# A TypedDict mirrors the keyword arguments of a function.
MIRRORS: list[tuple[Any, Callable[..., Any], set[str]]] = [
    (options.GRPOLossOptions, grpo_kernels.grpo_loss, {"spec"}),
    (options.LogRatioLossOptions, grpo_kernels.grpo_loss, {"spec", "ref_logits"}),
    (options.LinearGRPOLossOptions, grpo_kernels.linear_grpo_loss, {"spec"}),
    (options.LogpsOptions, grpo_kernels.selective_logps, {"return_entropy"}),
    (options.LinearLogpsOptions, grpo_kernels.linear_logps, {"return_entropy"}),
]


@pytest.mark.parametrize("mirror, function, apart", MIRRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_options_mirror_the_function(mirror: Any, function: Callable[..., Any], apart: set[str]) -> None:
    hints = typing.get_type_hints(function)
    arguments = {
        name: hints[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in apart
    }
    assert typing.get_type_hints(mirror) == arguments
    assert not mirror.__required_keys__


def test_preset_options_mirror_the_fields() -> None:
    of_package = (getattr(surrogates, name) for name in surrogates.__all__ if name != "Surrogate")
    classes = [LossSpec, *of_package]
    of_fields: dict[str, set[Any]] = defaultdict(set)
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            of_fields[field.name].add(hints[field.name])
    assert {name: {hint} for name, hint in typing.get_type_hints(PresetOptions).items()} == of_fields


def test_policy_loss_is_a_function_wherever_it_is_imported_from() -> None:
    from grpo_kernels.policy_loss import policy_loss

    assert policy_loss is grpo_kernels.policy_loss
    assert inspect.isfunction(grpo_kernels.policy_loss)
