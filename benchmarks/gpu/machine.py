"""Writes versions, the bandwidth of a copy, and the rate of a bf16 matrix product, to a JSON file.

python -m benchmarks.gpu.machine --output machine.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from ..speed import measure
from ..tables import record
from ..work.providers import PROVIDERS

PRODUCT = 8192, 4096, 151936  # a chunk's logits: [M, K] @ [K, N]
TINY = 64, 64, 128


def describe(device: torch.device, *, tiny: bool) -> dict[str, object]:
    """The machine, and the floors that everything else is compared with."""
    shape, dtype = (TINY, torch.float32) if tiny else (PRODUCT, torch.bfloat16)
    if tiny:
        measure.COPY_BYTES[device.type] = 2**20
    found = measure.floors(device, [shape], dtype)
    providers = [provider for form in PROVIDERS.values() for provider in form.values()]
    peers = {p.package: p.version for p in providers if p.package is not None and p.version}
    about: dict[str, object] = {"device": record.device_name(device), "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda,
        }
    rates = {"copy_GB_per_s": found.bytes_per_s / 1e9, "product_TFLOP_per_s": found.flop_per_s / 1e12}
    rounded = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
    return about | record.versions() | {"peers": peers, "product": shape, **rounded}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal on a CPU")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found = describe(args.device, tiny=args.tiny)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
