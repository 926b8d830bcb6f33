"""Figures of compiled kernels: a name for each variant, its resources, and instructions per element."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from .no_gpu import TARGETS, launches_for
from .resources import Resources, resources
from .sass import Instruction, Sass

OURS = "grpo_kernels"


@dataclass(frozen=True)
class Pass:
    """A pass over the row. Counts are per element that the main loop reads.

    Predicated and conditional instructions count as if every iteration executed them. If a kernel has no
    loop, each program handles one block of the row, and all of its instructions count.
    """

    name: str  # "statistics", or "gradient" if it stores to the row
    elements: int  # read by a thread in an iteration
    instructions: float
    exponentials: float
    narrowest_bits: int | None  # of the loop's global memory accesses; None if there is no loop
    calls: int


@dataclass(frozen=True)
class Figures:
    package: str
    kernel: str
    variant: str
    target: str
    resources: Resources
    passes: tuple[Pass, ...]


STATISTICS, GRADIENT = ("statistics",), ("gradient",)
PASSES = {
    "row_stats": STATISTICS,
    "dlogits": GRADIENT,
    "fused_loss": STATISTICS + GRADIENT,
    "scale_rows": GRADIENT,
    "divergence": STATISTICS,
    "divergence_gradient": GRADIENT,
    # Liger
    "grpo_loss.selective_log_softmax": STATISTICS,
    "grpo_loss.grpo_loss_fwd": STATISTICS,
    "grpo_loss.grpo_loss_bwd": GRADIENT,
    # TRL
    "logprob_entropy.forward": STATISTICS,
    "logprob_entropy.backward": GRADIENT,
    "chunked_logprob.forward": STATISTICS,
    "chunked_logprob.backward": GRADIENT,
}
BLOCK_PER_PROGRAM = ("logprob_entropy.backward", "chunked_logprob.backward")


def compiled(call: Callable[[], None], target: str, *, read: bool = True) -> list[Figures]:
    """The figures of the kernels that `call` launches. With `read=False`, they have no passes."""
    with launches_for(TARGETS[target]) as kernels:
        call()
    return [figures(kernel, target, read=read) for kernel in dict.fromkeys(kernels)]


def compile_all(calls: Iterable[Callable[[], None]], targets: Iterable[str]) -> list[Figures]:
    """The figures of all distinct kernels, compiled on all cores. Those of this package come first."""
    found: dict[tuple[str, ...], Figures] = {}
    # The compiler's threads would not survive a fork.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in [pool.submit(compiled, call, target) for call in calls for target in targets]:
            for one in result.result():
                same = found.setdefault((one.package, one.kernel, one.variant, one.target), one)
                assert same == one, f"two kernels have the same name: {same}, {one}"
    order = [*TARGETS]
    return sorted(
        found.values(),
        key=lambda f: (f.package != OURS, f.package, f.kernel, f.variant, order.index(f.target)),
    )


def figures(kernel: Any, target: str, *, read: bool) -> Figures:
    used = resources(kernel)
    passes = read_passes(kernel, used.threads) if read else ()
    return Figures(package(kernel), kernel_name(kernel), variant(kernel), target, used, passes)


def package(kernel: Any) -> str:
    return kernel.src.fn.__module__.split(".")[0]


def kernel_name(kernel: Any) -> str:
    """The kernel's name. For peers it includes the module, because some have several kernels of one name."""
    name = kernel.src.fn.__name__.strip("_").removesuffix("_kernel")
    return name if package(kernel) == OURS else f"{kernel.src.fn.__module__.split('.')[-1]}.{name}"


def constants(kernel: Any) -> dict[str, Any]:
    """The arguments that are constants in the machine code, including None and False."""
    return {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}


def given(kernel: Any, name: str) -> bool:
    """Whether this argument is neither None nor False."""
    return bool(constants(kernel).get(name, name in kernel.src.signature))


OPTIONAL = (
    *("ref", "entropy", "kl_forward", "top1", "dentropy", "dkl", "dkl_forward", "temperature"),
    "sampling_mask",
)
OF_TOKENS = (
    *("old_logps", "ref_logps", "entropy", "kl", "kl_forward"),
    *("token_weights", "entropy_weights", "dentropy", "dkl"),
)
SHAPING = ("BLOCK", "BLOCK_N", "BLOCK_SIZE", "BLOCK_B", "BLOCK_V", "BLOCK_D", "GROUP")
CHOSEN = ("SURROGATE", "ANCHOR", "CLIP", "KL_KIND", "ESTIMATOR")
FLAGS = (
    *("STRAIGHT_THROUGH", "RATIO_CORRECTED", "CAPPED", "REF_CAPPED", "RATIO"),
    *("SAME", "FORWARD", "JSD"),  # of the divergences
)


def variant(kernel: Any) -> str:
    """A short text that distinguishes this binary from the others of its kernel."""
    names, fixed = kernel.src.fn.arg_names, constants(kernel)
    element = element_type(kernel)
    words = [] if element is None else [element]
    gradient = kernel.src.signature.get("out_ptr", "").lstrip("*")
    if gradient not in ("", element):
        words = [f"{element}->{gradient}"]
    if package(kernel) == OURS:
        optional = OF_TOKENS if element is None else OPTIONAL
        words += [name for name in optional if given(kernel, f"{name}_ptr")]
    for name in (*SHAPING, *CHOSEN):
        if fixed.get(name) is not None:
            words.append(f"{name.lower()}={getattr(fixed[name], '__name__', fixed[name])}")
    words += [n.lower() for n in names if fixed.get(n) and (n in FLAGS or n.startswith("HAS_"))]
    if "V" in names and ["tt.divisibility", 16] not in kernel.src.attrs.get((names.index("V"),), []):
        words.append("V%16!=0")
    return " ".join(words)


ROWS = ("logits_ptr", "x_ptr", "LOGITS", "mm_ptr", "E")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def element_type(kernel: Any) -> str | None:
    """The dtype of the rows; None if the kernel runs over tokens."""
    found = next((kernel.src.signature[name] for name in ROWS if name in kernel.src.signature), None)
    return None if found is None else found.lstrip("*")


def read_passes(kernel: Any, threads: int) -> tuple[Pass, ...]:
    """The passes of a kernel. There are none for fp64, whose exponential is a function call."""
    name, element = kernel_name(kernel), element_type(kernel)
    if "cubin" not in kernel.asm or name not in PASSES or element not in ITEMSIZE:
        return ()
    sass = Sass(kernel.asm["cubin"])
    if name in BLOCK_PER_PROGRAM:
        (what,) = PASSES[name]
        return (read_pass(what, sass.way_through(), constants(kernel)["BLOCK_SIZE"] // threads, None),)
    found = []
    for what in PASSES[name]:
        loop = sass.main_loop(stores=what == "gradient")
        assert loop is not None, f"{name} {variant(kernel)}: no loop over the row"
        # Words of a sampling mask are loaded one by one, 32 bits each. They are not elements of a row.
        row = loop.without_loads(32) if given(kernel, "sampling_mask_ptr") else loop
        elements = row.loaded_bytes // ITEMSIZE[element]
        found.append(read_pass(what, loop.instructions, elements, row.narrowest_bits))
    return tuple(found)


def read_pass(what: str, code: Sequence[Instruction], elements: int, narrowest_bits: int | None) -> Pass:
    def count(opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in code)

    per_element = len(code) / elements, count("MUFU.EX2") / elements
    return Pass(what, elements, *per_element, narrowest_bits, count("CALL"))
