"""`group_advantages` against loops over the groups, written from the papers' formulas."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import group_advantages

SIZES = [1, 2, 3, 8]
SCALES = ["std", "batch", "none"]


def rewards(size: int, groups: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(groups * size, generator=torch.Generator().manual_seed(seed))


def by_loop(
    r: Tensor, size: int, *, scale: str = "std", eps: float = 1e-4, leave_one_out: bool = False
) -> Tensor:
    result = []
    whole = r.double().tolist()
    centre = sum(whole) / len(whole)
    of_batch = (sum((x - centre) ** 2 for x in whole) / max(len(whole) - 1, 1)) ** 0.5
    for start in range(0, len(r), size):
        group = r[start : start + size].double().tolist()
        mean = sum(group) / size
        std = (sum((x - mean) ** 2 for x in group) / (size - 1)) ** 0.5 if size > 1 else 0.0
        for i, x in enumerate(group):
            others = group[:i] + group[i + 1 :]
            baseline = sum(others) / len(others) if leave_one_out and others else mean
            divisor = {"std": std + eps, "batch": of_batch + eps, "none": 1.0}[scale]
            result.append((x - baseline) / divisor)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_by_loop(device: str, size: int, scale: str, leave_one_out: bool) -> None:
    r = rewards(size)
    got = group_advantages(r.to(device), group_size=size, scale=scale, leave_one_out=leave_one_out)
    assert got.dtype == torch.float32 and got.device.type == device
    want = by_loop(r, size, scale=scale, leave_one_out=leave_one_out)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-4, 0.0, 1.0])
def test_as_in_trl(eps: float) -> None:
    """`(r - mean) / (std + eps)` on the `[groups, size]` view, as `GRPOTrainer` writes it."""
    r = rewards(4)
    view = r.view(-1, 4)
    want = (view - view.mean(1, keepdim=True)) / (view.std(1, keepdim=True) + eps)
    torch.testing.assert_close(group_advantages(r, group_size=4, eps=eps), want.view(-1))


@pytest.mark.parametrize("size", [2, 4])
def test_batch_as_in_trl(size: int) -> None:
    """`(r - mean of the group) / (std of all rewards + eps)`: TRL's `scale_rewards="batch"`."""
    r = rewards(size)
    want = (r.view(-1, size) - r.view(-1, size).mean(1, keepdim=True)) / (r.std() + 1e-4)
    torch.testing.assert_close(group_advantages(r, group_size=size, scale="batch"), want.view(-1))


def test_leave_one_out_as_in_rloo() -> None:
    r = torch.tensor([1.0, 2.0, 6.0])
    got = group_advantages(r, group_size=3, scale="none", leave_one_out=True)
    torch.testing.assert_close(got, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))


