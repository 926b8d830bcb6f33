"""Calls of every public function on tensors that are real, fake or on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from parity import user_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo_kernels import (
    DRO,
    GMPO,
    KL,
    VESPO,
    GRPOLoss,
    LinearGRPOLoss,
    LossSpec,
    PPOClip,
    Reinforce,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    log_ratio_loss,
    selective_logps,
)
from grpo_kernels.checks.choices import MISMATCH_STATISTICS, STATISTIC_OVERS
from grpo_kernels.mismatch import mismatch_metrics
from grpo_kernels.normalizers import global_normalizer
from grpo_kernels.policy_loss import policy_loss
from grpo_kernels.weights import importance_weights, off_policy_sequence_mask, rejection_mask

B, T, V, H = 2, 6, 19, 4
N, LENGTHS = B * T, [5, 0, 7]


class Place(NamedTuple):
    """The device of the tensors of a call, and whether they have values."""

    name: str
    device: str
    fake: bool = False

    def leaf(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.new(*shape, dtype=dtype).requires_grad_()

    def mode(self) -> AbstractContextManager[Any]:
        return FakeTensorMode() if self.fake else nullcontext()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self is not REAL:
            return torch.empty(shape, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 2, shape).to(dtype)

    def seq_lens(self) -> Tensor:
        return torch.tensor(LENGTHS) if self is REAL else self.new(len(LENGTHS), dtype=torch.int64)


REAL = Place("real", "cpu")
META, FAKE_CPU = Place("meta", "meta"), Place("fake CPU", "cpu", fake=True)
FAKE_CUDA = Place("fake CUDA", "cuda", fake=True)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a backward of fake CUDA tensors asks for the device"
)
places = pytest.mark.parametrize(
    "place",
    [META, FAKE_CPU, pytest.param(FAKE_CUDA, marks=needs_gpu)],
    ids=lambda place: place.name,
)


class Found(NamedTuple):
    outputs: Any
    leaves: list[Tensor]


Form = Callable[[Place], Found]


def tokens(at: Place, packed: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The arguments of a loss for each token, except for the taken ids, and their leading shape."""
    shape = (N,) if packed else (B, T)
    options: dict[str, Any] = {
        "completion_mask": at.new(*shape),
        "old_logps": at.new(*shape),
        "token_weights": at.new(*shape),
        "temperature": at.new(*shape).exp(),
        "normalizer": at.new(),
    }
    options["prompt_ids"] = at.new(len(LENGTHS) if packed else B, dtype=torch.int64)
    return options | ({"seq_lens": at.seq_lens()} if packed else {}), shape


def from_logits(
    spec: LossSpec | str = "grpo",
    *,
    function: Callable[..., Any] = grpo_loss,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    reference: str = "none",
    **more: Any,
) -> Form:
    def call(at: Place) -> Found:
        options, shape = tokens(at, packed)
        leaf = at.leaf(*shape, V, dtype=dtype)
        if reference != "none":
            options["ref_logps"] = at.new(*shape)
        if reference == "logits":
            options["ref_logits"] = at.new(*shape, V, dtype=dtype)
            del options["ref_logps"]
        if function is log_ratio_loss:
            args = [
                leaf.clone(),
                options.pop("ref_logits"),
                at.new(*shape, dtype=torch.int64),
                at.new(*shape),
            ]
        else:
            args = [leaf.clone(), at.new(*shape, dtype=torch.int64), at.new(*shape)]
            options["spec"] = spec
        out = function(*args, **options, **more)
        out.loss.backward()
        return Found(out, [leaf])

    return call


def from_hidden(
    spec: LossSpec | str = "grpo",
    *,
    function: Callable[..., Any] = linear_grpo_loss,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    reference: bool = False,
    frozen: bool = False,
    **more: Any,
) -> Form:
    def call(at: Place) -> Found:
        options, shape = tokens(at, packed)
        hidden = at.leaf(*shape, H, dtype=dtype)
        weight, bias = ((at.new if frozen else at.leaf)(*s, dtype=dtype) for s in ((V, H), (V,)))
        if reference:
            options["ref_hidden"] = at.new(*shape, H + 1, dtype=dtype)
            options["ref_lm_head_weight"] = at.new(V, H + 1, dtype=dtype)
        args = [hidden, weight, at.new(*shape, dtype=torch.int64), at.new(*shape)]
        out = function(*args, spec=spec, lm_head_bias=bias, **options, **more)
        out.loss.backward()
        return Found(out, [hidden] if frozen else [hidden, weight, bias])

    return call


