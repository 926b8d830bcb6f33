"""The namespace of this copy's operators in `torch.ops`. Every loaded copy of the package has its own.

An installed package registers `torch.ops.grpo_kernels.*`. The `kernels` library of the Hugging Face Hub
imports each build under a name of its own, which becomes its namespace. In a build by kernel-builder, a
generated file with the names `ops` and `add_op_namespace_prefix` replaces this one.
"""

from __future__ import annotations

import torch

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of an operator, for `torch.library`."""
    return f"{NAMESPACE}::{op_name}"
