"""Calls that together compile every kernel of this package, with each of its options.

The tensors are on the meta device. The calls are made inside `no_gpu.launches_for`, where nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_kernels import (
    CISPO,
    DPPO,
    DRO,
    KL,
    SAPO,
    ImportanceRatio,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
)
from grpo_kernels.linear import config
from grpo_kernels.logps import linear_token_stats

# Matrix products of 16-bit operands accumulate in fp32, as on a GPU.
mixed_products = mock.patch.object(config, "multiplies_mixed", lambda device: True)


def loss(
    spec: LossSpec,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 151936,
    reference: str = "none",
    old: bool = False,
    per_token: bool = False,
    dropped: bool = False,
    **options: Any,
) -> None:
    """Forward and backward of a loss from logits. `reference` is "none", "logits" or "logps".

    `dropped`: there is a sampling mask.
    """

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits = new(8, 512, vocab, dtype=dtype).requires_grad_()
    out = grpo_loss(
        logits.clone(),
        new(8, 512, dtype=torch.int64),
        new(8),
        spec=spec,
        ref_logits=new(8, 512, vocab, dtype=dtype) if reference == "logits" else None,
        ref_logps=new(8, 512) if reference == "logps" else None,
        old_logps=new(8, 512) if old else None,
        token_weights=new(8, 512) if per_token else None,
        temperature=new(8) if per_token else 0.9,
        sampling_mask=new(8, 512, -(-vocab // 32), dtype=torch.int32) if dropped else None,
        backend="triton",
        **options,
    )
    out.loss.backward()


@mixed_products
def linear(spec: LossSpec, *, reference: bool = False, **options: Any) -> None:
    """Forward and backward from bf16 hidden states, with fp32 logits and their bf16 gradient."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight = new(8, 512, 64), new(options.pop("vocab", 151936), 64)
    out = linear_grpo_loss(
        *(hidden.requires_grad_(), weight, new(8, 512, dtype=torch.int64), new(8)),
        spec=spec,
        old_logps=new(8, 512, dtype=torch.float32),
        ref_hidden=hidden.detach() if reference else None,
        ref_lm_head_weight=weight if reference else None,
        chunk_tokens=2048,
        compact=False,
        backend="triton",
        **options,
    )
    out.loss.backward()


@mixed_products
def token_statistics(**options: Any) -> None:
    """Log-probability, entropy and top-1 flag of each token, without a loss."""
    hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (4096, 151936))
    ids = torch.empty(4096, dtype=torch.int64, device="meta")
    given = {"entropy": True, "top1": True, "chunk_tokens": 2048, "compact": False, "backend": "triton"}
    linear_token_stats(hidden, weight, ids, **given, **options)


