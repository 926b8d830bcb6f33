"""`FusedGRPOTrainer`, TRL's GRPOTrainer with our loss."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...log import OnceLogger, logger
from ...spec import LossSpec
from ...vocab.autograd import fusible
from .comparison import Difference, compare_losses
from .fallback import check_settings, check_spec, find_override, refuse_data_parallel, refuse_unknown_options
from .head import FusedLogProbs, GRPOTrainer, head_function, stock_head, zero3_enabled
from .metrics import LoggedState, log_own_metrics
from .model import add_fused_loss, cast_own_head, ignored_forward
from .normalizer import accumulated_micro_batches, micro_batch_divisor
from .settings import loss_arguments, spec_of_settings
from .step import CallWithLoss, Step

# Number of micro-batches whose gradients are compared. Later, a ratio within rounding of its clip bound may
# be clipped by only one of the losses. That changes the gradient, but hardly the loss.
GRADIENT_CHECKS = 8


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with a loss that the model's forward computes from hidden states.

    The forward calls `linear_grpo_loss`. Constructor, `GRPOConfig`, sampling, rewards and logged metrics are
    those of TRL. TRL's `_compute_loss` still runs on the log-probabilities of our loss, and its loss is
    compared with ours. On the first micro-batches, so are the gradients. If they differ by more than 1e-3 of
    the loss's size, a warning shows both numbers, and loss and log-probabilities are TRL's from that
    micro-batch on.

    With `top_entropy_quantile` or `off_policy_mask_threshold`, the token weights depend on the policy's
    entropies or log-probabilities. TRL then computes its own loss from log-probabilities of `linear_logps`.
    The logger "grpo_kernels" names the choice at level INFO.

    Examples:
        `model`, `reward`, `args` (a `GRPOConfig`) and `prompts` are those of TRL's trainer.

        >>> from grpo_kernels.integrations.trl import FusedGRPOTrainer  # instead of TRL's GRPOTrainer
        >>> trainer = FusedGRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts)
        >>> trainer.loss_spec().surrogate  # the loss that args ask for
        PPOClip(eps_low=0.2, eps_high=0.2, delta=None, dual_clip=None)
    """

    loss_options: ClassVar[dict[str, Any]] = {}
    """Options that a subclass may set: `chunk_tokens`, `logits_dtype`, `compact` and `backend`.

    They go to `linear_grpo_loss`, and to `linear_logps` for the old and the reference's log-probabilities.
    """

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_data_parallel(args[0] if args else kwargs.get("model"))
        refuse_unknown_options(self.loss_options)
        super().__init__(*args, **kwargs)
        if self.args.cast_lm_head_to_fp32:
            cast_own_head(self.model)
        add_fused_loss(self.model)
        self._fused_step: Step | None = None
        self._gradient_checks = GRADIENT_CHECKS
        self._log_once = OnceLogger(logging.INFO)  # once per trainer, not once per process
        self._why_not_fused: str | None = None
        ignored = ignored_forward(self.model)
        if ignored is not None:
            logger.warning(
                f"FusedGRPOTrainer: {ignored} is not run. As in TRL, log-probabilities are computed from the "
                "weight and bias of the head"
            )
        # `super()._compute_loss` may call a class between this one and TRL's.
        other = find_override(type(self), "_compute_loss", start=FusedGRPOTrainer, ours=FusedGRPOTrainer)
        if other is not None:
            self._why_not_fused = f"{other} comes after FusedGRPOTrainer in the method resolution order"
        if self._has_own_spec:
            try:
                self._fusible_spec()
            except AttributeError as error:
                # A subclass may set attributes that loss_spec() reads after `super().__init__()`. They are
                # checked again before the first generation.
                logger.debug(f"FusedGRPOTrainer: loss_spec() is not complete in the constructor: {error}")
        elif other is not None:
            logger.warning(f"FusedGRPOTrainer: the loss is TRL's, because {self._why_not_fused}")
        self._handed_over = zero3_enabled() and not self._has_gradient_in_the_forward()
        if self._handed_over and self._has_own_spec:
            raise ValueError(
                "under DeepSpeed ZeRO-3 the forward has to compute the gradient of your own loss_spec(). "
                "It can if the LossSpec is token-local, without fp16, top_entropy_quantile and "
                "off_policy_mask_threshold"
            )
        if self._handed_over:
            logger.warning("FusedGRPOTrainer: under DeepSpeed ZeRO-3 this loss remains TRL's own")

    def loss_spec(self) -> LossSpec:
        """Return the loss that `args` ask for, without its entropy bonus. Called for every micro-batch.

        Override this method to train on another loss, such as `LossSpec.preset("log_ratio")`. Then:

        * Our loss is not compared with TRL's. TRL still logs the metrics of its `loss_type`; ours are logged
          under `grpo_kernels/`.
        * The reference's log-probabilities are available if `beta` is not 0.
        * The spec's `entropy_coef` applies if `args` ask for no entropy bonus.
        * A "token-mean" counts the tokens of all micro-batches of the step if `loss_type` is "dapo", "cispo"
          or "vespo". Otherwise the loss is the mean of the micro-batches' losses.

        Returns:
            The loss of the next micro-batch.

        Raises:
            ValueError: no LossSpec describes `args`. The loss is then TRL's.

        Examples:
            >>> from grpo_kernels import LossSpec
            >>> from grpo_kernels.integrations.trl import FusedGRPOTrainer
            >>> class CispoTrainer(FusedGRPOTrainer):
            ...     def loss_spec(self):
            ...         return LossSpec.preset("cispo", ratio_max=4.0)
            >>> trainer = CispoTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts)
        """
        return spec_of_settings(self)

    def sampling_mask(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the `sampling_mask` of a micro-batch, `[B, T, ceil(V / 32)]`, or None. See `grpo_loss`.

        It is that of the batch, if there is one. TRL 1.16 does not make one. A subclass adds it to the result
        of `_generate_and_score_completions`, and TRL splits and shuffles it with the other tensors. Or it
        overrides this method.
        """
        return inputs.get("sampling_mask")

    @property
    def _has_own_spec(self) -> bool:
        return getattr(self.loss_spec, "__func__", None) is not FusedGRPOTrainer.loss_spec

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self._has_own_spec:
            self._fusible_spec()  # raises before generation and rewards take their time
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        refuse_data_parallel(model)
        step = None if self._handed_over else self._step_of(inputs)
        if step is None:
            return super()._compute_loss(model, inputs)
        step.start(model)
        before = LoggedState.of(self)
        self._fused_step = step
        try:
            theirs = super()._compute_loss(model, inputs)
        finally:
            self._fused_step = None
        if self._has_own_spec:
            return self._own_loss(step)
        loss = self._loss(step) if step.once else None
        if self._disagree(step, loss, theirs):
            before.restore(self)
            return super()._compute_loss(model, inputs)
        return theirs if loss is None else loss

    def _step_of(self, inputs: dict[str, Any]) -> Step | None:
        """Return a new step, or None if TRL computes its loss from our log-probabilities."""
        try:
            spec = self._fusible_spec()
        except ValueError as reason:
            if self._has_own_spec or self.sampling_mask(inputs) is not None:
                raise
            self._log_once(f"FusedGRPOTrainer: TRL's loss from linear_logps, because {reason}")
            return None
        self._log_once(f"FusedGRPOTrainer: loss in the model's forward, loss_type={self.loss_type!r}")
        return Step(
            inputs["completion_ids"],
            inputs["completion_mask"],
            inputs["advantages"],
            loss_arguments(self, spec, inputs),
            {**self.loss_options, "sampling_mask": self.sampling_mask(inputs)},
        )

    def _fusible_spec(self) -> LossSpec:
        """Return the loss that the forward computes. Raise ValueError with a reason if it cannot."""
        if self._why_not_fused is not None:
            raise ValueError(self._why_not_fused)
        check_settings(self, own_spec=self._has_own_spec)
        return check_spec(self.loss_spec(), beta=self.beta)

    def _has_gradient_in_the_forward(self) -> bool:
        """Return whether the forward computes the gradient, so that the backward does not need the head."""
        try:
            return fusible(self._fusible_spec(), torch.float16 if self.args.fp16 else self.model.dtype)
        except ValueError:
            return False

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
                # Our loss has no log-probabilities of tokens that a tool wrote. TRL still computes their
                # ratio, which is 1 with this replacement.
                logps = torch.where(mask.bool(), logps, old_logps)
        return logps, entropy, aux_loss

    def _loss(self, step: Step) -> Tensor:
        loss = step.loss / micro_batch_divisor(self, step.arguments["normalizer"])
        if step.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * step.aux_loss / accumulated_micro_batches(self)
        return loss

    def _own_loss(self, step: Step) -> Tensor:
        """Return the loss of an overridden `loss_spec()`, which TRL's loss cannot replace."""
        if step.once:
            loss, others = self._loss(step), log_own_metrics(self, step)
            if not others:
                return loss
        why = step.why_not() or "another rank was called with other tokens than those of its batch"
        raise ValueError(
            f"{self._with_override(why)}. The loss of loss_spec() needs exactly one call of the model, with "
            "the whole batch, and TRL's loss cannot replace it"
        )

    def _disagree(self, step: Step, loss: Tensor | None, theirs: Tensor) -> bool:
        """Return whether this micro-batch has to be computed again with TRL's loss, on all ranks.

        Args:
            step: the micro-batch.
            loss: our loss; None if the model was not called exactly once.
            theirs: TRL's loss. If no call of the model computed our loss, the gradient of TRL's loss is
                complete, and this rank need not compute the micro-batch again.
        """
        if loss is None:
            found = Difference(torch.tensor(step.computed > 0, device=theirs.device))
        else:
            found = self._compare(step, loss.detach(), theirs)
        flags = torch.stack([found.too_large, torch.full_like(found.too_large, not step.computed)])
        # Syncs with the device, as each of TRL's metrics does, because the result decides between two losses.
        again, outside = self.accelerator.gather(flags[None]).reshape(-1, 2).any(0).tolist()
        if not (again or outside):
            return False
        why = step.why_not()
        if why is None and loss is not None and again:
            gap = "" if found.gradients is None else f", the gradients {float(found.gradients):.2g} apart"
            logger.warning(
                f"FusedGRPOTrainer: with loss_type={self.loss_type!r} our loss is {float(loss):.7g}, TRL's "
                f"{float(theirs):.7g}{gap}. From here on loss and log-probabilities are TRL's own"
            )
            self._handed_over = True
            return True
        self._why_not_fused = "on another rank the loss is TRL's" if why is None else self._with_override(why)
        self._handed_over = zero3_enabled()
        logger.warning(f"FusedGRPOTrainer: from here on the loss is TRL's, because {self._why_not_fused}")
        return bool(again)

    def _compare(self, step: Step, loss: Tensor, theirs: Tensor) -> Difference:
        length = step.completion_ids.shape[1] if self.loss_type == "luspo" else 1
        found = compare_losses(
            step,
            loss,
            theirs,
            size=length / accumulated_micro_batches(self),
            divisor=micro_batch_divisor(self, step.arguments["normalizer"]),
            with_gradients=self._gradient_checks > 0 and theirs.requires_grad,
        )
        if found.norm is not None:
            # A batch without advantages proves nothing and does not count. This line syncs with the device,
            # only while checks remain.
            self._gradient_checks -= int(found.norm > 0)
        return found

    def _with_override(self, why: str) -> str:
        """Add the name of a method that may have called the model in another way."""
        method = find_override(
            type(self), "_get_per_token_logps_and_entropies", start=type(self), ours=FusedGRPOTrainer
        )
        return why if method is None else f"{why} (see {method})"
