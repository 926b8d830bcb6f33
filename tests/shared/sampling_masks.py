"""Cases whose columns are spread among others, which a sampling mask drops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from parity import Case, Oracle, Result, assert_outputs, assert_rows_no_worse, run
from torch import Tensor

from grpo_kernels import LossOutput, grpo_loss, pack_sampling_mask

JUNK = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, 3.0])


class Masked(NamedTuple):
    """A case with a sampling mask."""

    case: Case
    columns: Tensor  # [B, T, K] or [N, K]: the kept columns of each row in ascending order

    @property
    def dropped(self) -> Tensor:
        """Whether each column of the logits was dropped. Columns beyond the vocabulary were."""
        return torch.ones_like(self.case.logits, dtype=torch.bool).scatter_(-1, self.columns, False)

    def rows_of(self, got: Result, expected: Oracle) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient's kept columns, and what they are in eager PyTorch and in fp64."""
        size = self.columns.shape[-1]
        results = (expected.eager.grad, expected.truth.grad)
        return got.grad.gather(-1, self.columns), *(x[..., :size] for x in results)


def spread(case: Case, V: int, *, junk: Tensor = JUNK, seed: int = 0) -> Masked:
    """Spread the columns of a case over V columns, in their order, and drop the other columns.

    Dropped columns hold `junk`. At masked positions the mask holds arbitrary bits. Columns beyond the
    vocabulary stay behind it, and the mask's bits for them are 1.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, K = case.completion_ids.shape, case.options.get("vocab_size", case.logits.shape[-1])
    columns = torch.rand(*rows, V, generator=generator).argsort(-1)[..., :K].sort(-1).values

    def wide(x: Tensor) -> Tensor:
        other = junk[torch.randint(len(junk), (*rows, V), generator=generator)].to(x.dtype)
        return torch.cat([other.scatter(-1, columns, x[..., :K]), x[..., K:]], -1)

    keep = torch.zeros(*rows, -(-V // 32) * 32, dtype=torch.bool).scatter_(-1, columns, True)
    keep[..., V:] = True
    mask = case.options.get("completion_mask")
    if mask is not None:
        noise = torch.rand(keep.shape, generator=generator) > 0.5
        keep = torch.where(mask.bool()[..., None], keep, noise)
    ids = columns.gather(-1, case.completion_ids.clamp(min=0)[..., None])[..., 0]
    options = case.options | {"sampling_mask": pack_sampling_mask(keep)}
    if options.get("ref_logits") is not None:
        options["ref_logits"] = wide(options["ref_logits"])
    if "vocab_size" in options:
        options["vocab_size"] = V
    wider = Case(case.spec, wide(case.logits), ids, case.advantages, options)
    return Masked(wider, columns)


def assert_masked_parity(expected: Oracle, masked: Masked, *, what: str = "", **options: object) -> Result:
    """Compare `grpo_loss` of a spread case with fp64 on the kept columns alone.

    An entry of the gradient may err twice as much as eager PyTorch's, or as that of the call without a mask.
    Which of the two errs more is chance where an entry nearly cancels.
    """
    got = run(grpo_loss, masked.case, **options)
    assert isinstance(got.out, LossOutput)
    assert_outputs(expected, got.out, what=what, return_entropy=bool(options.get("return_entropy", False)))
    own, eager, truth = masked.rows_of(got, expected)
    plain = run(grpo_loss, expected.case, **options).grad[..., : own.shape[-1]]
    worse = torch.where((plain - truth).abs() > (eager - truth).abs(), plain, eager)
    ids, logps = expected.case.completion_ids, expected.truth.out.logps
    assert_rows_no_worse(own, worse, truth, ids=ids, logps=logps, what=what)
    assert not got.grad[masked.dropped].any(), f"{what}: gradient of dropped columns"
    return got
