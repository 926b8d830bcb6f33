"""Worker: the loss from hidden states, its head split over the ranks by vocabulary entries.

Every rank makes the same case and takes its part of the head. Gradients are gathered and compared as one,
with the oracle and tolerances of an unsplit vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from linear_cases import assert_gradients, from_logits, leaves, linear_oracle, run_linear
from parity import SURROGATES, assert_outputs, every_branch, user_loss
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed.vocab_parts import BACKENDS, FULL, SPLITS, V, joined, linear_parts
from distributed.worker import Cases
from grpo_kernels import LossSpec, PPOClip, VocabShard, linear_grpo_loss, linear_logps
from grpo_kernels.linear import chunks

cases = Cases()


@cases.add(
    backend=BACKENDS,
    split=SPLITS,
    dtype=[torch.float64, torch.float32],
    options=["chunks of 1", "chunks of 3", "compact=False", "idle rows", "skip_inactive"],
)
def from_hidden_states(backend: str, split: str, dtype: torch.dtype, options: str) -> None:
    skip = options == "skip_inactive"
    spec = LossSpec(PPOClip()) if skip or options == "idle rows" else FULL
    case = from_logits(every_branch(spec, V, dtype))
    given: dict[str, Any] = {
        "chunks of 1": {"chunk_tokens": 1},
        "chunks of 3": {"chunk_tokens": 3},
        "compact=False": {"compact": False},
        "idle rows": {"chunk_tokens": 2},
        "skip_inactive": {"skip_inactive": True},
    }[options]
    expected = linear_oracle(case)
    parts = linear_parts(case, split)
    got = run_linear(parts.case, shard=parts.shard, backend=backend, **given)
    if skip:
        want = run_linear(case, backend=backend, **given)
        torch.testing.assert_close(got.out, want.out, rtol=1e-5, atol=1e-6)
    else:
        assert_outputs(expected.by_logits, got.out, what=options)
    dhidden, *of_head = got.grads
    grads = (dhidden, *(joined(x, split, V, 0) for x in of_head))
    assert_gradients(grads, expected.eager, expected.truth, expected.terms, expected.lengths, options)


@cases.add(name=["callable", "GMPO", "VESPO"])
def coupled_from_hidden_states(name: str) -> None:
    case = from_logits(every_branch(LossSpec(SURROGATES[name]), V, torch.float32))
    expected, parts = linear_oracle(case), linear_parts(case, "uneven")
    got = run_linear(parts.case, shard=parts.shard)
    dhidden, *of_head = got.grads
    grads = (dhidden, *(joined(x, "uneven", V, 0) for x in of_head))
    assert_gradients(grads, expected.eager, expected.truth, expected.terms, expected.lengths, name)


@cases.add(spec=["token-local", "callable"])
def accumulated_into_a_part(spec: str) -> None:
    """With `accumulate_into`, a rank's buffer gets the gradient of its own rows of the weight."""
    loss = {"token-local": FULL, "callable": LossSpec(user_loss)}[spec]
    parts = linear_parts(from_logits(every_branch(loss, V, torch.float64)), "uneven")
    case, want = parts.case, run_linear(parts.case, shard=parts.shard)
    hidden, weight, bias = leaves(case)
    into = torch.ones_like(weight)
    out = linear_grpo_loss(
        *(hidden, weight, case.completion_ids, case.advantages),
        **{"spec": case.spec, "lm_head_bias": bias, "shard": parts.shard, **case.options},
        accumulate_into=into.detach(),
    )
    out.loss.backward()
    assert weight.grad is None
    for got, wanted in zip((hidden.grad, into - 1, bias.grad), want.grads, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@cases.add(frozen=[False, True])
def dtensor_head(frozen: bool) -> None:
    """A DTensor head is gathered without `shard` and stays in parts with it.

    In both cases the gradient is a DTensor that equals the gradient of the whole head.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    case = from_logits(every_branch(FULL, V, torch.float64))
    want = run_linear(case)
    hidden, weight, bias = leaves(case)
    options = dict(case.options)
    weight, bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (weight, bias))
    inputs = [hidden] if frozen else [hidden, weight.requires_grad_(), bias.requires_grad_()]
    ref = [options.pop(f"ref_lm_head_{name}") for name in ("weight", "bias")]
    ref = [distribute_tensor(x, mesh, [Shard(0)]) for x in ref]
    shard = VocabShard.of(weight)
    assert shard.stop - shard.start == weight.to_local().shape[0]
    for given in (None, shard):
        out = linear_grpo_loss(
            *(hidden, weight, case.completion_ids, case.advantages),
            spec=case.spec,
            lm_head_bias=bias,
            ref_lm_head_weight=ref[0],
            ref_lm_head_bias=ref[1],
            shard=given,
            **options,
        )
        torch.testing.assert_close(out.loss, want.out.loss)
        found = torch.autograd.grad(out.loss, inputs)
        for got, wanted in zip(found, want.grads, strict=False):
            whole = got.full_tensor() if isinstance(got, DTensor) else got
            torch.testing.assert_close(whole, wanted)


@cases.add(backend=BACKENDS)
def logps_from_hidden_states(backend: str) -> None:
    """Log-probabilities and entropies have the right gradients for random upstream gradients."""
    case = from_logits(every_branch(FULL, V, torch.float64))
    mask = case.options["completion_mask"]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    parts = linear_parts(case, "uneven")
    results = []
    for of, shard in ((case, None), parts):
        hidden, weight, bias = inputs = leaves(of)
        options = {"lm_head_bias": bias, "mask": mask, "return_entropy": True, "backend": backend}
        found = linear_logps(hidden, weight, case.completion_ids, shard=shard, **options)
        results.append([*found, *torch.autograd.grad(found, inputs, upstream)])
    want, got = results
    got[3:] = [joined(x, "uneven", V, 0) for x in got[3:]]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@cases.add(spec=["token-local", "callable"])
def flops(spec: str) -> None:
    """One pass takes three products and two passes take four, in units of a part's T V H."""
    loss, units = {"token-local": (LossSpec(PPOClip()), 6), "callable": (LossSpec(user_loss), 8)}[spec]
    case = from_logits(every_branch(loss, V, torch.float32, ref=None), bias=False)
    mask = torch.ones_like(case.completion_ids, dtype=torch.bool)
    case = case.with_options(completion_mask=mask, old_logps=None)._replace(
        hidden=case.hidden.nan_to_num(),
        completion_ids=case.completion_ids.clamp(min=0),
        advantages=torch.ones(4),
    )
    parts = linear_parts(case, "uneven")
    with FlopCounterMode(display=False) as counter:
        run_linear(parts.case, shard=parts.shard)
    assert counter.get_total_flops() == units * parts.case.weight.numel() * mask.numel()


@cases.add(level=["token", "sequence"])
def parts_of_dhidden(level: str) -> None:
    """With `sum_dhidden=False` the caller sums the gradients of the hidden states."""
    case = from_logits(every_branch(LossSpec(PPOClip(), level=level), V, torch.float64))
    parts = linear_parts(case, "uneven")
    want = run_linear(parts.case, shard=parts.shard).grads[0].nan_to_num()
    got = run_linear(parts.case, shard=replace(parts.shard, sum_dhidden=False)).grads[0].nan_to_num()
    assert not torch.allclose(got, want)
    dist.all_reduce(got)
    torch.testing.assert_close(got, want)


@cases.add()
def ranks_agree_on_chunks() -> None:
    """Ranks agree on chunks if the first has memory for all tokens and the others for one."""
    chunks.CPU_CHUNK_BYTES = 1 << 26 if dist.get_rank() == 0 else 1
    case = from_logits(every_branch(FULL, V, torch.float64))
    want, parts = run_linear(case, chunk_tokens=1), linear_parts(case, "uneven")
    got = run_linear(parts.case, shard=parts.shard)
    torch.testing.assert_close(got.out.loss, want.out.loss)
    torch.testing.assert_close(got.grads[0], want.grads[0])


@cases.add()
def every_rank_has_the_same_bits() -> None:
    case = from_logits(every_branch(FULL, V, torch.float32))
    parts = linear_parts(case, "uneven")
    got = run_linear(parts.case, shard=parts.shard)
    mine = torch.stack([got.out.loss.detach(), *got.out.metrics.values(), got.grads[0].nan_to_num().sum()])
    of_first = mine.clone()
    dist.broadcast(of_first, 0)
    assert torch.equal(mine, of_first)


if __name__ == "__main__":
    cases.main()
