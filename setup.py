"""Metadata; and the versions that tests, demo and benchmarks install (pinned there, loose for users)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LINUX = 'platform_system == "Linux"'


def version() -> str:
    """`__version__`, read as text: importing the package would need torch at build time."""
    text = (ROOT / "grpo_kernels" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('grpo_kernels/__init__.py has no line `__version__ = "..."`')
    return match[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# The last versions that run on Python 3.10 stand beside the newest.
BASE = [
    "torch==2.13.0",
    f"triton==3.7.1; {LINUX}",
    'numpy==2.4.6; python_version >= "3.11"',
    'numpy==2.2.6; python_version < "3.11"',
]
PYTEST = ["pytest==9.2.0"]
MYPY = ["mypy==2.4.1"]
PLOTS = [
    'matplotlib==3.11.2; python_version >= "3.11"',
    'matplotlib==3.10.9; python_version < "3.11"',
]

# TRL 1.16 and transformers 5.23 need Python 3.11.
TRAINER = ["trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]

PEERS = [*TRAINER, "peft==0.21.2", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"]

TEST = [
    *BASE,
    *PYTEST,
    *PLOTS,
    *MYPY,
    "pytest-xdist==3.8.0",
    'hypothesis==6.170.15; python_version >= "3.11"',
    'hypothesis==6.168.5; python_version < "3.11"',
    # compared with
    *(f'{peer}; python_version >= "3.11"' for peer in PEERS),
]
BENCHMARK = [*PYTEST, "pytest-benchmark==5.3.1", "psutil==7.2.2"]
BENCH = [*BASE, *BENCHMARK, *PLOTS, *(f'{peer}; python_version >= "3.11"' for peer in PEERS)]
TRL = [
    *BASE,
    *PLOTS,
    *TRAINER,
    "tqdm==4.70.1",
    "rich==15.0.0",
    "psutil==7.2.2",
]
# verl pins libraries of its own that contradict the `trl` extra (and has no release for Python 3.13): give it
# an environment to itself. It asks for no torch and would take any.
VERL = [*BASE, *BENCHMARK, "verl==0.9.1"]
# One per line: `make docs` reads them from here.
DOCS = [
    "mkdocs==1.6.1",
    "mkdocs-material==9.8.2",
    "mkdocstrings==1.0.8",
    "mkdocstrings-python==2.0.11",
    "mkdocs-autorefs==1.4.5",
    "griffelib==2.4.1",
    "pymdown-extensions==13.1",
    "latex2mathml==3.81.1",
    "ruff==0.17.6",  # breaks the lines of signatures
]
DEV = [*TEST, *BENCH, *MYPY, "ruff==0.17.6"]

setup(
    name="grpo_kernels",
    version=version(),
    description="Fused GRPO policy-loss layer: Triton kernels, and PyTorch on the CPU",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # Makes an editable install a path entry, which type checkers follow. Without it setuptools installs an
    # import hook, which they do not.
    package_dir={"": "."},
    packages=find_packages(include=["grpo_kernels", "grpo_kernels.*"]),
    package_data={"grpo_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.8", f"triton>=3.4; {LINUX}", "typing-extensions>=4.10"],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "trl": TRL,
        "verl": VERL,
        "docs": DOCS,
        "dev": list(dict.fromkeys(DEV)),
    },
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
