"""Every kernel variant in use compiles for seven GPUs without spills, and for sm_90 within a budget.

No GPU is needed: the public functions are called on "meta" tensors, their launches are compiled and not run,
and the machine code is read. What a loop computes in some turns only is counted as if it did so in all.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing compiles"),
]
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks.sass import MAX_THREADS, TARGETS, Loop, Resources, Sass, launches_for, resources  # noqa: E402
from grpo_kernels import (  # noqa: E402
    CISPO,
    DPPO,
    DRO,
    KL,
    SAPO,
    ImportanceRatio,
    LogRatio,
    LossSpec,
    PPOClip,
    Reinforce,
    grpo_loss,
    heads,
    linear_grpo_loss,
)
from grpo_kernels.logps import linear_token_statistics  # noqa: E402

SHARED_BYTES = 48 * 1024  # a block has this much everywhere, without asking for more

BUDGETED = "sm_90"
# Instructions per element of a row read.
PLAIN_STATISTICS, FULL_STATISTICS, GRADIENT = 8, 12, 8
# One exponential per element; and per thread and block of the row one more, which carries its sums to a new
# maximum. A thread holds 16 elements or more.
EXPONENTIALS = 1 + 1 / 16


def loss(
    spec: LossSpec,
    *,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 151936,
    reference: str = "none",
    old: bool = False,
    per_token: bool = False,
    **options: Any,
) -> None:
    """Forward and backward of a loss on tensors without storage. `reference`: "none", "logits" or "logps"."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits = new(8, 512, vocab, dtype=dtype).requires_grad_()
    out = grpo_loss(
        logits.clone(),
        new(8, 512, dtype=torch.int64),
        new(8),
        spec=spec,
        ref_logits=new(8, 512, vocab, dtype=dtype) if reference == "logits" else None,
        ref_logps=new(8, 512) if reference == "logps" else None,
        old_logps=new(8, 512) if old else None,
        token_weights=new(8, 512) if per_token else None,
        temperature=new(8) if per_token else 0.9,
        backend="triton",
        **options,
    )
    out.loss.backward()


def linear(spec: LossSpec, *, reference: bool = False, **options: Any) -> None:
    """From hidden states in bf16, as on a GPU: fp32 logits, whose gradient is held in bf16 beside them."""
    heads.multiplies_mixed = lambda device: True

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight = new(8, 512, 64), new(options.pop("vocab", 151936), 64)
    out = linear_grpo_loss(
        *(hidden.requires_grad_(), weight, new(8, 512, dtype=torch.int64), new(8)),
        spec=spec,
        old_logps=new(8, 512, dtype=torch.float32),
        ref_hidden=hidden.detach() if reference else None,
        ref_lm_head_weight=weight if reference else None,
        chunk_tokens=2048,
        compact=False,
        backend="triton",
        **options,
    )
    out.loss.backward()


def token_statistics(**options: Any) -> None:
    """Of each token, without a loss."""
    heads.multiplies_mixed = lambda device: True
    hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (4096, 151936))
    ids = torch.empty(4096, dtype=torch.int64, device="meta")
    given = {"entropy": True, "top1": True, "chunk_tokens": 2048, "compact": False, "backend": "triton"}
    linear_token_statistics(hidden, weight, ids, **given, **options)


def own_surrogate(logps: Tensor, *rest: Tensor | None) -> Tensor:
    return logps


