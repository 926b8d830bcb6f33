"""The losses from logits: check what comes in, lay it out by rows, call autograd, shape what goes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import (
    LossOutput,
    check_reference,
    logit_transform,
    loss_output,
    resolve_spec,
    token_inputs,
)
from .autograd import (
    RowConfig,
    fused_loss,
    fusible,
    loss_of_statistics,
    refuse_transforms,
    row_statistics,
)
from .backend import choose_backend, log_path, traced, two_kernels
from .batch import Batch, Vocabulary, by_rows, check_logits, check_writable
from .distributed import VocabShard, local_part
from .names import Aggregation, Backend, PresetName
from .options import GRPOLossOptions, LogRatioLossOptions
from .row_loss import coefficients
from .spec import LossSpec, PresetOptions
from .surrogates import LogRatio


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    spec: LossSpec | PresetName = LossSpec(),
    completion_mask: Tensor | None = None,
    seq_lens: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    old_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_logit_softcap: float | None = None,
    vocab_size: int | None = None,
    normalizer: float | Tensor | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
    shard: VocabShard | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """A GRPO-style policy loss from logits, with its gradient in one pass over them.

    Padded batches have `B` sequences of `T` tokens, packed ones `N` tokens of `S` sequences end to end.
    Formulas: docs/math.md; the losses' papers stand at the surrogates' classes. A number may be any real
    scalar, including NumPy's and 0-dim CPU tensors.

    Args:
        logits: `[B, T, V]` or `[N, V]`, fp16, bf16, fp32 or fp64. `logits[b, t]` predicts `completion_ids[b,
            t]`. Any strides but the last, which must be 1; never copied.
        completion_ids: `[B, T]` or `[N]`, int32 or int64.
        advantages: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`.
        spec: a `LossSpec`, or the name of a preset. The default is PPO-clip with "token-mean".
        completion_mask: `[B, T]` or `[N]`, bool, int or float; 0: not a completion token. What any argument
            holds at such a position never matters.
        seq_lens: packed only: `[S]` integers that sum to `N`; on the device of the logits, lest the host
            wait.
        ref_logits: the reference model's logits, as `logits`; no gradient.
        ref_logps: `[B, T]` or `[N]`, nats: its log-probabilities instead. Not both.
        old_logps: `[B, T]` or `[N]`, nats: the behaviour policy's. None: on-policy, the ratio is exactly 1.
        token_weights: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`: constant factor on the surrogate,
            before the KL term; of VESPO and GMPO, on the sequence's ratio (see there).
        temperature: a float, or `[B]`, `[B, 1]`, `[B, T]`, packed `[S]`, `[N]`.
        logit_scale, logit_softcap: `z -> softcap * tanh(z * scale / softcap)`, then `/ temperature`.
        ref_logit_scale, ref_logit_softcap: the reference's; None: as the policy's.
        vocab_size: columns from here on are padding: they take no part and get zero gradient. If it is given,
            policy and reference may have different numbers of columns.
        normalizer: a number or a 0-dim tensor. Replaces the denominator of the aggregation: the tokens
            (sequences) of all micro-batches and ranks. If gradients are averaged over ranks, as DDP and FSDP
            do, it is divided by the number of ranks. `global_normalizer` computes it.
        return_entropy: fill `entropy` and `metrics["entropy"]`.
        inplace: the gradient overwrites `logits`, at the latest in the backward. Autograd reports an
            operation that still needs the old values, as for any in-place operation; do not use them
            afterwards. Neither may they share memory with the reference's logits of other tokens. Under
            torch.compile the logits are kept.
        shard: logits (and `ref_logits`) hold these columns of a vocabulary that is split over ranks; ids are
            those of the whole vocabulary, as is `vocab_size`. All ranks get the same loss and outputs, each
            the gradient of its own columns. A DTensor is taken for its local part (`VocabShard.of(logits,
            dim=-1)`).
        backend: "triton", "torch", or "auto": triton on GPU tensors, torch elsewhere.

    Returns:
        LossOutput with `loss` (0-dim fp32, fp64 for fp64 logits), `metrics` (detached 0-dim tensors: means
        over the unmasked tokens of `log_ratio`, `ratio`, `clip_fraction`, `clip_fraction_low`,
        `clip_fraction_high`, `kl`, `kl_exact`, `entropy`, `active_fraction`, where they apply), and detached
        `[B, T]` or `[N]` tensors `logps`, `ref_logps`, `entropy` in nats, 0 at masked positions.

    Raises:
        ValueError: a wrong shape, dtype, device, enum value or a missing companion; TypeError: a wrong type.
            An unmasked id outside the vocabulary, or a NaN among what is given, makes the loss NaN. With
            GRPO_KERNELS_DEBUG=1 in the environment they raise ValueError with position and value, as do
            infinite advantages, token weights, hidden states and head weights, tensor temperatures that are
            not positive, and float masks with values other than 0 and 1. A batch without an unmasked token is
            then logged as a warning. Each of these checks syncs with the device.
    """
    spec, given = resolve_spec(spec), logits
    if shard is not None:
        logits, ref_logits = local_part(logits), None if ref_logits is None else local_part(ref_logits)
    check_logits("logits", logits)
    vocab = Vocabulary.of(vocab_size, logits, -1, "columns of logits", shard)
    batch = Batch.of(logits, completion_ids, completion_mask, seq_lens, vocab)
    batch.look_at(logits=logits[..., : vocab.width])
    check_reference(spec, ref_logits, ref_logps, "ref_logits")
    if ref_logits is not None:
        padded = vocab_size is not None
        check_logits("ref_logits", ref_logits, like=logits, width=vocab.width, padded=padded)
        batch.look_at(ref_logits=ref_logits[..., : vocab.width])
        ref_logits = by_rows(ref_logits.detach())
    # A graph copies what its operators overwrite, or else cannot tell what shares memory with its inputs.
    inplace = inplace and not traced(logits)
    if inplace:
        refuse_transforms(logits)  # whose tensors have no address to compare
        check_writable(by_rows(logits), given, ref_logits)
    config = RowConfig.of(
        spec,
        logit_transform(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, logits),
        reference=ref_logits is not None,
        entropy=return_entropy,
        inplace=inplace,
        shard=shard,
    )
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
    )
    tensors = (by_rows(logits), ref_logits, batch.targets, batch.temperatures(temperature))

    learns = torch.is_grad_enabled() and logits.requires_grad
    fused = inplace and learns and fusible(spec, logits.dtype) and shard is None
    path = "fused (loss and gradient in one kernel)" if fused else two_kernels(learns)
    ref_dtype = None if ref_logits is None else ref_logits.dtype
    log_path("grpo_loss", path, config.backend, logits=logits.dtype, ref_logits=ref_dtype)
    if fused:
        loss, dlogp, stats = fused_loss(*tensors, inputs, spec, config)
        derivatives = coefficients(spec, inputs, dlogp)
    else:
        loss, stats, derivatives = loss_of_statistics(
            row_statistics(*tensors, config), spec, inputs, batch.layout, config.backend
        )
    return loss_output(spec, batch, loss, stats, inputs, derivatives, config.backend)


def log_ratio_loss(
    logits: Tensor,
    ref_logits: Tensor,
    completion_ids: Tensor,
    rewards: Tensor,
    *,
    aggregation: Aggregation = "token-mean",
    **options: Unpack[LogRatioLossOptions],
) -> LossOutput:
    """`-aggregate(rewards * (logp - ref_logp))`: the reward-weighted log-ratio of policy and reference.

    Exactly `grpo_loss(logits, completion_ids, rewards, spec=LossSpec(LogRatio(), aggregation=aggregation),
    ref_logits=ref_logits, **options)`; see there for shapes, options, return value and errors. Its gradient
    is REINFORCE's: the reference is a constant in it. What does hold the policy near the reference:
    docs/math.md.
    """
    if "spec" in options:
        raise TypeError("log_ratio_loss has a fixed spec; use grpo_loss for another")
    spec = LossSpec(LogRatio(), aggregation=aggregation)
    return grpo_loss(logits, completion_ids, rewards, spec=spec, ref_logits=ref_logits, **options)


class LossModule(nn.Module):
    """A loss function as a module: the spec and the options that stay the same are given once."""

    function: Callable[..., LossOutput]

    def __init__(self, spec: LossSpec | PresetName = LossSpec(), **options: Any) -> None:
        super().__init__()
        self.option_names = tuple(name for name in self.function.__kwdefaults__ or {} if name != "spec")
        self.check(options, spec)
        self.spec = resolve_spec(spec)
        self.options = options

    def check(self, options: dict[str, Any], spec: LossSpec | PresetName) -> None:
        """Raise TypeError for an option that the function does not take."""
        unknown = [name for name in options if name not in self.option_names]
        if not unknown:
            return
        message = f"{type(self).__name__} has no option {', '.join(unknown)}"
        of_loss = [name for name in unknown if name in PresetOptions.__annotations__]
        if of_loss:
            preset = repr(spec) if isinstance(spec, str) else "name"
            given = "".join(f", {name}=..." for name in of_loss)
            message += f": options of the loss go into its spec, LossSpec.preset({preset}{given})"
        raise TypeError(f"{message}. The options are {', '.join(self.option_names)}")

    def call(self, *tensors: Tensor, spec: LossSpec | PresetName | None = None, **options: Any) -> LossOutput:
        """The function; options given here win over the module's."""
        spec = self.spec if spec is None else spec
        self.check(options, spec)
        return self.function(*tensors, **{"spec": spec, **self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.spec), *(f"{key}={value!r}" for key, value in self.options.items())])


