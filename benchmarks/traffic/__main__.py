"""Counts the bytes that kernels read and write, and the FLOPs of matrix products, without a GPU.

    python -m benchmarks.traffic

All providers run on the same small batches, and their kernels run in Triton's interpreter. The results go to
traffic.csv and operations.csv in benchmarks/results/ and are printed as tables. Bytes are per element of the
logits, `E = T * V`, so reading bf16 logits once counts as 2. Every load and store of a kernel counts, even if
a cache would serve it. Loads of elements that the same launch has read before are also listed separately.

PyTorch's own traffic is not counted: the matrix products of the linear form, TRL's loss on `[B, L]`, and the
zeros of the position that Liger adds.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from ..tables import record
from .addresses import quick_interpreter
from .counts import BASES, distillations, measurements
from .tables import operations_rows, operations_table, traffic_rows, traffic_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.splitlines()[0])
    parser.parse_args()
    started = time.monotonic()
    # The interpreter uses NumPy, which warns about infinities.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    with quick_interpreter():
        found = [one for form in BASES for one in measurements(form)] + [*distillations()]
    # The dtype of logits does not change the number of FLOPs.
    of_products = (one for one in found if one.batch.work.form == "linear")
    products = [one for one in of_products if one.provider.name != "grpo_kernels bf16 logits"]
    for name, rows, table in (
        ("traffic.csv", [row for one in found for row in traffic_rows(one)], traffic_tables),
        ("operations.csv", [row for one in products for row in operations_rows(one)], operations_table),
    ):
        path = record.RESULTS / name
        record.write_table(path, rows)
        print(f"{path}\n\n{table(path)}")
    print(f"{len(found)} measurements in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
