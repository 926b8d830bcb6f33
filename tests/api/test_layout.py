"""Structure of the package: imports between modules, public names, and docstrings."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import grpo_kernels

PACKAGE = Path(grpo_kernels.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))

# The folders in the order of their imports: each may import those before it. The public modules are one
# folder. `reference` and `testing` import nothing of the package, so that they share no mistake with what
# they judge.
FOLDERS = ["kernels", "checks", "spec", "tokens", "vocab", "linear", "public", "integrations"]
ALONE = {"kernels", "reference", "testing"}
PUBLIC = {
    *("__init__", "losses", "linear_losses", "logps", "policy_loss", "options"),
    *("advantages", "weights", "mismatch", "normalizers", "sampling_mask", "reference", "testing"),
    *("distillation", "linear_distillation"),
}
TRAINERS = {
    "integrations/nemo_rl": {"nemo_rl"},
    "integrations/openrlhf": {"openrlhf"},
    "integrations/skyrl": {"skyrl"},
    "integrations/slime": {"slime"},
    "integrations/swift": {"swift"},
    "integrations/trl/head": {"trl"},
    "integrations/verl/__init__": {"verl"},
    "integrations/verl/engine": {"verl"},
    "integrations/verl/heads": {"verl"},
    "integrations/verl/logps": {"verl"},
    "integrations/verl/losses": {"verl"},
}
# Imports inside functions, apart from torch and the trainers.
INSIDE_FUNCTIONS = {
    "testing": {"psutil"},
    "integrations/versions": {"packaging"},
    "integrations/trl/head": {"transformers"},
}


def folder(module: str) -> str:
    """The folder of a module. `log` and `_ops`, on which most folders depend, count as part of `checks`."""
    if "/" in module:
        return module.split("/")[0]
    return "checks" if module in ("log", "_ops") else "public"


def tree(module: str) -> ast.Module:
    """The module without imports for type checkers only."""
    parsed = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    parsed.body = [
        statement
        for statement in parsed.body
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING")
    ]
    return parsed


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """Return absolute names of imports. With `at_import`, leave out imports inside functions."""
    parents = ["grpo_kernels", *module.split("/")[:-1]]
    found = set()
    for statement in tree(module).body:
        if at_import and isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                # `from . import passes` and `from ..kernels import fused` name modules.
                names = [f"{start}.{alias.name}" for alias in node.names]
                found |= {name if path_of(name) in MODULES else start for name in names}
    return found


def path_of(name: str) -> str:
    return name.removeprefix("grpo_kernels.").replace(".", "/")


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    names = (path_of(name) for name in imports(module) if name.split(".")[0] == "grpo_kernels")
    return {f"{name}/__init__" if f"{name}/__init__" in MODULES else name for name in names}


def test_every_module_has_its_place() -> None:
    assert {folder(module) for module in MODULES} == set(FOLDERS)
    assert {module for module in MODULES if folder(module) == "public"} == PUBLIC


def test_no_import_points_up() -> None:
    """The imports have no cycle, so every module has a level above those of its imports."""
    levels: dict[str, int] = {}

    def level(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a cycle of imports: {' -> '.join([*above, module])}"
        if module not in levels:
            below = own_imports(module) - {module}
            levels[module] = 1 + max((level(name, (*above, module)) for name in below), default=0)
        return levels[module]

    for module in MODULES:
        level(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    own = own_imports(module)
    assert own <= set(MODULES)
    above = {folder(name) for name in own} - {folder(module)}
    assert all(FOLDERS.index(name) < FOLDERS.index(folder(module)) for name in above)
    if module in ALONE or folder(module) in ALONE:
        assert not above
    for at_import in (False, True):
        foreign = {
            name.split(".")[0] for name in imports(module, at_import=at_import)
        } - sys.stdlib_module_names
        allowed = {
            "grpo_kernels",
            "torch",
            "typing_extensions",
            *({"triton"} if module.startswith("kernels/") else ()),
        }
        allowed |= TRAINERS.get(module, set())
        assert foreign <= allowed | (set() if at_import else INSIDE_FUNCTIONS.get(module, set()))


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("kernels/")])
def test_kernels_are_imported_inside_functions(module: str) -> None:
    """Without Triton the package works until a kernel is needed, so no module imports Triton at its top."""
    names = imports(module, at_import=True)
    assert not [name for name in names if name.startswith(("triton", "grpo_kernels.kernels"))]


def test_map_of_contributing() -> None:
    """CONTRIBUTING.md draws an arrow for each import between folders that no other arrows imply."""
    folders: dict[str, set[str]] = {name: set() for name in FOLDERS}
    for module in MODULES:
        folders[folder(module)] |= {folder(name) for name in own_imports(module)} - {folder(module)}
    reachable: dict[str, set[str]] = {}
    for name in FOLDERS:  # each imports only those before it
        reachable[name] = folders[name].union(*(reachable[x] for x in folders[name]))
    wanted = {
        (name, other)
        for name in FOLDERS
        for other in folders[name]
        if not any(other in reachable[x] for x in folders[name])
    }
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (drawing,) = re.findall(r"^```mermaid\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    drawn: set[tuple[str, str]] = set()
    for line in drawing.splitlines()[1:]:
        names = [re.sub(r"\[.*\]", "", name).strip() for name in line.split("-->")]
        drawn |= set(pairwise(names))
    assert drawn == wanted


WITHOUT_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton() -> None:
    """The package works without Triton, as on Windows and macOS."""
    program = """