def log_probabilities(linear: bool, **more: Any) -> Form:
    def call(at: Place) -> Found:
        leaves = [at.leaf(B, T, H), at.leaf(V, H)] if linear else [at.leaf(B, T, V, dtype=torch.bfloat16)]
        args = [*leaves, at.new(B, T, dtype=torch.int64)]
        function = linear_logps if linear else selective_logps
        found = function(*args, mask=at.new(B, T), return_entropy=True, **more)
        (found[0] + found[1]).sum().backward()
        return Found(found, leaves)

    return call


def of_log_probabilities(spec: LossSpec | str, packed: bool = False) -> Form:
    def call(at: Place) -> Found:
        options, shape = tokens(at, packed)
        del options["temperature"]
        logps, entropy = (at.leaf(*shape) for _ in range(2))
        out = policy_loss(
            logps, at.new(*shape), spec=spec, entropy=entropy, ref_logps=at.new(*shape), **options
        )
        out.loss.backward()
        return Found(out, [logps, *([entropy] if spec is EVERYTHING_SAMPLED else [])])

    return call


def helper(call: Callable[[Place], Any]) -> Form:
    return lambda at: Found(call(at), [])


def of_the_sampler(function: Callable[..., Any], packed: bool = False, **options: Any) -> Form:
    def call(at: Place) -> Found:
        tokens = (at.new(*((N,) if packed else (B, T))) for _ in range(3))
        seq_lens = {"seq_lens": at.seq_lens()} if packed else {}
        return Found(function(*tokens, **seq_lens, **options), [])

    return call


def drift_mask(logps: Tensor, *args: Tensor, **options: Any) -> Tensor:
    return off_policy_sequence_mask(logps, logps, *args, threshold=0.1, **options)


EVERYTHING = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1)
PROMPT_MEAN = LossSpec(PPOClip(), aggregation="prompt-mean")
EVERYTHING_SAMPLED = LossSpec(PPOClip(), KL("k3"), entropy_coef=0.1)
COUPLED = {
    "gspo": LossSpec.preset("gspo", kl=KL("k3", ratio_corrected=True)),
    "gspo_token": LossSpec.preset("gspo_token"),
    "GMPO": LossSpec(GMPO()),
    "VESPO": LossSpec(VESPO()),
    "DRO, sequence": LossSpec(DRO(beta=0.1), level="sequence"),
    "callable": LossSpec(user_loss),
}
bf16, fp16, fp64 = torch.bfloat16, torch.float16, torch.float64

