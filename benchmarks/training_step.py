"""Training steps of a real model, in TRL's GRPOTrainer and in a plain loop, by stock losses and by ours.

    python -m benchmarks.training_step           # the shape of Qwen2.5-0.5B, 8 sequences of 512 + 3584 tokens
    python -m benchmarks.training_step --tiny    # does everything run? needs no GPU

Weights and tokens are random; bf16 (on a CPU fp32), SDPA, gradient checkpointing, AdamW. A step is forward,
backward, clipping of the gradients and optimizer, on samples at hand; of grpo_kl also the reference's
forward. The first step's loss and gradients are compared with those under a head that is multiplied out in
fp32. The floor is the step whose loss is a mean of hidden states, in the same trainer or loop: what a step
takes beyond it is the loss's, a trainer's metrics included.

Memory is the most that PyTorch had allocated, model and optimizer included (on a CPU: by how much the process
grew). Who runs out of it with 8 sequences in a micro-batch is tried again with half as many.

TRL 1.16 has no eager loss left: its stock is a chunked head, in Triton on a GPU. Its `use_liger_kernel` swaps
layers and not the loss, and would do so for all that run after it; Liger's loss is here in the plain loop.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_kernels.testing import peak_memory

from . import measure, providers, record, trainers
from .__main__ import QUANTILES, first_line
from .workload import BETA, SEQUENCES, Batch, Workload, token_losses

WARM_UP = 2  # steps; the first compiles, the second is the first with an optimizer's state
LEARNING_RATE = 1e-6
POLICY, REFERENCE = 0, 1  # seeds
MODELS: dict[str, dict[str, int]] = {
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 521,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# By bytes of the dtype: the loss relative to a token's mean magnitude, gradients in L2. In bf16, eager's of a
# small model were seen to err 6e-3.
TOLERANCE = {2: {"loss": 1e-3, "gradient": 5e-2}, 4: {"loss": 1e-5, "gradient": 1e-3}}
FLOOR = "no loss"


@dataclass(frozen=True)
class Case:
    model: str  # of MODELS
    loss: str
    device: torch.device
    prompt: int  # tokens of each sequence
    completion: int
    inactive: float  # fraction of the sequences without advantage
    steps: int  # that are timed

    @property
    def work(self) -> Workload:
        sizes = MODELS[self.model]
        return Workload(
            *("linear", self.loss, SEQUENCES * self.completion, sizes["vocab_size"], sizes["hidden_size"]),
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            inactive=self.inactive,
        )


class Samples(NamedTuple):
    ids: Tensor  # [B, P + T]
    old_logps: Tensor  # [B, T]
    advantages: Tensor  # [B]

    def micro_batches(self, sequences: int) -> Iterator[Samples]:
        return (Samples(*parts) for parts in zip(*(x.split(sequences) for x in self), strict=True))


class Truth(NamedTuple):
    loss: float
    token_loss: float  # mean magnitude
    gradients: list[Tensor]  # on the CPU, of model.parameters()


class Subject(NamedTuple):
    model: Any
    train: Callable[[trainers.Watch], None]  # WARM_UP + case.steps steps


def make_model(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**MODELS[case.model], tie_word_embeddings=True)
    with torch.device(case.device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=case.work.dtype, attn_implementation="sdpa"
        )


def make_models(case: Case) -> tuple[Any, Any]:
    """Policy and, where the loss has one, reference."""
    policy = make_model(case, POLICY).train()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, make_model(case, REFERENCE).eval().requires_grad_(False) if case.work.reference else None


def hidden_of(model: Any, ids: Tensor, completion: int) -> Tensor:
    """`[B, T, H]`: those that predict the completions' tokens."""
    return model.model(ids, use_cache=False).last_hidden_state[:, -completion - 1 : -1]


def exact_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """`[B, T]` fp32 of products in fp32, the logits of one sequence at a time."""
    weight = weight.float()

    def of_sequence(hidden: Tensor, ids: Tensor) -> Tensor:
        return providers.eager_logps(hidden.float() @ weight.t(), ids)

    return torch.stack([
        checkpoint(of_sequence, *one, use_reentrant=False) for one in zip(hidden, ids, strict=True)
    ])  # fmt: skip