import torch, grpo_kernels
batch = torch.randn(2, 3, 7, requires_grad=True), torch.zeros(2, 3).long(), torch.ones(2)
grpo_kernels.grpo_loss(*batch, inplace=False).loss.backward()
assert batch[0].grad.any()
try:
    grpo_kernels.grpo_loss(*batch, backend="triton")
except ValueError as error:
    print(error)
"""
    assert "triton" in python(WITHOUT_TRITON + program)


def test_import_leaves_triton_alone() -> None:
    """This package does not import Triton. PyTorch may."""
    program = """
import sys, torch
before = {name for name in sys.modules if name.split(".")[0] == "triton"}
import grpo_kernels
batch = torch.randn(2, 3, 7, requires_grad=True), torch.zeros(2, 3).long(), torch.ones(2)
grpo_kernels.grpo_loss(*batch).loss.backward()
print({name for name in sys.modules if name.split(".")[0] == "triton"} - before)
"""
    assert python(program).strip() == "set()"


def test_public_names() -> None:
    assert sorted(grpo_kernels.__all__) == sorted(
        [
            *("grpo_loss", "log_ratio_loss", "linear_grpo_loss", "GRPOLoss", "LinearGRPOLoss", "LossOutput"),
            *("selective_logps", "linear_logps", "policy_loss"),
            *("LossSpec", "KL", "LogRatio", "ImportanceRatio", "PPOClip", "Reinforce"),
            *("CISPO", "SAPO", "DRO", "DPPO", "VESPO", "GMPO"),
            *("distillation_loss", "linear_distillation_loss"),
            *(
                "group_advantages",
                "global_normalizer",
                "importance_weights",
                "rejection_mask",
                "mismatch_metrics",
                "pack_sampling_mask",
                "VocabShard",
            ),
        ]
    )
    assert all(hasattr(grpo_kernels, name) for name in grpo_kernels.__all__)
    # The function `policy_loss` has the name of its module.
    modules = {module.split("/")[0] for module in MODULES} - set(grpo_kernels.__all__)
    private = {name for name in vars(grpo_kernels) if not name.startswith("_")} - modules
    assert private == set(grpo_kernels.__all__)


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_version() -> None:
    try:
        installed = importlib.metadata.version("grpo_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("imported without being installed")
    assert grpo_kernels.__version__ == installed


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_docstrings(module: str) -> None:
    assert ast.get_docstring(tree(module))


@pytest.mark.parametrize("name", grpo_kernels.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(grpo_kernels, name)
    # A dataclass or NamedTuple without a docstring is given its signature for one.
    assert thing.__doc__ and not thing.__doc__.startswith(f"{name}(")
    if inspect.isclass(thing):
        methods = {
            key: x for key, x in vars(thing).items() if inspect.isfunction(x) and not key.startswith("_")
        }
        undocumented = [key for key, method in methods.items() if not method.__doc__]
        assert not [key for key in undocumented if not hasattr(super(thing, thing), key)]


# Functions whose docstrings explain the arguments that a function's own docstring leaves out.
EXPLAINED_BY = {
    "grpo_loss": [],
    "group_advantages": [],
    "importance_weights": [],
    "rejection_mask": [],
    "mismatch_metrics": [],
    "selective_logps": ["grpo_loss"],
    "linear_grpo_loss": ["grpo_loss"],
    "linear_logps": ["grpo_loss", "linear_grpo_loss"],
}


@pytest.mark.parametrize("name", EXPLAINED_BY)
def test_docstrings_name_every_argument(name: str) -> None:
    texts = [getattr(grpo_kernels, known).__doc__ for known in (name, *EXPLAINED_BY[name])]
    arguments = inspect.signature(getattr(grpo_kernels, name)).parameters
    assert not [argument for argument in arguments if not any(argument in text for text in texts)]


def test_linear_options() -> None:
    """The linear form takes all options of the logits form, except those of logits."""
    options, linear = (
        {name: x.default for name, x in inspect.signature(function).parameters.items()}
        for function in (grpo_kernels.grpo_loss, grpo_kernels.linear_grpo_loss)
    )
    shared = options.keys() - {"logits", "ref_logits", "inplace"}
    assert {name: linear[name] for name in shared} == {name: options[name] for name in shared}


@pytest.mark.parametrize("name", ["testing", "reference", "weights", "mismatch"])
def test_helpers_for_users_have_docstrings(name: str) -> None:
    module = importlib.import_module(f"grpo_kernels.{name}")
    functions = [
        x for x in vars(module).values() if inspect.isfunction(x) and x.__module__ == module.__name__
    ]
    assert not [x.__name__ for x in functions if not x.__name__.startswith("_") and not x.__doc__]