def distillation(
    divergence: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 151936,
    dropped: bool = False,
    per_token: bool = False,
    **options: Any,
) -> None:
    """Forward and backward of the divergence of two models' logits. `dropped`: there is a sampling mask."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out = distillation_loss(
        new(8, 512, vocab, dtype=dtype).requires_grad_(),
        teacher_logits=new(8, 512, vocab, dtype=dtype),
        divergence=divergence,  # type: ignore[arg-type]
        temperature=new(8) if per_token else 0.9,
        sampling_mask=new(8, 512, -(-vocab // 32), dtype=torch.int32) if dropped else None,
        backend="triton",
        **options,
    )
    out.loss.backward()


@mixed_products
def linear_distillation(divergence: str) -> None:
    """The same from bf16 hidden states, with fp32 logits and their bf16 gradient."""
    hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (4096, 151936))
    out = linear_distillation_loss(
        *(hidden.requires_grad_(), weight),
        teacher_hidden=hidden.detach(),
        teacher_lm_head_weight=weight,
        divergence=divergence,  # type: ignore[arg-type]
        chunk_tokens=2048,
        compact=False,
        backend="triton",
    )
    out.loss.backward()


def own_surrogate(logps: Tensor, *rest: Tensor | None) -> Tensor:
    return logps


def cases() -> dict[str, Callable[[], None]]:
    """Calls by name. Together they compile every kernel with each of its options."""
    ppo = LossSpec(PPOClip())
    both = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.01)
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for inplace in (False, True) if dtype in (torch.bfloat16, torch.float32) else (False,):
            call = partial(loss, dtype=dtype, inplace=inplace)
            where = f"{name}{' fused' if inplace else ''}"
            found[f"{where} policy only"] = partial(call, ppo, old=True)
            found[f"{where} exact KL, entropy"] = partial(call, both, reference="logits")
            found[f"{where} softcap"] = partial(call, both, reference="logits", logit_softcap=30.0)
            found[f"{where} unaligned rows"] = partial(call, both, reference="logits", vocab=50257)

    dropping = partial(loss, dropped=True)
    for dtype in (torch.bfloat16, torch.float32):
        for inplace in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}{' fused' if inplace else ''} sampling mask"
            call = partial(dropping, dtype=dtype, inplace=inplace)
            found[name] = partial(call, ppo, old=True)
            found[f"{name}, exact KL, entropy"] = partial(call, both, reference="logits")
    for inplace in (False, True):
        name, call = (
            f"bfloat16{' fused' if inplace else ''} sampling mask",
            partial(dropping, inplace=inplace),
        )
        found[f"{name}, entropy"] = partial(call, LossSpec(PPOClip(), entropy_coef=0.01))
        forward = LossSpec(PPOClip(), KL("exact_forward"))
        found[f"{name}, exact KL"] = partial(call, LossSpec(PPOClip(), KL("exact")), reference="logits")
        found[f"{name}, forward KL"] = partial(call, forward, reference="logits")
        found[f"{name}, softcap"] = partial(call, both, reference="logits", logit_softcap=30.0)
        found[f"{name}, unaligned rows"] = partial(call, both, reference="logits", vocab=50257)
    found["float64 sampling mask"] = partial(dropping, both, dtype=torch.float64, reference="logits")

    for inplace in (False, True):
        call = partial(loss, inplace=inplace)
        where = f"bfloat16{' fused' if inplace else ''}"
        found[f"{where} entropy"] = partial(call, LossSpec(PPOClip(), entropy_coef=0.01))
        found[f"{where} reference"] = partial(call, LossSpec(LogRatio()), reference="logits")
        found[f"{where} exact KL"] = partial(call, LossSpec(PPOClip(), KL("exact")), reference="logits")
        forward = LossSpec(PPOClip(), KL("exact_forward"))
        found[f"{where} forward KL"] = partial(call, forward, reference="logits")
        found[f"{where} temperatures"] = partial(call, ppo, per_token=True)
        found[f"{where} padded vocabulary"] = partial(call, ppo, vocab_size=151643)

    # Options that only the fused kernel has.
    fused: dict[str, tuple[LossSpec, dict[str, Any]]] = {
        "PPOClip on-policy": (ppo, {}),
        "Reinforce": (LossSpec(Reinforce()), {}),
        "LogRatio, ref_logps": (LossSpec(LogRatio()), {"reference": "logps"}),
        "ImportanceRatio": (LossSpec(ImportanceRatio()), {"old": True}),
        "ImportanceRatio to ref": (LossSpec(ImportanceRatio("ref")), {"reference": "logits"}),
        "CISPO": (LossSpec(CISPO(ratio_max=5.0)), {"old": True}),
        "SAPO": (LossSpec(SAPO()), {"old": True}),
        "DRO": (LossSpec(DRO(beta=0.1, anchor="ref")), {"reference": "logps"}),
        "DPPO tv": (LossSpec(DPPO("tv")), {"old": True}),
        "DPPO kl": (LossSpec(DPPO("kl")), {"old": True}),
        "KL alone": (LossSpec(None, KL("exact")), {"reference": "logits"}),
        "k1": (LossSpec(PPOClip(), KL("k1")), {"reference": "logits", "old": True}),
        "abs": (LossSpec(PPOClip(), KL("abs")), {"reference": "logits"}),
        "k2": (LossSpec(PPOClip(), KL("k2")), {"reference": "logps", "old": True}),
        "k3": (LossSpec(PPOClip(), KL("k3")), {"reference": "logits", "old": True}),
        "k3 ratio-corrected": (
            LossSpec(PPOClip(), KL("k3", ratio_corrected=True)),
            {"reference": "logits", "old": True},
        ),
        "k3 straight-through": (
            LossSpec(PPOClip(), KL("k3", straight_through=True)),
            {"reference": "logps", "old": True},
        ),
    }
    for name, (spec, options) in fused.items():
        found[f"bfloat16 fused {name}"] = partial(loss, spec, inplace=True, **options)

    for where, surrogate in (("one pass", PPOClip()), ("two passes", own_surrogate)):
        name = f"linear, {where}"
        found[name] = partial(linear, LossSpec(surrogate))
        full = LossSpec(surrogate, KL("exact"), entropy_coef=0.01)
        found[f"{name}, exact KL, entropy"] = partial(linear, full, reference=True)
        found[f"{name}, softcap"] = partial(linear, full, reference=True, logit_softcap=30.0)
        found[f"{name}, odd vocabulary"] = partial(linear, LossSpec(surrogate), vocab=50257)
    found["linear, token statistics"] = token_statistics
    found["linear, token statistics, softcap"] = partial(token_statistics, logit_softcap=30.0)
    return found | distillation_cases()


def distillation_cases() -> dict[str, Callable[[], None]]:
    """Calls that compile the kernels of the divergences."""
    found: dict[str, Callable[[], None]] = {}
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        call = partial(distillation, kind)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            name = f"{str(dtype).removeprefix('torch.')} {kind}"
            found[name] = partial(call, dtype=dtype)
            found[f"{name}, sampling mask, softcap"] = partial(
                call, dtype=dtype, dropped=True, logit_softcap=30.0
            )
        found[f"bfloat16 {kind}, sampling mask"] = partial(call, dropped=True)
        found[f"bfloat16 {kind}, softcap"] = partial(call, logit_softcap=30.0)
        found[f"bfloat16 {kind}, unaligned rows"] = partial(call, vocab=50257)
        found[f"linear, {kind}"] = partial(linear_distillation, kind)
    call = partial(distillation, "jsd")
    found["bfloat16 jsd, temperatures"] = partial(call, per_token=True)
    found["bfloat16 jsd, two scales"] = partial(call, ref_logit_scale=0.5)
    found["float32 jsd, sampling mask"] = partial(call, dtype=torch.float32, dropped=True)
    found["bfloat16 jsd, sampling mask, unaligned rows"] = partial(call, dropped=True, vocab=50257)
    return found


CASES = cases()
