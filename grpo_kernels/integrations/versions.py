"""Which versions of a trainer an integration takes: the one that it is tested with, and later ones."""

from __future__ import annotations

import importlib
import warnings


def require(package: str, name: str, tested: str) -> str:
    """The installed version of a trainer.

    Raises ImportError where there is none, or an older one than `tested`; warns of a newer one. Digits that
    `tested` does not have are not compared.
    """
    integration = f"grpo_kernels.integrations.{package}"
    try:
        installed = str(importlib.import_module(package).__version__)
    except ImportError as error:
        raise ImportError(
            f"{integration} needs {name} {tested} or later (pip install '{package}>={tested}'), and "
            f"importing {package} failed: {error}"
        ) from error
    from packaging.version import Version  # which the trainers bring

    least = Version(tested)
    if Version(installed) < least:
        raise ImportError(f"{integration} needs {name} {tested} or later, found {installed}")
    if Version(installed).release[: len(least.release)] > least.release:
        warnings.warn(
            f"{integration} is tested with {name} {tested}; {name} {installed} is newer", stacklevel=2
        )
    return installed
