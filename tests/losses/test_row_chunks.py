"""Rows that share a chunk of the PyTorch backend. Sums of a chunk without -inf skip the test for 0 * inf."""

from __future__ import annotations

import math

import pytest
import torch
from hard_cases import SPECS, assert_right, random_case, set_chunks
from parity import run

from grpo_kernels import grpo_loss
from grpo_kernels.vocab.row_chunks import row_chunks


@pytest.mark.parametrize("inplace", [False, True], ids=["not in place", "in place"])
@pytest.mark.parametrize("special", [-math.inf, math.nan], ids=["-inf", "NaN"])
@pytest.mark.parametrize("name", ["exact KL", "entropy", "forward KL", "k3"])
def test_special_values_change_no_other_row(
    name: str, special: float, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk is ordinary, the second has a row with special values, the others follow it."""
    set_chunks(4 * 37, monkeypatch)
    plain = random_case(SPECS[name], 2, 8, 37, device="cpu", masked=0)
    own = int(plain.completion_ids[0, 5])
    columns = [v for v in range(3, 30) if v != own]
    logits, reference = plain.logits.clone(), plain.options["ref_logits"].clone()
    logits[0, 5, columns] = special
    reference[0, 5, columns] = special
    case = plain._replace(logits=logits).with_options(ref_logits=reference)
    got, ordinary = (run(grpo_loss, x, backend="torch", inplace=inplace) for x in (case, plain))
    others = torch.ones(2, 8, dtype=torch.bool)
    others[0, 5] = False
    for part in ("logps", "ref_logps", "entropy"):
        mine, theirs = getattr(got.out, part), getattr(ordinary.out, part)
        assert (mine is None and theirs is None) or torch.equal(mine[others], theirs[others]), part
    assert torch.equal(got.grad[others], ordinary.grad[others])
    if special == -math.inf:
        assert_right(case, backend="torch", inplace=inplace)
    else:
        assert got.grad[0, 5].isnan().all() and got.out.loss.isnan()


@pytest.mark.parametrize("special", [-math.inf, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", ["exact KL", "entropy", "forward KL", "k3"])
def test_a_row_of_special_values_has_no_numbers(name: str, special: float) -> None:
    case = random_case(SPECS[name], 1, 2, 37, device="cpu", masked=0)
    case.logits[0, 0] = special
    assert run(grpo_loss, case, backend="torch").grad[0, 0].isnan().all()


@pytest.mark.parametrize("masked", [0, 1, 4, 11, 16])
def test_masked_rows_leave_the_others_alone(masked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks with no, some and only masked rows give the bits of an unmasked batch."""
    set_chunks(4 * 37, monkeypatch)
    case = random_case(SPECS["exact KL"], 2, 8, 37, device="cpu", masked=0).with_options(normalizer=16.0)
    mask = torch.ones(16, dtype=torch.bool)
    mask[torch.randperm(16, generator=torch.Generator().manual_seed(masked))[:masked]] = False
    mask = mask.view(2, 8)
    whole = run(grpo_loss, case, backend="torch")
    got = run(grpo_loss, case.with_options(completion_mask=mask), backend="torch")
    assert torch.equal(got.grad[mask], whole.grad[mask]) and not got.grad[~mask].any()
    assert torch.equal(got.out.logps[mask], whole.out.logps[mask]) and not got.out.logps[~mask].any()


SLICES = {
    "all but the last": lambda x: x[:, :-1],
    "all but the first": lambda x: x[:, 1:],
    "the last": lambda x: x[:, -1:],
    "the first of each batch": lambda x: x[:, :1],
    "one sequence for all": lambda x: x[:1].expand(x.shape),
    "columns": lambda x: x[..., 3:36],
    "transposed": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("masked", [0, 5, 20])
@pytest.mark.parametrize("name", SLICES)
def test_a_slice_has_the_bits_of_its_copy(name: str, masked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several short sequences share a chunk, however they lie in memory."""
    set_chunks(6 * 39, monkeypatch)
    view = SLICES[name]
    whole = random_case(SPECS["exact KL"], 10, 4, 39, device="cpu", masked=0)
    case = random_case(SPECS["exact KL"], *view(whole.logits).shape, device="cpu", masked=masked)
    case = case._replace(logits=whole.logits).with_options(ref_logits=view(whole.options["ref_logits"]))
    for inplace in (False, True) if name != "one sequence for all" else (False,):
        got = run(grpo_loss, case, view, backend="torch", inplace=inplace)
        copied = run(grpo_loss, case, lambda x: view(x).contiguous(), backend="torch", inplace=inplace)
        for mine, theirs in zip(got.out[2:4], copied.out[2:4], strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(got.out.metrics["kl_exact"], copied.out.metrics["kl_exact"])
        assert torch.equal(got.grad, copied.grad)


@pytest.mark.parametrize("batch,time,chunks", [(256, 4, 1), (64, 1, 1), (3, 600, 3), (2, 1500, 4)])
def test_short_sequences_share_a_chunk(
    batch: int, time: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk holds 1024 rows. A slice of short sequences takes as few chunks as a copy of it."""
    set_chunks(1024 * 8, monkeypatch)
    x = torch.randn(batch, time + 1, 8)[:, :-1]
    assert len(list(row_chunks(torch.ones(batch * time, dtype=torch.bool), x))) == chunks


def test_a_sampling_mask_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sequences are not adjacent in memory. Each chunk takes its own rows of one copy."""
    set_chunks(4 * 40, monkeypatch)
    case = random_case(SPECS["k3"], 4, 8, 40, device="cpu", masked=0)
    mask = torch.full((4, 9, 2), -1, dtype=torch.int32)[:, :-1]
    flattened = []
    flatten = torch.Tensor.flatten
    monkeypatch.setattr(
        torch.Tensor,
        "flatten",
        lambda x, *dims: (flattened.append(x) if x.dtype == torch.int32 else None, flatten(x, *dims))[1],
    )
    run(grpo_loss, case.with_options(sampling_mask=mask), backend="torch")
    assert len(flattened) == 1
