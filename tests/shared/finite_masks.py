"""Logits that are masked with a finite number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from parity import KLS, Case, every_branch
from torch import Tensor

from grpo_kernels import LossSpec, PPOClip

LOWEST = torch.finfo(torch.float32).min
MASKS = [-1e9, -2e9, -1e10, -1e12, -1e20, -1e29, -1e30, LOWEST]
TEMPERATURES = [1.0, 0.3, 0.1]
PATTERNS = ["one column", "most of the row", "the front", "blocks", "scattered"]


def columns(where: str, size: int) -> Tensor:
    """Return which columns of a row are masked, `[size]` bool."""
    v = torch.arange(size)
    return {
        "one column": v == 17,
        "most of the row": v > size // 3,
        "the front": v < 140,
        "blocks": v // 64 % 2 == 0,
        "scattered": v % 3 == 0,
    }[where]


def masked(case: Case, value: float, where: str, *names: str) -> Case:
    """Mask the logits in `names` in every row, except at the taken token."""

    def mask(z: Tensor) -> Tensor:
        taken = case.completion_ids.clamp(min=0)[..., None]
        hit = columns(where, z.shape[-1]).expand(z.shape).clone().scatter_(-1, taken, False)
        lowest = torch.finfo(z.dtype).min
        return z.masked_fill(hit, value if value == -torch.inf else max(value, lowest))

    options = dict(case.options)
    if "reference" in names:
        options["ref_logits"] = mask(options["ref_logits"])
    return case._replace(logits=mask(case.logits) if "policy" in names else case.logits, options=options)


def cases(
    value: float, names: tuple[str, ...], dtype: torch.dtype, kl: str, size: int, turn: int = 0
) -> Iterator[tuple[str, Case]]:
    """Yield a case for each pattern, with one of the temperatures. `turn` says with which the first begins.

    The distances between ordinary logits are scaled with the temperature, and the masks are not.
    """
    spec = LossSpec(PPOClip(), KLS[kl], entropy_coef=0.1)
    for number, where in enumerate(PATTERNS):
        temperature = TEMPERATURES[(number + turn) % len(TEMPERATURES)]
        case = every_branch(spec, size, dtype)
        scaled = case._replace(logits=case.logits * temperature)
        scaled = scaled.with_options(
            ref_logits=case.options["ref_logits"] * temperature, temperature=temperature
        )
        yield f"{where}, temperature {temperature}", masked(scaled, value, where, *names)


def batch_of_masks(
    values: list[float], names: tuple[str, ...], dtype: torch.dtype, kl: str, size: int
) -> Case:
    """Return one batch with every value in every pattern, one token each, some of them masked.

    Each token has its own temperature. The temperatures take turns, so that each meets every value and every
    pattern.
    """
    every = [
        case for turn, value in enumerate(values) for _, case in cases(value, names, dtype, kl, size, turn)
    ]

    def one_of_each(tensor: Callable[[Case], Tensor]) -> Tensor:
        return torch.cat([tensor(case)[i % 2, i % 3].reshape(1, 1, -1) for i, case in enumerate(every)])

    tokens = ("completion_mask", "old_logps")
    options = {name: one_of_each(lambda case, name=name: case.options[name])[..., 0] for name in tokens}
    options["ref_logits"] = one_of_each(lambda case: case.options["ref_logits"])
    options["temperature"] = torch.tensor([[case.options["temperature"]] for case in every])
    ids = one_of_each(lambda case: case.completion_ids)[..., 0]
    advantages = torch.stack([case.advantages[i % 2] for i, case in enumerate(every)])
    return Case(every[0].spec, one_of_each(lambda case: case.logits), ids, advantages, options)
