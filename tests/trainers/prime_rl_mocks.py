"""Mocks of the packages that prime-rl's trainer imports, but does not call in our runs.

Importing this module installs them. It also turns off `torch.compile`, which prime-rl's loss uses.
"""

from __future__ import annotations

import importlib.machinery
import sys
from typing import Any
from unittest import mock

import torch._dynamo
from transformers import LlamaForCausalLM  # noqa: F401  (before the mocks, because it asks for versions)

ABSENT = {"dion", "fla", "grpc", "modelexpress", "prime_cli", "pynvml", "ring_flash_attn"}
ABSENT |= {"tilelang", "torchao", "vllm", "wandb_gql", "wandb_workspaces"}


class Mocks:
    """Finds the modules of `ABSENT` and TensorBoard's, which torchtitan imports."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT or name == "torch.utils.tensorboard":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__name__, module.__path__, module.__spec__ = spec.name, [], spec
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing is executed."""


torch._dynamo.config.disable = True
sys.meta_path.insert(0, Mocks())  # type: ignore[arg-type]
