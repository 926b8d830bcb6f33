"""Prints the errors of the emulated kernels and of eager PyTorch, against fp64, as a table in markdown.

python tests/ptx/errors.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared"), str(ROOT / "tests" / "ptx")]

from emulator import Mode, emulated  # noqa: E402
from linear_cases import LinearCase, run_eager, run_linear  # noqa: E402
from parity import DTYPES, EVERYTHING, Case, run  # noqa: E402

from benchmarks.machine_code.cases import mixed_products  # noqa: E402
from grpo_kernels import grpo_loss  # noqa: E402
from grpo_kernels.reference import reference_loss  # noqa: E402
from grpo_kernels.testing import RandomBatch, make_batch, relative_error  # noqa: E402

TARGET, TOKENS, WIDTH = "sm_90", 4, 64  # WIDTH: size of a hidden state
ROWS = [
    *(("fp32", path, V) for path in ("two kernels", "in place", "hidden states") for V in (4113, 151936)),
    *(("bf16", path, V) for path in ("two kernels", "in place", "hidden states") for V in (4113, 151936)),
    ("fp16", "two kernels", 4113),
    ("fp16", "two kernels", 151936),
    ("fp64", "two kernels", 4113),
]


class Found(NamedTuple):
    """What the columns compare."""

    logps: Tensor
    entropy: Tensor
    grad: Tensor  # rows with respect to the logits, or to the hidden states

    @classmethod
    def of(cls, out: Any, grad: Tensor) -> Found:
        return cls(out.logps.detach(), out.entropy.detach(), grad)


class Errors(NamedTuple):
    """Largest errors: in nats, and relative L2 errors of the gradient rows."""

    logp: float
    entropy: float
    grad: float


def errors(found: Found, truth: Found) -> Errors:
    largest = ((x.double() - y).abs().max() for x, y in zip(found[:2], truth[:2], strict=True))
    return Errors(*map(float, largest), float(relative_error(found.grad, truth.grad).max()))


class Runs(NamedTuple):
    """The three ways to compute one row of the table."""

    kernels: Callable[[], Found]
    eager: Callable[[], Found]
    truth: Callable[[], Found]


def from_logits(batch: RandomBatch, *, inplace: bool) -> Runs:
    options = {"ref_logits": batch.ref_logits, "old_logps": batch.old_logps}
    case = Case(EVERYTHING, batch.logits, batch.completion_ids, batch.advantages, options)

    def found(loss: Callable[..., Any], case: Case, **options: Any) -> Found:
        return Found.of(*run(loss, case, **options))

    return Runs(
        lambda: found(grpo_loss, case, backend="triton", inplace=inplace),
        lambda: found(reference_loss, case),
        lambda: found(reference_loss, case.wide()),
    )


def from_hidden_states(batch: RandomBatch) -> Runs:
    """Return the runs for random hidden states. 16-bit operands are multiplied into fp32, as on a GPU."""
    V, dtype = batch.logits.shape[-1], batch.logits.dtype
    generator = torch.Generator().manual_seed(V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(1, TOKENS, WIDTH), 3 / WIDTH**0.5 * normal(V, WIDTH)
    ref_hidden, old_logps = hidden + 0.1 * normal(*hidden.shape), 0.3 * normal(1, TOKENS)
    logps = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, batch.completion_ids[..., None])[..., 0]
    options = {
        "ref_hidden": ref_hidden.to(dtype),
        "ref_lm_head_weight": weight.to(dtype),
        "old_logps": logps + old_logps,
    }
    ids, advantages = batch.completion_ids, batch.advantages
    case = LinearCase(EVERYTHING, hidden.to(dtype), weight.to(dtype), None, ids, advantages, options)

    def kernels() -> Found:
        with mixed_products if dtype.itemsize == 2 else nullcontext():
            out, grads = run_linear(case, backend="triton")
        return Found.of(out, grads[0])

    def eager(case: LinearCase) -> Found:
        result, _, grads = run_eager(case)
        return Found.of(result.out, grads[0])

    return Runs(kernels, lambda: eager(case), lambda: eager(case.to(torch.float64)))


def measured(dtype: str, path: str, V: int) -> list[Errors]:
    """Return the errors of the kernels, of these with perturbed approximations, and of eager PyTorch."""
    batch = make_batch(1, TOKENS, V, dtype=DTYPES[dtype], masked=0, inactive=0, seed=V)
    if path == "hidden states":
        runs = from_hidden_states(batch)
    else:
        runs = from_logits(batch, inplace=path == "in place")
    truth, found = runs.truth(), []
    for mode in (Mode(), Mode(perturb=True)):
        with emulated(TARGET, mode):
            found.append(errors(runs.kernels(), truth))
    return [*found, errors(runs.eager(), truth)]


def main() -> None:
    """Print the table. A cell has three numbers: emulated, emulated with perturbed approximations, eager."""
    print("| dtype | path | V | log-probability, nats | entropy, nats | gradient, relative |")
    print("|---|---|---|---|---|---|")
    for dtype, path, V in ROWS:
        columns = zip(*measured(dtype, path, V), strict=True)
        cells = [" / ".join(f"{x:.1e}" for x in column) for column in columns]
        print(f"| {dtype} | {path} | {V} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
