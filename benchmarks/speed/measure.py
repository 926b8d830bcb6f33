"""Measures time and memory of a provider on a batch, and the machine's bandwidth and FLOP rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.testing import peak_memory

from ..tables import record
from ..work.batch import Batch
from ..work.providers import Provider
from ..work.workload import Floor

CPU_ROUNDS = 7
GPU_MS = 150  # spent on the repetitions of each part
COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 512 * 2**20}


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile


class Subject:
    """A step of a provider, whose forward and backward can run separately."""

    def __init__(self, provider: Provider, batch: Batch) -> None:
        self.provider, self.batch = provider, batch
        self.inputs: tuple[Tensor, ...] = ()
        self.loss: Tensor | None = None
        self.gradients: tuple[Tensor, ...] = ()

    def prepare(self) -> None:
        """Restores the state before a step: frees its results and copies overwritten inputs again."""
        self.loss, self.gradients, self.inputs = None, (), ()
        self.inputs = self.provider.inputs(self.batch)

    def forward(self) -> None:
        self.loss = self.provider.loss(self.batch, *self.inputs)

    def backward(self) -> None:
        assert self.loss is not None
        wanted = [x for x in self.inputs if x.requires_grad]
        self.gradients = torch.autograd.grad(self.loss, wanted)

    def step(self) -> None:
        self.forward()
        self.backward()

    def prepare_backward(self) -> None:
        self.prepare()
        self.forward()


def timings(subject: Subject, device: torch.device) -> dict[str, Timing]:
    """Times forward, backward and the full step. On a GPU, a long step is timed only as a whole."""
    if device.type == "cuda":
        full = on_gpu(subject.step, subject.prepare)
        if full.median > GPU_MS:
            return {"full": full}
        forward = on_gpu(subject.forward, subject.prepare)
        return {
            "full": full,
            "forward": forward,
            "backward": on_gpu(subject.backward, subject.prepare_backward),
        }
    seconds = []
    for _ in range(1 + CPU_ROUNDS):
        subject.prepare()
        start = time.perf_counter()
        subject.forward()
        middle = time.perf_counter()
        subject.backward()
        end = time.perf_counter()
        seconds.append((end - start, middle - start, end - middle))
    measured = torch.tensor(seconds[1:], dtype=torch.float64).t()  # the first round is a warm-up
    return {name: quantiles(x) for name, x in zip(("full", "forward", "backward"), measured, strict=True)}


def quantiles(seconds: Tensor) -> Timing:
    return Timing(*(1e3 * seconds.quantile(seconds.new_tensor([0.5, 0.2, 0.8]))).tolist())


class BeforeEach:
    """Calls `prepare` before each timed call of `do_bench`, which then sets `grad` of this object to None."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        object.__setattr__(self, "prepare", prepare)

    def __setattr__(self, name: str, value: object) -> None:
        self.prepare()


def on_gpu(call: Callable[[], None], prepare: Callable[[], None]) -> Timing:
    """Times `call` with a cold L2 cache, for `GPU_MS` milliseconds or 5 times, whichever is longer.

    `do_bench` clears the cache before each call.
    """
    from triton.testing import do_bench

    ready = False

    def make_ready() -> None:
        nonlocal ready
        prepare()
        ready = True

    def prepared_call() -> None:
        nonlocal ready
        if not ready:  # `do_bench` calls no hook while it warms up and estimates
            prepare()
        ready = False
        call()

    torch.cuda.synchronize()
    start = time.perf_counter()
    prepared_call()
    torch.cuda.synchronize()
    # With its preparation, which `do_bench` counts too when it divides `rep` by the time of a call.
    ms = 1e3 * (time.perf_counter() - start)
    how = {"warmup": GPU_MS / 6, "rep": max(GPU_MS, 5.5 * ms), "quantiles": [0.5, 0.2, 0.8]}
    return Timing(*do_bench(prepared_call, grad_to_none=[BeforeEach(make_ready)], **how))


def memory(subject: Subject, device: torch.device) -> float:
    """Peak memory of a step in MiB, without batch and inputs."""
    subject.prepare()
    return peak_memory(subject.step, device) / 2**20


class Floors(NamedTuple):
    """Rates that the machine reached on random data."""

    bytes_per_s: float  # of a copy, reads and writes added
    flop_per_s: float  # of a matrix product

    def ms(self, floor: Floor) -> float:
        return 1e3 * floor.amount / (self.bytes_per_s if floor.unit == "B" else self.flop_per_s)


def floors(device: torch.device, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> Floors:
    """Measures the rates. `shapes` lists products `[M, K] @ [K, N]`; the fastest one counts."""
    return Floors(copy_rate(device), max(product_rate(*shape, dtype, device) for shape in shapes))


def measured_floors(rows: Iterable[record.Row]) -> Floors | None:
    """The rates that a run has written, or None if it has not."""
    rates = {row.kernel_provider: row.y_value_50 or 0.0 for row in rows if row.kernel_name == "floor"}
    if rates.keys() != {"copy", "matrix product"}:
        return None
    return Floors(1e9 * rates["copy"], 1e12 * rates["matrix product"])


def copy_rate(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / seconds(lambda: target.copy_(source), device)


def product_rate(M: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K)))
    out = torch.empty(M, N, dtype=dtype, device=device)
    return 2 * M * K * N / seconds(lambda: torch.mm(a, b.t(), out=out), device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    measured = []
    for _ in range(1 + CPU_ROUNDS):
        start = time.perf_counter()
        call()
        measured.append(time.perf_counter() - start)
    return float(torch.tensor(measured[1:], dtype=torch.float64).median())
