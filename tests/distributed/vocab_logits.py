"""Worker: the loss from logits, which are split over the ranks along the vocabulary.

Every rank makes the same case and takes its columns. Gradients are gathered and compared as one, with the
oracle and tolerances of an unsplit vocabulary.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
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
)
from sampling_masks import spread
from sure_tokens import BOUNDS, assert_gradient, assert_relative, truth_of
from sure_tokens import sure_tokens as draw_sure_tokens
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed.vocab_parts import (
    BACKENDS,
    FULL,
    SPLITS,
    V,
    assert_parity,
    bounds,
    joined,
    part_of,
    shard_of,
)
from distributed.worker import Cases
from grpo_kernels import (
    KL,
    LossSpec,
    PPOClip,
    Reinforce,
    VocabShard,
    grpo_loss,
    pack_sampling_mask,
    selective_logps,
)
from grpo_kernels.logps import linear_token_stats

cases = Cases()


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


@cases.add(backend=BACKENDS, split=SPLITS, kl=["exact", "exact_forward"])
def sampling_mask(backend: str, split: str, kl: str) -> None:
    """The bits of each rank's mask count from its first column. Dropped columns hold NaN and infinities."""
    expected = oracle(every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), 20, torch.float32))
    masked, shard = spread(expected.case, V), shard_of(split, V)
    words = pack_sampling_mask(~masked.dropped[..., shard.start : shard.stop])
    part = part_of(masked.case, shard).with_options(sampling_mask=words)
    got = run(grpo_loss, part, backend=backend, return_entropy=True)
    whole = got._replace(grad=joined(got.grad, split, V, -1))
    assert_outputs(expected, whole.out, what=kl, return_entropy=True)
    ids, logps = expected.case.completion_ids, expected.truth.out.logps
    assert_rows_no_worse(*masked.rows_of(whole, expected), ids=ids, logps=logps, what=kl)
    assert not whole.grad[masked.dropped].any()


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"])
def logit_transforms(backend: str, kl: str) -> None:
    case = every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), V, torch.float32)
    options = {"logit_scale": 0.7, "ref_logit_scale": 1.3, "logit_softcap": 6.0, "ref_logit_softcap": 9.0}
    temperatures = torch.tensor([0.6, 1.0, 1.7, 1.0])
    for extra in ({}, {"temperature": 0.6}, {"temperature": temperatures}, {**options, "temperature": 0.8}):
        assert_parity(case.with_options(**extra), backend=backend, what=str(extra))


def with_masked_part(case: Case, value: float, names: str) -> Case:
    """Fill the second rank's columns with `value`. A taken token among them is replaced by token 0.

    The logit of every taken token is lowered, because 1 - p of a likely one would have few digits.
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
    """The exact KL is the policy's probability of the masked columns times the mask."""
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
    """Padding is the end of the last part, or all of it."""
    size = V - 2
    case = every_branch(FULL, size, torch.float32).with_options(vocab_size=size)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - size), value=torch.nan)

    case = case._replace(logits=padded(case.logits))
    assert_parity(case.with_options(ref_logits=padded(case.options["ref_logits"])), backend=backend)


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"])
def parts_without_probability(backend: str, kl: str) -> None:
    """All columns of a part are -inf in both models, or in one of them."""
    case = every_branch(LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1), V, torch.float32)
    start, _ = bounds("uneven", V)[-1]
    # One token takes the last vocabulary entry, which is in this part. It takes another one instead.
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
    # A part without probability in one model only makes one direction of the KL infinite.
    alone = "policy" if kl == "exact_forward" else "reference"
    one = both._replace(logits=case.logits) if alone == "reference" else both
    if alone == "policy":
        one = one.with_options(ref_logits=case.options["ref_logits"])
    got = run(grpo_loss, part_of(one, shard_of("uneven", V)), backend=backend)
    assert math.isinf(got.out.metrics["kl"])


