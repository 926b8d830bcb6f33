"""A vocabulary split over the ranks gives what the whole one gives: held to the same oracle and tolerances.

Every rank makes the same case and takes its part of it. Gradients are gathered and judged as one.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import LinearCase, assert_gradients, from_logits, leaves, linear_oracle, run_linear
from parity import (
    KLS,
    PAIRS,
    SEQUENCE_LEVEL,
    SURROGATES,
    Case,
    assert_outputs,
    assert_rows_no_worse,
    every_branch,
    oracle,
    run,
    user_loss,
)
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed.worker import Cases
from grpo_kernels import (
    KL,
    LossSpec,
    PPOClip,
    VocabShard,
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_logps,
    selective_logps,
)
from grpo_kernels.logps import linear_token_statistics

cases = Cases()

BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
V = 37  # divides by no number of ranks
FULL = LossSpec(PPOClip(), KL("exact", beta=0.2), entropy_coef=0.1)


def bounds(split: str, size: int) -> list[tuple[int, int]]:
    """The part of each rank."""
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
    """The parts of all ranks in the order of the vocabulary."""
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


@cases.add(pair=["-".join(pair) for pair in PAIRS])
def every_loss(pair: str) -> None:
    surrogate, kl = pair.split("-")
    assert_parity(every_branch(LossSpec(SURROGATES[surrogate], KLS[kl]), V, torch.float32), what=pair)


@cases.add(name=SEQUENCE_LEVEL, packed=[False, True])
def every_level(name: str, packed: bool) -> None:
    surrogate, level = SEQUENCE_LEVEL[name]
    spec = LossSpec(SURROGATES[surrogate], KLS["ratio_corrected"], level)
    assert_parity(every_branch(spec, V, torch.float32, packed=packed), what=name)


@cases.add(
    backend=BACKENDS,
    split=SPLITS,
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    inplace=[False, True],
)
def every_split(backend: str, split: str, dtype: torch.dtype, inplace: bool) -> None:
    case = every_branch(FULL, V, dtype)
    assert_parity(case, split, backend=backend, inplace=inplace, return_entropy=True)


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"])
def logit_transforms(backend: str, kl: str) -> None:
    case = every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), V, torch.float32)
    options = {"logit_scale": 0.7, "ref_logit_scale": 1.3, "logit_softcap": 6.0, "ref_logit_softcap": 9.0}
    temperatures = torch.tensor([0.6, 1.0, 1.7, 1.0])
    for extra in ({}, {"temperature": 0.6}, {"temperature": temperatures}, {**options, "temperature": 0.8}):
        assert_parity(case.with_options(**extra), backend=backend, what=str(extra))


def with_masked_part(case: Case, value: float, names: str) -> Case:
    """Fill the second rank's columns with `value`. A taken token among them swaps its logit with column 0.

    Its logit is lowered, because with fewer other tokens 1 - p of the likeliest one would have few digits.
    """
    start, stop = bounds("uneven", V)[1]
    ids = case.completion_ids.clamp(min=0)
    moves = (ids >= start) & (ids < stop)
    taken = torch.where(moves, 0, ids)

    def masked(z: Tensor) -> Tensor:
        first, own = z[..., 0], z.gather(-1, ids[..., None])[..., 0] - 2
        z = z.scatter(-1, ids[..., None], torch.where(moves, first, own)[..., None])
        z[..., 0] = torch.where(moves | (ids == 0), own, first)
        z[..., start:stop] = value
        return z

    options = dict(case.options)
    if "reference" in names:
        options["ref_logits"] = masked(options["ref_logits"])
    logits = masked(case.logits) if "policy" in names else case.logits
    return case._replace(logits=logits, completion_ids=taken, options=options)


@cases.add(backend=BACKENDS, value=[-1e10, torch.finfo(torch.float32).min, -math.inf], inplace=[False, True])
def a_part_of_masks(backend: str, value: float, inplace: bool) -> None:
    for kl in ("exact", "exact_forward"):
        spec = LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1)
        case = with_masked_part(every_branch(spec, V, torch.float32), value, "policy and reference")
        assert_parity(case, backend=backend, inplace=inplace, return_entropy=True, what=kl)
    case = with_masked_part(every_branch(FULL, V, torch.float32), value, "policy")
    assert_parity(case, backend=backend, inplace=inplace, return_entropy=True, what="policy only")


@cases.add(backend=BACKENDS)
def a_part_of_masks_of_the_reference(backend: str) -> None:
    """The exact KL is the policy's probability of these columns times the mask."""
    case = with_masked_part(every_branch(FULL, V, torch.float32), -1e10, "reference")
    assert_parity(case, backend=backend)


@cases.add(backend=BACKENDS, value=[-1e10, -1e20, -math.inf])
def a_taken_token_in_a_part_of_masks(backend: str, value: float) -> None:
    start, stop = bounds("uneven", V)[1]
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    logits[..., start:stop] = value
    shard = shard_of("uneven", V)
    ids = torch.full((2, 3), start)
    got = selective_logps(logits[..., shard.start : shard.stop], ids, shard=shard, backend=backend)
    torch.testing.assert_close(got, logits.log_softmax(-1)[..., start])


