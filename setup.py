"""Metadata. Ranges are for users; the versions that the project is tested with are in requirements/."""

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
    # TRL needs Python 3.11. TRL and verl ask for different versions of transformers: use two environments.
    extras_require={"trl": ["trl>=1.16,<2"], "verl": ["verl>=0.9.1,<1"]},
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