class GRPOLoss(LossModule):
    """`grpo_loss` as a module: the spec and the options that stay the same are given once.

    ```python
    loss_fn = GRPOLoss("dapo", temperature=0.9)
    out = loss_fn(logits, completion_ids, advantages, completion_mask=mask, old_logps=old_logps)
    ```

    Args:
        spec: as in `grpo_loss`. Options of the loss, such as `eps_high`, go into `LossSpec.preset`.
        options: keyword arguments of `grpo_loss`.

    Raises:
        TypeError: an option that `grpo_loss` does not have; ValueError: an unknown preset.
    """

    function = staticmethod(grpo_loss)

    def __init__(self, spec: LossSpec | PresetName = LossSpec(), **options: Unpack[GRPOLossOptions]) -> None:
        super().__init__(spec, **options)

    def forward(
        self,
        logits: Tensor,
        completion_ids: Tensor,
        advantages: Tensor,
        *,
        spec: LossSpec | PresetName | None = None,
        **options: Unpack[GRPOLossOptions],
    ) -> LossOutput:
        """As `grpo_loss`; options given here win over the module's."""
        return self.call(logits, completion_ids, advantages, spec=spec, **options)

    if TYPE_CHECKING:  # nn.Module declares it as `Callable[..., Any]`, which takes everything

        def __call__(
            self,
            logits: Tensor,
            completion_ids: Tensor,
            advantages: Tensor,
            *,
            spec: LossSpec | PresetName | None = None,
            **options: Unpack[GRPOLossOptions],
        ) -> LossOutput: ...
