"""Peak memory of a step from hidden states, by formula and measured, with `accumulate_into` and without.

    python -m benchmarks.memory      # T=16384, H=4096, V=151936 on a GPU; a smaller head in fp32 on a CPU

Without `accumulate_into` the gradient of the weight is held from the forward to the backward: in fp32 if it
is a sum over chunks, and then returned in the weight's dtype. With it, the backward adds to a buffer that
exists anyway, and computes the logits again.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from grpo_kernels import LossSpec, PPOClip, linear_grpo_loss
from grpo_kernels.linear.products import BLOCK_ELEMENTS
from grpo_kernels.testing import peak_memory

from .tables.markdown import markdown

WAYS = ("returned", "into fp32", "into bf16")


class Head(NamedTuple):
    """Sizes of a step. The model is bf16 on a GPU, fp32 on a CPU, where products widen 16-bit operands."""

    T: int
    H: int
    V: int
    dtype: torch.dtype

    def bytes(self, way: str, chunk: int) -> tuple[int, int]:
        """Peak bytes of forward and backward, above inputs and buffer, for chunks of `chunk` tokens."""
        logits = 4 * chunk * self.V
        with_gradient = logits if self.dtype == torch.float32 else 6 * chunk * self.V
        sums = 4 * self.T * self.H  # the hidden states' gradient in fp32
        returned = 0 if self.dtype == torch.float32 else 2
        if way == "returned":
            single = chunk >= self.T  # then the weight's gradient is held as it is returned
            held = sums + (self.dtype.itemsize if single else 4) * self.V * self.H
            copied = self.T if single else self.T + self.V
            return held + with_gradient, held + returned * copied * self.H
        narrow = way == "into bf16" and self.dtype == torch.float32
        # A block of the product, of the buffer and of their sum, in fp32.
        part = 3 * 4 * min(BLOCK_ELEMENTS, self.V * self.H) if narrow else 0
        # The chunk is freed before the hidden states' gradient is returned.
        return logits, sums + max(with_gradient + part, returned * self.T * self.H)


ON_GPU = Head(16384, 4096, 151936, torch.bfloat16)
ON_CPU = Head(1024, 1024, 32000, torch.float32)
TINY = Head(64, 64, 512, torch.float32)
CHUNKS = {ON_GPU: (1024, 4096, 8192), ON_CPU: (64, 256), TINY: (16,)}


def predicted(head: Head = ON_GPU) -> str:
    """The formulas as a table, in GiB."""
    lines = []
    for chunk in CHUNKS[head]:
        for way in WAYS:
            forward, backward = (x / 2**30 for x in head.bytes(way, chunk))
            most = f"**{max(forward, backward):.1f}**"
            lines.append((str(chunk), way, f"{forward:.1f}", f"{backward:.1f}", most))
    columns = ("`chunk_tokens`", "weight's gradient", "forward, GiB", "backward, GiB", "peak, GiB")
    return markdown(columns, lines, text_columns=2)


def measured(head: Head, device: torch.device) -> str:
    """The formulas next to peaks that were measured, in MiB."""
    torch.manual_seed(0)
    hidden = torch.randn(8, head.T // 8, head.H, device=device).to(head.dtype).requires_grad_()
    weight = (torch.randn(head.V, head.H, device=device) / head.H**0.5).to(head.dtype).requires_grad_()
    ids = torch.randint(head.V, hidden.shape[:2], device=device)
    advantages = torch.linspace(-1, 1.5, 8, device=device)
    lines = []
    for chunk in CHUNKS[head]:
        for way in WAYS:
            dtype = torch.bfloat16 if way == "into bf16" else torch.float32
            into = None if way == "returned" else torch.zeros_like(weight, dtype=dtype)

            def step(chunk: int = chunk, into: torch.Tensor | None = into) -> None:
                how = {"chunk_tokens": chunk, "accumulate_into": into, "spec": LossSpec(PPOClip())}
                loss = linear_grpo_loss(hidden, weight, ids, advantages, **how).loss
                loss.backward()
                hidden.grad = weight.grad = None

            step()  # what a first call allocates stays
            formula = max(head.bytes(way, chunk)) / 2**20
            found = peak_memory(step, device) / 2**20
            lines.append((str(chunk), way, f"{formula:.0f}", f"{found:.0f}"))
    return markdown(
        ("`chunk_tokens`", "weight's gradient", "formula, MiB", "measured, MiB"), lines, text_columns=2
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small head, to see that everything runs")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    head = TINY if args.tiny else ON_GPU if args.device.type == "cuda" else ON_CPU
    print(f"T={head.T} H={head.H} V={head.V}, {head.dtype}\n\n{measured(head, args.device)}")


if __name__ == "__main__":
    main()
