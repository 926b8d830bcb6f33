"""The table of docs/parity.md: relative errors of sure tokens, here and in other libraries.

    TRITON_INTERPRET=1 python docs/figures/sure_tokens.py

Each cell has the largest relative error of a log-probability and of the gradient of the taken logit. The gap
is the distance of this logit from the logsumexp of the others. verl has its own environment, .venv-verl.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_kernels import selective_logps

GAPS = [12.0, 16.0, 20.0, 25.0, 30.0, 40.0]
Numbers = tuple[Tensor, Tensor]  # log-probabilities, and gradients of their sum with respect to taken logits


def draw(gap: float, rows: int, V: int) -> tuple[Tensor, Tensor]:
    """Return fp32 logits `[rows, 1, V]` and ids `[rows, 1]`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 1, V, generator=generator)
    ids = torch.randint(V, (rows, 1), generator=generator)
    others = logits.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1)
    return logits.scatter(-1, ids[..., None], (others + gap)[..., None]), ids


def truth(logits: Tensor, ids: Tensor) -> Numbers:
    """Compute both in fp64 from the logsumexp of the others."""
    wide = logits.double()
    others = wide.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1)
    logps = -torch.log1p(torch.exp(others - wide.gather(-1, ids[..., None])[..., 0]))
    return logps, -torch.expm1(logps)


def by_autograd(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Numbers]:
    def numbers(logits: Tensor, ids: Tensor) -> Numbers:
        leaf = logits.clone().requires_grad_()
        logps = function(leaf, ids)
        (grad,) = torch.autograd.grad(logps.sum(), leaf)
        return logps.detach(), grad.gather(-1, ids[..., None])[..., 0]

    return numbers


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def liger(logits: Tensor, ids: Tensor) -> Numbers:
    """Run Liger's kernels. On-policy, with an advantage of 1, the loss has the gradient of -logp."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # Liger drops the last position
    logps = fused_selective_log_softmax(padded, ids, temperature=1.0)
    leaf, ones = padded.clone().requires_grad_(), torch.ones(len(ids))
    options = {"temperature": 1.0, "beta": 0.0, "loss_type": "grpo", "inplace": False, "reduce": False}
    per_token, *_ = triton_grpo_loss(leaf, None, None, ids, ones, torch.ones_like(ids), **options)
    (grad,) = torch.autograd.grad(-per_token.sum(), leaf)
    return logps, grad[:, :-1].gather(-1, ids[..., None])[..., 0]


def ways() -> dict[str, Callable[[Tensor, Tensor], Numbers]]:
    found = {"eager PyTorch": by_autograd(eager)}
    if importlib.util.find_spec("trl") is not None:
        from trl.trainer.utils import selective_log_softmax

        found["TRL, `selective_log_softmax`"] = by_autograd(selective_log_softmax)
    if importlib.util.find_spec("verl") is not None:
        from verl.utils.torch_functional import logprobs_from_logits

        found["verl, `logprobs_from_logits`"] = by_autograd(logprobs_from_logits)
    found["ours, PyTorch"] = by_autograd(lambda logits, ids: selective_logps(logits, ids, backend="torch"))
    found["ours, Triton"] = by_autograd(lambda logits, ids: selective_logps(logits, ids, backend="triton"))
    if importlib.util.find_spec("liger_kernel") is not None:
        found["Liger, kernels"] = liger
    return found


def errors(rows: int = 4, V: int = 32000) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways()}
    for gap in GAPS:
        batch = draw(gap, rows, V)
        for name, numbers in ways().items():
            pairs = zip(numbers(*batch), truth(*batch), strict=True)
            logp, grad = (float(((x.double() - y) / y).abs().max()) for x, y in pairs)
            found[name].append((logp, grad))
    return found


if __name__ == "__main__":
    print("| gap |" + "".join(f" {gap:.0f} |" for gap in GAPS))
    print("|---|" + "---|" * len(GAPS))
    for name, cells in errors().items():
        print(f"| {name} |" + "".join(f" {logp:.0e} / {grad:.0e} |" for logp, grad in cells))
