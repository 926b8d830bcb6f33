"""Batches of the hard cases with a sequence-level ratio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_cases import every_tensor
from hard_cases import random_case as padded_case
from parity import SEQUENCE_LEVEL, SURROGATES, Case

from grpo_kernels import KL, LossSpec

layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
levels = pytest.mark.parametrize("level", ["sequence", "sequence-token"])
LOSSES = {
    name: LossSpec(SURROGATES[surrogate], level=level)
    for name, (surrogate, level) in SEQUENCE_LEVEL.items()
    if "(" not in name  # one of each surrogate
}
losses = pytest.mark.parametrize("spec", LOSSES.values(), ids=LOSSES)


def every_term(spec: LossSpec) -> LossSpec:
    return replace(spec, kl=KL("k3", ratio_corrected=True), entropy_coef=0.01)


def random_case(spec: LossSpec, *shape: int, **how: Any) -> Case:
    """Return a batch with one advantage per sequence."""
    case = padded_case(spec, *shape, **how)
    return case._replace(advantages=case.advantages[:, 0].contiguous())


def laid_out(case: Case, packed: bool) -> Case:
    """Return the same tokens, packed if `packed`, including masked ones."""
    if not packed:
        return case
    sequences, tokens = case.completion_ids.shape
    case = every_tensor(case, lambda _, x: x.flatten(0, 1) if x.dim() > 1 else x)
    return case.with_options(seq_lens=torch.full((sequences,), tokens))
