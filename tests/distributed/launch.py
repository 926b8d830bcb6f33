"""What runs in pytest: start a worker script on several ranks, once per session, and gather the outcomes.

@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    thin = request.config.getoption("--pairwise")
    return run_workers(Path(data_parallel.__file__), 2, session_folder(tmp_path_factory), pairwise=thin)

@pytest.mark.parametrize("name", data_parallel.cases.params())
def test_data_parallel(outcomes, name):
    assert outcomes[name] == "ok", outcomes[name]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock  # torch depends on it

TESTS = Path(__file__).parent.parent
TIMEOUT_S = 1800  # far longer than a script takes: it only ends scripts that hang


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def run_workers(script: Path, nproc: int, tmp_path: Path, *, pairwise: bool = False) -> dict[str, str]:
    """Run `script` on `nproc` ranks. Return "ok" or the tracebacks for each case.

    Processes that share `tmp_path` share one run. `pairwise` runs only the cases of `pytest --pairwise`.
    """
    folder = tmp_path / f"{script.stem}-{nproc}"
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    options = ["--pairwise"] if pairwise else []
    with FileLock(folder / "lock"):
        if not log.exists():
            log.write_text(torchrun(script, nproc, str(folder), *options), encoding="utf-8")
    ranks = [folder / f"{rank}.json" for rank in range(nproc)]
    if not all(path.exists() for path in ranks):
        raise RuntimeError(f"{script.name} did not start on {nproc} ranks:\n{log.read_text('utf-8')}")
    found = [json.loads(path.read_text("utf-8")) for path in ranks]
    return {name: "\n".join(sorted({x[name] for x in found} - {"ok"})) or "ok" for name in found[0]}


def torchrun(script: Path, nproc: int, *arguments: str) -> str:
    """Run a script under torchrun and return the output of the launcher and the ranks, with errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    paths = [str(TESTS), str(TESTS / "shared"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return process.communicate(timeout=TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends its ranks, which would survive a kill
        return f"not done after {TIMEOUT_S} s\n{process.communicate()[0]}"
