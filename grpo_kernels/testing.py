"""For tests, yours too: realistic random batches, and the bar a kernel has to clear."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RandomBatch(NamedTuple):
    """Arguments of `grpo_loss`; `packed()` gives the same tokens end to end."""

    logits: Tensor  # [B, T, V]
    completion_ids: Tensor  # [B, T] int64
    advantages: Tensor  # [B] fp32
    completion_mask: Tensor  # [B, T] bool
    ref_logits: Tensor  # [B, T, V]
    old_logps: Tensor  # [B, T] fp32, nats

    def packed(self) -> tuple[RandomBatch, Tensor]:
        """The batch as `[B * T]` rows, mask and all, and its `seq_lens` `[B]`."""
        batch, time = self.completion_ids.shape
        flat = [x if x is self.advantages else x.reshape(batch * time, *x.shape[2:]) for x in self]
        return RandomBatch(*flat), torch.full((batch,), time)


def make_batch(
    B: int,
    T: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    masked: float = 0.25,
    inactive: float = 0.25,
    off_policy: float = 0.3,
    seed: int = 0,
) -> RandomBatch:
    """A batch as training sees it: peaked logits, ids drawn from the policy, ragged masks, some zero
    advantages.

    masked: fraction of tokens cut off the ends of the sequences, at random lengths.
    inactive: fraction of sequences whose advantage is exactly zero.
    off_policy: standard deviation of `logp - old_logp` in nats.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = (3.0 * normal(B, T, V)).to(dtype)
    ref_logits = (logits.float() + 0.3 * normal(B, T, V)).to(dtype)
    log_probs = torch.log_softmax(logits.float(), -1)
    # Gumbel's trick draws from softmax(logits) row by row without multinomial's limit on the number of
    # categories.
    uniform = torch.rand(B, T, V, generator=generator).clamp_(1e-9, 1 - 1e-7)
    ids = (log_probs - torch.log(-torch.log(uniform))).argmax(-1)
    logps = log_probs.gather(-1, ids[..., None])[..., 0]
    # Uniform lengths on [T - 2 * masked * T, T] cut off `masked` of the tokens on average.
    lengths = T - (torch.rand(B, generator=generator) * 2 * masked * (T + 1)).long().clamp(max=T)
    mask = torch.arange(T) < lengths[:, None]
    advantages = normal(B)
    advantages[torch.rand(B, generator=generator) < inactive] = 0.0
    batch = RandomBatch(logits, ids, advantages, mask, ref_logits, logps + off_policy * normal(B, T))
    return RandomBatch(*(x.to(device) for x in batch))


def relative_error(got: Tensor, truth: Tensor) -> Tensor:
    """L2 norm of the error over that of the truth, by row of `[..., V]`; 0 where both rows are zero."""
    error = (got.double() - truth.double()).norm(dim=-1)
    norm = truth.double().norm(dim=-1)
    return torch.where(error == 0, 0.0, error / norm.clamp(min=torch.finfo(torch.float64).tiny))


def assert_no_worse_than_eager(
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    epsilon: float | Tensor | None = None,
    what: str = "",
) -> None:
    """`got` errs from the fp64 `truth` at most `factor` times what `eager` errs, plus `epsilon`, row by row.

    Errors are relative L2 norms over the last dimension: a bound on the largest element would let a gradient
    of zeros pass. `epsilon` is one number, or one per row. It defaults to one rounding of `got`'s dtype, and
    to at least 2e-6 (fp64: 1e-12), what a log-probability near -10 is rounded by in fp32. A row in which
    eager is NaN has no bar but NaN.

    Raises:
        AssertionError: naming the worst row and both errors.
    """
    if epsilon is None:
        epsilon = 1e-12 if got.dtype == torch.float64 else max(torch.finfo(got.dtype).eps, 2e-6)
    ours, theirs = relative_error(got, truth).reshape(-1), relative_error(eager, truth).reshape(-1)
    allowed = factor * theirs.nan_to_num(nan=torch.inf) + torch.as_tensor(epsilon).to(theirs).reshape(-1)
    excess = (ours - allowed).nan_to_num(nan=torch.inf)
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: row {worst} errs {float(ours[worst]):.3g}, eager {float(theirs[worst]):.3g}, allowed "
            f"{float(allowed[worst]):.3g}"
        )


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that a call of `function` needs at its peak, above what is allocated before it.

    On a GPU read from PyTorch's allocator. Elsewhere the growth of the process, sampled every millisecond
    from a second thread (needs psutil). What earlier calls left to the process would hide part of it, and is
    given back first where the C library can (glibc).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    import psutil

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return peak - before