@cases.add(backend=BACKENDS, width=[V, 2 * V])
def padded_vocabulary(backend: str, width: int) -> None:
    """Padding at the end of the last part, or all of it."""
    size = V - 2
    case = every_branch(FULL, size, torch.float32).with_options(vocab_size=size)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - size), value=torch.nan)

    case = case._replace(logits=padded(case.logits))
    assert_parity(case.with_options(ref_logits=padded(case.options["ref_logits"])), backend=backend)


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"])
def parts_without_probability(backend: str, kl: str) -> None:
    """All columns of a part at -inf: of both models, and of one of them."""
    case = every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), V, torch.float32)
    start, _ = bounds("uneven", V)[-1]
    # The part holds the last word, which is one token's: that one is taken elsewhere.
    ids = torch.where(case.completion_ids >= start, 3, case.completion_ids)
    hidden = torch.arange(V) >= start

    def suppressed(x: Tensor) -> Tensor:
        return x.masked_fill(hidden, -torch.inf)

    both = case._replace(completion_ids=ids, logits=suppressed(case.logits))
    both = both.with_options(ref_logits=suppressed(case.options["ref_logits"]))
    want, part = run(grpo_loss, both, backend=backend), part_of(both, shard_of("uneven", V))
    got = run(grpo_loss, part, backend=backend)
    assert bool(got.out.loss.isfinite()) and bool(got.out.metrics["kl_exact"].isfinite())
    torch.testing.assert_close(got.out.loss, want.out.loss)
    torch.testing.assert_close(joined(got.grad, "uneven", V, -1), want.grad, rtol=1e-4, atol=1e-7)
    # What the reference rules out makes one divergence infinite; what the policy does, the other.
    alone = "policy" if kl == "exact_forward" else "reference"
    one = both._replace(logits=case.logits) if alone == "reference" else both
    if alone == "policy":
        one = one.with_options(ref_logits=case.options["ref_logits"])
    got = run(grpo_loss, part_of(one, shard_of("uneven", V)), backend=backend)
    assert math.isinf(got.out.metrics["kl"])


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"], banned=[-1e9, -200.0])
def parts_banned_in_two_ways(backend: str, kl: str, banned: float) -> None:
    """By a finite number of one model, by -inf of the other: nothing weighs the infinite divergence."""
    case = every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), V, torch.float32)
    start, _ = bounds("uneven", V)[-1]
    ids = torch.where(case.completion_ids >= start, 3, case.completion_ids)
    hidden = torch.arange(V) >= start
    fills = [banned, -torch.inf] if kl == "exact" else [-torch.inf, banned]
    logits, ref_logits = (
        x.masked_fill(hidden, fill)
        for x, fill in zip((case.logits, case.options["ref_logits"]), fills, strict=True)
    )
    case = case._replace(completion_ids=ids, logits=logits).with_options(ref_logits=ref_logits)
    want = run(grpo_loss, case, backend=backend)
    assert bool(want.out.loss.isfinite())
    got = run(grpo_loss, part_of(case, shard_of("uneven", V)), backend=backend)
    torch.testing.assert_close(got.out.loss, want.out.loss)
    torch.testing.assert_close(got.out.metrics["kl"], want.out.metrics["kl"])
    torch.testing.assert_close(joined(got.grad, "uneven", V, -1), want.grad, rtol=1e-4, atol=1e-7)


@cases.add(backend=BACKENDS, split=["uneven", "an empty part"])
def far_rows(backend: str, split: str) -> None:
    """Parts of one row that lie 2e4 apart, and rows far from zero."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, V, generator=generator, dtype=torch.float64)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, :, : V // 4] += 2e4
    logits[3, :, -1] += 200
    ids = torch.randint(V, (6, 5), generator=generator)
    ids[3] = V - 1
    rounded = logits.float()
    want = rounded.double().log_softmax(-1)
    shard = shard_of(split, V)
    part = rounded[..., shard.start : shard.stop]
    logps, entropy = selective_logps(part, ids, shard=shard, return_entropy=True, backend=backend)
    exact = want.gather(-1, ids[..., None])[..., 0]
    # Triton's interpreter rounds products of 1e4 that a GPU fuses into the subtraction that follows.
    atol = 2e-6 if backend == "torch" else 1e-3
    torch.testing.assert_close(logps.double(), exact, rtol=2e-7, atol=atol)
    terms = torch.where(want.exp() > 0, -want.exp() * want, 0.0)
    torch.testing.assert_close(entropy.double(), terms.sum(-1), rtol=0, atol=5 * atol)
    assert bool((entropy >= 0).all())


@cases.add(backend=BACKENDS)
def what_nobody_holds(backend: str) -> None:
    """An id outside the vocabulary is NaN on all ranks, and so is a row with a NaN in any part."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    logits[1, -1] = torch.nan
    shard = shard_of("uneven", V)
    part = logits[:, shard.start : shard.stop]
    for outside in (V, -100, 2**40):
        found = selective_logps(part, torch.tensor([outside, 0, 1]), shard=shard, backend=backend)
        assert found.isnan().tolist() == [True, True, False]
    hidden, weight = torch.eye(3), logits.nan_to_num()[:, shard.start : shard.stop].t()
    top1 = linear_token_statistics(hidden, weight, torch.tensor([V, 0, 1]), top1=True, shard=shard).top1
    assert top1 is not None and not top1[0]
    ids, mask = torch.tensor([-100, 0, 1]), torch.tensor([0, 0, 1])
    found = selective_logps(part, ids, mask=mask, shard=shard, backend=backend)
    assert found[:2].tolist() == [0, 0] and bool(found[2].isfinite())


