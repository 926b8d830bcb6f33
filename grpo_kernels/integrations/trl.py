"""TRL 1.16 and later: `FusedGRPOTrainer`, and `fuse_trl_logps` for GRPO, RLOO, SFT, DPO and KTO."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..autograd import fusible
from ..checks.choices import Aggregation
from ..log import OnceLogger, logger
from ..spec import KL, LossSpec
from ..spec.surrogates import CISPO, SAPO, VESPO, PPOClip, Surrogate
from .trl_head import (
    FusedLogProbs,
    GRPOTrainer,
    fuse_trl_logps,
    head_function,
    stock_head,
    zero3_enabled,
)
from .trl_model import add_fused_loss, cast_own_head, ignored_forward
from .trl_step import CallWithLoss, Step

__all__ = ["FusedGRPOTrainer", "fuse_trl_logps"]

AGGREGATION: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
    "cispo": "token-mean",
    "dapo": "token-mean",
    "vespo": "token-mean",
}
COUNTED = ("cispo", "dapo", "vespo")  # divided by the tokens of all micro-batches

# Of the loss's size. TRL's and ours, of the same log-probabilities, differ by rounding, 1e-6.
TOLERANCE = 1e-3
# Micro-batches whose gradients are compared. In the long run a ratio within rounding of its clip bound falls
# to one side here and to the other there, which the loss does not show and the gradient does.
GRADIENT_CHECKS = 8
# Attributes of a trainer that TRL's `_compute_loss` changes, apart from its metrics.
CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")


def refuse_data_parallel(model: Any) -> None:
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "FusedGRPOTrainer does not support nn.DataParallel, whose replicas would all call the forward of "
            "one model. Start the script with `accelerate launch` or `torchrun`, or make a single GPU "
            "visible with CUDA_VISIBLE_DEVICES"
        )


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose loss `linear_grpo_loss` makes of hidden states, within the model's forward.

    Constructor, `GRPOConfig`, sampling, rewards and logged metrics are TRL's own. Its `_compute_loss` still
    runs, on the log-probabilities that our loss has found, and its loss (of the first micro-batches its
    gradient too) has to agree with ours to 1e-3 of its size. Where it does not, a warning shows both, and
    everything is TRL's from that micro-batch on.

    With `top_entropy_quantile` or `off_policy_mask_threshold`, whose token weights are made of the policy's
    entropies or log-probabilities, the loss is TRL's, of log-probabilities by `linear_logps`. The logger
    "grpo_kernels" tells at level INFO which way was taken.
    """

    loss_options: ClassVar[dict[str, Any]] = {}
    """Set by a subclass: `chunk_tokens`, `logits_dtype`, `compact`, `backend` of `linear_grpo_loss`, and of
    `linear_logps` for the old and the reference's log-probabilities."""

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_data_parallel(args[0] if args else kwargs.get("model"))
        unknown = self.loss_options.keys() - {"chunk_tokens", "logits_dtype", "compact", "backend"}
        if unknown:
            raise ValueError(
                f"loss_options takes chunk_tokens, logits_dtype, compact and backend, got {sorted(unknown)}"
            )
        super().__init__(*args, **kwargs)
        if self.args.cast_lm_head_to_fp32:
            cast_own_head(self.model)
        add_fused_loss(self.model)
        self._fused_step: Step | None = None
        self._gradient_checks = GRADIENT_CHECKS
        self._log_once = OnceLogger(logging.INFO)  # once per trainer, and not once per process
        self._why_not_fused: str | None = None
        ignored = ignored_forward(self.model)
        if ignored is not None:
            logger.warning(
                f"FusedGRPOTrainer: {ignored} is not run. As in TRL, log-probabilities are computed from the "
                "weight and bias of the head"
            )
        other = self._overrides("_compute_loss", after=True)
        if other is not None:
            self._why_not_fused = f"{other} comes after FusedGRPOTrainer in the method resolution order"
        if self._has_own_spec:
            try:
                self._fusible_spec()
            except AttributeError as error:
                # A subclass may set what its spec reads after `super().__init__()`. Generation checks again.
                logger.debug(f"FusedGRPOTrainer: loss_spec() is not complete in the constructor: {error}")
        elif other is not None:
            logger.warning(f"FusedGRPOTrainer: the loss is TRL's, because {self._why_not_fused}")
        self._handed_over = zero3_enabled() and not self._learns_in_the_forward()
        if self._handed_over and self._has_own_spec:
            raise ValueError(
                "under DeepSpeed ZeRO-3 a loss of one's own has to be made in the forward: a token-local "
                "LossSpec, without fp16, top_entropy_quantile and off_policy_mask_threshold"
            )
        if self._handed_over:
            logger.warning("FusedGRPOTrainer: under DeepSpeed ZeRO-3 this loss remains TRL's own")

    def loss_spec(self) -> LossSpec:
        """The loss that `args` ask for, without its entropy bonus; read at every micro-batch.

        Override it to train on another, such as `LossSpec.preset("log_ratio")`. TRL's metrics remain those of
        its `loss_type`, ours are logged beside them under `grpo_kernels/`, and nothing is compared. The
        reference's log-probabilities are at hand where `beta` is not 0. The spec's own `entropy_coef` counts
        where `args` ask for no bonus. A "token-mean" is one over all micro-batches of the step where
        `loss_type` is "dapo", "cispo" or "vespo"; all else is a mean of the micro-batches' losses.

        Raises:
            ValueError: `args` that no LossSpec describes. The loss is then TRL's.
        """
        if self.loss_type not in AGGREGATION:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown here")
        kl = None
        if self.beta:
            kl = KL("k3", beta=self.beta, ratio_corrected=self.args.use_bias_correction_kl)
        level = self.importance_sampling_level
        if self.loss_type == "vespo":
            if level == "sequence" and kl is not None and kl.ratio_corrected:
                raise ValueError("VESPO's KL term would be corrected by the sequence's ratio")
            level = "token"  # its weights are the sequence's at either
        return LossSpec(
            self._surrogate(),
            kl,
            level=level,
            aggregation=AGGREGATION[self.loss_type],
            max_tokens=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    def _surrogate(self) -> PPOClip | CISPO | SAPO | VESPO:
        args = self.args
        if self.loss_type == "cispo":
            return CISPO(ratio_max=self.epsilon_high, ratio_min=0.0)  # the bound itself, no offset from 1
        if self.loss_type == "sapo":
            return SAPO(tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg)
        if self.loss_type == "vespo":
            return VESPO(
                k_pos=args.vespo_k_pos,
                lambda_pos=args.vespo_lambda_pos,
                k_neg=args.vespo_k_neg,
                lambda_neg=args.vespo_lambda_neg,
            )
        return PPOClip(eps_low=self.epsilon_low, eps_high=self.epsilon_high, delta=args.delta)

    @property
    def _has_own_spec(self) -> bool:
        return getattr(self.loss_spec, "__func__", None) is not FusedGRPOTrainer.loss_spec

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _overrides(self, name: str, *, after: bool = False) -> str | None:
        """Name the first override of a method outside of `FusedGRPOTrainer`, None if there is none.

        The classes are those before TRL's in the method resolution order; with `after`, only those that
        `FusedGRPOTrainer` calls with `super()`.
        """
        order = type(self).__mro__
        start = order.index(FusedGRPOTrainer) if after else 0
        for cls in order[start : order.index(GRPOTrainer)]:
            if cls is not FusedGRPOTrainer and name in vars(cls):
                return f"{cls.__name__}.{name}"
        return None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self._has_own_spec:
            self._fusible_spec()  # to raise before time is spent on generation and rewards
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        refuse_data_parallel(model)
        step = None if self._handed_over else self._step_of(inputs)
        if step is None:
            return super()._compute_loss(model, inputs)
        step.start(model)
        logged = self._logged()
        self._fused_step = step
        try:
            theirs = super()._compute_loss(model, inputs)
        finally:
            self._fused_step = None
        if self._has_own_spec:
            return self._own_loss(step)
        loss = self._loss(step) if step.once else None
        if self._disagree(step, loss, theirs):
            self._restore(*logged)
            return super()._compute_loss(model, inputs)
        return theirs if loss is None else loss

    def _logged(self) -> tuple[dict[str, int], dict[str, Any]]:
        """The state of the trainer that TRL's loss changes: lengths of metrics and the entropy controller."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        controller = {name: vars(self)[name] for name in CONTROLLER if name in vars(self)}
        return {name: len(values) for name, values in metrics.items()}, controller

    def _restore(self, lengths: dict[str, int], controller: dict[str, Any]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [*metrics]:
            metrics[name] = metrics[name][: lengths.get(name, 0)]
            if not metrics[name]:
                del metrics[name]
        self.__dict__.update(controller)

    def _loss(self, step: Step) -> Tensor:
        loss = step.loss / self._divisor(step.arguments["normalizer"])
        if step.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * step.aux_loss / self._accumulation
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        score = super()._get_per_token_logps_and_entropies
        step = self._fused_step
        if step is not None and not step.concerns(model):
            step = None
        # The backward of linear_logps needs the head, which DeepSpeed ZeRO-3 has sharded again by then.
        stock = self._handed_over or (step is not None and zero3_enabled())
        with stock_head() if stock else head_function(FusedLogProbs(self.loss_options)):
            if step is None:
                return score(model, *args, **kwargs)
            step.scored += 1
            if step.scored > 1:
                return score(model, *args, **kwargs)
            logps, entropy, aux_loss = score(CallWithLoss(step), *args, **kwargs)
        if step.once:
            step.aux_loss = aux_loss
            mask, old_logps = step.arguments["completion_mask"], step.arguments["old_logps"]
            if old_logps is not None:
                # We have no logps of tokens that a tool wrote. TRL still forms their ratio, which becomes 1.
                logps = torch.where(mask.bool(), logps, old_logps)
        return logps, entropy, aux_loss

    def _learns_in_the_forward(self) -> bool:
        """Otherwise the backward needs the head, which DeepSpeed ZeRO-3 has sharded again by then."""
        try:
            return fusible(self._fusible_spec(), torch.float16 if self.args.fp16 else self.model.dtype)
        except ValueError:
            return False

    def _fusible_spec(self) -> LossSpec:
        """Raises ValueError where the loss cannot be made where the log-probabilities are."""
        if self._why_not_fused is not None:
            raise ValueError(self._why_not_fused)
        for name, unset in (("top_entropy_quantile", 1.0), ("off_policy_mask_threshold", None)):
            value = getattr(self, name)
            if value != unset:
                raise ValueError(f"{name}={value} weighs tokens by what the policy makes of them")
        if (
            self.loss_type == "vespo"
            and not self._has_own_spec
            and self.get_gamma_weights is not GRPOTrainer.get_gamma_weights
        ):
            raise ValueError("get_gamma_weights is overridden")
        spec = self.loss_spec()
        if not isinstance(spec, LossSpec):
            raise TypeError(f"loss_spec() must return a LossSpec, got {spec!r}")
        if spec.exact_kl is not None:
            raise ValueError(
                f"{spec.exact_kl} runs over the vocabulary: TRL has the reference's log-probabilities"
            )
        anchored = isinstance(spec.surrogate, Surrogate) and spec.surrogate.anchor == "ref"
        if not self.beta and (anchored or spec.sampled_kl is not None):
            raise ValueError(f"{spec} needs a reference, which TRL runs where beta is not 0")
        return spec

    def _step_of(self, inputs: dict[str, Any]) -> Step | None:
        """None: the loss is to be TRL's, of our log-probabilities."""
        try:
            spec = self._fusible_spec()
        except ValueError as reason:
            if self._has_own_spec:
                raise
            self._log_once(f"FusedGRPOTrainer: TRL's loss from linear_logps, because {reason}")
            return None
        self._log_once(f"FusedGRPOTrainer: loss in the model's forward, loss_type={self.loss_type!r}")
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        normalizer = self._normalizer(spec, inputs)
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        weighted = corrected or self.loss_type == "vespo"
        arguments = {
            "spec": replace(spec, entropy_coef=self._entropy_coef(spec, mask, normalizer)),
            "completion_mask": mask,
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs["ref_per_token_logps"] if self.beta else None,
            "token_weights": inputs.get("importance_sampling_ratio") if weighted else None,
            "normalizer": normalizer,
        }
        return Step(
            inputs["completion_ids"],
            inputs["completion_mask"],
            inputs["advantages"],
            arguments,
            self.loss_options,
        )

    def _normalizer(self, spec: LossSpec, inputs: dict[str, Any]) -> Tensor | None:
        """Tokens of all micro-batches of an optimizer step, per process; TRL counts those of a generation."""
        if self.loss_type not in COUNTED or spec.aggregation != "token-mean":
            return None
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return tokens * self._accumulation / self.args.steps_per_generation if self.model.training else tokens

    def _divisor(self, normalizer: Tensor | None) -> int:
        return self._accumulation if normalizer is None else 1

    def _entropy_coef(self, spec: LossSpec, mask: Tensor, normalizer: Tensor | None) -> float:
        if not self._entropy_bonus_enabled:
            return spec.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        if normalizer is None:
            return self.entropy_coef
        # Ours would be divided by the normalizer, TRL's bonus is a mean over the micro-batch. Syncs, because
        # a LossSpec holds numbers.
        return self.entropy_coef * float(normalizer / (mask.sum().clamp(min=1) * self._accumulation))

    def _disagree(self, step: Step, loss: Tensor | None, theirs: Tensor) -> bool:
        """Whether to compute this micro-batch again with TRL's loss, which is then used on all ranks.

        `loss` is None if the model was not called exactly once. If no call has computed our loss, `theirs`
        has all gradients, and nothing is computed again.
        """
        if loss is None:
            apart, gap = torch.tensor(step.computed > 0, device=theirs.device), None
        else:
            apart, gap = self._compare(step, loss.detach(), theirs)
        flags = torch.stack([apart, torch.full_like(apart, not step.computed)])
        # Syncs, as each of TRL's metrics does, because it decides which loss is returned.
        again, outside = self.accelerator.gather(flags[None]).reshape(-1, 2).any(0).tolist()
        if not (again or outside):
            return False
        why = step.why_not()
        if why is None and loss is not None and again:
            gradients = "" if gap is None else f", the gradients {float(gap):.2g} apart"
            logger.warning(
                f"FusedGRPOTrainer: with loss_type={self.loss_type!r} our loss is {float(loss):.7g}, TRL's "
                f"{float(theirs):.7g}{gradients}. From here on loss and log-probabilities are TRL's own"
            )
            self._handed_over = True
            return True
        self._why_not_fused = "on another rank the loss is TRL's" if why is None else self._explained(why)
        self._handed_over = zero3_enabled()
        logger.warning(f"FusedGRPOTrainer: from here on the loss is TRL's, because {self._why_not_fused}")
        return bool(again)

    def _explained(self, why: str) -> str:
        method = self._overrides("_get_per_token_logps_and_entropies")
        return why if method is None else f"{why} (see {method})"

    def _compare(self, step: Step, loss: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Whether TRL's loss of the same log-probabilities differs, and the distance of the gradients."""
        divisor = self._divisor(step.arguments["normalizer"])
        # The loss of tokens that all have an advantage of 1 and a ratio of 1.
        size = (step.completion_ids.shape[1] if self.loss_type == "luspo" else 1) / self._accumulation
        apart = ~((loss - theirs).abs() <= TOLERANCE * (size + theirs.abs())) & theirs.isfinite()
        apart |= step.other_tokens
        if not (self._gradient_checks and theirs.requires_grad):
            return apart, None
        wanted = step.gradient(theirs)
        error = (step.gradient(step.loss_of_logps() / divisor) - wanted).abs().sum()
        norm = wanted.abs().sum()
        # A batch without advantages proves nothing and does not count. Syncs, only while checks remain.
        self._gradient_checks -= int(norm > 0)
        return apart | (~(error <= TOLERANCE * (size + norm)) & norm.isfinite()), error / norm

    def _own_loss(self, step: Step) -> Tensor:
        """The loss of `loss_spec()`. TRL's loss is neither compared with it nor a replacement for it."""
        if step.once:
            loss, others = self._loss(step), self._log_own_metrics(step)
            if not others:
                return loss
        why = step.why_not() or "another rank was called with other tokens than those of its batch"
        raise ValueError(
            f"{self._explained(why)}. The loss of loss_spec() needs exactly one call of the model, with the "
            "whole batch, and TRL's loss cannot replace it"
        )

    def _log_own_metrics(self, step: Step) -> bool:
        """Log the loss's metrics. Return whether the model was called with other tokens on any rank."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        found = step.output.metrics
        rows = torch.stack([*found.values(), step.other_tokens.float()])[None]
        # One sync for all metrics. TRL syncs for each of its own.
        *values, others = self.accelerator.gather(rows).nanmean(0).tolist()
        for name, value in zip(found, values, strict=True):
            metrics[f"grpo_kernels/{name}"].append(value)
        return others > 0