def cases() -> dict[str, Callable[[], None]]:
    """Name: a call. Together they make every kernel with each of its options."""
    ppo = LossSpec(PPOClip())
    both = LossSpec(PPOClip(), KL("exact"), entropy_coef=0.01)
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for inplace in (False, True) if dtype in (torch.bfloat16, torch.float32) else (False,):
            call = partial(loss, dtype=dtype, inplace=inplace)
            where = f"{name}{' fused' if inplace else ''}"
            found[f"{where} policy only"] = partial(call, ppo, old=True)
            found[f"{where} exact KL, entropy"] = partial(call, both, reference="logits")
            found[f"{where} softcap"] = partial(call, both, reference="logits", logit_softcap=30.0)
            found[f"{where} unaligned rows"] = partial(call, both, reference="logits", vocab=50257)

    for inplace in (False, True):
        call = partial(loss, inplace=inplace)
        where = f"bfloat16{' fused' if inplace else ''}"
        found[f"{where} entropy"] = partial(call, LossSpec(PPOClip(), entropy_coef=0.01))
        found[f"{where} reference"] = partial(call, LossSpec(LogRatio()), reference="logits")
        found[f"{where} exact KL"] = partial(call, LossSpec(PPOClip(), KL("exact")), reference="logits")
        forward = LossSpec(PPOClip(), KL("exact_forward"))
        found[f"{where} forward KL"] = partial(call, forward, reference="logits")
        found[f"{where} temperatures"] = partial(call, ppo, per_token=True)
        found[f"{where} padded vocabulary"] = partial(call, ppo, vocab_size=151643)

    # What only the fused kernel knows of.
    fused: dict[str, tuple[LossSpec, dict[str, Any]]] = {
        "PPOClip on-policy": (ppo, {}),
        "Reinforce": (LossSpec(Reinforce()), {}),
        "LogRatio, ref_logps": (LossSpec(LogRatio()), {"reference": "logps"}),
        "ImportanceRatio": (LossSpec(ImportanceRatio()), {"old": True}),
        "ImportanceRatio to ref": (LossSpec(ImportanceRatio("ref")), {"reference": "logits"}),
        "CISPO": (LossSpec(CISPO(ratio_max=5.0)), {"old": True}),
        "SAPO": (LossSpec(SAPO()), {"old": True}),
        "DRO": (LossSpec(DRO(beta=0.1, anchor="ref")), {"reference": "logps"}),
        "DPPO tv": (LossSpec(DPPO("tv")), {"old": True}),
        "DPPO kl": (LossSpec(DPPO("kl")), {"old": True}),
        "KL alone": (LossSpec(None, KL("exact")), {"reference": "logits"}),
        "k1": (LossSpec(PPOClip(), KL("k1")), {"reference": "logits", "old": True}),
        "abs": (LossSpec(PPOClip(), KL("abs")), {"reference": "logits"}),
        "k2": (LossSpec(PPOClip(), KL("k2")), {"reference": "logps", "old": True}),
        "k3": (LossSpec(PPOClip(), KL("k3")), {"reference": "logits", "old": True}),
        "k3 ratio-corrected": (
            LossSpec(PPOClip(), KL("k3", ratio_corrected=True)),
            {"reference": "logits", "old": True},
        ),
        "k3 straight-through": (
            LossSpec(PPOClip(), KL("k3", straight_through=True)),
            {"reference": "logps", "old": True},
        ),
    }
    for name, (spec, options) in fused.items():
        found[f"bfloat16 fused {name}"] = partial(loss, spec, inplace=True, **options)

    for where, surrogate in (("one pass", PPOClip()), ("two passes", own_surrogate)):
        name = f"linear, {where}"
        found[name] = partial(linear, LossSpec(surrogate))
        full = LossSpec(surrogate, KL("exact"), entropy_coef=0.01)
        found[f"{name}, exact KL, entropy"] = partial(linear, full, reference=True)
        found[f"{name}, softcap"] = partial(linear, full, reference=True, logit_softcap=30.0)
        found[f"{name}, odd vocabulary"] = partial(linear, LossSpec(surrogate), vocab=50257)
    found["linear, token statistics"] = token_statistics
    found["linear, token statistics, softcap"] = partial(token_statistics, logit_softcap=30.0)
    return found


CASES = cases()


@dataclass(frozen=True)
class Pass:
    """The main loop of one pass over the row, per element that it reads."""

    name: str
    instructions: float
    exponentials: float
    narrowest_bits: int
    calls: int
    limit: int | None  # of instructions; None: no budget is set


@dataclass(frozen=True)
class Figures:
    kernel: str
    variant: str
    resources: Resources
    passes: tuple[Pass, ...]  # on the target that has a budget


def compile_case(case: str, target: str) -> list[Figures]:
    with launches_for(TARGETS[target]) as kernels:
        CASES[case]()
    return [
        Figures(
            kernel.src.fn.__name__.removesuffix("_kernel"),
            variant(kernel),
            resources(kernel),
            read_passes(kernel) if target == BUDGETED else (),
        )
        for kernel in kernels
    ]