@cases.add(backend=BACKENDS)
def several_blocks(backend: str) -> None:
    """Parts as long as several blocks of a kernel, with a tail."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * dist.get_world_size() * 4096 // 3
    logits = 3 * torch.randn(3, 2, size, generator=generator)
    ids = torch.randint(size, (3, 2), generator=generator)
    ref_logits = logits + 0.1 * torch.randn(logits.shape, generator=generator)
    case = Case(FULL, logits, ids, torch.randn(3, generator=generator), {"ref_logits": ref_logits})
    assert_parity(case, backend=backend)


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


@cases.add(frozen=[False, True])
def dtensor_head(frozen: bool) -> None:
    """A head as tensor parallelism leaves it: as it is, it is gathered; with its own shard it stays in parts.

    In both ways the gradient is that of the whole, in parts.
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


@cases.add()
def dtensor_logits() -> None:
    """As tensor parallelism leaves them: with their shard they stay in parts, else they are refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    case = every_branch(FULL, V, torch.float64)
    want = run(grpo_loss, case)
    logits = distribute_tensor(case.logits, mesh, [Shard(2)]).requires_grad_()
    ref_logits = distribute_tensor(case.options["ref_logits"], mesh, [Shard(2)])
    options = {**case.options, "spec": case.spec, "ref_logits": ref_logits}
    shard = VocabShard.of(logits, dim=-1)
    out = grpo_loss(logits, case.completion_ids, case.advantages, shard=shard, **options)
    torch.testing.assert_close(out.loss, want.out.loss)
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(grad.full_tensor(), want.grad)
    logps = selective_logps(logits, case.completion_ids, mask=case.options["completion_mask"], shard=shard)
    torch.testing.assert_close(logps.detach(), want.out.logps)
    with pytest.raises(RuntimeError, match="a leaf requiring grad"):
        grpo_loss(logits, case.completion_ids, case.advantages, shard=shard, inplace=True, **options)
    with pytest.raises(ValueError, match="logits is a DTensor"):
        selective_logps(logits, case.completion_ids)
    with pytest.raises(ValueError, match=r"needs a DTensor with placements \(Shard\(dim=0\),\)"):
        VocabShard.of(logits)


@cases.add(backend=BACKENDS)
def logps_from_hidden_states(backend: str) -> None:
    """Differentiable, by random upstream gradients of both outputs."""
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
def operations(spec: str) -> None:
    """In units of a part's T V H: three products in one pass, four in two."""
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
    """Their sum is left to the caller: in one pass and in two."""
    case = from_logits(every_branch(LossSpec(PPOClip(), level=level), V, torch.float64))
    parts = linear_parts(case, "uneven")
    want = run_linear(parts.case, shard=parts.shard).grads[0].nan_to_num()
    got = run_linear(parts.case, shard=replace(parts.shard, sum_dhidden=False)).grads[0].nan_to_num()
    assert not torch.allclose(got, want)
    dist.all_reduce(got)
    torch.testing.assert_close(got, want)


@cases.add()
def ranks_agree_on_chunks() -> None:
    """The first has memory for all tokens at once, the others for one."""
    linear.CPU_CHUNK_BYTES = 1 << 26 if dist.get_rank() == 0 else 1
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


@cases.add()
def debug_mode_names_parts_that_do_not_join() -> None:
    rank = dist.get_rank()
    os.environ["GRPO_KERNELS_DEBUG"] = "1"
    try:
        with pytest.raises(ValueError, match="must join"):
            selective_logps(torch.randn(2, 5), torch.tensor([0, 1]), shard=VocabShard(6 * rank, 6 * rank + 5))
        # An empty part may stand anywhere.
        size = 5 * (dist.get_world_size() - 1)
        start, stop = (2, 2) if rank == 0 else (5 * rank - 5, 5 * rank)
        part = torch.randn(2, stop - start)
        selective_logps(part, torch.tensor([0, 1]), shard=VocabShard(start, stop))
        size = 5 * dist.get_world_size()
        with pytest.raises(ValueError, match=rf"ids\[1\] is {size}, outside \[0, {size}\)"):
            ids = torch.tensor([0, size])
            selective_logps(torch.randn(2, 5), ids, shard=VocabShard(5 * rank, 5 * rank + 5))
    finally:
        del os.environ["GRPO_KERNELS_DEBUG"]


if __name__ == "__main__":
    cases.main()