@cases.add(backend=BACKENDS, kl=["exact", "exact_forward"], banned=[-1e9, -200.0])
def parts_banned_in_two_ways(backend: str, kl: str, banned: float) -> None:
    """One model masks a part with a finite number and the other with -inf. The KL stays finite."""
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
    """The parts of one row differ by 2e4, and rows are far from zero."""
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
def invalid_ids_and_nan(backend: str) -> None:
    """An id outside the vocabulary gives NaN on all ranks, and so does a NaN in any part of a row."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    logits[1, -1] = torch.nan
    shard = shard_of("uneven", V)
    part = logits[:, shard.start : shard.stop]
    for outside in (V, -100, 2**40):
        found = selective_logps(part, torch.tensor([outside, 0, 1]), shard=shard, backend=backend)
        assert found.isnan().tolist() == [True, True, False]
    hidden, weight = torch.eye(3), logits.nan_to_num()[:, shard.start : shard.stop].t()
    top1 = linear_token_stats(hidden, weight, torch.tensor([V, 0, 1]), top1=True, shard=shard).top1
    assert top1 is not None and not top1[0]
    ids, mask = torch.tensor([-100, 0, 1]), torch.tensor([0, 0, 1])
    found = selective_logps(part, ids, mask=mask, shard=shard, backend=backend)
    assert found[:2].tolist() == [0, 0] and bool(found[2].isfinite())


@cases.add(backend=BACKENDS)
def several_blocks(backend: str) -> None:
    """Each part has several blocks of a kernel and a tail."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * dist.get_world_size() * 4096 // 3
    logits = 3 * torch.randn(3, 2, size, generator=generator)
    ids = torch.randint(size, (3, 2), generator=generator)
    ref_logits = logits + 0.1 * torch.randn(logits.shape, generator=generator)
    case = Case(FULL, logits, ids, torch.randn(3, generator=generator), {"ref_logits": ref_logits})
    assert_parity(case, backend=backend)


@cases.add(backend=BACKENDS, split=SPLITS, dtype=[torch.float64, torch.float32])
def sure_tokens(backend: str, split: str, dtype: torch.dtype) -> None:
    """The probability of the part that holds the taken token is nearly 1 as well, and keeps its digits."""
    batch, bounds = draw_sure_tokens(101, dtype, sequences=4), BOUNDS[dtype]
    truth = truth_of(batch)
    case = Case(LossSpec(Reinforce(), aggregation="token-sum"), batch.logits, batch.ids, batch.ones, {})
    case = case.with_options(ref_logits=batch.ref_logits)
    part = part_of(case, shard_of(split, 101))
    got = run(grpo_loss, part, backend=backend, return_entropy=True)
    for name in ("logps", "ref_logps", "entropy"):
        assert_relative(name, getattr(got.out, name), getattr(truth, name), bounds.statistic)
    kinds = {"exact": (truth.kl, truth.dkl), "exact_forward": (truth.kl_forward, truth.dkl_forward)}
    found = [("logps", got.grad, -truth.dlogps)]
    for kind, (value, gradient) in kinds.items():
        spec = LossSpec(None, KL(kind, beta=1.0), aggregation="token-sum")
        got = run(grpo_loss, part._replace(spec=spec), backend=backend)
        assert_relative(kind, got.out.loss, value.sum(), bounds.gradient)
        found.append((kind, got.grad, gradient))
    for what, grad, want in found:
        slack = truth.slack(dtype) if what == "exact" else 0.0
        grad = joined(grad, split, 101, -1)
        sizes = {"bound": bounds.gradient, "sum_bound": bounds.row_sum, "slack": slack}
        assert_gradient(what, grad, want, batch.ids, **sizes)


@cases.add()
def dtensor_logits() -> None:
    """DTensor logits stay in parts with `shard`, and are refused without it."""
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
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        grpo_loss(logits, case.completion_ids, case.advantages, shard=shard, inplace=True, **options)
    with pytest.raises(ValueError, match="logits is a DTensor"):
        selective_logps(logits, case.completion_ids)
    with pytest.raises(ValueError, match=r"needs a DTensor with placements \(Shard\(dim=0\),\)"):
        VocabShard.of(logits)


@cases.add()
def debug_mode_names_parts_that_do_not_join() -> None:
    rank = dist.get_rank()
    os.environ["GRPO_KERNELS_DEBUG"] = "1"
    try:
        with pytest.raises(ValueError, match="must join"):
            selective_logps(torch.randn(2, 5), torch.tensor([0, 1]), shard=VocabShard(6 * rank, 6 * rank + 5))
        # An empty part may have any bounds.
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