def given(kernel: Any, *names: str) -> bool:
    """Whether any of these arguments was other than None or False."""
    fixed = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    return any(fixed.get(name, name in kernel.src.signature) for name in names)


OPTIONAL = ("ref", "entropy", "kl_forward", "top1", "dentropy", "dkl", "dkl_forward", "temperature")
SHAPING = ("BLOCK", "GROUP", "SURROGATE", "ANCHOR", "KL_KIND", "ESTIMATOR")
FLAGS = ("STRAIGHT_THROUGH", "RATIO_CORRECTED", "CAPPED", "REF_CAPPED")


def variant(kernel: Any) -> str:
    """What tells this binary from the kernel's others, in a few words."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    words = [element_type(kernel), *(name for name in OPTIONAL if given(kernel, f"{name}_ptr"))]
    for name in SHAPING:
        if constants.get(name) is not None:
            words.append(f"{name.lower()}={getattr(constants[name], '__name__', constants[name])}")
    words += [name.lower() for name in FLAGS if constants.get(name)]
    if "V" in names and ["tt.divisibility", 16] not in kernel.src.attrs.get((names.index("V"),), []):
        words.append("V%16!=0")
    return " ".join(words)


def element_type(kernel: Any) -> str:
    signature = kernel.src.signature
    return signature.get("logits_ptr", signature.get("x_ptr")).lstrip("*")


def read_passes(kernel: Any) -> tuple[Pass, ...]:
    """What the main loops of each kernel cost. fp64, whose exponential is a function, is not for speed."""
    if element_type(kernel) == "fp64":
        return ()
    sass = Sass(kernel.asm["cubin"])
    name = kernel.src.fn.__name__
    found = []
    if name in ("row_stats_kernel", "fused_loss_kernel"):
        limit = FULL_STATISTICS if given(kernel, "ref_ptr", "entropy_ptr") else PLAIN_STATISTICS
        found.append(read_pass("statistics", kernel, sass.main_loop(stores=False), limit))
    if name != "row_stats_kernel":
        what = "scaling" if name == "scale_rows_kernel" else "gradient"
        found.append(read_pass(what, kernel, sass.main_loop(stores=True), GRADIENT))
    return tuple(found)


def read_pass(name: str, kernel: Any, loop: Loop | None, limit: int) -> Pass:
    assert loop is not None, f"{kernel.src.fn.__name__} {variant(kernel)}: no loop over the row"
    elements = loop.loaded_bytes / {"bf16": 2, "fp16": 2, "fp32": 4}[element_type(kernel)]
    # A softcap computes a tanh per element; rows that are not aligned are read element by element.
    exempt = given(kernel, "CAPPED", "REF_CAPPED") or "group=1" in variant(kernel).split()
    return Pass(
        name,
        len(loop.instructions) / elements,
        loop.count("MUFU.EX2") / elements,
        loop.narrowest_bits,
        loop.count("CALL"),
        None if exempt else limit,
    )


Farm = dict[tuple[str, str], "Future[list[Figures]]"]


@pytest.fixture(scope="module")
def farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    """What the selected tests need, being compiled on all cores."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = [(p.params["case"], p.params["target"]) for p in params if p is not None and "case" in p.params]
    # A compiler's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(mp_context=context)
    found = {pair: pool.submit(compile_case, *pair) for pair in dict.fromkeys(wanted)}
    yield found
    pool.shutdown(cancel_futures=True)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(table(found))


