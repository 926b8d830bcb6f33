"""The losses from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from typing_extensions import Unpack

from .checks.choices import Aggregation, Backend, PresetName
from .checks.tensors import traced
from .log import kernel_path, log_path
from .options import GRPOLossOptions, LogRatioLossOptions
from .spec import LogitTransform, LossSpec, PresetOptions, resolve_spec
from .spec.surrogates import LogRatio
from .tokens.autograd import loss_of_statistics
from .tokens.batch import Batch
from .tokens.differentiation import refuse_transforms
from .tokens.inputs import check_reference, token_inputs
from .tokens.loss import BatchLoss
from .tokens.output import LossOutput, loss_output
from .vocab.autograd import differentiable_stats, fused_loss, fusible
from .vocab.dispatch import choose_backend
from .vocab.logits import check_logits, check_ref_logits, check_writable
from .vocab.rows import Rows, as_rows
from .vocab.sampling_mask import check_sampling_mask, kept_logits
from .vocab.shard import VocabShard, local_part
from .vocab.vocabulary import Vocabulary
from .vocab.want import Want


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
    sampling_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    prompt_ids: Tensor | None = None,
    return_entropy: bool = False,
    inplace: bool = False,
    shard: VocabShard | None = None,
    context_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """Compute a GRPO-style policy loss from logits in one pass over them, and its gradient in another.

    A padded batch has `B` sequences of `T` tokens. A packed batch has `N` tokens of `S` sequences, end to
    end. docs/math.md has the formulas, and the classes of the surrogates name the papers. A number may be any
    real scalar, including NumPy's and 0-dim CPU tensors.

    Args:
        logits: `[B, T, V]` or `[N, V]`, fp16, bf16, fp32 or fp64. `logits[b, t]` predicts `completion_ids[b,
            t]`. The last stride must be 1, the others may be any. They are never copied.
        completion_ids: `[B, T]` or `[N]`, int32 or int64.
        advantages: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`; `[N]` if S = N.
        spec: a `LossSpec`, or the name of a preset. The default is PPO-clip with "token-mean".
        completion_mask: `[B, T]` or `[N]`, bool, int or float. 0 means that the token is not part of the
            completion. The values of all other arguments at such a position are ignored.
        seq_lens: packed only: `[S]` integers that sum to `N`, on the device of the logits to avoid a sync.
        ref_logits: logits of the reference model, shaped as `logits`. They get no gradient.
        ref_logps: `[B, T]` or `[N]`, nats: log-probabilities of the reference model instead of `ref_logits`.
        old_logps: `[B, T]` or `[N]`, nats: log-probabilities of the behaviour policy. None means on-policy:
            the ratio is exactly 1.
        token_weights: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`; `[N]` if S = N.
            Constant factors of the surrogate, not of the KL term. In VESPO and GMPO they weight the
            sequence's ratio; see these classes.
        temperature: a float, or `[B]`, `[B, 1]`, `[B, T]`, packed `[S]`, `[N]`.
        logit_scale: a factor of the logits, before the softcap.
        logit_softcap: `z -> softcap * tanh(z / softcap)` after the scale, before `/ temperature`.
        ref_logit_scale: the same for the reference. None: that of the policy.
        ref_logit_softcap: the same for the reference. None: that of the policy.
        vocab_size: number of vocabulary entries. Later columns are ignored and get zero gradient. If it is
            given, policy and reference may have different numbers of columns.
        sampling_mask: `[B, T, W]` or `[N, W]` int32, `W = ceil(V / 32)`: the tokens that top-k, top-p or
            min-p sampling kept. Bit `v % 32` of word `v // 32` is 1 if token `v` was kept. `V` is
            `vocab_size`, or the number of columns; with a shard, that of its columns. Policy and reference
            are normalized over the kept tokens alone, as if the other logits were -inf, after the softcap. A
            taken token that was not kept has the log-probability -inf. `pack_sampling_mask` makes it.
        normalizer: a number or a 0-dim tensor that replaces the denominator of the aggregation: the number of
            tokens (or sequences) of all micro-batches and ranks. If gradients are averaged over ranks, as in
            DDP and FSDP, divide it by the number of ranks. `global_normalizer` computes it.
        prompt_ids: `[B]`; packed: `[S]`. Any integers: sequences with equal ids answer the same prompt. The
            aggregation "prompt-mean" needs them, and the others ignore them.
        return_entropy: fill `entropy` and `metrics["entropy"]`.
        inplace: let the gradient overwrite `logits`, in the forward or in the backward. Do not use them
            afterwards. As for any in-place operation, autograd raises an error if another operation still
            needs the old values; with hooks on saved tensors it cannot see that. A token's `logits` must not
            share memory with another token's `ref_logits`. Under torch.compile this option has no effect.
            Without it the gradient is a new tensor, which on a CPU the forward may already allocate.
        shard: `logits` and `ref_logits` are these columns of a vocabulary that is split over ranks. The
            ids and `vocab_size` are those of the whole vocabulary. All ranks get the same loss and outputs,
            and each gets the gradient of its own columns. If they are DTensors, their local parts
            are used, with `VocabShard.of(logits, dim=-1)`.
        context_group: the ranks over which the tokens of each sequence are split along T (context
            parallelism). Each rank gives its slices of the same sequences in the same order, which may differ
            in length or be empty, and for a packed batch their `seq_lens`. `loss` is this rank's share: the
            shares add up to the loss of the whole sequences, and each rank gets the gradient of its slices.
            The metrics are those of the whole batch. All ranks call the loss together, with the same options.
            They communicate if a sum over a sequence or a count of tokens is needed, and for the metrics. A
            `normalizer` counts the tokens of all ranks. With FSDP, which averages gradients over these ranks
            too, divide it by their number.
        backend: "triton", "torch", or "auto", which is triton for GPU tensors and torch otherwise.

    Returns:
        LossOutput with

        * `loss`: 0-dim fp32, fp64 for fp64 logits.
        * `metrics`: detached 0-dim tensors, means over the unmasked tokens: `log_ratio`, `ratio`,
          `clip_fraction`, `clip_fraction_low`, `clip_fraction_high`, `kl`, `kl_exact`, `entropy`,
          `active_fraction`. Those that do not apply are absent.
        * `logps`, `ref_logps`, `entropy`: detached `[B, T]` or `[N]`, nats, 0 at masked positions.

    Raises:
        ValueError: a wrong shape, dtype, device or name, or a missing argument that another one needs.
        TypeError: a wrong type.

    An unmasked id outside the vocabulary, or an unmasked NaN, makes the loss NaN. With GRPO_KERNELS_DEBUG=1
    in the environment these raise a ValueError that shows position and value. So do infinite advantages,
    token weights, hidden states and head weights, temperatures (as a tensor) that are not positive, and
    float masks with values other than 0 and 1. A batch without an unmasked token logs a warning. Each of
    these checks syncs with the device.

    Examples:
        >>> import torch
        >>> from grpo_kernels import grpo_loss
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)  # 2 completions of 3 tokens, a vocabulary of 5
        >>> ids, advantages = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([1.0, -0.5])
        >>> out = grpo_loss(logits, ids, advantages, spec="dapo")
        >>> out.loss.backward()
        >>> round(out.loss.item(), 4), round(out.logps[0, 0].exp().item(), 4)
        (-0.25, 0.2)
    """
    spec, given = resolve_spec(spec), logits
    if shard is not None:
        logits, ref_logits = local_part(logits), None if ref_logits is None else local_part(ref_logits)
    check_logits(logits)
    vocab = Vocabulary.of(vocab_size, logits, -1, "columns of logits", shard)
    batch = Batch.of(logits, completion_mask, seq_lens, context_group=context_group)
    targets = vocab.targets(batch, completion_ids)
    kept = check_sampling_mask(sampling_mask, batch, vocab.width)
    batch.debug_numbers(logits=kept_logits(logits[..., : vocab.width], kept))
    check_reference(spec, ref_logits, ref_logps, "ref_logits")
    if ref_logits is not None:
        check_ref_logits(ref_logits, logits, vocab.width, padded=vocab_size is not None)
        batch.debug_numbers(ref_logits=kept_logits(ref_logits[..., : vocab.width], kept))
        ref_logits = as_rows(ref_logits.detach())
    # A compiled graph copies what its operators overwrite, and cannot check which inputs share memory.
    inplace = inplace and not traced(logits)
    if inplace:
        refuse_transforms(logits)  # their tensors have no addresses to compare
        check_writable(as_rows(logits), given, ref_logits)
    rows = Rows(
        as_rows(logits),
        ref_logits,
        targets,
        batch.temperatures(temperature),
        kept,
        None,
        LogitTransform.of(
            vocab.width, temperature, logit_scale, logit_softcap, ref_logit_scale, ref_logit_softcap
        ),
        choose_backend(backend, logits),
    )
    want = Want.of(
        spec, reference=ref_logits is not None, entropy=return_entropy, inplace=inplace, shard=shard
    )
    inputs = token_inputs(
        spec,
        batch,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        token_weights=token_weights,
        normalizer=normalizer,
        prompt_ids=prompt_ids,
    )
    loss = BatchLoss(spec, inputs, batch.sequences)

    learns = torch.is_grad_enabled() and logits.requires_grad
    # On a CPU arithmetic is the bottleneck, and one pass computes the exponentials once. On a GPU memory is,
    # and both ways move the same bytes.
    on_cpu = rows.backend == "torch" and logits.device.type == "cpu" and not traced(logits)
    one_pass = inplace or (on_cpu and logits.dtype == torch.float32)
    fused = one_pass and learns and fusible(spec, logits.dtype) and shard is None
    path = "fused (loss and gradient in one kernel)" if fused else kernel_path(learns)
    ref_dtype = None if ref_logits is None else ref_logits.dtype
    log_path("grpo_loss", path, rows.backend, logits=logits.dtype, ref_logits=ref_dtype)
    if fused:
        value, dlogp, stats = fused_loss(rows, loss, want)
        derivatives = loss.coefficients(dlogp)
    else:
        value, stats, derivatives = loss_of_statistics(differentiable_stats(rows, want), loss, rows.backend)
    return loss_output(value, batch, loss, stats, derivatives, rows.backend)


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

    The same as `grpo_loss(logits, completion_ids, rewards, spec=LossSpec(LogRatio(),
    aggregation=aggregation), ref_logits=ref_logits, **options)`, which documents shapes, options, return
    value and errors. Its gradient is that of REINFORCE, because the reference is a constant. docs/math.md
    explains what keeps a policy near the reference.

    Args:
        logits: `[B, T, V]` or `[N, V]`, as in `grpo_loss`.
        ref_logits: shaped as `logits`. They get no gradient.
        completion_ids: `[B, T]` or `[N]`, int32 or int64.
        rewards: `[B]`, `[B, 1]` or `[B, T]`; packed: `[S]` or `[N]`; `[N]` if S = N.
        aggregation: as in `LossSpec`.
        **options: the other options of `grpo_loss`, except for `spec`.

    Returns:
        LossOutput as in `grpo_loss`.

    Raises:
        ValueError, TypeError: as in `grpo_loss`. Also TypeError for `spec`.

    Examples:
        >>> import torch
        >>> from grpo_kernels import log_ratio_loss
        >>> logits = torch.zeros(1, 1, 4)  # each of 4 tokens has the probability 0.25
        >>> ref_logits = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]]).log()
        >>> out = log_ratio_loss(logits, ref_logits, torch.tensor([[0]]), torch.tensor([2.0]))
        >>> round(out.loss.item(), 4)  # -2 log(0.25 / 0.7)
        2.0592
    """
    if "spec" in options:
        raise TypeError("log_ratio_loss has a fixed spec; use grpo_loss for another")
    spec = LossSpec(LogRatio(), aggregation=aggregation)
    return grpo_loss(logits, completion_ids, rewards, spec=spec, ref_logits=ref_logits, **options)


