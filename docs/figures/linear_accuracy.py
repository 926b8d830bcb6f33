"""The accuracy tables of docs/kernels.md: log-probabilities and weight gradients from bf16 hidden states.

    python docs/figures/linear_accuracy.py              # --device cuda --H 4096 --V 151936

Errors are those of fp64 arithmetic on the same bf16 numbers. As on a GPU, operands of matrix products stay in
bf16 and products are summed in fp32 (on a CPU the package would widen them, and round less).
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import LossSpec, Reinforce, linear_grpo_loss, linear_logps
from grpo_kernels.linear import config
from grpo_kernels.testing import relative_error

SPEC = LossSpec(Reinforce(), aggregation="token-sum")


class Numbers(NamedTuple):
    hidden: Tensor  # [1, N, H] bf16
    weight: Tensor  # [V, H] bf16
    ids: Tensor  # [1, N], drawn from the policy


def draw(N: int, H: int, V: int, *, seed: int = 0) -> Numbers:
    """Logits of standard deviation 4: as peaked as a language model's, a mean log-probability near -4."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    hidden = torch.randn(1, N, H, generator=generator).bfloat16()
    weight = (torch.randn(V, H, generator=generator) * 4 / H**0.5).bfloat16()
    probs = torch.softmax(hidden[0].float() @ weight.float().t(), -1)
    return Numbers(hidden, weight, torch.multinomial(probs, 1, generator=generator).t())


def taken(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def logp_errors(N: int = 512, H: int = 1024, V: int = 32000) -> dict[str, tuple[float, float]]:
    """Largest and mean error of a log-probability, in nats."""
    hidden, weight, ids = draw(N, H, V)
    truth = taken(hidden.double() @ weight.double().t(), ids)
    found = {
        "eager, bf16 throughout": taken(hidden @ weight.t(), ids),
        "eager, bf16 logits, fp32 softmax": taken((hidden @ weight.t()).float(), ids),
        "linear_logps, bf16 logits": linear_logps(hidden, weight, ids, logits_dtype=torch.bfloat16),
        "linear_logps": linear_logps(hidden, weight, ids),
    }
    errors = {name: (x.double() - truth).abs() for name, x in found.items()}
    return {name: (float(x.max()), float(x.mean())) for name, x in errors.items()}


def weight_gradient_errors(
    chunks: int = 64, tokens: int = 32, H: int = 1024, V: int = 32000
) -> dict[str, tuple[float, float]]:
    """Error of the weight's gradient: of the whole, and the mean of its rows', relative to their norms."""
    hidden, weight, ids = draw(chunks * tokens, H, V)
    ones = torch.ones(1)

    def gradient(hidden: Tensor, ids: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        linear_grpo_loss(hidden, leaf, ids, ones, spec=SPEC, chunk_tokens=tokens).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        (-taken(hidden @ leaf.t(), ids).sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    truth = eager(hidden.double(), weight.double())
    summed = torch.zeros_like(weight)
    for part, part_ids in zip(hidden.split(tokens, 1), ids.split(tokens, 1), strict=True):
        summed += gradient(part, part_ids)
    found = {
        f"{chunks} chunks, summed in bf16": summed,
        "eager, bf16 throughout": eager(hidden, weight),
        f"linear_grpo_loss, {chunks} chunks": gradient(hidden, ids),
        "fp64, rounded to bf16": truth.bfloat16(),
    }
    return {
        name: (float(relative_error(x.flatten(), truth.flatten())), float(relative_error(x, truth).mean()))
        for name, x in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--H", type=int, default=1024)
    parser.add_argument("--V", type=int, default=32000)
    args = parser.parse_args()
    torch.set_default_device(args.device)
    config.multiplies_mixed = lambda device: True
    sizes, named = {"H": args.H, "V": args.V}, f"H={args.H}, V={args.V}"
    print(f"| log-probabilities, {named} | max error | mean error |\n|---|---:|---:|")
    for name, (largest, mean) in logp_errors(**sizes).items():
        print(f"| {name} | {largest:.1e} | {mean:.1e} |")
    print(f"\n| weight gradient, {named} | relative error | mean of rows |\n|---|---:|---:|")
    for name, (whole, rows) in weight_gradient_errors(**sizes).items():
        print(f"| {name} | {whole:.1e} | {rows:.1e} |")


if __name__ == "__main__":
    main()
