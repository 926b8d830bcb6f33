"""Fixtures of all tests: device and backend, NaN in new memory, a faster interpreter, the emulator of PTX."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import nan_memory
import pytest
import torch
from pairwise import pytest_addoption, pytest_collection_modifyitems  # noqa: F401  (hooks: pytest finds them here)

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # The examples are the same every time, except with pytest --hypothesis-profile=nightly.
    # `make test` uses "quick", `make test-all` "default".
    slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("default", max_examples=100, derandomize=True, **slow)
    settings.register_profile("quick", max_examples=20, derandomize=True, **slow)
    settings.register_profile("nightly", max_examples=2000, **slow)
    settings.load_profile("default")

# PyTorch's cache of compiled code ignores ATEN_CPU_CAPABILITY: code for AVX-512 from another run would be
# compiled without AVX-512, and fail.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = f"torchinductor_{os.environ['ATEN_CPU_CAPABILITY']}_{os.getuid()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), cache))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("EMULATE")  # "sm_80" or "sm_90": kernels are compiled, and the emulator runs them
if EMULATED and "TRITON_INTERPRET" in os.environ:
    raise RuntimeError("EMULATE needs TRITON_INTERPRET unset: in the interpreter nothing compiles")
DEVICE = "cuda" if torch.cuda.is_available() and not EMULATED else "cpu"
NO_TRITON = (
    None
    if importlib.util.find_spec("triton") is not None and (DEVICE == "cuda" or INTERPRETED or EMULATED)
    else "no GPU: the kernels run with TRITON_INTERPRET=1 or EMULATE=sm_90 in the environment"
)
NEEDS_TRITON = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter runs on NumPy, which warns of infinities. The kernels handle them on purpose.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Device of a test's tensors: the GPU if there is one."""
    return DEVICE


@pytest.fixture(scope="session", params=["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def needs_triton() -> None:
    """Skip a test that needs the kernels if they cannot run here."""
    if NO_TRITON is not None:
        pytest.skip(NO_TRITON)


@pytest.fixture(autouse=True)
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the results of `torch.empty` and similar functions with NaN, which reveals unwritten outputs."""
    nan_memory.let_dynamo_find_allocators()
    for owner, name in nan_memory.ALLOCATORS:
        monkeypatch.setattr(owner, name, nan_memory.filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def compiled_kernels(nan_in_new_memory: None) -> Iterator[None]:
    """Run the kernels in the emulator of PTX, if EMULATE is set."""
    if EMULATED is None:
        yield
        return
    from emulator import emulated

    with emulated(EMULATED):
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    if NO_TRITON is not None or not INTERPRETED:
        yield
        return
    from benchmarks.traffic import addresses

    with addresses.quick_interpreter():
        yield
