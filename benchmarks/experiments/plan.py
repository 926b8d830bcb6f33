"""The experiments of docs/dev/tuning.md."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..work.from_hidden import refused_but_in_bf16
from ..work.providers import (
    needs_gpu,
    ours,
    ours_in_bf16,
    ours_inplace,
    ours_linear,
    ours_skipping,
    refused_without_idle_rows,
)
from ..work.workload import Workload
from .costs import NOMINAL, linear, logits, read_twice, two_kernels, where_they_stand, without_bytes
from .split_rows.launch import VARIANTS as SPLIT
from .split_rows.launch import in_place_of_fused
from .stages import FUSED_STAGES, LEFT_OUT, without
from .variants import (
    Experiment,
    Variant,
    blocks,
    in_chunks,
    reference_by_itself,
    tokens_in_torch,
    two_passes,
    uncompacted,
)

LINEAR = Workload("linear", "grpo", 8192, 151936, 4096)
LOGITS = Workload("logits", "grpo_kl", 8192, 151936)
VOCABULARIES = tuple(replace(LOGITS, V=V) for V in (151936, 128256, 32000))
CHUNKS = (1024, 2048, 4096, 8192, 16384)
# A thread loads 8 columns of bf16 at a time. With 128 columns per thread, registers spill.
BLOCKS = tuple((b, w) for b in (1024, 2048, 4096, 8192) for w in (2, 4, 8) if 8 <= b // (32 * w) < 128)
EXPERIMENTS = {
    "1": Experiment(
        "1: 6TVH against 8TVH",
        (LINEAR, replace(LINEAR, loss="grpo_kl")),
        (
            Variant("gradient in the forward", ours_linear, cost=linear()),
            Variant(
                "logits anew in the backward",
                ours_linear,
                cost=lambda work: linear(products=8 + 2 * work.reference, one_pass=False)(work),
                changes=two_passes,
            ),
        ),
    ),
    "2": Experiment(
        "2: tokens of a chunk",
        (replace(LINEAR, T=16384),),
        tuple(Variant(f"{n}", in_chunks(n), cost=linear(chunk=n)) for n in CHUNKS),
    ),
    "3": Experiment(
        "3: half the rows without advantage",
        (LINEAR, replace(LINEAR, inactive=0.5)),
        (
            Variant("ordered", ours_linear, cost=linear()),
            Variant(
                "skip_inactive",
                ours_skipping,
                refuses=refused_without_idle_rows,
                cost=lambda work: linear()(replace(work, masked=1 - work.learning, inactive=0.0)),
            ),
            Variant("where they stand", uncompacted, cost=where_they_stand),
        ),
    ),
    "4": Experiment(
        "4: one pass",
        VOCABULARIES,
        (
            Variant("two kernels", ours, cost=logits(8)),
            Variant("in place", ours_inplace, overwrites=True, cost=logits(8)),
            *(
                Variant(
                    f"{32 // warps} per multiprocessor{', kept in L2' if keep else ''}",
                    ours_inplace,
                    overwrites=True,
                    cost=read_twice(32 // warps),
                    changes=partial(blocks, 512 * warps, warps, "fused", keep=keep),
                )
                for warps in (32, 16, 8)
                for keep in (False, True)
            ),
            *(
                Variant(
                    f"row {name}",
                    ours_inplace,
                    refuses=needs_gpu,
                    overwrites=True,
                    cost=logits(6),
                    changes=partial(in_place_of_fused, **how),
                )
                for name, how in SPLIT.items()
            ),
        ),
    ),
    "6": Experiment(
        "6: block and warps",
        VOCABULARIES,
        tuple(
            Variant(
                f"{block} by {warps} warps",
                ours,
                cost=logits(8),
                changes=partial(blocks, block, warps, "row_stats", "dlogits"),
            )
            for block, warps in BLOCKS
        ),
    ),
    "7": Experiment(
        "7: policy and reference in one launch",
        tuple(replace(LOGITS, T=T) for T in (512, 4096, 16384, 32768)),
        (
            Variant("one", ours, cost=logits(8)),
            Variant("two", reference_by_itself, cost=logits(8, launches=45)),
        ),
    ),
    "8": Experiment(
        "8: logits of a chunk",
        (LINEAR,),
        (
            Variant("fp32", ours_linear, cost=linear()),
            Variant("bf16", ours_in_bf16, refuses=refused_but_in_bf16, cost=linear(logits=2)),
        ),
    ),
    "9": Experiment(
        "9: loss and metrics in one launch each",
        (LOGITS, replace(LOGITS, T=2048, V=32000)),
        (
            Variant("in Triton", ours, cost=logits(8)),
            Variant("in PyTorch", ours, cost=logits(8, launches=119), changes=tokens_in_torch),
        ),
    ),
    # Bytes limit a kernel if only the variants that move less are faster.
    "10": Experiment(
        "10: a stage left out",
        (LOGITS, replace(LOGITS, loss="grpo")),
        (
            Variant("all stages", ours, cost=two_kernels),
            *(
                Variant(
                    f"{kernel} without {stage}",
                    ours,
                    cost=without_bytes(2 if stage in ("store", "load") else 0),
                    changes=partial(without, stage, kernel),
                    profile=True,
                )
                for kernel, stages in LEFT_OUT.items()
                for stage in stages
            ),
            Variant("in place, all stages", ours_inplace, overwrites=True, cost=two_kernels),
            *(
                Variant(
                    f"in place, without {stage}",
                    ours_inplace,
                    overwrites=True,
                    cost=without_bytes(2 if stage == "store" else 0),
                    changes=partial(without, stage, "fused"),
                    profile=True,
                )
                for stage in FUSED_STAGES
            ),
        ),
    ),
}


def by_gain() -> list[str]:
    """The experiments, those with the largest predicted gain first."""
    return sorted(EXPERIMENTS, key=lambda name: -EXPERIMENTS[name].gain(NOMINAL))
