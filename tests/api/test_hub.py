"""The layout for the Hugging Face Hub: what it contains, and that several copies work in one process."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import NEEDS_DYNAMO
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from release import hub
from release.files import PACKAGE, package_files

REPO_ID = "someone/grpo-kernels"
LIBRARY = "needs the Hub's library: kernels"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "layout"
    hub.lay_out(out, repo_id=REPO_ID)
    return out


@pytest.fixture(scope="module")
def copies(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """The installed package, a build, and a build of another version, all loaded into this process."""
    # The version tells the library from `tests/kernels`, a folder without one.
    kernels = pytest.importorskip("kernels", minversion="0.1", reason=LIBRARY)
    folder = tmp_path_factory.mktemp("next")
    shutil.copytree(PACKAGE, folder / "grpo_kernels")
    init = folder / "grpo_kernels" / "__init__.py"
    init.write_text(init.read_text(encoding="utf-8").replace("__version__ = ", "__version__ = 'next ' "))
    hub.lay_out(folder / "layout", repo_id=REPO_ID, package=folder / "grpo_kernels")
    return {
        "installed": grpo_kernels,
        "build": kernels.get_local_kernel(layout),
        "next build": kernels.get_local_kernel(folder / "layout"),
    }


# --- What is in it ---


def shipped() -> list[str]:
    return [name for name in package_files() if not name.startswith(hub.LEFT_OUT)]


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"), feature_version=(3, 9))


def test_files(layout: Path) -> None:
    found = (path.relative_to(layout) for path in layout.rglob("*") if path.is_file())
    files = {path.as_posix() for path in found if "__pycache__" not in path.parts}
    expected = {"build.toml", "LICENSE", "README.md", "build/CARD.md"}
    expected |= {f"torch-ext/grpo_kernels/{name}" for name in shipped() if name != "_ops.py"}
    for backend in ("cpu", "cuda", "rocm"):
        expected |= {f"build/torch-{backend}/{name}" for name in (*shipped(), "metadata.json")}
    assert files == expected
    assert not any("integrations" in name for name in files)
    assert {"__init__.py", "_ops.py", "kernels/fused.py"} <= set(shipped())


def test_the_same_files_give_the_same_layout(layout: Path, tmp_path: Path) -> None:
    hub.lay_out(tmp_path / "again", repo_id=REPO_ID)
    for path in layout.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (tmp_path / "again" / path.relative_to(layout)).read_bytes() == path.read_bytes()


def test_only_a_layout_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(FileExistsError, match=r"build\.toml"):
        hub.lay_out(tmp_path, repo_id=REPO_ID)
    assert (tmp_path / "letter.txt").exists()


@pytest.mark.parametrize("backend", hub.BACKENDS)
def test_metadata(layout: Path, backend: str) -> None:
    """The id is a name for a module, and every file has its digest."""
    folder = layout / "build" / f"torch-{backend}"
    metadata = json.loads((folder / "metadata.json").read_bytes())
    assert metadata["id"].isidentifier() and metadata["id"].startswith(f"_grpo_kernels_{backend}_")
    assert metadata["backend"] == {"type": backend}
    digests = {
        name: base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode()
        for name in shipped()
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}


def test_the_library_reads_the_metadata(copies: dict[str, ModuleType], layout: Path) -> None:
    import kernels

    (loaded,) = (x for x in kernels.get_loaded_kernels() if x.module is copies["build"])
    metadata = loaded.metadata
    assert (metadata.id, metadata.version) == (copies["build"].__name__, hub.MAJOR)
    assert metadata.name.python_name == "grpo_kernels"


def test_configuration(layout: Path) -> None:
    toml = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    configuration = toml.loads((layout / "build.toml").read_text(encoding="utf-8"))
    assert configuration.pop("torch-noarch") == {}
    assert configuration == {
        "general": {
            "name": "grpo-kernels",
            "version": hub.MAJOR,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda", "rocm"],
            "hub": {"repo-id": REPO_ID},
        }
    }


def test_card(layout: Path) -> None:
    text = (layout / "README.md").read_text(encoding="utf-8")
    yaml = pytest.importorskip("yaml")
    _, front, page = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "kernels"
    assert REPO_ID in page and grpo_kernels.__version__ in page
    assert all(f"`{name}`" in page for name in grpo_kernels.__all__)


@pytest.mark.parametrize("name", package_files())
def test_imports_of_the_package_are_relative(name: str) -> None:
    """A copy that imports `grpo_kernels` would import another copy."""
    if not name.endswith(".py"):
        return
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not [x for x in names if x.split(".")[0] == "grpo_kernels"], ast.unparse(node)


@pytest.mark.parametrize("name", shipped())
def test_foreign_imports(name: str) -> None:
    """The Hub allows PyTorch, what comes with it, and Triton."""
    allowed = {"torch", "typing_extensions", "triton", *sys.stdlib_module_names}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] in allowed


# Of `typing` in Python 3.10 and later.
LATER_TYPING = {
    *("TypeAlias", "ParamSpec", "Concatenate", "TypeGuard", "Self", "Unpack", "Required", "NotRequired"),
    *("Never", "LiteralString", "TypeVarTuple", "assert_never", "assert_type", "reveal_type", "override"),
}


@pytest.mark.parametrize("name", shipped())
def test_python_3_9(name: str) -> None:
    """The Hub asks for code that Python 3.9 can run."""
    module = tree(name)  # fails at syntax of Python 3.10
    typing = [x for x in ast.walk(module) if isinstance(x, ast.ImportFrom) and x.module == "typing"]
    assert not {alias.name for node in typing for alias in node.names} & LATER_TYPING
    assert not [
        ast.unparse(node)
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if (ast.unparse(node.func), keyword.arg) in {("zip", "strict"), ("dataclass", "slots")}
        or keyword.arg == "kw_only"
    ]
    assert not [ast.unparse(x) for x in evaluated(module) for part in ast.walk(x) if is_union(part)]


def evaluated(module: ast.Module) -> list[ast.expr]:
    """Return the expressions with types that are evaluated at import."""
    lazy = any(isinstance(x, ast.ImportFrom) and x.module == "__future__" for x in module.body)
    found: list[ast.expr | None] = [x.value for x in module.body if isinstance(x, ast.Assign)]
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and not lazy:
            arguments = node.args
            found += [x.annotation for x in (*arguments.args, *arguments.posonlyargs, *arguments.kwonlyargs)]
            found.append(node.returns)
        elif isinstance(node, ast.AnnAssign) and not lazy:
            found.append(node.annotation)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"isinstance", "cast"}:
            found += node.args
    return [x for x in found if x is not None]


def is_union(node: ast.AST) -> bool:
    """Whether a node is a union of types: `X | None`, or `X | Y` of names that start with a capital."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)):
        return False
    types = {"int", "float", "str", "bool", "tuple", "list", "dict", "slice", "None", "Tensor"}
    return any(ast.unparse(side).split("[")[0].split(".")[-1] in types for side in (node.left, node.right))