@pytest.mark.parametrize(
    "ids", [[7, 7, 7, -2, -2, -2, 0, 0, 0], [5, 1, 9, 5, 1, 9, 5, 1, 9]], ids=["blocks", "mixed"]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids(device: str, ids: list[int], dtype: torch.dtype) -> None:
    """Group ids may be any numbers, and members of a group may come in any order."""
    r, group_ids = rewards(3).to(device), torch.tensor(ids, dtype=dtype, device=device)
    order = torch.argsort(group_ids, stable=True)
    want = torch.empty_like(r)
    want[order] = group_advantages(r[order], group_size=3)
    torch.testing.assert_close(group_advantages(r, group_ids=group_ids), want)


def test_groups_of_unequal_size() -> None:
    r, ids = rewards(3), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 3])
    got = group_advantages(r, group_ids=ids)
    for group in range(4):
        members = ids == group
        torch.testing.assert_close(
            got[members].double(), by_loop(r[members], int(members.sum())), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_equal_rewards_are_exactly_zero(size: int, scale: str, eps: float) -> None:
    """Equal rewards give exactly 0, because only rows with an advantage of 0 are skipped."""
    values = torch.rand(100, generator=torch.Generator().manual_seed(1))
    for leave_one_out in (False, True):
        got = group_advantages(
            values.repeat_interleave(size), group_size=size, scale=scale, eps=eps, leave_one_out=leave_one_out
        )
        assert not got.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Sums are not computed in half precision, which counts only to 256 or 2048."""
    r = rewards(3000, groups=2).to(dtype)
    got = group_advantages(r, group_size=3000)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(),
        by_loop(r, 3000),
        rtol=max(torch.finfo(dtype).eps, 1e-5),
        atol=max(torch.finfo(dtype).eps, 1e-6),
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_integers_and_bools(dtype: torch.dtype, scale: str, leave_one_out: bool) -> None:
    """The advantages are fp32, and equal those of the same rewards in floating point."""
    r = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1])
    options = {"group_size": 4, "scale": scale, "leave_one_out": leave_one_out}
    got = group_advantages(r.to(dtype), **options)
    assert got.dtype == torch.float32
    assert torch.equal(got, group_advantages(r.float(), **options))
    want = by_loop(r, 4, scale=scale, leave_one_out=leave_one_out)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        group_advantages(r.to(dtype), group_ids=torch.arange(12) // 4, **{**options, "group_size": None}), got
    )


def test_large_integers() -> None:
    """fp32 cannot represent the differences between these rewards."""
    r = torch.tensor([2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3])
    torch.testing.assert_close(
        group_advantages(r, group_size=4).double(), by_loop(r, 4), rtol=1e-5, atol=1e-6
    )


def test_far_from_zero() -> None:
    """The standard deviation is computed around the mean, so large rewards do not cancel."""
    r = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3])
    torch.testing.assert_close(
        group_advantages(r, group_size=4).double(), by_loop(r, 4), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rewards_that_are_not_finite(scale: str, value: float) -> None:
    """They stay in their group, apart from the standard deviation of the batch."""
    r = torch.tensor([1.0, value, 2.0, 5.0, 3.0, 3.0])
    got = group_advantages(r, group_size=2, scale=scale)
    assert not got[:2].isfinite().any()
    assert not got[4:].any()
    if scale == "batch":
        assert got[2:4].isnan().all()
    else:
        torch.testing.assert_close(got[2:4], group_advantages(r[2:4], group_size=2, scale=scale))


def test_equal_infinite_rewards() -> None:
    got = group_advantages(torch.tensor([torch.inf, torch.inf, 1.0, 2.0]), group_size=2)
    assert not got[:2].any() and got[2:].isfinite().all()


def test_huge_ids(device: str) -> None:
    """Ids that differ by more than 64 bits hold, and ids that fp64 cannot tell apart."""
    top = 2**63 - 1
    ids = torch.tensor([top, -top - 1, top, top - 1, -top - 1, top - 1], device=device)
    r = rewards(2).to(device)
    small = torch.tensor([2, 0, 2, 1, 0, 1], device=device)
    assert torch.equal(group_advantages(r, group_ids=ids), group_advantages(r, group_ids=small))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus_baseline"])
def test_no_device_sync(estimator: str) -> None:
    r, ids = rewards(4).cuda(), torch.arange(12, device="cuda") % 3
    options = {} if estimator == "grpo" else {"lengths": ids}
    group_advantages(r, group_ids=ids, estimator=estimator, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        group_advantages(r, group_ids=ids, estimator=estimator, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing() -> None:
    assert group_advantages(torch.zeros(0), group_size=4).shape == (0,)
    assert group_advantages(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.long)).shape == (0,)


R = torch.zeros(4)
IDS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "given, options, error, message",
    [
        ([1.0, 2.0], {"group_size": 2}, TypeError, "rewards must be a tensor, got list"),
        (
            R[None],
            {"group_size": 2},
            ValueError,
            "rewards must be [B] of a real dtype, got torch.float32 of shape (1, 4)",
        ),
        (
            torch.zeros(4, dtype=torch.complex64),
            {"group_size": 2},
            ValueError,
            "rewards must be [B] of a real dtype, got torch.complex64 of shape (4,)",
        ),
        (R, {}, ValueError, "give one of group_size and group_ids"),
        (R, {"group_size": 2, "group_ids": IDS}, ValueError, "give one of group_size and group_ids"),
        (R, {"group_size": 3}, ValueError, "group_size must divide the 4 rewards, got 3"),
        (R, {"group_size": 0}, ValueError, "group_size must be >= 1, got 0"),
        (R, {"group_size": -2}, ValueError, "group_size must be >= 1, got -2"),
        (R, {"group_size": 2.0}, TypeError, "group_size must be an integer, got 2.0"),
        (R, {"group_size": True}, TypeError, "group_size must be an integer, got True"),
        (R, {"group_ids": [0, 0, 1, 1]}, TypeError, "group_ids must be a tensor, got list"),
        (
            R,
            {"group_ids": IDS[:2]},
            ValueError,
            "group_ids must be integers of shape (4,), got torch.int64 of shape (2,)",
        ),
        (
            R,
            {"group_ids": R},
            ValueError,
            "group_ids must be integers of shape (4,), got torch.float32 of shape (4,)",
        ),
        (R, {"group_ids": IDS.to("meta")}, ValueError, "group_ids is on meta, rewards on cpu"),
        (
            R,
            {"group_size": 2, "scale": "group"},
            ValueError,
            "scale must be one of 'std', 'batch', 'none', got 'group'",
        ),
        (R, {"group_size": 2, "eps": -1}, ValueError, "eps must be finite and >= 0, got -1"),
        (R, {"group_size": 2, "eps": "1"}, TypeError, "eps must be a number, got '1'"),
    ],
)
def test_errors(given: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        group_advantages(given, **options)
