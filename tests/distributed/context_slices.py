"""Worker: sequences whose tokens are split over the ranks (context parallelism).

Every rank makes the same case and takes its slice of each sequence. Losses and gradients of the ranks are
joined and compared as one, with the oracle and tolerances of whole sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import assert_gradients, from_logits, linear_oracle, run_linear
from parity import (
    AGGREGATIONS,
    KLS,
    PAIRS,
    SEQUENCE_LEVEL,
    SURROGATES,
    Case,
    assert_outputs,
    assert_rows_no_worse,
    every_branch,
    oracle,
    per_token,
    run,
    user_loss,
)
from torch import Tensor
from torch import distributed as dist

from distributed.vocab_parts import BACKENDS, V
from distributed.worker import Cases
from grpo_kernels import (
    KL,
    LossOutput,
    LossSpec,
    PPOClip,
    VocabShard,
    global_normalizer,
    grpo_loss,
    policy_loss,
    selective_logps,
)

cases = Cases()
CUTS = {"even": 1.0, "uneven": 1.6, "an empty slice": 9.0}
"""Exponents: with 9, the first rank has no token of a short sequence."""
GSPO = LossSpec(PPOClip(), KL("k3", beta=0.2), "sequence", "seq-mean-token-mean", entropy_coef=0.1)


class Slices(NamedTuple):
    """How the tokens of a case are split over the ranks."""

    lengths: list[int]  # of the sequences
    packed: bool
    cuts: str

    @classmethod
    def of(cls, case: Case, cuts: str) -> Slices:
        ids = case.completion_ids
        packed = ids.dim() == 1
        lengths = case.options["seq_lens"].tolist() if packed else [ids.shape[1]] * ids.shape[0]
        return cls(lengths, packed, cuts)

    def bounds(self, length: int, rank: int) -> tuple[int, int]:
        ranks = dist.get_world_size()
        return tuple(round(length * (i / ranks) ** CUTS[self.cuts]) for i in (rank, rank + 1))  # type: ignore[return-value]

    def take(self, x: Tensor, rank: int) -> Tensor:
        """Return a rank's tokens of `x` `[B, T, ...]` or `[N, ...]`."""
        if not self.packed:
            return x[:, slice(*self.bounds(self.lengths[0], rank))]
        parts = x.split(self.lengths)
        return torch.cat([p[slice(*self.bounds(len(p), rank))] for p in parts])

    def seq_lens(self, rank: int) -> Tensor:
        bounds = (self.bounds(length, rank) for length in self.lengths)
        return torch.tensor([stop - start for start, stop in bounds])

    def join(self, part: Tensor) -> Tensor:
        """Return the tokens of all ranks, in their order."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, part)
        if not self.packed:
            return torch.cat(found, 1)
        pieces = [x.split(self.seq_lens(rank).tolist()) for rank, x in enumerate(found)]
        return torch.cat([piece for sequence in zip(*pieces, strict=True) for piece in sequence])

    def part(self, case: Any, *names: str) -> Any:
        """Return this rank's part of a case, whose fields `names` have tokens, as some of its options do."""
        rank, shape = dist.get_rank(), case.completion_ids.shape
        options = {
            name: self.take(x, rank) if isinstance(x, Tensor) and x.shape[: len(shape)] == shape else x
            for name, x in case.options.items()
        }
        options["context_group"] = dist.group.WORLD
        if self.packed:
            options["seq_lens"] = self.seq_lens(rank)
            # One per token: a rank may have as many tokens as there are sequences.
            names, case = (*names, "advantages"), case._replace(advantages=per_token(case, case.advantages))
        fields = {name: self.take(getattr(case, name), rank) for name in (*names, "completion_ids")}
        return case._replace(**fields, options=options)


def summed(x: Tensor) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def joined(out: LossOutput, slices: Slices) -> LossOutput:
    """Return the output of the whole sequences. The metrics are already theirs."""
    tokens = (None if x is None else slices.join(x) for x in (out.logps, out.ref_logps, out.entropy))
    return LossOutput(summed(out.loss), out.metrics, *tokens)


def assert_parity(case: Case, cuts: str = "uneven", *, what: str = "", **options: Any) -> None:
    expected, slices = oracle(case), Slices.of(case, cuts)
    got = run(grpo_loss, slices.part(case, "logits"), **options)
    # Before the first assertion, which may fail on one rank only: the others would wait for it.
    out, grad = joined(got.out, slices), slices.join(got.grad)
    assert_outputs(expected, out, what=what)
    _, truth, eager = expected
    ids, logps = case.completion_ids, truth.out.logps
    assert_rows_no_worse(grad, eager.grad, truth.grad, ids=ids, logps=logps, what=what)


