"""Worker: the distillation losses of a vocabulary that is split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from distillation_cases import KINDS, Case, assert_gradient, assert_outputs, batch, eager, run
from distributed.vocab_parts import BACKENDS, SPLITS, V, joined, shard_of
from distributed.worker import Cases

from grpo_kernels import distillation_loss, linear_distillation_loss

cases = Cases()
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def assert_parity(case: Case, split: str, **options: Any) -> None:
    shard = shard_of(split, V)
    columns = slice(shard.start, shard.stop)
    part = Case(case.logits[..., columns], case.teacher[..., columns], {**case.options, "shard": shard})
    got = run(part, return_entropy=True, **options)
    truth, other = eager(case.wide()), eager(case)
    assert_outputs(case, got.out, truth, other, what=split)
    assert_gradient(joined(got.grad, split, V, -1), other.grad, truth.grad, what=split)


@cases.add(kind=KINDS, split=SPLITS, dtype=list(DTYPES), backend=BACKENDS, inplace=[False, True])
def from_logits(kind: str, split: str, dtype: str, backend: str, inplace: bool) -> None:
    assert_parity(batch(DTYPES[dtype], kind=kind, vocab=V), split, backend=backend, inplace=inplace)


@cases.add(kind=KINDS)
def nearly_equal_rows(kind: str) -> None:
    shard = shard_of("uneven", V)
    case = batch(kind=kind, vocab=V, distance=1e-4)
    columns = slice(shard.start, shard.stop)
    part = Case(case.logits[..., columns], case.teacher[..., columns], {**case.options, "shard": shard})
    value, exact = (float(x.out.loss.detach()) for x in (run(part), eager(case.wide())))
    assert abs(value - exact) <= 1e-3 * exact < 1e-6


@cases.add(kind=KINDS, form=["whole", "top-K"], split=SPLITS)
def from_hidden_states(kind: str, form: str, split: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, teacher_hidden, teacher_weight = (
        normal(2, 3, 5),
        normal(V, 5),
        normal(2, 3, 4),
        normal(V, 4),
    )
    options: dict[str, Any] = {"divergence": kind, "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    shard = shard_of(split, V)
    rows = slice(shard.start, shard.stop)
    own: dict[str, Any] = {"shard": shard, "chunk_tokens": 2}
    if form == "whole":
        whole = {"teacher_logits": teacher_hidden @ teacher_weight.t()}
        own |= {"teacher_hidden": teacher_hidden, "teacher_lm_head_weight": teacher_weight[rows]}
    else:
        logps, ids = (teacher_hidden @ teacher_weight.t()).log_softmax(-1).topk(4)
        whole = {"teacher_ids": ids, "teacher_logps": logps}
        own |= whole
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = distillation_loss(leaves[0] @ leaves[1].t(), **whole, **options)
    dhidden, dweight = torch.autograd.grad(want.loss, leaves)
    parts = [hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
    got = linear_distillation_loss(*parts, **own, **options)
    grads = torch.autograd.grad(got.loss, parts)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(grads[0], dhidden)
    torch.testing.assert_close(grads[1], dweight[rows])


if __name__ == "__main__":
    cases.main()