# --- Several copies in one process ---


class Namespaces(TorchDispatchMode):
    """Collects the namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.namespace)
        return func(*args, **(kwargs or {}))


CALLS = ("logits", "hidden", "distillation", "hidden distillation")


def run(
    module: ModuleType, call: str, *, device: str = "cpu", compiled: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return loss and gradients of a call with the functions of a copy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8), torch.randn(37, 8)
    ids, advantages = torch.randint(37, (2, 3)), torch.tensor([1.0, -0.5])
    logits, other = hidden @ weight.T, torch.randn(2, 3, 37)
    hidden, weight, ids, advantages, logits, other = (
        x.to(device) for x in (hidden, weight, ids, advantages, logits, other)
    )
    spec = module.LossSpec.preset("grpo", kl=module.KL("exact", beta=0.1))
    leaves = [logits] if call in ("logits", "distillation") else [hidden, weight]
    leaves = [x.requires_grad_() for x in leaves]

    def loss() -> torch.Tensor:
        if call == "logits":
            return module.grpo_loss(*leaves, ids, advantages, spec=spec, ref_logits=other).loss
        if call == "hidden":
            reference = {"ref_hidden": hidden.detach() + 1, "ref_lm_head_weight": weight.detach()}
            return module.linear_grpo_loss(*leaves, ids, advantages, spec=spec, **reference).loss
        if call == "distillation":
            return module.distillation_loss(*leaves, teacher_logits=other).loss
        teacher = {"teacher_hidden": hidden.detach() + 1, "teacher_lm_head_weight": weight.detach()}
        return module.linear_distillation_loss(*leaves, **teacher).loss

    value = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)()
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("call", CALLS)
def test_copies_agree(copies: dict[str, ModuleType], call: str) -> None:
    assert len({id(module.grpo_loss) for module in copies.values()}) == 3
    first, *others = (run(module, call) for module in copies.values())
    assert all(x.any() for x in first)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_kernels_of_a_build(copies: dict[str, ModuleType], device: str, needs_triton: None) -> None:
    logits = torch.randn(2, 3, 37, device=device)
    results = [
        module.selective_logps(logits, torch.ones(2, 3, dtype=torch.int64, device=device), backend="triton")
        for module in copies.values()
    ]
    assert results[0].all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_each_copy_calls_its_own_operators(copies: dict[str, ModuleType], call: str) -> None:
    """On tensors without data every copy calls its operators, which are in the namespace of its name."""
    found = []
    for module in copies.values():
        with Namespaces() as namespaces:
            run(module, call, device="meta")
        found.append(namespaces.found - {"aten", "prim", "prims"})
        assert found[-1] == {module.__name__}
    assert len(set.union(*found)) == 3


@NEEDS_DYNAMO
class TestCompile:
    """Each copy under torch.compile gives the bits of eager execution."""

    @pytest.fixture(autouse=True)
    def nan_in_new_memory(self) -> None:
        """Turn the fixture off: Dynamo cannot trace an allocation that fills its memory."""
        torch._dynamo.reset()

    @pytest.mark.parametrize("call", CALLS)
    def test_copies_agree(self, copies: dict[str, ModuleType], call: str) -> None:
        eager = run(grpo_kernels, call)
        for module in copies.values():
            compiled = run(module, call, compiled=True)
            torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_ids_differ(copies: dict[str, ModuleType], layout: Path) -> None:
    """A change of any file changes the name of the build."""
    first, second = copies["build"], copies["next build"]
    assert first.__name__ != second.__name__ and second.__version__ == f"next {first.__version__}"
    metadata = Path(str(first.__file__)).with_name("metadata.json")
    assert metadata.is_relative_to(layout)
    assert json.loads(metadata.read_bytes())["id"] == first.__name__
