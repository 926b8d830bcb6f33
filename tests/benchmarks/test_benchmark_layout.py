"""The layout of benchmarks/: imports between its folders point one way, and modules have docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))

# The folders that each folder may import. A folder comes after those that it imports. The files next to the
# folders are commands, such as `python -m benchmarks.plot`, and come last.
COMMANDS = "."
ALLOWED: dict[str, set[str]] = {
    "tables": set(),
    "work": set(),
    "speed": {"tables", "work"},
    "training_step": {"tables", "work", "speed"},
    "machine_code": {"tables", "work"},
    "traffic": {"tables", "work"},
    "experiments": {"tables", "work", "speed", "machine_code"},
    "gpu": {"tables", "work", "speed", "experiments"},
    COMMANDS: {"tables", "work", "speed", "machine_code", "traffic", "experiments"},
}


def folder(module: str) -> str:
    return module.split("/")[0] if "/" in module else COMMANDS


def imports(module: str) -> set[str]:
    """The modules of benchmarks/ that a module imports, at its top or inside functions."""
    parents = ["benchmarks", *module.split("/")[:-1]]
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
            found |= {name if path_of(name) in MODULES else start for name in names}
    return {path_of(name) for name in found if name.split(".")[0] == "benchmarks"}


def path_of(name: str) -> str:
    return name.removeprefix("benchmarks.").replace(".", "/")


def test_the_folders_are_known() -> None:
    assert {folder(module) for module in MODULES} == ALLOWED.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_between_folders_point_one_way(module: str) -> None:
    order = list(ALLOWED)
    found = imports(module)
    assert found <= set(MODULES)
    folders = {folder(name) for name in found} - {folder(module)}
    assert folders <= ALLOWED[folder(module)]
    assert all(order.index(name) < order.index(folder(module)) for name in folders)


def test_there_is_no_import_cycle() -> None:
    graph = {module: imports(module) for module in MODULES}
    while graph:
        free = {module for module, found in graph.items() if not found & graph.keys()}
        assert free, f"there is a cycle among {sorted(graph)}"
        graph = {module: found for module, found in graph.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_docstrings(module: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")))