@cases.add(pair=["-".join(pair) for pair in PAIRS if pair[0] != "callable"], packed=[False, True])
def every_loss(pair: str, packed: bool) -> None:
    surrogate, kl = pair.split("-")
    spec = LossSpec(SURROGATES[surrogate], KLS[kl])
    assert_parity(every_branch(spec, V, torch.float32, packed=packed), what=pair)


@cases.add(name=SEQUENCE_LEVEL, packed=[False, True], cuts=CUTS)
def every_level(name: str, packed: bool, cuts: str) -> None:
    surrogate, level = SEQUENCE_LEVEL[name]
    spec = LossSpec(SURROGATES[surrogate], KLS["ratio_corrected"], level)
    assert_parity(every_branch(spec, V, torch.float32, packed=packed), cuts, what=name)


@cases.add(aggregation=AGGREGATIONS, packed=[False, True], cuts=CUTS, normalizer=[None, 7.0])
def every_aggregation(aggregation: str, packed: bool, cuts: str, normalizer: float | None) -> None:
    spec = replace(GSPO, aggregation=aggregation, max_tokens=4, level="token")
    case = every_branch(spec, V, torch.float64, packed=packed)
    assert_parity(case.with_options(normalizer=normalizer), cuts)


@cases.add(
    backend=BACKENDS, inplace=[False, True], dtype=[torch.float32, torch.bfloat16], packed=[False, True]
)
def every_path(backend: str, inplace: bool, dtype: torch.dtype, packed: bool) -> None:
    for spec in (GSPO, LossSpec(PPOClip(), KL("exact"))):
        case = every_branch(spec, V, dtype, packed=packed)
        assert_parity(case, backend=backend, inplace=inplace)


@cases.add(backend=BACKENDS, packed=[False, True], skip_inactive=[False, True], level=["token", "sequence"])
def from_hidden_states(backend: str, packed: bool, skip_inactive: bool, level: str) -> None:
    spec = LossSpec(PPOClip(), level=level, aggregation="seq-mean-token-mean")
    case = from_logits(every_branch(spec, V, torch.float32, packed=packed))
    slices = Slices.of(case, "uneven")  # type: ignore[arg-type]
    how = {"backend": backend, "skip_inactive": skip_inactive}
    got, want = run_linear(slices.part(case, "hidden"), **how), run_linear(case, **how)
    dhidden, *of_head = got.grads
    out, grads = joined(got.out, slices), (slices.join(dhidden), *map(summed, of_head))
    torch.testing.assert_close(out, want.out, rtol=1e-5, atol=1e-6)
    if skip_inactive:
        return
    expected = linear_oracle(case)
    assert_gradients(grads, expected.eager, expected.truth, expected.terms, expected.lengths, str(how))


@cases.add(packed=[False, True])
def from_log_probabilities(packed: bool) -> None:
    case = every_branch(replace(GSPO, entropy_coef=0.0), V, torch.float64, packed=packed, ref="logps")
    slices = Slices.of(case, "uneven")
    found = []
    for part in (slices.part(case, "logits"), case):
        mask = part.options["completion_mask"]
        logps = selective_logps(part.logits, part.completion_ids.masked_fill(~mask, 0), mask=mask)
        leaf = logps.requires_grad_()
        out = policy_loss(leaf, part.advantages, spec=part.spec, **part.options)
        found.append((out, *torch.autograd.grad(out.loss, leaf)))
    (out, grad), (whole, whole_grad) = found
    got, got_grad = joined(out, slices), slices.join(grad)
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(got_grad, whole_grad)


@cases.add(aggregation=["token-mean", "seq-mean-token-mean"])
def with_a_normalizer(aggregation: str) -> None:
    """`global_normalizer` counts the sequences of every rank, so it is given the whole mask."""
    spec = replace(GSPO, aggregation=aggregation)
    case = every_branch(spec, V, torch.float64)
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    normalizer = global_normalizer(case.options["completion_mask"], aggregation=aggregation, group=group)
    assert_parity(case.with_options(normalizer=normalizer))


@cases.add()
def without_gradients() -> None:
    case = every_branch(GSPO, V, torch.float64)
    slices = Slices.of(case, "uneven")
    part = slices.part(case, "logits")
    with torch.no_grad():
        out = grpo_loss(part.logits, part.completion_ids, part.advantages, spec=part.spec, **part.options)
    assert_outputs(oracle(case), joined(out, slices), what="no_grad")


@cases.add()
def beside_a_split_vocabulary() -> None:
    """Each rank is alone in the group of its vocabulary."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    case = every_branch(GSPO, V, torch.float64)
    assert_parity(case, shard=VocabShard(0, V, alone))


@cases.add()
def a_callable_raises() -> None:
    case = every_branch(LossSpec(user_loss), V, torch.float64)
    with pytest.raises(ValueError, match=r"context_group: a callable surrogate"):
        run(grpo_loss, Slices.of(case, "even").part(case, "logits"))


if __name__ == "__main__":
    cases.main()
