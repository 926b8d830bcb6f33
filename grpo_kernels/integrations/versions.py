"""Checks the version of a trainer. An integration accepts its tested version and later ones."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings


def require(package: str, name: str, tested: str, distribution: str | None = None) -> str:
    """Return the installed version of a trainer. Warn if it is newer than the tested one.

    Args:
        package: the package that is imported, and the name of our module.
        name: the trainer's name in messages.
        tested: the version that the integration is tested with. "1.16" covers all versions 1.16.x.
        distribution: the name for pip, if it is not that of the package.

    Raises:
        ImportError: the trainer is not installed, or older than `tested`.
    """
    integration = f"grpo_kernels.integrations.{package}"
    distribution = distribution or package
    try:
        module = importlib.import_module(package)
        installed = str(getattr(module, "__version__", None) or importlib.metadata.version(distribution))
    except ImportError as error:
        raise ImportError(
            f"{integration} needs {name} {tested} or later (pip install '{distribution}>={tested}'), and "
            f"importing {package} failed: {error}"
        ) from error
    from packaging.version import Version  # a dependency of the trainers

    least = Version(tested)
    if Version(installed) < least:
        raise ImportError(f"{integration} needs {name} {tested} or later, found {installed}")
    if Version(installed).release[: len(least.release)] > least.release:
        warnings.warn(
            f"{integration} is tested with {name} {tested}; {name} {installed} is newer", stacklevel=2
        )
    return installed
