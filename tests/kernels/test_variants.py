"""Training on changing lengths, temperatures and clip ranges compiles each kernel once."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction
if not hasattr(JITFunction, "_do_compile"):
    pytest.skip("Triton before 3.5 has no place to count what it would compile", allow_module_level=True)

from benchmarks.machine_code.no_gpu import TARGETS, variants_for  # noqa: E402
from grpo_kernels import (  # noqa: E402
    KL,
    LossSpec,
    PPOClip,
    distillation_loss,
    grpo_loss,
    linear_grpo_loss,
    linear_losses,
)

# 1 and multiples of 16, which Triton specializes by default; odd lengths; and lengths at which the stride
# of a sequence's logits exceeds 2^31.
LENGTHS = [1, 2, 3, 16, 17, 32, 48, 100, 512, 513, 999, 4096, 14133, 16384, 32768, *range(700, 4200, 100)]
TEMPERATURES = [1.0, 0.7, 2.0]
CLIP_RANGES = [(0.2, 0.2), (0.2, 0.28), (1.0, 3.0)]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(
    length: int,
    vocab: int,
    *,
    temperature: float = 1.0,
    clip_range: tuple[float, float] = (0.2, 0.2),
    inplace: bool = False,
    dropped: bool = False,
) -> None:
    spec = LossSpec(PPOClip(*clip_range), KL("exact", beta=clip_range[0]), entropy_coef=clip_range[1])
    logits = new(4, length, vocab, dtype=torch.bfloat16).requires_grad_()
    out = grpo_loss(
        logits.clone(),
        new(4, length, dtype=torch.int64),
        new(4),
        spec=spec,
        ref_logits=new(4, length, vocab, dtype=torch.bfloat16),
        old_logps=new(4, length),
        temperature=temperature,
        # A word or more of padding, so that the strides of the mask change with the length.
        sampling_mask=new(4, length, vocab // 32 + length, dtype=torch.int32)[..., : -(-vocab // 32)]
        if dropped
        else None,
        inplace=inplace,
        backend="triton",
    )
    out.loss.backward()


def launch_distillation(
    length: int, vocab: int, divergence: str, *, temperature: float, weight: float, dropped: bool
) -> None:
    """The weight of a JSD may change, too."""
    out = distillation_loss(
        new(4, length, vocab, dtype=torch.bfloat16).requires_grad_(),
        teacher_logits=new(4, length, vocab, dtype=torch.bfloat16),
        divergence=divergence,  # type: ignore[arg-type]
        jsd_weight=weight,
        temperature=temperature,
        sampling_mask=new(4, length, vocab // 32 + length, dtype=torch.int32)[..., : -(-vocab // 32)]
        if dropped
        else None,
        backend="triton",
    )
    out.loss.backward()


def launch_linear(length: int, vocab: int, *, local: bool) -> None:
    """Call the linear form. Tokens without a gradient start after a changing number of others.

    Tensors are on the CPU, because Triton looks at the alignment of addresses and "meta" has none.
    """
    hidden, weight = torch.randn(1, length, 8, requires_grad=True), torch.randn(vocab, 8)
    advantages = (torch.arange(length) < length // 3).float()[None]
    spec = (
        LossSpec(PPOClip())
        if local
        else LossSpec(lambda logps, old, ref, advantages, mask: logps * advantages)
    )
    out = linear_grpo_loss(
        *(hidden, weight, torch.zeros(1, length, dtype=torch.long), advantages),
        spec=spec,
        old_logps=torch.randn(1, length),
        temperature=torch.ones(1, length),
        chunk_tokens=5,
    )
    out.loss.backward()


def counted(variants: dict[str, set[str]]) -> dict[str, int]:
    return {name: len(keys) for name, keys in variants.items()}


@pytest.mark.parametrize(
    ("target", "vocab", "count"),
    [
        ("sm_90", 151936, 1),
        ("sm_90", 50264, 1),  # rows aligned to 16 bytes, but not to 16 elements
        ("sm_90", 50257, 1),  # rows not aligned
        ("gfx942", 151936, 2),  # AMD's compiler has another variant for tensors below 2 GiB
    ],
)
@pytest.mark.parametrize(
    ("inplace", "kernels"),
    [(False, ["row_stats_kernel", "dlogits_kernel"]), (True, ["fused_loss_kernel", "scale_rows_kernel"])],
)
def test_no_recompilation(inplace: bool, kernels: list[str], vocab: int, target: str, count: int) -> None:
    of_tokens = ["token_metrics_kernel", *([] if inplace else ["token_loss_kernel"])]
    assert len(set(LENGTHS)) == 50
    with variants_for(TARGETS[target]) as variants:
        for length, temperature, clip_range in itertools.product(LENGTHS, TEMPERATURES, CLIP_RANGES):
            launch(length, vocab, temperature=temperature, clip_range=clip_range, inplace=inplace)
    assert counted(variants) == dict.fromkeys(kernels, count) | dict.fromkeys(of_tokens, 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_recompilation_with_a_sampling_mask(inplace: bool) -> None:
    kernels = ["fused_loss_kernel"] if inplace else ["row_stats_kernel", "dlogits_kernel"]
    with variants_for(TARGETS["sm_90"]) as variants:
        for length in LENGTHS:
            launch(length, 151936, inplace=inplace, dropped=True)
    assert {name: counted(variants)[name] for name in kernels} == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "sampling mask"])
@pytest.mark.parametrize("vocab", [151936, 50264, 50257])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_no_recompilation_of_a_distillation(divergence: str, vocab: int, dropped: bool) -> None:
    with variants_for(TARGETS["sm_90"]) as variants:
        for length, temperature, weight in itertools.product(LENGTHS, TEMPERATURES, (0.5, 0.1)):
            launch_distillation(
                length, vocab, divergence, temperature=temperature, weight=weight, dropped=dropped
            )
    kernels = ["row_stats_kernel", "divergence_kernel", "divergence_gradient_kernel"]
    assert counted(variants) == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("vocab", [1024, 1031])  # the chunks' rows are aligned in either
@pytest.mark.parametrize(
    ("local", "kernels"),
    [
        (True, ["fused_loss_kernel", "scale_rows_kernel", "row_stats_kernel", "token_metrics_kernel"]),
        (False, ["row_stats_kernel", "dlogits_kernel"]),
    ],
)
def test_no_recompilation_of_the_linear_form(
    local: bool, kernels: list[str], vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_losses, "choose_backend", lambda *_: "triton")
    with variants_for(TARGETS["sm_90"]) as variants:
        for length in (1, 2, *range(3, 60)):
            launch_linear(length, vocab, local=local)
    assert counted(variants) == dict.fromkeys(kernels, 1)


def test_another_variant_is_detected() -> None:
    with variants_for(TARGETS["sm_90"]) as variants:
        launch(512, 151936)
        launch(512, 151937)  # rows not aligned
    found = counted(variants)
    assert found["row_stats_kernel"] == found["dlogits_kernel"] == 2
