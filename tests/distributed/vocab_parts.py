"""One rank's part of a case, and the gradients of all parts joined in the order of the vocabulary."""

from __future__ import annotations

import itertools
import os
from typing import Any, NamedTuple

import torch
from linear_cases import LinearCase
from parity import Case, assert_outputs, assert_rows_no_worse, oracle, run
from torch import Tensor
from torch import distributed as dist

from grpo_kernels import KL, LossSpec, PPOClip, VocabShard, grpo_loss

BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
V = 37  # not divisible by the number of ranks
FULL = LossSpec(PPOClip(), KL("exact", beta=0.2), entropy_coef=0.1)


def bounds(split: str, size: int) -> list[tuple[int, int]]:
    """Return start and stop of the part of each rank."""
    ranks = dist.get_world_size()
    cuts = [round(size * (i / ranks) ** 1.5) for i in range(ranks + 1)]
    parts = list(itertools.pairwise(cuts))
    if split == "reversed":
        parts = parts[::-1]
    if split == "an empty part":
        parts[0], parts[1] = (0, 0), (0, parts[1][1])
    return parts


SPLITS = ["uneven", "reversed", "an empty part"]


def shard_of(split: str, size: int) -> VocabShard:
    return VocabShard(*bounds(split, size)[dist.get_rank()])


def joined(part: Tensor, split: str, size: int, dim: int) -> Tensor:
    """Return the parts of all ranks, concatenated in the order of the vocabulary."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, part)
    parts = zip(bounds(split, size), found, strict=True)
    return torch.cat([x for _, x in sorted(parts, key=lambda item: item[0])], dim)


def part_of(case: Case, shard: VocabShard) -> Case:
    columns = slice(shard.start, shard.stop)
    options = dict(case.options, shard=shard)
    if "ref_logits" in options:
        options["ref_logits"] = options["ref_logits"][..., columns]
    return case._replace(logits=case.logits[..., columns], options=options)


def assert_parity(case: Case, split: str = "uneven", *, what: str = "", **options: Any) -> None:
    expected = oracle(case)
    width = case.logits.shape[-1]
    got = run(grpo_loss, part_of(case, shard_of(split, width)), **options)
    entropy = options.get("return_entropy", False)
    assert_outputs(expected, got.out, what=what, return_entropy=entropy)
    grad = joined(got.grad, split, width, -1)
    _, truth, eager = expected
    ids, logps = case.completion_ids, truth.out.logps
    assert_rows_no_worse(grad, eager.grad, truth.grad, ids=ids, logps=logps, what=what)


class Parts(NamedTuple):
    case: LinearCase
    shard: VocabShard


def linear_parts(case: LinearCase, split: str) -> Parts:
    shard = shard_of(split, case.weight.shape[0])
    rows = slice(shard.start, shard.stop)
    options = dict(case.options)
    for name in ("ref_lm_head_weight", "ref_lm_head_bias"):
        if name in options:
            options[name] = options[name][rows]
    bias = None if case.bias is None else case.bias[rows]
    return Parts(case._replace(weight=case.weight[rows], bias=bias, options=options), shard)
