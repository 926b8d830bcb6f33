"""Rows in which the taken token has nearly all the probability, and their exact statistics and gradients.

The truth is computed in fp64 from the logsumexp of the other tokens. It keeps its digits however small
`1 - p` is, which autograd of a log-softmax in fp64 does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

GAPS = [12.0, 16.0, 20.0, 25.0, 30.0, 40.0]
"""Distances from the logsumexp of the other tokens to the taken token."""
REFERENCES = [0.7, -1.5, 4.0, None]
"""How much larger the gap of the reference is. None: it gives the taken token a probability of about 1/3."""


class Bounds(NamedTuple):
    """Relative errors that the tests allow: of statistics, gradients, and sums of gradient rows."""

    statistic: float
    gradient: float
    row_sum: float


BOUNDS = {
    torch.float64: Bounds(1e-13, 1e-13, 1e-13),
    torch.float32: Bounds(1e-5, 1e-4, 1e-5),
    torch.bfloat16: Bounds(1e-5, 1e-4, 1e-5),  # the gradients are then rounded to bf16
}


class SureTokens(NamedTuple):
    """A batch. Every sequence has a token of each gap, with references and places in other combinations.

    Attributes:
        logits, ref_logits: `[B, T, V]`.
        ids: `[B, T]`.
        options: Transforms of the logits, as keyword options of `grpo_loss`.
    """

    logits: Tensor
    ref_logits: Tensor
    ids: Tensor
    options: dict[str, Any]

    @property
    def ones(self) -> Tensor:
        """Advantages."""
        return torch.ones(len(self.ids), device=self.ids.device)


def places(V: int) -> list[int]:
    """Return columns in a kernel's first block, in one in the middle, in the last one and in the tail."""
    block = next((size for size in (1024, 128) if size <= V), 1)
    return [0, V // 2, V // block * block - 1, V - 1]


def sure_tokens(
    V: int,
    dtype: torch.dtype,
    *,
    sequences: int = 1,
    gaps: Sequence[float] = GAPS,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    device: str = "cpu",
) -> SureTokens:
    """Draw a batch. With a transform of the logits, the gaps are those of the transformed logits."""
    generator = torch.Generator().manual_seed(V)
    t = torch.arange(len(gaps))
    # Every gap meets every place, and so does every reference.
    ids = torch.tensor(places(V))[(torch.arange(sequences)[:, None] - (t + 1) // 2) % 4]
    more = [[ref_gap(gap, REFERENCES[(b + t) % 4]) for t, gap in enumerate(gaps)] for b in range(sequences)]
    options: dict[str, Any] = {"temperature": temperature, "logit_scale": scale, "logit_softcap": softcap}

    def draw(gaps: Tensor) -> Tensor:
        u = torch.randn(*ids.shape, V, generator=generator, dtype=torch.float64)
        others = u.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1)
        u = u.scatter(-1, ids[..., None], (others + gaps)[..., None]) * per_row(temperature)
        return ((u if softcap is None else softcap * torch.atanh(u / softcap)) / scale).to(device, dtype)

    logits, ref_logits = draw(torch.tensor(gaps)), draw(torch.tensor(more))
    if isinstance(temperature, Tensor):
        options["temperature"] = temperature.to(device)
    return SureTokens(logits, ref_logits, ids.to(device), options)


def ref_gap(gap: float, more: float | None) -> float:
    return -0.7 if more is None else gap + more


def per_row(temperature: float | Tensor) -> Any:
    return temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature


class Truth(NamedTuple):
    """Statistics `[B, T]`, and their gradients with respect to the logits `[B, T, V]`, in fp64."""

    logps: Tensor
    ref_logps: Tensor
    entropy: Tensor
    kl: Tensor
    kl_forward: Tensor
    dlogps: Tensor
    dentropy: Tensor
    dkl: Tensor
    dkl_forward: Tensor

    def slack(self, dtype: torch.dtype) -> Tensor:
        """Return how much `dkl` may err at the taken token if the reference is much less sure, `[B, T]`.

        The entry is `p (logp - ref_logp - KL)`. The last two are then much larger than their difference,
        which errs by a few of their roundings. If the reference is about as sure as the policy, this is 0.
        """
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return torch.where(self.ref_logps < 8 * self.logps, 4 * eps * (self.kl - self.ref_logps), 0.0)


def log_softmax(u: Tensor, ids: Tensor) -> Tensor:
    """Compute the log-softmax. At the taken token it is log1p of the others' share, relative to its own."""
    taken = u.gather(-1, ids[..., None])
    others = u.scatter(-1, ids[..., None], -torch.inf).logsumexp(-1, keepdim=True)
    return u - taken - torch.log1p(torch.exp(others - taken))


def truth_of(batch: SureTokens) -> Truth:
    """Compute the truth. A gradient with respect to the transformed logits sums to 0 in every row.

    So its entry at the taken token is minus the sum of the others, which have the digits.
    """
    cap, scale, temperature = (batch.options[f] for f in ("logit_softcap", "logit_scale", "temperature"))
    ids = batch.ids[..., None]

    def transformed(z: Tensor) -> Tensor:
        z = z.double() * scale
        return (z if cap is None else cap * torch.tanh(z / cap)) / per_row(temperature)

    u = transformed(batch.logits)
    slope = torch.full_like(u, scale) / per_row(temperature)
    if cap is not None:
        slope = slope * (1 - (u * per_row(temperature) / cap) ** 2)
    log_p, log_q = log_softmax(u, batch.ids), log_softmax(transformed(batch.ref_logits), batch.ids)
    p, q = log_p.exp(), log_q.exp()
    entropy = -(p * log_p).sum(-1)
    kl, kl_forward = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)

    def balanced(gradient: Tensor) -> Tensor:
        others = gradient.scatter(-1, ids, 0.0)
        return others.scatter(-1, ids, -others.sum(-1, keepdim=True)) * slope

    return Truth(
        log_p.gather(-1, ids)[..., 0],
        log_q.gather(-1, ids)[..., 0],
        entropy,
        kl,
        kl_forward,
        balanced(-p),
        balanced(-p * (log_p + entropy[..., None])),
        balanced(p * (log_p - log_q - kl[..., None])),
        balanced(p - q),
    )


def at(x: Tensor, ids: Tensor) -> Tensor:
    """Return the entries of `[..., V]` at the taken tokens."""
    return x.gather(-1, ids[..., None])[..., 0].double()


def assert_relative(what: str, got: Tensor, want: Tensor, bound: float, slack: Tensor | float = 0.0) -> None:
    """Assert that each entry errs at most `bound` times its truth, plus `slack`."""
    error = (got.detach().double() - want).abs()
    wrong = ~(error <= bound * want.abs() + slack)  # NaN is wrong
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what} at {first}: {float(got[first]):.9g}, wanted {float(want[first]):.9g}")


