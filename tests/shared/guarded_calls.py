"""A call of every public function, with tensors that a test may surround with poison."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from parity import every_branch, user_loss
from products import assert_same_products, lengths, magnitudes, on_a_grid
from torch import Tensor

from grpo_kernels import (
    KL,
    LogRatio,
    LossOutput,
    LossSpec,
    PPOClip,
    distillation_loss,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
    linear_logps,
    log_ratio_loss,
    pack_sampling_mask,
    selective_logps,
)
from grpo_kernels.logps import linear_token_stats
from grpo_kernels.policy_loss import policy_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = ("logits", "ref_logits", "teacher_logits")  # their last dimension must have stride 1
HEADS = (
    *("hidden", "lm_head_weight", "ref_hidden", "ref_lm_head_weight"),
    *("teacher_hidden", "teacher_lm_head_weight"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

SPECS: dict[str, tuple[LossSpec, str | None]] = {  # a spec and the form of its reference
    "PPO": (LossSpec(PPOClip()), None),
    "exact KL, entropy": (LossSpec(PPOClip(), KL("exact"), entropy_coef=0.1), "logits"),
    "forward KL": (LossSpec(PPOClip(), KL("exact_forward")), "logits"),
    "k3": (LossSpec(PPOClip(), KL("k3")), "logps"),
    "LogRatio": (LossSpec(LogRatio()), "logits"),
    "GSPO": (LossSpec(PPOClip(), KL("k3", ratio_corrected=True), level="sequence"), "logits"),
    "GSPO-token": (LossSpec(PPOClip(), level="sequence-token"), None),
    "callable": (LossSpec(user_loss, aggregation="seq-mean-token-mean"), "logps"),
}


class Call(NamedTuple):
    """A function of the package, its tensors and its other arguments."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    learns: tuple[str, ...]  # the tensors that get gradients

    def run(
        self, given: dict[str, Tensor], leaves: dict[str, Tensor] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Return all outputs, and the gradients of a weighted sum of them, in which some weights are 0.

        Args:
            given: Tensor arguments of the function.
            leaves: Leaves from which tensors in `given` were computed, if any.
        """
        by = [(leaves or given)[name].requires_grad_() for name in self.learns]
        found = named(self.function(**given, **self.options, **options))
        terms = [
            (torch.linspace(3, -1, x.numel(), device=x.device).round().view(x.shape) * x).sum()
            for x in found.values()
            if x.requires_grad
        ]
        grads = torch.autograd.grad(sum(terms), by)
        found |= {f"gradient of {name}": x for name, x in zip(self.learns, grads, strict=True)}
        return {name: x.detach().clone() for name, x in found.items()}


def named(out: Any) -> dict[str, Tensor]:
    if isinstance(out, LossOutput):
        fields = {**out._asdict(), **out.metrics}
        del fields["metrics"]
    else:
        parts = (out,) if isinstance(out, Tensor) else out
        fields = {f"output {number}": x for number, x in enumerate(parts)}
    return {name: x for name, x in fields.items() if x is not None}


def arguments(name: str, V: int = 37, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> Call:
    """Return a call of `grpo_loss` with every tensor. Masked positions and 8 padding columns hold NaN."""
    spec, ref = SPECS[name]
    case = every_branch(spec, V, dtype, packed=packed, ref=ref)
    tokens = case.completion_ids.shape
    generator = torch.Generator().manual_seed(V)
    tensors: dict[str, Tensor] = {
        "logits": case.logits,
        "completion_ids": case.completion_ids.to(torch.int32 if packed else torch.int64),
        "advantages": case.advantages,
        **case.options,
        "token_weights": 0.5 + torch.rand(tokens, generator=generator),
        "temperature": 0.5 + torch.rand(tokens, generator=generator),
        "normalizer": torch.tensor(5.0),
    }
    masked = ~tensors["completion_mask"]
    for each in ("token_weights", "temperature"):
        tensors[each].masked_fill_(masked, torch.nan)
    if packed:
        tensors["completion_mask"] = tensors["completion_mask"].float()
    for each in tensors.keys() & set(ROWS):
        padding = tensors[each].new_full((*tokens, 8), torch.nan)
        tensors[each] = torch.cat([tensors[each], padding], -1)
    return Call(grpo_loss, tensors, {"spec": spec, "vocab_size": V, "return_entropy": True}, ("logits",))


def dropping(call: Call) -> Call:
    """Return the call with a sampling mask that keeps each token, and about half of the other columns.

    In a distillation, which has no token ids, it keeps the first column.
    """
    mask, V = call.tensors["completion_mask"], call.options["vocab_size"]
    ids = call.tensors.get("completion_ids", torch.zeros_like(mask, dtype=torch.long))
    keep = torch.rand(*ids.shape, V, generator=torch.Generator().manual_seed(V)) < 0.5
    keep.scatter_(-1, ids.long().clamp(min=0)[..., None], True)
    tensors = {**call.tensors, "sampling_mask": pack_sampling_mask(keep)}
    return call._replace(tensors=tensors)


def of_logps(V: int = 37, *, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    tensors = arguments("PPO", V, dtype=dtype).tensors
    given = {each: tensors[each] for each in ("logits", "temperature")}
    given |= {"ids": tensors["completion_ids"], "mask": tensors["completion_mask"]}
    return Call(selective_logps, given, {"vocab_size": V, **options}, ("logits",))


def of_rewards(*, packed: bool) -> Call:
    call = arguments("LogRatio", packed=packed)
    given = {"rewards" if name == "advantages" else name: x for name, x in call.tensors.items()}
    return Call(log_ratio_loss, given, {"vocab_size": 37}, call.learns)


def of_hidden(
    name: str, V: int = 37, *, packed: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Call:
    """Return a call of `linear_grpo_loss`. Masked hidden states and 8 padding rows of the weights hold NaN.

    The logits are exact products (products.py).
    """
    call = arguments(name, V, packed=packed, dtype=dtype)
    tensors = {each: x for each, x in call.tensors.items() if each not in ROWS}
    generator = torch.Generator().manual_seed(V)
    for prefix, logits, H in ("", "logits", 6), ("ref_", "ref_logits", 9):
        if logits in call.tensors:
            shapes = {"hidden": (*tensors["completion_ids"].shape, H), "lm_head_weight": (V + 8, H)}
            for each, shape in {**shapes, "lm_head_bias": (V + 8,)}.items():
                x = on_a_grid(torch.randn(shape, generator=generator)).to(dtype)
                if each == "hidden":
                    x.masked_fill_(tensors["completion_mask"][..., None] == 0, torch.nan)
                else:
                    x[V:] = torch.nan
                tensors[prefix + each] = x
    return Call(
        linear_grpo_loss,
        tensors,
        {**call.options, "chunk_tokens": 3, **options},
        ("hidden", "lm_head_weight", "lm_head_bias"),
    )


def of_hidden_logps(V: int = 37, *, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    call = of_hidden("PPO", V, dtype=dtype)
    given = {each: x for each, x in call.tensors.items() if "hidden" in each or "lm_head" in each}
    given |= {"ids": call.tensors["completion_ids"], "mask": call.tensors["completion_mask"]}
    given["temperature"] = call.tensors["temperature"]
    function = linear_token_stats if "top1" in options else linear_logps
    return Call(function, given, {"vocab_size": V, "chunk_tokens": 3, **options}, call.learns)


def as_distillation(call: Call, function: Callable[..., Any], divergence: str) -> Call:
    """Turn a call of a loss with a reference, the teacher, into one of a distillation loss."""
    unused = ("completion_ids", "advantages", "old_logps", "token_weights")
    tensors = {name.replace("ref_", "teacher_"): x for name, x in call.tensors.items() if name not in unused}
    options = {name: x for name, x in call.options.items() if name != "spec"}
    return Call(function, tensors, {**options, "divergence": divergence}, call.learns)


def of_distillation(
    divergence: str, V: int = 37, *, packed: bool = False, dtype: torch.dtype = torch.float32
) -> Call:
    call = arguments("exact KL, entropy", V, packed=packed, dtype=dtype)
    return as_distillation(call, distillation_loss, divergence)


def of_hidden_distillation(divergence: str, *, packed: bool = False, **options: Any) -> Call:
    call = of_hidden("exact KL, entropy", packed=packed, **options)
    return as_distillation(call, linear_distillation_loss, divergence)


def of_log_probabilities(name: str, *, packed: bool) -> Call:
    call = arguments(name, packed=packed)
    given = {
        each: x
        for each, x in call.tensors.items()
        if each not in (*ROWS, "completion_ids", "temperature", "ref_logits")
    }
    masked = given["completion_mask"] == 0
    given["logps"] = (given["old_logps"] + 0.1).masked_fill(masked, torch.nan)
    given["entropy"] = given["old_logps"].abs()
    given["ref_logps"] = given["old_logps"] - 0.2
    return Call(policy_loss, given, {"spec": call.options["spec"]}, ("logps",))


def watching(backend: str) -> AbstractContextManager[Any]:
    """In the interpreter, raise at an address that is no element of a kernel's tensors."""
    if backend != "triton" or not INTERPRETED:
        return contextlib.nullcontext()
    from benchmarks.traffic.addresses import recording

    return recording()


def assert_same(
    got: dict[str, Tensor],
    wanted: dict[str, Tensor],
    *,
    exact: bool = True,
    equal_nan: bool = False,
    sizes: dict[str, Tensor] | None = None,
    terms: dict[str, int] | None = None,
) -> None:
    """Compare bits, or with `exact=False` allow another order of fp32 sums.

    Args:
        got: Results by name.
        wanted: Expected results by name.
        exact: Whether results that are not matrix products must have the same bits.
        equal_nan: Whether NaN equals NaN.
        sizes: Sums of the magnitudes of the terms of each gradient that is a matrix product.
        terms: Number of terms of each such gradient.
    """
    assert got.keys() == wanted.keys()
    rtol, atol = (0.0, 0.0) if exact else (1e-4, 1e-5)
    for name, x in got.items():
        if terms is not None and sizes is not None and name in terms:
            assert_same_products(x, wanted[name], sizes[name], terms[name], name)
            continue
        torch.testing.assert_close(x, wanted[name], rtol=rtol, atol=atol, equal_nan=equal_nan, msg=name)


def of_products(call: Call, given: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Return `sizes` and `terms` of `assert_same` for a call from hidden states, else nothing."""
    if "hidden" not in given:
        return {}
    with magnitudes():
        sizes = call.run(given, **options)
    tokens = given["hidden"].shape[:-1].numel()
    counts = lengths(tokens, given["lm_head_weight"].shape[0]).values()
    return {
        "sizes": sizes,
        "terms": dict(zip((f"gradient of {x}" for x in call.learns), counts, strict=True)),
    }


def bare_distillation(shape: tuple[int, ...], V: int, divergence: str = "jsd") -> Call:
    """Return a distillation of the logits of `bare`."""
    call = bare(shape, V)
    return as_distillation(call, distillation_loss, divergence)


def bare(shape: tuple[int, ...], V: int, *, hidden: bool = False) -> Call:
    """Return a call on random tensors without a mask. One number in `shape` makes a packed batch."""
    generator = torch.Generator().manual_seed(V)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "completion_ids": torch.randint(V, shape, generator=generator),
        "advantages": normal(*shape),
        "old_logps": normal(*shape) - 3,
    }
    options: dict[str, Any] = {"spec": SPECS["exact KL, entropy"][0]}
    if not hidden:
        logits = {"logits": normal(*shape, V), "ref_logits": normal(*shape, V)}
        return Call(grpo_loss, logits | tensors, options, ("logits",))
    sizes = {"hidden": (*shape, 6), "lm_head_weight": (V, 6)}
    ref_sizes = {"ref_hidden": (*shape, 9), "ref_lm_head_weight": (V, 9)}
    head, ref = ({each: on_a_grid(normal(*x)) for each, x in of.items()} for of in (sizes, ref_sizes))
    head["lm_head_bias"] = normal(V)
    return Call(linear_grpo_loss, head | ref | tensors, {**options, "chunk_tokens": 4}, tuple(head))