def make_samples(case: Case) -> tuple[Samples, Truth]:
    """Tokens at random, as of a policy one small step ago, and what the step is to be.

    As in `workload.make_batch`, one token in 50 has moved far, and no ratio is near a bound of the clip.
    """
    generator = torch.Generator().manual_seed(2)
    shape = SEQUENCES, case.completion
    ids = torch.randint(case.work.V, (SEQUENCES, case.prompt + case.completion), generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    advantages[: round(case.inactive * SEQUENCES)] = 0.0
    moved = torch.where(torch.rand(shape, generator=generator) < 0.02, 1.0, 0.05)
    moved *= torch.randn(shape, generator=generator).sign()
    ids, advantages, moved = (x.to(case.device) for x in (ids, advantages, moved))

    model, reference = make_models(case)
    targets = ids[:, case.prompt :]
    logps = exact_logps(hidden_of(model, ids, case.completion), model.lm_head.weight, targets)
    ref_logps = None
    if reference is not None:
        ref_logps = exact_logps(hidden_of(reference, ids, case.completion), reference.lm_head.weight, targets)
    old_logps = logps.detach() - moved
    losses = token_losses(case.work, logps, old_logps, ref_logps, advantages)
    losses.mean().backward()
    loss, token_loss = losses.mean().item(), losses.abs().mean().item()
    return Samples(ids, old_logps, advantages), Truth(
        loss, token_loss, [p.grad.cpu() for p in model.parameters()]
    )


def plain_loop(
    case: Case, samples: Samples, folder: Path, micro_batch: int, *, loss: providers.Loss
) -> Subject:
    """`loss`: of benchmarks.providers, from hidden states."""
    model, reference = make_models(case)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def loss_of(part: Samples) -> Tensor:
        hidden, ref_hidden, ref_weight = hidden_of(model, part.ids, case.completion), None, None
        if reference is not None:
            ref_hidden = hidden_of(reference, part.ids, case.completion)
            ref_weight = reference.lm_head.weight
        targets = part.ids[:, case.prompt :]
        mask = torch.ones_like(targets, dtype=torch.bool)
        tokens = targets, mask, part.advantages, part.old_logps
        heads = hidden, model.lm_head.weight, ref_hidden, ref_weight
        batch = Batch(case.work, *tokens, None, None, *heads, truth=None)
        return loss(batch, hidden, model.lm_head.weight) * micro_batch / SEQUENCES

    def train(watch: trainers.Watch) -> None:
        for _ in range(WARM_UP + case.steps):
            watch.begin()
            for part in samples.micro_batches(micro_batch):
                value = loss_of(part)
                value.backward()
                watch.after_backward(value.detach())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            watch.end()

    return Subject(model, train)


def trl_trainer(
    case: Case,
    samples: Samples,
    folder: Path,
    micro_batch: int,
    *,
    fused_loss: bool = False,
    fused_logps: bool = False,
    without_loss: bool = False,
) -> Subject:
    from trl import GRPOTrainer

    from grpo_kernels.integrations.trl import FusedGRPOTrainer

    model = make_model(case, POLICY)
    model.config._name_or_path = str(folder)  # TRL loads the reference from where the policy came from
    mixin = trainers.WithoutLoss if without_loss else trainers.OnSamples
    bases = mixin, FusedGRPOTrainer if fused_loss else GRPOTrainer
    trainer = trainers.grpo_trainer(
        type("Trainer", bases, {}),
        model,
        folder,
        SEQUENCES,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=SEQUENCES // micro_batch,
        max_completion_length=case.completion,
        max_steps=WARM_UP + case.steps,
        beta=BETA if case.work.reference else 0.0,
        use_bias_correction_kl=False,
        learning_rate=LEARNING_RATE,
        bf16=case.work.dtype == torch.bfloat16,
        use_cpu=case.device.type == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )

    def train(watch: trainers.Watch) -> None:
        with trainers.fused_logps() if fused_logps else nullcontext():
            trainer.train_on(trainers.grpo_inputs(*samples), watch)
        if fused_loss and trainer._handed_over:
            raise RuntimeError("FusedGRPOTrainer has left the loss to TRL")

    return Subject(model, train)


def mean_of_hidden(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float().mean()


@dataclass(frozen=True)
class Way:
    """To take the step."""

    host: str  # "TRL" or "PyTorch"
    what: str
    make: Callable[..., Subject]
    package: str | None = None

    @property
    def name(self) -> str:
        return f"{self.host}: {self.what}"

    @property
    def version(self) -> str:
        return (self.package and providers.installed_version(self.package)) or ""


def in_plain_loop(name: str) -> Way:
    provider = providers.PROVIDERS["linear"][name]
    return Way("PyTorch", name, functools.partial(plain_loop, loss=provider.loss), provider.package)


def in_trl(what: str, **how: bool) -> Way:
    return Way("TRL", what, functools.partial(trl_trainer, **how), "trl")


# The most informative first, for a run may end at its limit; a floor before what is compared with it.
WAYS = {
    way.name: way
    for way in (
        in_trl(FLOOR, without_loss=True),
        in_trl("stock"),
        in_trl("FusedGRPOTrainer", fused_loss=True),
        in_trl("fuse_trl_logps", fused_logps=True),
        Way("PyTorch", FLOOR, functools.partial(plain_loop, loss=mean_of_hidden)),
        in_plain_loop("eager"),
        in_plain_loop("grpo_kernels"),
        in_plain_loop("liger"),
        in_plain_loop("torch.compile"),
    )
}


class Meter:
    """Compares the first step with the truth, if there is one, and times those after the warm-up."""

    def __init__(self, case: Case, model: Any, micro_batches: int, truth: Truth | None) -> None:
        self.case, self.model, self.truth = case, model, truth
        self.remaining = micro_batches  # of the first step
        self.loss = 0.0
        self.errors: dict[str, float] = {}
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.start = self.now()

    def after_backward(self, loss: Tensor) -> None:
        if self.truth is None or not self.remaining:
            return
        self.loss += loss.item()
        self.remaining -= 1
        if not self.remaining:
            self.errors = self.compare(self.truth)

    def end(self) -> None:
        self.seconds.append(self.now() - self.start)

    def now(self) -> float:
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def compare(self, truth: Truth) -> dict[str, float]:
        head = self.model.get_output_embeddings().weight
        squares = {"head": [0.0, 0.0], "backbone": [0.0, 0.0]}
        for parameter, gradient in zip(self.model.parameters(), truth.gradients, strict=True):
            want = gradient.to(self.case.device, torch.float32)
            of = squares["head" if parameter is head else "backbone"]
            of[0] += (parameter.grad.float() - want).square().sum().item()
            of[1] += want.square().sum().item()
        errors = {f"gradient of the {name}": (e / n) ** 0.5 for name, (e, n) in squares.items()}
        return {"loss": abs(self.loss - truth.loss) / truth.token_loss} | errors


class Outcome(NamedTuple):
    status: str  # "ok", what differs from the truth and by how much, or why there are no figures
    timing: measure.Timing | None = None
    peak_mib: float | None = None
    loss: float | None = None  # of the first step
    errors: Mapping[str, float] = MappingProxyType({})


def verdict(case: Case, errors: Mapping[str, float]) -> str:
    tolerance = TOLERANCE[case.work.dtype.itemsize]
    wrong = (
        f"{what} differs by {x:.1e}" for what, x in errors.items() if not x <= tolerance[what.split()[0]]
    )
    return ", ".join(wrong) or "ok"


class Run:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder = folder  # of the reference, and for what trainers write
        sizes = ("tiny", 8, 24) if args.tiny else (args.model, 512, 3584)
        self.cases = [
            Case(sizes[0], loss, args.device, *sizes[1:], args.inactive, args.steps)
            for loss in args.loss or ("grpo", "grpo_kl")
        ]
        wanted = [WAYS[name] for name in args.way or WAYS]
        hosts = {way.host for way in wanted}
        self.ways = [w for w in WAYS.values() if w in wanted or (w.what == FLOOR and w.host in hosts)]
        self.device: torch.device = args.device
        self.limit: float = args.limit
        self.started = time.monotonic()
        self.floors: dict[tuple[str, str], float] = {}  # ms, by host and loss
        self.table = record.Table(args.output)

    def __call__(self) -> None:
        for case in self.cases:
            samples, truth = make_samples(case)
            if case.work.reference:
                make_model(case, REFERENCE).save_pretrained(self.folder)
            self.clean()
            print(f"{case.model}, {case.work}: loss {truth.loss:.6g}", flush=True)
            for way in self.ways:
                self.take(case, way, samples, truth)

    def take(self, case: Case, way: Way, samples: Samples, truth: Truth) -> None:
        """With as many sequences in a micro-batch as the memory allows."""
        micro_batch = SEQUENCES
        while micro_batch:
            outcome = self.attempt(case, way, samples, truth, micro_batch)
            self.clean()
            self.write(case, way, micro_batch, outcome)
            micro_batch = micro_batch // 2 if "OutOfMemoryError" in outcome.status else 0

    def attempt(self, case: Case, way: Way, samples: Samples, truth: Truth, micro_batch: int) -> Outcome:
        if way.package is not None and providers.installed_version(way.package) is None:
            return Outcome(f"skipped: {way.package} is not installed")
        if time.monotonic() - self.started > self.limit:
            return Outcome(f"not run: the limit of {self.limit:g} s was reached")
        try:
            subject = way.make(case, samples, self.folder, micro_batch)
            compared = None if way.what == FLOOR else truth
            meter = Meter(case, subject.model, SEQUENCES // micro_batch, compared)
            model = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
            peak = model + peak_memory(lambda: subject.train(meter), self.device)
        # Whatever somebody dies of belongs into the table, and the others go on.
        except Exception as error:
            traceback.print_exc(limit=-3)
            return Outcome(f"failed: {type(error).__name__}: {first_line(error)}")
        timing = measure.quantiles(torch.tensor(meter.seconds[WARM_UP:], dtype=torch.float64))
        loss = meter.loss if meter.errors else None
        return Outcome(verdict(case, meter.errors), timing, peak / 2**20, loss, meter.errors)

    def clean(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self, case: Case, way: Way, micro_batch: int, outcome: Outcome) -> None:
        """Rows of speed, memory and loss, or one that says why there are none."""
        work = {**asdict(case.work), "dtype": str(case.work.dtype)[6:]}
        sizes = {
            "model": case.model,
            "prompt": case.prompt,
            "sequences": SEQUENCES,
            "micro_batch": micro_batch,
        }
        name = way.name if micro_batch == SEQUENCES else f"{way.name}, micro-batch {micro_batch}"
        common = {
            "kernel_name": f"training_step {case.loss}",
            "kernel_provider": name,
            "kernel_operation_mode": "full",
            "x_value": case.work.T,
            "extra_benchmark_config_str": json.dumps(work | sizes),
            "status": outcome.status,
            "provider_version": way.version,
        }
        ms = outcome.timing
        if ms is None:
            self.add(common, metric_name="speed", metric_unit="ms")
            print(f"  {name}: {outcome.status}", flush=True)
            return
        speed = dict(zip(QUANTILES, ms, strict=True))
        if way.what == FLOOR:
            self.floors[way.host, case.loss] = ms.median
            common |= {"kernel_name": "floor", "kernel_provider": f"{name}, {case.loss}"}
        else:
            floor_ms = self.floors.get((way.host, case.loss))
            common |= {"floor": "the step without a loss"}
            errors = [error for what, error in outcome.errors.items() if what != "loss"]
            speed["max_rel_err"] = max(errors)
            if floor_ms is not None:
                speed["pct_of_floor"] = 100 * floor_ms / ms.median
                rest = {"kernel_operation_mode": "loss", "y_value_50": ms.median - floor_ms}
                self.add(common | rest, metric_name="speed", metric_unit="ms")
            first = {"kernel_operation_mode": "first step", "y_value_50": outcome.loss}
            self.add(common | first, metric_name="loss", max_rel_err=outcome.errors["loss"])
        peak = dict.fromkeys(QUANTILES, outcome.peak_mib)
        self.add(common | speed, metric_name="speed", metric_unit="ms")
        self.add(common | peak, metric_name="memory", metric_unit="MiB")
        print(
            f"  {name}: {ms.median:.4g} ms ({ms.low:.4g} to {ms.high:.4g}), {outcome.peak_mib:.0f} MiB",
            *(f"{what} differs by {error:.1e}" for what, error in outcome.errors.items()),
            sep=", ",
            flush=True,
        )

    def add(self, common: dict[str, object], **values: object) -> None:
        empty = {f.name: None if "None" in str(f.type) else "" for f in fields(record.Row)}
        here = {"gpu_name": record.device_name(self.device), "timestamp": record.timestamp()}
        axis = {"x_name": "T", "x_label": "tokens"}
        self.table.add(record.Row(**(empty | axis | here | record.versions() | common | values)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=("0.5B", "1.5B"), default="0.5B", help="default: 0.5B")
    parser.add_argument(
        "--loss", action="append", choices=("grpo", "grpo_kl"), help="default: both, by turns"
    )
    parser.add_argument("--way", action="append", choices=tuple(WAYS), help="may be given more than once")
    parser.add_argument("--inactive", type=float, default=0.0, help="fraction of sequences without advantage")
    parser.add_argument(
        "--steps", type=int, default=5, help=f"timed, after {WARM_UP} that are not; default: 5"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model: does everything run?")
    parser.add_argument(
        "--limit", type=float, default=270, metavar="SECONDS", help="start nothing new after; default: 270"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/training-step-<device>.csv")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.output = args.output or record.RESULTS / f"training-step-{record.short_name(args.device)}.csv"
    return args


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        Run(args, Path(folder))()
    print(args.output)


if __name__ == "__main__":
    main()