FORMS: dict[str, Form] = {
    "default": from_logits(),
    "packed": from_logits(packed=True),
    "bf16": from_logits(dtype=bf16, logit_softcap=5.0, vocab_size=V - 2),
    "fp64": from_logits(dtype=fp64),
    "module": from_logits(function=GRPOLoss("dapo")),
    "log_ratio_loss": from_logits(function=log_ratio_loss, reference="logits"),
    "entropy": from_logits(return_entropy=True),
    "reference logits": from_logits(EVERYTHING, reference="logits"),
    "reference logps": from_logits(EVERYTHING_SAMPLED, reference="logps"),
    "forward KL": from_logits(LossSpec(Reinforce(), KL("exact_forward")), reference="logits"),
    "in place": from_logits(EVERYTHING, reference="logits", inplace=True, return_entropy=True),
    "in place, bf16": from_logits(dtype=bf16, inplace=True),
    "in place, fp16": from_logits(dtype=fp16, inplace=True),
    "sequence mean": from_logits(LossSpec(PPOClip(), aggregation="seq-mean-token-mean"), packed=True),
    "prompt mean": from_logits(PROMPT_MEAN),
    "prompt mean, packed": from_logits(PROMPT_MEAN, packed=True),
    "linear, prompt mean": from_hidden(PROMPT_MEAN),
    "linear, one pass": from_hidden(),
    "linear, one pass, packed": from_hidden(packed=True),
    "linear, one pass, everything": from_hidden(EVERYTHING, reference=True),
    "linear, one pass, bf16": from_hidden(EVERYTHING, reference=True, dtype=bf16),
    "linear, bf16 logits": from_hidden(dtype=bf16, logits_dtype=bf16),
    "linear, frozen head": from_hidden(frozen=True),
    "linear, in place rows": from_hidden(compact=False, chunk_tokens=5),
    "linear, skip_inactive": from_hidden(skip_inactive=True),
    "linear, padding": from_hidden(vocab_size=V - 2),
    "linear, two passes, fp16": from_hidden(EVERYTHING, reference=True, dtype=fp16),
    "linear, two passes, fp64": from_hidden(dtype=fp64),
    "linear, two passes, in place rows": from_hidden(LossSpec(user_loss), compact=False),
    "linear, two passes, skip_inactive": from_hidden("gspo", skip_inactive=True),
    "linear, module": from_hidden(function=LinearGRPOLoss("dapo")),
    "selective_logps": log_probabilities(linear=False),
    "linear_logps": log_probabilities(linear=True),
    "linear_logps, in place rows": log_probabilities(linear=True, compact=False),
    "policy_loss": of_log_probabilities("grpo"),
    "policy_loss, everything": of_log_probabilities(EVERYTHING_SAMPLED),
    "policy_loss, packed gspo": of_log_probabilities("gspo", packed=True),
    "policy_loss, prompt mean": of_log_probabilities(PROMPT_MEAN, packed=True),
    "group_advantages": helper(lambda at: group_advantages(at.new(N), group_size=3)),
    "group_advantages of ids": helper(
        lambda at: group_advantages(at.new(N), group_ids=at.new(N, dtype=torch.int32), leave_one_out=True)
    ),
    "group_advantages of tokens": helper(
        lambda at: group_advantages(
            at.new(N, 2),
            group_ids=at.new(N, dtype=torch.int32),
            estimator="gdpo",
            lengths=at.new(N),
            reward_weights=at.new(2),
        )
    ),
    "importance_weights": of_the_sampler(importance_weights),
    "importance_weights of sequences": of_the_sampler(importance_weights, level="sequence", mode="mask"),
    "importance_weights, packed": of_the_sampler(importance_weights, True, level="geometric", normalize=True),
    "mismatch_metrics": of_the_sampler(mismatch_metrics, high=2.0),
    "mismatch_metrics, packed": of_the_sampler(mismatch_metrics, True, level="sequence", low=0.5),
    "off_policy_sequence_mask, packed": of_the_sampler(drift_mask, True),
    "global_normalizer": helper(lambda at: global_normalizer([at.new(B, T), at.new(B, T)])),
    "global_normalizer of prompts": helper(
        lambda at: global_normalizer(
            at.new(B, T), aggregation="prompt-mean", prompt_ids=at.new(B, dtype=torch.int64)
        )
    ),
    "global_normalizer of sequences": helper(
        lambda at: global_normalizer(at.new(N), aggregation="seq-mean-token-sum", seq_lens=at.seq_lens())
    ),
}
for statistic, over, packed in itertools.product(MISMATCH_STATISTICS, STATISTIC_OVERS, (False, True)):
    bounds = {"statistic": statistic, "over": over, "low": 0.0, "high": 0.5}
    FORMS[f"{statistic}, {over}, {packed=}"] = of_the_sampler(rejection_mask, packed, **bounds)
for name, spec in COUPLED.items():
    reference = "logps" if spec.kl is not None else "none"
    FORMS[name] = from_logits(spec, reference=reference)
    FORMS[f"{name}, packed"] = from_logits(spec, reference=reference, packed=True)
    FORMS[f"{name}, in place"] = from_logits(spec, reference=reference, inplace=True)
    if spec.kl is None:
        FORMS[f"linear, {name}"] = from_hidden(spec)
