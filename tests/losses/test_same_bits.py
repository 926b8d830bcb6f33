"""From logits, the bits of a token depend on that token alone, for every loss, position and thread count.

test_hard_invariants.py covers long rows. Losses that couple tokens agree up to rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity import KLS, SURROGATES
from torch import Tensor

from grpo_kernels import LossSpec, grpo_loss
from grpo_kernels.testing import make_batch

TOKENS, V = 331, 137  # PyTorch uses its threads for these sizes, and vector loops leave a remainder in both


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def is_token_local(name: str) -> bool:
    return name != "callable" and "token" in getattr(SURROGATES[name], "levels", ("token",))


# Every surrogate alone, and every KL alone.
ALONE = [("None", kl) for kl in KLS if kl != "None"]
ALONE += [
    (surrogate, "None") for surrogate in SURROGATES if surrogate != "None" and is_token_local(surrogate)
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("surrogate, kl", ALONE)
def test_every_loss(surrogate: str, kl: str, device: str) -> None:
    """This test runs the torch backend. With Triton each program has one row: test_hard_invariants.py."""
    batch = make_batch(TOKENS, 1, V, masked=0, inactive=0.1, device=device)
    spec = LossSpec(SURROGATES[surrogate], KLS[kl], aggregation="token-sum", entropy_coef=0.1)

    def run(at: Tensor) -> list[Tensor]:
        leaf = batch.logits[at].clone().requires_grad_()
        out = grpo_loss(
            leaf,
            batch.completion_ids[at],
            batch.advantages[at],
            spec=spec,
            ref_logits=batch.ref_logits[at],
            old_logps=batch.old_logps[at],
            normalizer=1.0,
            backend="torch",
        )
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert out.ref_logps is not None and out.entropy is not None
        return [grad, out.logps, out.ref_logps, out.entropy]

    everything = torch.arange(TOKENS, device=device)
    whole = run(everything)
    # Parts too short for a vector loop, a part without a remainder, and other positions.
    parts = *everything.split(7)[::3], everything[:320], everything.flip(0), everything[::2], everything[-1:]
    for at in parts:
        for name, x, y in zip(("gradient", "logps", "ref_logps", "entropy"), run(at), whole, strict=True):
            assert torch.equal(x, y[at]), f"{name} of {at.tolist()}"
