"""Each public name has a section on an API page, and an example in its docstring that runs.

The examples of the integrations run in tests/trainers and tests/verl, which have these trainers.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from docstring_examples import run_examples

import grpo_kernels

ROOT = Path(__file__).parents[2]
# Public as modules, not only by their names in `grpo_kernels`.
MODULES = ["grpo_kernels.testing", "grpo_kernels.reference", "grpo_kernels.weights"]
INTEGRATIONS = ["grpo_kernels.integrations.trl", "grpo_kernels.integrations.verl"]


def source(module: str) -> ast.Module:
    """Return the syntax tree of a module or package of ours."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def public_definitions(module: str) -> list[str]:
    """Return the names of the public functions and classes that a module defines."""
    found = [node for node in source(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node.name for node in found if not node.name.startswith("_")]


def exported(package: str) -> list[str]:
    """Return `__all__` of a package, without importing it."""
    (value,) = (
        node.value
        for node in source(package).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return list(ast.literal_eval(value))


def documented() -> set[str]:
    """Return the paths of everything that has a section on an API page. A module has all its public names."""
    found: set[str] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            found.add(path)
            if (ROOT / path.replace(".", "/")).with_suffix(".py").exists():
                found |= {f"{path}.{name}" for name in public_definitions(path)}
    return found


def paths(thing: Any, name: str) -> set[str]:
    """Return the paths by which a page may name a public name of `grpo_kernels`."""
    return {f"grpo_kernels.{name}", f"{thing.__module__}.{name}"}


@pytest.mark.parametrize("name", grpo_kernels.__all__)
def test_public_names(name: str) -> None:
    thing = getattr(grpo_kernels, name)
    assert paths(thing, name) & documented(), f"{name} has no section in docs/api/"
    run_examples(thing, name)


@pytest.mark.parametrize(
    "path",
    [f"{module}.{name}" for module in MODULES for name in public_definitions(module)],
)
def test_public_modules(path: str) -> None:
    assert path in documented(), f"{path} has no section in docs/api/"
    module, name = path.rsplit(".", 1)
    if name == "peak_memory":
        pytest.importorskip("psutil")
    run_examples(getattr(importlib.import_module(module), name), name)


@pytest.mark.parametrize("package", INTEGRATIONS)
def test_integrations_have_sections(package: str) -> None:
    names = exported(package)
    assert names and {f"{package}.{name}" for name in names} <= documented()


def test_sections_are_of_public_names() -> None:
    public = {path for name in grpo_kernels.__all__ for path in paths(getattr(grpo_kernels, name), name)}
    public |= {f"{module}.{name}" for module in MODULES for name in public_definitions(module)}
    public |= {f"{package}.{name}" for package in INTEGRATIONS for name in exported(package)}
    assert documented() <= public | set(MODULES)