def table(found: Farm) -> str:
    done = {pair: f.result() for pair, f in found.items() if not f.cancelled() and not f.exception()}
    lines = [f"\n\n{BUDGETED}: per element read, main loop", HEADER, "-" * len(HEADER)]
    seen: dict[tuple[str, str], dict[str, Figures]] = {}
    for (_, target), kernels in done.items():
        for k in kernels:
            seen.setdefault((k.kernel, k.variant), {})[target] = k
    for (kernel, words), by_target in sorted(seen.items()):
        k = by_target.get(BUDGETED)
        if k is None:
            continue
        r = k.resources
        for p in k.passes or (None,):
            read = f"{'':12}{'':>7}{'':>9}{'':>6}"
            if p is not None:
                limit = "-" if p.limit is None else str(p.limit)
                read = f"{p.name:12}{p.instructions:7.2f}{limit:>4}{p.exponentials:8.3f}{p.narrowest_bits:5}"
            lines.append(f"{r.registers:5}{r.spills:7}{r.shared_bytes:7}  {read:38} {kernel} {words}")
    lines += ["", "registers (and spills) per target", "".join(f"{t:>9}" for t in TARGETS)]
    for (kernel, words), by_target in sorted(seen.items()):
        cells = (by_target.get(t) for t in TARGETS)
        text = ("" if c is None else f"{c.resources.registers} ({c.resources.spills})" for c in cells)
        lines.append("".join(f"{t:>9}" for t in text) + f"  {kernel} {words}")
    return "\n".join(lines)


HEADER = f"{'regs':>5}{'spills':>7}{'shared':>7}  {'pass':12}{'instr':>7}{'max':>4}{'ex2':>8}{'bits':>5}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case: str, target: str, farm: Farm) -> None:
    for k in farm[case, target].result():
        # fp64 is for gradcheck, not for speed: there ptxas gives up a register or two for occupancy.
        assert k.resources.spills == 0 or k.variant.startswith("fp64"), k
        assert k.resources.shared_bytes <= SHARED_BYTES, k
        assert k.resources.threads <= MAX_THREADS, k


@pytest.mark.parametrize("target", [BUDGETED])
@pytest.mark.parametrize("case", CASES)
def test_main_loop_keeps_its_budget(case: str, target: str, farm: Farm) -> None:
    for k in farm[case, target].result():
        for p in k.passes:
            assert p.calls == 0, (k.kernel, k.variant, p)  # a division's slow path, say: its cost is not seen
            if p.limit is not None:
                assert p.narrowest_bits == 128, (k.kernel, k.variant, p)
                assert p.instructions <= p.limit, (k.kernel, k.variant, p)
                assert p.exponentials <= EXPONENTIALS, (k.kernel, k.variant, p)


@triton.jit
def hoarder(x_ptr, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    x = tl.load(x_ptr + columns)
    tl.debug_barrier()  # all is loaded before any of it is stored
    tl.store(x_ptr + columns, x + 1)


@pytest.mark.parametrize(("target", "size"), [("sm_90", 32 * 512), ("gfx942", 64 * 1024)])
def test_a_spill_is_seen(target: str, size: int) -> None:
    """More values per thread than it has registers."""
    with launches_for(TARGETS[target]) as kernels:
        hoarder[(1,)](torch.empty(size, device="meta"), size, num_warps=1)
    assert resources(kernels[0]).spills > 0


@triton.jit
def two_loops(out_ptr, x_ptr, n, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    top = tl.full([SIZE], float("-inf"), tl.float32)
    for start in range(0, n, SIZE):
        x = tl.load(x_ptr + start + columns)
        if start == 4 * SIZE:
            x = tl.exp2(x)
        top = tl.maximum(top, x)
    for start in range(0, n, SIZE):
        tl.store(out_ptr + start + columns, tl.exp2(tl.load(x_ptr + start + columns) - top))


def test_the_reader_finds_the_loops() -> None:
    """4 elements per thread and turn; exponentials in some turns of the one loop, in all of the other."""
    with launches_for(TARGETS[BUDGETED]) as kernels:
        x = torch.empty(4096, device="meta")
        two_loops[(1,)](x, x, 4096, 128, num_warps=1)
    sass = Sass(kernels[0].asm["cubin"])
    reading, writing = sass.main_loop(stores=False), sass.main_loop(stores=True)
    assert reading is not None and writing is not None
    turns = reading.loaded_bytes // 16  # of the loop as written in one of the loop as unrolled
    assert reading.count("MUFU.EX2") == 4 * turns
    assert not any(i.opcode.startswith("MUFU") and i.predicate is None for i in reading.every_time)
    assert reading.count("FMNMX") == 4 * turns
    assert reading.narrowest_bits == writing.narrowest_bits == 128
    assert writing.count("MUFU.EX2") == writing.loaded_bytes // 4
