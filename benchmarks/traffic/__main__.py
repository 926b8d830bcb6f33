"""Bytes that kernels move and operations of matrix products: counted, for which no GPU is needed.

    python -m benchmarks.traffic

runs the providers on the same small batches, their kernels in Triton's interpreter, writes
benchmarks/results/traffic.csv and operations.csv and prints tables of them. Bytes are per element of the
logits, `E = T * V`: bf16 logits read once are 2. Every load and store of a kernel counts, whatever a cache
would serve; loads of what the same launch has read before are also shown by themselves. What PyTorch moves
around the kernels is not seen: the matrix products of the linear form, TRL's loss of `[B, L]`, the zeros of
the position that Liger adds.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # heeded when Triton is imported

from ..tables import record
from .addresses import quick_interpreter
from .counts import BASES, measurements
from .tables import operations_rows, operations_table, traffic_rows, traffic_tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.splitlines()[0])
    parser.parse_args()
    started = time.monotonic()
    # The interpreter runs on NumPy, which warns of infinities.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    with quick_interpreter():
        found = [one for form in BASES for one in measurements(form)]
    # What logits are held in changes no product.
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
