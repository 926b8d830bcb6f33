"""The aggregation "prompt-mean" against its formula, written as loops, and its relation to others.

Parity of every surrogate, level and option, and the hard cases, are in the tests of all aggregations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import (
    GRPOLoss,
    LinearGRPOLoss,
    LogRatio,
    LossSpec,
    PPOClip,
    distillation_loss,
    global_normalizer,
    grpo_loss,
    linear_distillation_loss,
    linear_grpo_loss,
    log_ratio_loss,
    policy_loss,
)
from grpo_kernels.tokens.groups import number_groups

B, T, V, H = 6, 5, 11, 4
LENGTHS = torch.tensor([5, 2, 0, 3, 1, 0])
MASK = torch.arange(T) < LENGTHS[:, None]
LARGE = 2**63 - 1
IDS = {
    "mixed": torch.tensor([3, -8, 3, 3, -8, 5]),  # the prompt 5 has no tokens
    "blocks": torch.tensor([1, 1, 1, 0, 0, 0]),
    "one prompt": torch.full((B,), -4),
    "all distinct": torch.tensor([2, 1, 0, 5, 4, 3]),
    # Their differences do not fit into 64 bits.
    "huge": torch.tensor([LARGE, -LARGE - 1, LARGE, LARGE - 1, 0, -LARGE - 1]),
    # fp32 and fp64 cannot represent the difference between these.
    "neighbours": 2**60 + torch.tensor([0, 1, 0, 2, 1, 3]),
    "int8": torch.tensor([-128, 127, -128, 0, 0, 127], dtype=torch.int8),
    "uint8": torch.tensor([255, 0, 255, 0, 1, 1], dtype=torch.uint8),
    "int32": torch.tensor([-(2**31), 2**31 - 1, 0, 0, 1, 1], dtype=torch.int32),
    "strided": torch.tensor([3, 0, -8, 0, 3, 0, 3, 0, -8, 0, 5, 0])[::2],
}
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
prompts = pytest.mark.parametrize("name", IDS)
SPEC = LossSpec(PPOClip(), aggregation="prompt-mean")


def token_losses(logps: Tensor, *unused: Tensor | None) -> Tensor:
    """A surrogate whose loss of a token is its log-probability."""
    return logps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(values: Tensor, ids: list[int], denominator: float | None) -> float:
    """Average the unmasked tokens of each prompt, and then the prompts."""
    total = 0.0
    for prompt in set(ids):
        rows = [row for row in range(B) if ids[row] == prompt]
        tokens = [float(values[row, t]) for row in rows for t in range(int(LENGTHS[row]))]
        total += sum(tokens) / len(tokens) if tokens else 0.0
    return total / (len(set(ids)) if denominator is None else denominator)


@layouts
@prompts
@pytest.mark.parametrize("normalizer", [None, 2.5, torch.tensor(3)], ids=str)
def test_by_loops(name: str, packed: bool, normalizer: Any, device: str) -> None:
    ids, values = IDS[name], normal(B, T)
    logps = values.where(MASK, torch.nan).to(device)
    options: dict[str, Any] = {"completion_mask": MASK.to(device)}
    if packed:
        logps, options = logps[options["completion_mask"]], {"seq_lens": LENGTHS.to(device)}
    leaf = logps.requires_grad_()
    advantages = torch.ones(B, device=device)
    spec = LossSpec(token_losses, aggregation="prompt-mean")
    options |= {"spec": spec, "prompt_ids": ids.to(device), "normalizer": normalizer}
    out = policy_loss(leaf, advantages, **options)
    want = by_loops(values, ids.tolist(), None if normalizer is None else float(normalizer))
    assert float(out.loss.detach()) == pytest.approx(want, rel=1e-13)
    # The gradient is the weight of each token.
    (grad,) = torch.autograd.grad(out.loss, leaf)
    found = grad if packed else grad[MASK.to(device)]
    unit = torch.eye(B * T, dtype=torch.float64).view(-1, B, T)[MASK.view(-1)]
    divisor = None if normalizer is None else float(normalizer)
    weights = torch.tensor([by_loops(x, ids.tolist(), divisor) for x in unit], dtype=torch.float64)
    torch.testing.assert_close(found.cpu(), weights, rtol=1e-14, atol=0)


def batch(device: str, packed: bool = False) -> dict[str, Any]:
    """Return arguments of `grpo_loss` in fp32, without a spec."""
    mask = MASK.to(device)
    given = {
        "logits": normal(B, T, V).float(),
        "completion_ids": torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2)),
        "old_logps": normal(B, T, seed=3).float() - 2,
    }
    given = {key: x.to(device) for key, x in given.items()}
    rest = {"completion_mask": mask}
    if packed:
        given, rest = {key: x[mask] for key, x in given.items()}, {"seq_lens": LENGTHS.to(device)}
    return {**given, **rest, "advantages": normal(B, seed=4).float().to(device)}


def loss_and_grad(given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    logits = given["logits"].clone().requires_grad_()
    out = grpo_loss(**{**given, "logits": logits}, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, logits)[0]


@layouts
@pytest.mark.parametrize(
    "name, other", [("all distinct", "seq-mean-token-mean"), ("one prompt", "token-mean")]
)
def test_as_other_aggregations(name: str, other: str, packed: bool, device: str, backend: str) -> None:
    """If all prompts are distinct, a prompt is a sequence. One prompt has all tokens."""
    given = batch(device, packed)
    got = loss_and_grad(given, spec=SPEC, prompt_ids=IDS[name].to(device), backend=backend)
    want = loss_and_grad(given, spec=LossSpec(PPOClip(), aggregation=other), backend=backend)
    assert got[0].abs() > 0.01 and got[1].any()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@layouts
def test_only_equality_of_ids_matters(packed: bool, device: str, backend: str) -> None:
    """The bits do not depend on the numbers, and are the same in every call."""
    given, ids = batch(device, packed), IDS["mixed"]
    renamed = torch.tensor([9, 2**40, 9, 9, 2**40, -1])
    first = loss_and_grad(given, spec=SPEC, prompt_ids=ids.to(device), backend=backend)
    for other in (renamed, ids, ids.int()):
        again = loss_and_grad(given, spec=SPEC, prompt_ids=other.to(device), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_permuted_batch(device: str, backend: str) -> None:
    given, ids = batch(device), IDS["mixed"].to(device)
    order = torch.tensor([4, 2, 5, 0, 3, 1], device=device)
    _, grad = loss_and_grad(given, spec=SPEC, prompt_ids=ids, backend=backend)
    moved = {key: x[order] for key, x in given.items()}
    _, permuted = loss_and_grad(moved, spec=SPEC, prompt_ids=ids[order], backend=backend)
    assert torch.equal(permuted, grad[order])


def test_other_aggregations_ignore_prompt_ids(device: str) -> None:
    given = batch(device)
    for aggregation in ("token-mean", "seq-mean-token-mean", "token-sum"):
        spec = LossSpec(PPOClip(), aggregation=aggregation)
        got = loss_and_grad(given, spec=spec, prompt_ids=IDS["mixed"].to(device))
        assert all(map(torch.equal, got, loss_and_grad(given, spec=spec)))


@layouts
def test_every_form(packed: bool, device: str, backend: str) -> None:
    """The losses from logits, hidden states and log-probabilities, and the modules, agree in fp64."""
    given = {key: x.double() if x.is_floating_point() else x for key, x in batch(device, packed).items()}
    shape = given["completion_ids"].shape
    hidden, weight = normal(*shape, H, seed=5).to(device), normal(V, H, seed=6).to(device)
    given["logits"] = hidden @ weight.T
    given |= {"prompt_ids": IDS["mixed"].to(device)}
    want = grpo_loss(**given, spec=SPEC, backend=backend)
    of_hidden = {key: x for key, x in given.items() if key != "logits"}
    args = [of_hidden.pop(name) for name in ("completion_ids", "advantages")]
    for got in (
        GRPOLoss(SPEC)(given["logits"], *args, **of_hidden, backend=backend),
        linear_grpo_loss(hidden, weight, *args, **of_hidden, spec=SPEC, backend=backend, chunk_tokens=4),
        LinearGRPOLoss(SPEC, chunk_tokens=3)(hidden, weight, *args, **of_hidden, backend=backend),
        policy_loss(want.logps, args[1], **of_hidden, spec=SPEC, backend=backend),
    ):
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    ref_logits = normal(*shape, V, seed=7).to(device)
    got = log_ratio_loss(
        given["logits"], ref_logits, *args, aggregation="prompt-mean", **of_hidden, backend=backend
    )
    spec = LossSpec(LogRatio(), aggregation="prompt-mean")
    want = grpo_loss(**given, ref_logits=ref_logits, spec=spec, backend=backend)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)


@layouts
def test_distillation(packed: bool, device: str, backend: str) -> None:
    """The weights are those of the losses with rewards."""
    given = batch(device, packed)
    teacher = normal(*given["logits"].shape, seed=8).to(device)
    options = {name: given[name] for name in ("completion_mask", "seq_lens") if name in given}
    logits = given["logits"].double()
    single = []
    for number in range(logits[..., 0].numel()):
        one = torch.zeros(logits[..., 0].numel(), dtype=torch.bool, device=device)
        one[number] = True
        one = one.view(logits.shape[:-1]) & options.get("completion_mask", True)
        out = distillation_loss(
            logits, teacher_logits=teacher, completion_mask=one, aggregation="token-sum", backend=backend
        )
        single.append(out.loss)
    tokens = torch.zeros(B, T, dtype=torch.float64)
    values = torch.stack(single).cpu()
    tokens[MASK] = values if packed else values.view(B, T)[MASK]
    ids = IDS["mixed"]
    options |= {"aggregation": "prompt-mean", "prompt_ids": ids.to(device), "backend": backend}
    want = by_loops(tokens, ids.tolist(), None)
    out = distillation_loss(logits, teacher_logits=teacher, **options)
    assert float(out.loss.detach()) == pytest.approx(want, rel=1e-12)
    identity = torch.eye(V, dtype=torch.float64, device=device)
    heads = {"teacher_hidden": teacher, "teacher_lm_head_weight": identity}
    out = linear_distillation_loss(logits, identity, **heads, **options)
    assert float(out.loss.detach()) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="aggregation 'prompt-mean' needs prompt_ids"):
        distillation_loss(logits, teacher_logits=teacher, **{**options, "prompt_ids": None})


def test_micro_batches_with_whole_prompts_add_up(device: str) -> None:
    """And a prompt that is split counts once in every part."""
    given, ids = batch(device), torch.tensor([7, 7, 1, 1, 1, 2], device=device)
    (whole, grad) = loss_and_grad(given, spec=SPEC, prompt_ids=ids)

    def summed(*parts: slice) -> tuple[Tensor, Tensor]:
        masks, numbers = ([x[part] for part in parts] for x in (given["completion_mask"], ids))
        normalizer = global_normalizer(masks, aggregation="prompt-mean", prompt_ids=numbers)
        found = [
            loss_and_grad(
                {key: x[part] for key, x in given.items()},
                spec=SPEC,
                prompt_ids=ids[part],
                normalizer=normalizer,
            )
            for part in parts
        ]
        return sum(x for x, _ in found), torch.cat([x for _, x in found])

    got = summed(slice(0, 2), slice(2, 6))
    torch.testing.assert_close(got, (whole, grad))
    split = summed(slice(0, 1), slice(1, 6))  # the prompt 7 has one completion here, and one there
    apart = torch.tensor([3, 7, 1, 1, 1, 2], device=device)
    torch.testing.assert_close(split, loss_and_grad(given, spec=SPEC, prompt_ids=apart))


@prompts
def test_number_groups(name: str, device: str) -> None:
    ids = IDS[name].to(device)
    numbers, count = number_groups(ids)
    unique, want = torch.unique(ids, return_inverse=True)
    assert torch.equal(numbers, want) and int(count) == len(unique)
    assert count.shape == () and count.device.type == device


def test_number_groups_of_nothing(device: str) -> None:
    numbers, count = number_groups(torch.zeros(0, dtype=torch.int32, device=device))
    assert numbers.shape == (0,) and int(count) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_device_sync(backend: str) -> None:
    given = batch("cuda", packed=True)
    given |= {"prompt_ids": IDS["mixed"].cuda(), "spec": SPEC, "backend": backend}
    grpo_loss(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grpo_loss(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
