"""Calls of the public functions that together reach every variant of the kernels, and their comparisons.

Each case can also run without its comparison. So a test collects the variants without compiling them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from distillation_cases import KINDS
from emulated_divergences import OPTIONS as DIVERGENCE_OPTIONS
from emulated_divergences import Distillation, LinearDistillation, Parts
from emulated_losses import FewRows, FromLogits, LogBand, ManyTokens, OneEntry, SamplingMask
from emulated_statistics import FromHidden, HiddenStatistics, Statistics
from parity import DTYPES, KLS, SURROGATES

from grpo_kernels import ImportanceRatio, LossSpec, PPOClip


class EmulatedCase(Protocol):
    def run(self) -> Any:
        """Call a public function with the backend "triton", and return its outputs and gradients."""

    def check(self, *, approximate: bool) -> None:
        """Run, and compare with fp64 and eager PyTorch.

        `approximate`: whether instructions such as `ex2.approx` err as much as the ISA allows.
        """


class Loss(NamedTuple):
    """A loss, and options of its fused case, which cost nothing: each loss compiles a kernel anyway."""

    surrogate: str
    kl: str
    dtype: str = "bf16"
    packed: bool = False
    option: str | None = None  # in EITHER


# Each surrogate and each KL at least once. The reference has logits, or log-probabilities if the case is
# packed and the KL is estimated.
LOSSES = (
    Loss("LogRatio", "k1", packed=True),
    Loss("ImportanceRatio", "k2", option="token weights"),
    Loss("ImportanceRatio(ref)", "k3"),
    Loss("ImportanceRatio(max_ratio)", "abs", "fp32", option="temperature per token"),
    Loss("PPOClip", "ratio_corrected", packed=True, option="KL on-policy"),
    Loss("PPOClip(delta)", "straight_through", option="softcap"),
    Loss("PPOClip(dual_clip)", "clamp", "fp32", option="on-policy"),
    Loss("Reinforce", "exact", option="reference softcap"),
    Loss("CISPO", "exact_forward", "fp32", packed=True, option="only the reference capped"),
    Loss("SAPO", "output_clamp", option="advantages per token"),
    Loss("DRO", "None", "fp32", packed=True, option="temperature"),
    Loss("DRO(ref)", "k1", packed=True, option="log-ratio clamped"),
    Loss("DPPO(tv)", "k3", packed=True, option="token weights"),
    Loss("DPPO(kl)", "None"),
    Loss("None", "exact", option="on-policy"),
    Loss("None", "straight_through", "fp32", packed=True),
)
# These take the two kernels over rows, and PyTorch computes the loss.
COUPLED = (
    ("PPOClip", "None", "sequence"),
    ("ImportanceRatio", "k2", "sequence-token"),
    ("CISPO", "exact_forward", "sequence"),
    ("SAPO", "None", "sequence-token"),
    ("DRO", "None", "sequence"),
    ("VESPO", "None", "token"),
    ("GMPO", "exact", "token"),
    ("callable", "ratio_corrected", "token"),
)
# Options of the two kernels, with all terms in the gradient.
OPTIONS = (
    *("scale", "temperature per token", "softcap", "only the reference capped", "vocabulary padded"),
    *("token weights", "advantages per token", "on-policy", "log-ratio clamped", "entropy alone", "no mask"),
)
FULL = LossSpec(ImportanceRatio(), KLS["exact"], entropy_coef=0.05)


def losses() -> Iterator[tuple[str, EmulatedCase]]:
    for loss in LOSSES:
        spec = LossSpec(SURROGATES[loss.surrogate], KLS[loss.kl])
        name = f"{loss.surrogate}, {loss.kl}"
        yield f"{name}, two kernels", FromLogits(spec)
        fused = FromLogits(spec, loss.dtype, packed=loss.packed, option=loss.option, inplace=True)
        yield f"{name}, {loss.option or loss.dtype}, in place", fused
    for surrogate, kl, level in COUPLED:
        spec = LossSpec(SURROGATES[surrogate], KLS[kl], level)
        yield f"{surrogate}, {kl}, {level} level", FromLogits(spec)
    yield "log band", LogBand()


def options() -> Iterator[tuple[str, EmulatedCase]]:
    for option in OPTIONS:
        yield f"{option}, two kernels", FromLogits(FULL, option=option)
    for option in ("vocabulary padded", "forward KL"):
        yield f"{option}, in place", FromLogits(FULL, "bf16", option=option, inplace=True)
    yield "entropy returned", FromLogits(LossSpec(PPOClip()), return_entropy=True)


def dtypes() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield aligned and unaligned rows, and slices of wider tensors, with a full block and a tail."""
    for dtype in DTYPES:
        for packed, rows in ((False, "aligned"), (True, "not aligned")):
            option = "softcap" if dtype == "fp64" and packed else None
            yield f"{dtype}, rows {rows}, two kernels", FromLogits(FULL, dtype, packed, option)
            # The upstream gradient is known in the backward only, and another kernel multiplies by it.
            fused = FromLogits(FULL, dtype, packed, option, inplace=True, upstream=-3.5)
            yield f"{dtype}, rows {rows}, in place, upstream gradient", fused
        inplace = dtype in ("fp32", "fp16")
        yield f"{dtype}, slice, aligned", FromLogits(FULL, dtype, inplace=inplace, margins=(8, 8))
    yield "fp32, slice, not aligned", FromLogits(FULL, margins=(1, 7))


