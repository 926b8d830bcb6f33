"""The smoke test of an installed package. `release.check` runs it from an empty folder with `python -I`."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch

import grpo_kernels
from grpo_kernels import KL, LossSpec, grpo_loss, linear_grpo_loss


def check_files() -> None:
    """Check that the package comes from this environment with its types, and nothing else of the project."""
    installed = distribution("grpo_kernels")
    assert installed.version == grpo_kernels.__version__, (installed.version, grpo_kernels.__version__)
    folder = Path(grpo_kernels.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert (folder / "py.typed").exists()
    top = {Path(str(file)).parts[0] for file in installed.files or ()}
    assert top == {"grpo_kernels", f"grpo_kernels-{installed.version}.dist-info"}, top
    for name in ("tests", "benchmarks", "examples", "docs", "release"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported"


def check_losses() -> None:
    """Check that the loss from hidden states has the value and gradient of the loss from their logits."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    tokens = torch.randint(50, (2, 3)), torch.tensor([1.0, -1.0])
    spec = LossSpec.preset("grpo", kl=KL("k3", beta=0.1))
    options = {"spec": spec, "ref_logps": torch.full((2, 3), -4.0)}
    results = []
    for out in (
        grpo_loss(hidden @ head.T, *tokens, **options),
        linear_grpo_loss(hidden, head, *tokens, **options),
    ):
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, head))))
    torch.testing.assert_close(*results)
    assert all(x.any() for x in results[0]), "a result is zero"


check_files()
check_losses()
print(f"grpo_kernels {grpo_kernels.__version__} works with torch {torch.__version__}")
