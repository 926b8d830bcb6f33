"""Lays the package out for the Hugging Face Hub: `python -m release.hub OUT --repo-id OWNER/NAME`.

    OUT/build.toml, OUT/torch-ext/grpo_kernels/    what the Hub's kernel-builder builds from
    OUT/build/torch-cpu/, torch-cuda/, torch-rocm/ a build per backend, as kernel-builder makes it
    OUT/README.md, OUT/build/CARD.md               the card

`kernels.get_local_kernel(Path(OUT))` loads the build for the installed PyTorch. The builds differ only in
`metadata.json`. `kernels` imports a build under the `id` in it, which is also the namespace of the build's
operators (grpo_kernels/_ops.py). The id contains a hash of the files.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

import grpo_kernels

from .files import PACKAGE, ROOT, package_files

NAME, MODULE = "grpo-kernels", "grpo_kernels"
BACKENDS = ("cpu", "cuda", "rocm")

# The Hub's version: the branch v0 of its repository. 0 means that the API may change.
MAJOR = 0

# The integrations import the installed package, and `testing` imports psutil. A build may import neither.
LEFT_OUT = ("integrations/", "testing.py", "py.typed")

# kernel-builder generates this file itself.
GENERATED = "_ops.py"


def lay_out(out: Path, *, repo_id: str, package: Path = PACKAGE) -> list[Path]:
    """Write the layout into `out` and return the folders of the builds. An older layout there is replaced.

    Raises:
        FileExistsError: `out` exists and is no such layout.
    """
    if out.exists() and not (out / "build.toml").exists():
        raise FileExistsError(f"{out} exists and has no build.toml, so it is not replaced")
    names = [name for name in package_files(package) if not name.startswith(LEFT_OUT)]
    files = {name: (package / name).read_bytes() for name in names}
    shutil.rmtree(out, ignore_errors=True)
    source = {name: content for name, content in files.items() if name != GENERATED}
    write(out / "torch-ext" / MODULE, source)
    builds = []
    for backend in BACKENDS:
        builds.append(out / "build" / f"torch-{backend}")
        write(builds[-1], files | {"metadata.json": metadata(backend, files)})
    page = card(repo_id).encode()
    write(out, {"build.toml": configuration(repo_id).encode(), "README.md": page, "build/CARD.md": page})
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    return builds


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def metadata(backend: str, files: dict[str, bytes]) -> bytes:
    """Return `metadata.json` of a build: what it is, and a digest of each file."""
    digests = {name: hashlib.sha256(content).digest() for name, content in sorted(files.items())}
    unique = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    content = {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{unique[:10]}",
        "version": MAJOR,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def configuration(repo_id: str) -> str:
    """Return `build.toml`. `torch-noarch`: nothing is compiled ahead of time."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return f"""[general]
name = "{NAME}"
version = {MAJOR}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""


def card(repo_id: str) -> str:
    """Return the page of the Hub's repository, with its front matter."""
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    names = ", ".join(f"`{name}`" for name in grpo_kernels.__all__)
    return template.format(repo_id=repo_id, version=grpo_kernels.__version__, major=MAJOR, names=names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repo-id", required=True, help="owner and name of the Hub's repository")
    arguments = parser.parse_args()
    for build in lay_out(arguments.out, repo_id=arguments.repo_id):
        print(build, json.loads((build / "metadata.json").read_bytes())["id"])
