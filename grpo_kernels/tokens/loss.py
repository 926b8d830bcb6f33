"""Computes the weighted loss of each row and its derivatives from the statistics, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import LossSpec
from ..spec.formula import TokenLoss, TokenTerms, log_ratio_to, unbounded
from ..spec.surrogates import Surrogate
from ..spec.surrogates.base import sequence_log_ratio
from .inputs import TokenInputs
from .sequences import Sequences
from .statistics import Coefficients, RowStats


class BatchLoss(NamedTuple):
    """A loss with the constants of a batch.

    `sequences` is None for a subset of the rows (see `rows`), whose loss does not couple tokens.
    """

    spec: LossSpec
    inputs: TokenInputs
    sequences: Sequences | None = None

    def rows(self, index: Tensor | slice) -> BatchLoss:
        """Return the loss of some rows. It must not couple tokens."""
        return BatchLoss(self.spec, self.inputs.rows(index))

    def values(self, stats: RowStats) -> tuple[Tensor, Coefficients]:
        """Compute each row's weighted loss, `[N]`, and its derivatives. The sum over rows is the loss."""
        spec, inputs, ref_logps = self.spec, self.inputs, self.ref_logps(stats)
        if spec.uses_callable:
            value, dlogp = self.callable_loss(stats.logps, ref_logps)
        else:
            value, dlogp = self.surrogate_loss(stats.logps, ref_logps)
        if spec.sampled_kl is not None:
            estimate, dlog_ratio = self.sampled_kl(stats.logps, ref_logps)
            weight = spec.sampled_kl.beta * inputs.row_weights
            masked = ~inputs.mask
            parts = (None if x is None else (weight * x).masked_fill_(masked, 0.0) for x in estimate)
            kl, dkl = self.collect(TokenLoss(*parts), dlog_ratio)  # type: ignore[arg-type]
            value, dlogp = value + kl, dlogp + dkl
        derivatives = self.coefficients(dlogp)
        statistics = stats.entropy, stats.kl, stats.kl_forward
        for weights, statistic in zip(derivatives[1:], statistics):
            if weights is not None and statistic is not None:
                value = value + weights * statistic
        return value, derivatives

    def coefficients(self, dlogp: Tensor) -> Coefficients:
        """Return all derivatives. All but `dlogp` are constant: entropy and exact KL enter linearly."""
        found, kl = Coefficients(dlogp, self.inputs.entropy_weights), self.spec.exact_kl
        if kl is None:
            return found
        weight = kl.beta * self.inputs.row_weights
        return found._replace(**{"dkl" if kl.kind == "exact" else "dkl_forward": weight})

    def ref_logps(self, stats: RowStats) -> Tensor | None:
        """Return the reference's log-probabilities: computed, or else as given."""
        return self.inputs.ref_logps if stats.ref_logps is None else stats.ref_logps

    def may_be_active(self) -> Tensor:
        """Return which rows may have a gradient, `[N]` bool. It is computed before the policy's logits."""
        spec, inputs, surrogate = self.spec, self.inputs, self.spec.surrogate
        if not isinstance(surrogate, Surrogate) or spec.sampled_kl or spec.exact_kl or spec.entropy_coef:
            return inputs.mask
        active = inputs.mask
        if surrogate.zero_without_advantage:
            active = active & (inputs.advantages != 0)
        if inputs.token_weights is not None and surrogate.zero_without_weight:
            active = active & (inputs.token_weights != 0)
        if spec.couples_tokens:
            assert self.sequences is not None
            active = inputs.mask & (self.sequences.total(active.to(self.sequences.dtype)) > 0)
        return active

    def surrogate_loss(self, logps: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted loss of a built-in surrogate and its derivative with respect to `logps`."""
        spec, inputs, surrogate = self.spec, self.inputs, self.spec.surrogate
        if surrogate is None:
            return torch.zeros_like(logps), torch.zeros_like(logps)
        assert isinstance(surrogate, Surrogate)
        clamp = unbounded(spec.log_ratio_clamp)
        anchor = ref_logps if surrogate.anchor == "ref" else inputs.old_logps
        terms = TokenTerms(log_ratio_to(logps, anchor), inputs.advantages, inputs.token_weights)
        if spec.couples_tokens:
            assert self.sequences is not None
            terms = surrogate.couple(terms, spec.level, clamp, self.sequences)
        loss = surrogate.token_loss(logps, terms.log_ratio, terms.advantages, clamp)
        # Filled instead of multiplied, because a zero advantage times an infinite ratio would be NaN.
        inactive = ~inputs.mask
        if surrogate.zero_without_advantage:
            inactive = inactive | (terms.advantages == 0)
        weights = inputs.row_weights
        if terms.token_weights is not None:
            weights = weights * terms.token_weights
            inactive = inactive | (terms.token_weights == 0)
        weighted = (None if x is None else (x * weights).masked_fill_(inactive, 0.0) for x in loss)
        return self.collect(TokenLoss(*weighted), terms.dlog_ratio)  # type: ignore[arg-type]

    def collect(self, loss: TokenLoss, dlog_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a weighted loss, and its derivative with respect to each token's own log-probability.

        `dlog_ratio` is the derivative of a sequence's log-ratio with respect to the token's. The losses of
        all tokens of the sequence then depend on each token.
        """
        by_log_ratio = loss.dlog_ratio
        if by_log_ratio is not None and dlog_ratio is not None:
            assert self.sequences is not None
            counts = self.sequences.mask & (dlog_ratio != 0)
            by_log_ratio = torch.where(counts, self.sequences.total(by_log_ratio) * dlog_ratio, 0.0)
        if loss.dlogp is None or by_log_ratio is None:
            dlogp = loss.dlogp if by_log_ratio is None else by_log_ratio
            assert dlogp is not None
            return loss.value, dlogp
        return loss.value, loss.dlogp + by_log_ratio

    def callable_loss(self, logps: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted loss of a user's callable, and its derivative by autograd.

        The weights are applied before the derivative is taken, because the callable may couple tokens.
        """
        assert self.sequences is not None
        inputs, shape = self.inputs, self.sequences.shape
        weights = inputs.row_weights
        if inputs.token_weights is not None:
            weights = weights * inputs.token_weights

        def shaped(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(shape)

        def total(logps: Tensor) -> tuple[Tensor, Tensor]:
            values = self.spec.surrogate(  # type: ignore[operator,misc]
                logps.view(shape),
                shaped(inputs.old_logps),
                shaped(ref_logps),
                shaped(inputs.advantages),
                shaped(inputs.mask),
            )
            if not isinstance(values, Tensor) or values.shape != torch.Size(shape):
                got = tuple(values.shape) if isinstance(values, Tensor) else values
                raise ValueError(
                    f"the callable surrogate must return a tensor of shape {tuple(shape)}, got {got}"
                )
            value = torch.where(weights != 0, weights * values.reshape(-1), 0.0)
            return value.sum(), value

        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            dlogp, (_, value) = torch.func.grad_and_value(total, has_aux=True)(logps)
        else:
            # Only the innermost hooks apply. These keep checkpointing and offloading out of this small graph.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                leaf = logps.detach().requires_grad_()
                summed, value = total(leaf)
                dlogp = torch.zeros_like(leaf)
                if summed.requires_grad:
                    (dlogp,) = torch.autograd.grad(summed, leaf, allow_unused=True, materialize_grads=True)
            value = value.detach()
        return value, torch.where(inputs.mask, dlogp, 0.0)

    def sampled_kl(self, logps: Tensor, ref_logps: Tensor | None) -> tuple[TokenLoss, Tensor | None]:
        """The KL estimate of each token, and the derivative of a sequence's log-ratio (see `collect`)."""
        spec, kl = self.spec, self.spec.sampled_kl
        assert kl is not None and ref_logps is not None
        log_ratio, dlog_ratio = None, None
        if kl.ratio_corrected:
            log_ratio = log_ratio_to(logps, self.inputs.old_logps)
            if spec.level != "token":
                assert self.sequences is not None
                log_ratio, dlog_ratio = sequence_log_ratio(spec.level, log_ratio, self.sequences)
        clamp = unbounded(spec.log_ratio_clamp)
        return kl.estimate(logps, ref_logps, log_ratio, clamp, own_ratio=dlog_ratio is None), dlog_ratio