def sizes() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield vocabularies from one entry, below a block, to those of real models."""
    yield "V = 1, two kernels", OneEntry(FULL, dtype="fp32", inplace=False)
    yield "V = 1, in place", OneEntry(FULL, dtype="bf16", inplace=True)
    plain = LossSpec(ImportanceRatio())
    for size in (31, 4113, 8192, 151936):
        for how, dtype, inplace in (("two kernels", "fp32", False), ("in place", "bf16", True)):
            yield f"V = {size}, {how}", FewRows(FULL, dtype, inplace, size)
        if size > 4113:
            yield f"V = {size}, policy only", FewRows(plain, "fp32", False, size)


def hidden_states() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield one pass (the loss does not couple tokens) and two. 16-bit operands are multiplied into fp32."""
    ways = (("one pass", "ImportanceRatio", "bf16", None), ("two passes", "callable", "fp16", "softcap"))
    for where, surrogate, dtype, option in ways:
        spec = LossSpec(SURROGATES[surrogate], KLS["exact"], entropy_coef=0.05)
        yield f"hidden states, {where}, fp32", FromHidden(spec, "fp32")
        yield f"hidden states, {where}, {dtype}", FromHidden(spec, dtype, option=option)
    yield "hidden states, policy only", FromHidden(LossSpec(ImportanceRatio()), "fp32", packed=True)
    yield "hidden states, bf16 logits", FromHidden(FULL, "bf16", logits_dtype=torch.bfloat16)
    yield "token statistics", HiddenStatistics()


def many_tokens() -> Iterator[tuple[str, EmulatedCase]]:
    yield "many tokens, two kernels", ManyTokens(False)
    yield "many tokens, in place", ManyTokens(True)


def sampling_masks() -> Iterator[tuple[str, EmulatedCase]]:
    forward = LossSpec(ImportanceRatio(), KLS["exact_forward"], entropy_coef=0.05)
    for inplace, where in ((False, "two kernels"), (True, "in place")):
        yield f"sampling mask, {where}", SamplingMask(FULL, inplace=inplace)
        yield f"sampling mask, bf16, {where}", SamplingMask(forward, "bf16", inplace=inplace)
        odd = SamplingMask(FULL, "bf16", packed=True, option="softcap", inplace=inplace)
        yield f"sampling mask, rows not aligned, {where}", odd
        plain = SamplingMask(LossSpec(ImportanceRatio()), option="temperature per token", inplace=inplace)
        yield f"sampling mask, policy only, {where}", plain
        padded = SamplingMask(FULL, option="vocabulary padded", inplace=inplace)
        yield f"sampling mask, vocabulary padded, {where}", padded
    yield "sampling mask, fp64", SamplingMask(FULL, "fp64")


def log_probabilities() -> Iterator[tuple[str, EmulatedCase]]:
    for of in (("logps",), ("entropy",), ("logps", "entropy")):
        yield f"selective_logps, gradient of {' and '.join(of)}", Statistics(of)


def distillations() -> Iterator[tuple[str, EmulatedCase]]:
    """Yield each divergence with each dtype and option, and with rows that nearly agree."""
    for kind in KINDS:
        for near in (False, True):
            where = f"{kind}, near" if near else kind
            yield where, Distillation(kind, near=near)
            if not near:  # in fp64, eager PyTorch is no bar
                yield f"{where}, fp64", Distillation(kind, "fp64")
            yield f"{where}, bf16, in place", Distillation(kind, "bf16", near=near, inplace=True)
            odd = Distillation(kind, "bf16", near=near, packed=True, dropped=True)
            yield f"{where}, rows not aligned, sampling mask", odd
        yield f"{kind}, sampling mask", Distillation(kind, dropped=True)
        capped = Distillation(kind, "bf16", option="softcap", dropped=True, inplace=True)
        yield f"{kind}, sampling mask, softcap", capped
        yield f"{kind}, hidden states", LinearDistillation(kind)
        yield f"{kind}, parts of the vocabulary", Parts(kind)
        for option in DIVERGENCE_OPTIONS:
            yield (
                f"{kind}, {option}",
                Distillation(kind, option=option, near=option == "temperature per token"),
            )
    yield "jsd, fp16", Distillation("jsd", "fp16")
    yield "jsd, fp64, sampling mask, softcap", Distillation("jsd", "fp64", option="softcap", dropped=True)
    for size in (1, 31, 8192):
        yield f"jsd, V = {size}", Distillation("jsd", near=size == 1, size=size)


CASES: dict[str, EmulatedCase] = {
    name: case
    for group in (
        *(losses, options, dtypes, sizes, hidden_states, log_probabilities, many_tokens),
        *(sampling_masks, distillations),
    )
    for name, case in group()
}