class LossModule(nn.Module):
    """Base class of the modules: a loss function with a spec and default options."""

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
            message += f": give options of the loss in its spec, LossSpec.preset({preset}{given})"
        raise TypeError(f"{message}. The options are {', '.join(self.option_names)}")

    def call(self, *tensors: Tensor, spec: LossSpec | PresetName | None = None, **options: Any) -> LossOutput:
        """Call the function. Options given here override those of the module."""
        spec = self.spec if spec is None else spec
        self.check(options, spec)
        return self.function(*tensors, **{"spec": spec, **self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.spec), *(f"{key}={value!r}" for key, value in self.options.items())])


class GRPOLoss(LossModule):
    """`grpo_loss` as a module, with a spec and default options.

    Args:
        spec: as in `grpo_loss`. Options of the loss, such as `eps_high`, go into `LossSpec.preset`.
        **options: keyword arguments of `grpo_loss`.

    Raises:
        TypeError: an option that `grpo_loss` does not have.
        ValueError: an unknown preset.

    Examples:
        >>> import torch
        >>> from grpo_kernels import GRPOLoss
        >>> loss_fn = GRPOLoss("dapo", temperature=0.9)
        >>> batch = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([1.0, -0.5])
        >>> out = loss_fn(*batch, completion_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> round(out.loss.item(), 4)  # -(3 * 1.0 - 2 * 0.5) / 5
        -0.4
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
        """Call `grpo_loss`. Options given here override those of the module."""
        return self.call(logits, completion_ids, advantages, spec=spec, **options)

    if TYPE_CHECKING:  # nn.Module declares it as `Callable[..., Any]`, which accepts any argument

        def __call__(
            self,
            logits: Tensor,
            completion_ids: Tensor,
            advantages: Tensor,
            *,
            spec: LossSpec | PresetName | None = None,
            **options: Unpack[GRPOLossOptions],
        ) -> LossOutput: ...
