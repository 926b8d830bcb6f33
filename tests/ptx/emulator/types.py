"""PTX's types and the NumPy types that stand for them. PTX ISA, "Fundamental Types"."""

from __future__ import annotations

import numpy as np

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "pred": "?",
        **{
            f"{kind}{bits}": f"{code}{bits // 8}"
            for bits in (8, 16, 32, 64)
            for kind, code in ("bu", "uu", "si")
        },
        "f16": "f2",
        "f32": "f4",
        "f64": "f8",
    }.items()
}
"""A `.bN` type is N bits without meaning. Those of bf16 numbers are in a `b16`, of pairs in a `b32`."""

BITS = {name: 1 if name == "pred" else 8 * dtype.itemsize for name, dtype in DTYPES.items()}
