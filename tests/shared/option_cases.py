"""Cases of the loss with one option each, for logits and for hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import AGGREGATIONS, DTYPES, KLS, PROMPT_IDS, Case, every_branch, user_loss
from torch import Tensor

from grpo_kernels import LossSpec

# Both have a full block or more and a tail. Rows of 1032 columns are multiples of 16 bytes in every dtype and
# take the vectorized path of the kernels. Rows of 1025 do not.
PADDED_V, PACKED_V = 1032, 1025


def branches(spec: LossSpec, dtype: str, packed: bool, device: str) -> Case:
    """Return a case that takes every branch. A packed case has reference logits only for an exact KL."""
    exact = spec.kl is not None and spec.kl.kind.startswith("exact")
    ref = None
    if spec.kl is not None or getattr(spec.surrogate, "anchor", None) == "ref":
        ref = "logits" if exact or not packed else "logps"
    return every_branch(
        spec, PACKED_V if packed else PADDED_V, DTYPES[dtype], packed=packed, ref=ref, device=device
    )


def values(case: Case, low: float, high: float) -> Tensor:
    """Return one value per token, and NaN at masked positions, which must have no effect."""
    mask = case.options["completion_mask"]
    return torch.linspace(low, high, mask.numel(), device=mask.device).view(mask.shape).where(mask, torch.nan)


def sequences(case: Case, *numbers: float) -> Tensor:
    return torch.tensor(numbers, device=case.logits.device)


def with_spec(case: Case, **changes: Any) -> Case:
    return case._replace(spec=replace(case.spec, **changes))


def vocabulary_padded(case: Case) -> Case:
    """Add padding columns of NaN and infinity, more to the reference than to the policy."""
    V, ref_logits = case.logits.shape[-1], case.options["ref_logits"]

    def wider(x: Tensor, columns: int, value: float) -> Tensor:
        return torch.cat([x, x.new_full((*x.shape[:-1], columns), value)], -1)

    case = case.with_options(ref_logits=wider(ref_logits, 9, torch.inf), vocab_size=V)
    return case._replace(logits=wider(case.logits, 5, torch.nan))


def no_mask(case: Case) -> Case:
    """Remove the mask. Masked positions become copies of the first token."""
    mask = case.options["completion_mask"]

    def filled(x: Tensor) -> Tensor:
        return x.where(mask if x.dim() == mask.dim() else mask[..., None], x[(0,) * mask.dim()])

    tokens = {name: filled(x) for name, x in case.options.items() if name != "seq_lens"}
    del tokens["completion_mask"]
    logits, ids = filled(case.logits), filled(case.completion_ids)
    return case._replace(logits=logits, completion_ids=ids).with_options(completion_mask=None, **tokens)


def empty_sequences(case: Case) -> Case:
    advantages = sequences(case, 5.0, 1.3, -5.0, -0.7, 0.4)
    return case._replace(advantages=advantages).with_options(seq_lens=torch.tensor([0, 3, 0, 3, 1]))


EITHER: dict[str, Callable[[Case], Case]] = {
    "temperature": lambda case: case.with_options(temperature=0.7),
    "temperature per sequence": lambda case: case.with_options(temperature=sequences(case, 0.7, 1.3, 0.9, 2)),
    "temperature per token": lambda case: case.with_options(temperature=values(case, 0.6, 1.6)),
    "scale": lambda case: case.with_options(logit_scale=0.6),
    "softcap": lambda case: case.with_options(logit_scale=0.7, logit_softcap=4.0, temperature=1.2),
    "reference scale": lambda case: case.with_options(logit_scale=0.6, ref_logit_scale=1.1),
    "reference softcap": lambda case: case.with_options(
        logit_softcap=9.0, ref_logit_scale=1.4, ref_logit_softcap=5.0, temperature=values(case, 0.6, 1.6)
    ),
    "only the reference capped": lambda case: case.with_options(ref_logit_softcap=5.0, temperature=0.9),
    "vocabulary padded": vocabulary_padded,
    "token weights": lambda case: case.with_options(token_weights=values(case, -0.5, 2.0)),
    "advantages per token": lambda case: case._replace(advantages=values(case, -1.5, 1.0)),
    "on-policy": lambda case: case.with_options(old_logps=None),
    "log-ratio clamped": lambda case: with_spec(case, log_ratio_clamp=0.4),
    "log-ratio of the KL clamped": lambda case: with_spec(
        case, log_ratio_clamp=0.4, kl=KLS["ratio_corrected"]
    ),
    "KL on-policy": lambda case: with_spec(case, kl=KLS["ratio_corrected"]).with_options(old_logps=None),
    "forward KL": lambda case: with_spec(case, kl=KLS["exact_forward"]),
    "entropy alone": lambda case: with_spec(case, kl=None).with_options(ref_logits=None),
    "callable": lambda case: with_spec(case, surrogate=user_loss).with_options(
        token_weights=values(case, 0.5, 2.0), old_logps=None
    ),
    "normalizer": lambda case: case.with_options(normalizer=7.5),
    **{
        f"normalizer, {how}": lambda case, how=how: with_spec(case, aggregation=how).with_options(
            normalizer=torch.tensor(7.5, device=case.logits.device),
            prompt_ids=PROMPT_IDS.to(case.logits.device),
        )
        for how in AGGREGATIONS
    },
    "no mask": no_mask,
}
PADDED: dict[str, Callable[[Case], Case]] = {
    "advantages [B, 1]": lambda case: case._replace(advantages=case.advantages[:, None]),
    "temperature [B, 1]": lambda case: case.with_options(
        temperature=sequences(case, 0.7, 1.3, 0.9, 2)[:, None]
    ),
    "token weights [B, 1]": lambda case: case.with_options(
        token_weights=sequences(case, 0.5, 2, 3, 4)[:, None]
    ),
}
PACKED: dict[str, Callable[[Case], Case]] = {
    "empty sequences": lambda case: with_spec(empty_sequences(case), aggregation="seq-mean-token-mean"),
    "no seq_lens": lambda case: case._replace(advantages=values(case, -1, 1)).with_options(seq_lens=None),
}


every_option = pytest.mark.parametrize(
    "packed, option",
    [(False, name) for name in EITHER | PADDED] + [(True, name) for name in EITHER | PACKED],
    ids=[f"{name}-padded" for name in EITHER | PADDED] + [f"{name}-packed" for name in EITHER | PACKED],
)


def tiny(spec: LossSpec, device: str) -> Case:
    """Return two tokens of a vocabulary of four, on different sides of every bound."""
    case = every_branch(spec, 4, torch.float64, device=device)
    two = (slice(1, 2), slice(1, 3))
    options = {name: value[two] for name, value in case.options.items()}
    return Case(spec, case.logits[two], case.completion_ids[two], case.advantages[1:2], options)
