"""Calls the kernels of peers, so that they are compiled."""

from __future__ import annotations

import contextlib
from typing import NamedTuple
from unittest import mock

import torch

from ..work.batch import empty_batch
from ..work.providers import PROVIDERS, Provider
from ..work.workload import Workload


class Peer(NamedTuple):
    """A provider whose kernels are compiled, and what it is called with."""

    provider: Provider
    work: Workload
    device: str  # "cpu" if masks or sorts need values


FROM_LOGITS = Workload("logits", "grpo", 4096, 151936)
FROM_HIDDEN = Workload("linear", "grpo", 128, 151936, 64)
WITH_REFERENCE = Workload("logits", "grpo_kl", 4096, 151936)
PEERS = {
    "liger": Peer(PROVIDERS["logits"]["liger"], WITH_REFERENCE, "meta"),
    "trl": Peer(PROVIDERS["logits"]["trl"], FROM_LOGITS, "meta"),
    "trl, chunked head": Peer(PROVIDERS["linear"]["trl"], FROM_HIDDEN, "cpu"),
    "cut-cross-entropy": Peer(PROVIDERS["linear"]["cut-cross-entropy"], FROM_HIDDEN, "cpu"),
}
# The functions in which TRL decides between Triton, on a GPU, and PyTorch.
GATES = ("trl.trainer.utils._supports_trl_loss_kernel", "trl.kernels.chunked_logprob._use_triton")


def installed(peer: str) -> bool:
    return PEERS[peer].provider.version != ""


def call_peer(name: str) -> None:
    """Runs forward and backward of a peer."""
    provider, work, device = PEERS[name]
    batch = empty_batch(work, device)
    inputs = provider.inputs(batch)
    with contextlib.ExitStack() as patches:
        patches.enter_context(torch.compiler.set_stance("force_eager"))
        for gate in GATES if provider.name == "trl" else ():
            patches.enter_context(mock.patch(gate, lambda *args: True))
        provider.loss(batch, *inputs).backward()
