"""The workloads and their order. The most informative come first, because a run can end at its time limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..work.workload import Workload

VOCABULARIES = (151936, 128256, 32000)  # Qwen, Llama 3, Llama 2
TOKENS = (8192, 16384, 4096, 32768)
HIDDEN = (4096, 2048)
IDLE = ({"inactive": 0.5}, {"masked": 0.5})
REFERENCE = ({"loss": "log_ratio"}, {"loss": "grpo_kl"}, {"loss": "log_ratio", "given_ref": True})


# The providers that come first at every headline shape, and those that come last because they compile.
FIRST = (
    *("grpo_kernels", "grpo_kernels selective_logps", "liger fused", "liger", "trl", "quack", "verl"),
    "cut-cross-entropy",
)
LAST = ("unsloth", "torch.compile", "torch.compile + exact KL")


def headline() -> list[Workload]:
    """The shapes of the best figures that peers have published, for a GPU."""
    linear = Workload("linear", "grpo", 8192, 131072, 4096)
    logits = Workload("logits", "cross_entropy", 8192, 151936, entropy=True)
    return [
        replace(linear, entropy=True),
        replace(linear, V=151936),
        replace(linear, V=151936, loss="grpo_kl"),
        logits,
        replace(logits, loss="grpo_kl", entropy=False),
        replace(logits, loss="grpo", entropy=False),
        replace(linear, T=4096, V=128256, entropy=True),
        replace(linear, V=151936, loss="cross_entropy"),
        replace(linear, loss="grpo_kl"),
    ]


def turn(work: Workload, provider: str) -> int:
    """The turn of a provider at a headline shape: 0, 1 or 2. Each shape's batch is drawn once per turn."""
    # The one compiled peer that a target names (docs/dev/tuning.md) does not wait for the last turn.
    aim = (work.form, work.loss, provider) == ("logits", "grpo_kl", "torch.compile")
    return 0 if aim or provider in FIRST else 2 if provider in LAST else 1


def plan(forms: list[str], device: torch.device, *, quick: bool) -> list[Workload]:
    """The workloads of a run. The forms take turns."""
    if quick:
        small = smoke(device)
    elif device.type == "cuda":
        small = None
    else:
        small = on_cpu()
    orders = [list(full(form)) if small is None else [w for w in small if w.form == form] for form in forms]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*orders))
    return [work for work in dict.fromkeys(turns) if work is not None]


def full(form: str) -> Iterator[Workload]:
    """All workloads of a form, for a GPU."""
    H = HIDDEN[0] if form == "linear" else 0
    first = Workload(form, "grpo_kl" if form == "logits" else "grpo", TOKENS[0], VOCABULARIES[0], H)
    other = replace(first, loss="grpo" if form == "logits" else "grpo_kl")
    yield first
    for idle in IDLE:
        yield replace(first, loss="grpo", **idle)
    yield other
    for T, V in itertools.product(TOKENS[:2], VOCABULARIES[:2]):
        yield replace(first, T=T, V=V)
    if form == "linear":
        yield replace(first, loss="cross_entropy")
        yield replace(first, frozen_head=True)
        yield replace(first, H=HIDDEN[1])
    for T in TOKENS:
        yield replace(first, T=T)
    yield replace(first, loss="log_ratio")
    yield replace(first, loss="log_ratio", given_ref=True)
    yield replace(first, loss="log_ratio", inactive=0.5)
    for V, T in itertools.product(VOCABULARIES, TOKENS):
        yield replace(first, T=T, V=V)
    if form == "linear":
        yield replace(first, T=65536)
    for H, loss, idle, T in itertools.product(
        HIDDEN if form == "linear" else (0,), (first.loss, other.loss), ({}, *IDLE), TOKENS
    ):
        yield replace(first, H=H, loss=loss, T=T, **idle)


def on_cpu() -> list[Workload]:
    """Sizes for a CPU, in fp32: half an hour. The losses with a reference come first."""
    logits = Workload("logits", "grpo", 2048, 32000, dtype=torch.float32)
    linear = Workload("linear", "grpo", 4096, 32000, 512, dtype=torch.float32)
    works = [replace(base, **change) for change in (*REFERENCE, {}) for base in (logits, linear)]
    works.remove(replace(linear, loss="log_ratio", given_ref=True))  # takes the time of grpo
    works += [replace(logits, loss="log_ratio", T=T) for T in (512, 1024, 4096)]
    works += [replace(linear, loss="log_ratio", T=T) for T in (1024, 2048)]
    return [*works, replace(linear, inactive=0.5)]


def smoke(device: torch.device) -> list[Workload]:
    """Small sizes that take seconds each, to see that everything runs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    T, V, H = (2048, 32000, 1024) if device.type == "cuda" else (256, 8000, 128)
    bases = Workload("logits", "grpo", T, V, dtype=dtype), Workload("linear", "grpo", T, V, H, dtype=dtype)
    return [replace(base, **change) for base in bases for change in (*REFERENCE, {}, *IDLE)]
