"""Helpers for tests, including yours: random batches, a comparison with eager PyTorch, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RandomBatch(NamedTuple):
    """Arguments of `grpo_loss`.

    Attributes:
        logits: `[B, T, V]`.
        completion_ids: `[B, T]` int64.
        advantages: `[B]` fp32.
        completion_mask: `[B, T]` bool.
        ref_logits: `[B, T, V]`.
        old_logps: `[B, T]` fp32, nats.

    Examples:
        >>> from grpo_kernels.testing import make_batch
        >>> rows, seq_lens = make_batch(2, 3, 11).packed()
        >>> rows.logits.shape, seq_lens
        (torch.Size([6, 11]), tensor([3, 3]))
    """

    logits: Tensor
    completion_ids: Tensor
    advantages: Tensor
    completion_mask: Tensor
    ref_logits: Tensor
    old_logps: Tensor

    def packed(self) -> tuple[RandomBatch, Tensor]:
        """Return the same tokens, masked ones included, as `[B * T]` rows, and the `seq_lens` `[B]`."""
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
    """Draw a realistic batch: peaked logits, ids sampled from the policy, sequences of different lengths.

    Args:
        B: sequences.
        T: tokens per sequence, padding included.
        V: vocabulary entries.
        dtype: of the logits.
        device: of all tensors.
        masked: average fraction of tokens that are masked at the ends of the sequences.
        inactive: fraction of sequences with an advantage of exactly 0.
        off_policy: standard deviation of `logp - old_logp` in nats.
        seed: of the random numbers. Equal seeds give equal batches on every device.

    Returns:
        The arguments of `grpo_loss`, by their names.

    Examples:
        >>> from grpo_kernels import grpo_loss
        >>> from grpo_kernels.testing import make_batch
        >>> batch = make_batch(2, 3, 11, seed=1)
        >>> out = grpo_loss(*batch[:3], completion_mask=batch.completion_mask, old_logps=batch.old_logps)
        >>> out.logps.shape
        torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = (3.0 * normal(B, T, V)).to(dtype)
    ref_logits = (logits.float() + 0.3 * normal(B, T, V)).to(dtype)
    log_probs = torch.log_softmax(logits.float(), -1)
    # Gumbel's trick samples from softmax(logits). torch.multinomial limits the number of categories.
    uniform = torch.rand(B, T, V, generator=generator).clamp_(1e-9, 1 - 1e-7)
    ids = (log_probs - torch.log(-torch.log(uniform))).argmax(-1)
    logps = log_probs.gather(-1, ids[..., None])[..., 0]
    # Uniform lengths on [T - 2 * masked * T, T] mask a fraction `masked` of the tokens on average.
    lengths = T - (torch.rand(B, generator=generator) * 2 * masked * (T + 1)).long().clamp(max=T)
    mask = torch.arange(T) < lengths[:, None]
    advantages = normal(B)
    advantages[torch.rand(B, generator=generator) < inactive] = 0.0
    batch = RandomBatch(logits, ids, advantages, mask, ref_logits, logps + off_policy * normal(B, T))
    return RandomBatch(*(x.to(device) for x in batch))


def relative_error(got: Tensor, truth: Tensor) -> Tensor:
    """Return the L2 norm of the error relative to the truth's, for each row of `[..., V]`.

    It is 0 for a row without an error, even if the truth is 0.

    Examples:
        >>> import torch
        >>> from grpo_kernels.testing import relative_error
        >>> relative_error(torch.tensor([[3.0, 4.1]]), torch.tensor([[3.0, 4.0]]))  # 0.1 / 5
        tensor([0.0200], dtype=torch.float64)
    """
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
    """Assert for each row that the error of `got` is at most `factor` times that of `eager`, plus `epsilon`.

    Errors are relative L2 norms over the last dimension. A bound on the largest element would accept a
    gradient of zeros.

    Args:
        got: `[..., V]`, the result under test.
        eager: `[..., V]`, the result of eager PyTorch in the same dtype. If a row is NaN here, `got` may have
            any value there except NaN.
        truth: `[..., V]`, computed in fp64.
        factor: how many times eager's error is allowed.
        epsilon: additional allowed error, one number or one per row. Defaults to the rounding error of
            `got`'s dtype, but at least 2e-6, the fp32 rounding error of a log-probability near -10. For fp64
            it is 1e-12.
        what: names the result in the message.

    Raises:
        AssertionError: with the worst row, both errors and the allowed error.

    Examples:
        >>> import torch
        >>> from grpo_kernels.testing import assert_no_worse_than_eager
        >>> truth = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> eager = truth.float()
        >>> assert_no_worse_than_eager(eager, eager, truth)
        >>> assert_no_worse_than_eager(0 * eager, eager, truth, what="gradient")
        Traceback (most recent call last):
        AssertionError: gradient: the error of row 0 is 1, eager's is 0, allowed is 2e-06
    """
    if epsilon is None:
        epsilon = 1e-12 if got.dtype == torch.float64 else max(torch.finfo(got.dtype).eps, 2e-6)
    ours, theirs = relative_error(got, truth).reshape(-1), relative_error(eager, truth).reshape(-1)
    allowed = factor * theirs.nan_to_num(nan=torch.inf) + torch.as_tensor(epsilon).to(theirs).reshape(-1)
    excess = (ours - allowed).nan_to_num(nan=torch.inf)
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: the error of row {worst} is {float(ours[worst]):.3g}, eager's is "
            f"{float(theirs[worst]):.3g}, allowed is {float(allowed[worst]):.3g}"
        )


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the peak memory of a call of `function` in bytes, above what was allocated before the call.

    On a GPU, PyTorch's allocator reports it. On other devices it is the growth of the process, sampled every
    millisecond from a second thread (needs psutil). Free memory that the process still holds would hide a
    part of the growth, so it is returned to the system first if the C library is glibc.

    Examples:
        >>> import torch
        >>> from grpo_kernels.testing import peak_memory
        >>> bytes_used = peak_memory(lambda: torch.ones(2**20).exp())
        >>> isinstance(bytes_used, int)
        True
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