def assert_gradient(
    what: str,
    got: Tensor,
    want: Tensor,
    ids: Tensor,
    *,
    bound: float,
    sum_bound: float | None = None,
    slack: Tensor | float = 0.0,
) -> None:
    """Compare the entries at the taken tokens, the other entries, and the sum of each row with 0.

    Args:
        what: Names the gradient in the message.
        got: `[B, T, V]`.
        want: `[B, T, V]` in fp64.
        ids: `[B, T]`.
        bound: Relative error of the entry at the taken token, and of the vector of the others. 16-bit
            entries may err by one spacing more, because Triton's interpreter truncates to bf16.
        sum_bound: The sum of a row, relative to its norm. None: a softcap changes the sum.
        slack: `[B, T]`, additional allowed error at the taken token.
    """
    size = got.double().norm(dim=-1)
    if torch.finfo(got.dtype).bits == 16:
        bound += torch.finfo(got.dtype).eps
        size, sum_bound = got.double().abs().sum(-1), None if sum_bound is None else bound
    assert_relative(f"{what} at the taken token", at(got, ids), at(want, ids), bound, slack)
    others, exact = (x.double().scatter(-1, ids[..., None], 0.0) for x in (got, want))
    assert_relative(
        f"{what}, the others", (others - exact).norm(dim=-1), 0 * size, 0, bound * exact.norm(dim=-1)
    )
    if sum_bound is not None:
        assert_relative(
            f"{what}, sum of the row", got.double().sum(-1), 0 * size, 0, sum_bound * size + slack
        )
