"""The wheel and the sdist that `make dist` builds, and the versions that requirements/ pins."""

from __future__ import annotations

import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

import grpo_kernels
from release import check, dist
from release.files import PROJECT_FILES, ROOT, package_files

NAME = f"grpo_kernels-{grpo_kernels.__version__}"
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))
SHARED = ("bench", "dev", "test", "trl")  # installed into one environment
TRAINERS = ("ms_swift", "nemo_rl", "openrlhf", "prime_rl", "skyrl", "slime")  # an environment for each


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("setuptools", minversion="77")
    return dist.build(tmp_path_factory.mktemp("dist"))


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(sdist: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None and member.name.startswith(f"{NAME}/")
            found[member.name.removeprefix(f"{NAME}/")] = content.read()
    return found


def test_the_wheel_has_the_package_and_its_licence(archives: tuple[Path, Path]) -> None:
    files = wheel_files(archives[0])
    package = {f"grpo_kernels/{name}" for name in package_files()}
    assert {name for name in files if name.startswith("grpo_kernels/")} == package
    assert "grpo_kernels/py.typed" in package
    about = {name.removeprefix(f"{NAME}.dist-info/") for name in files.keys() - package}
    assert about == {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    assert files[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_has_the_package_and_the_project(archives: tuple[Path, Path]) -> None:
    files = sdist_files(archives[1])
    expected = {*PROJECT_FILES, *(f"grpo_kernels/{name}" for name in package_files())}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert files.keys() - made == expected
    for name in expected:
        assert files[name] == (ROOT / name).read_bytes()


@pytest.mark.parametrize("read", [wheel_files, sdist_files], ids=["wheel", "sdist"])
def test_no_path_of_the_builder_is_in_them(
    archives: tuple[Path, Path], read: Callable[[Path], dict[str, bytes]]
) -> None:
    paths = [str(path).encode() for path in (ROOT, archives[0].parent, Path(sys.prefix))]
    for name, content in read(archives[read is sdist_files]).items():
        assert not [path for path in paths if path in content], name


def test_two_builds_give_the_same_bytes(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """The second build runs later, in another folder, with other access rights for new files."""
    before = os.umask(0o077)
    try:
        again = dist.build(tmp_path / "again")
    finally:
        os.umask(before)
    for first, second in zip(archives, again, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()


def test_the_sdist_builds_the_same_wheel(archives: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(archives[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = dist.run_hook("build_wheel", tmp_path / NAME, tmp_path, dist.release_date())
    assert wheel_files(wheel) == wheel_files(archives[0])


def test_the_date_is_given_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # 2001-09-09
    wheel, sdist = dist.build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.date_time[:3] for entry in archive.infolist()} == {(2001, 9, 9)}
    with tarfile.open(sdist) as archive:
        assert {entry.mtime for entry in archive.getmembers()} == {1000000000}


@pytest.mark.long
@pytest.mark.parametrize("kind", [0, 1], ids=["wheel", "sdist"])
def test_an_installation_works_without_the_checkout(
    archives: tuple[Path, Path], kind: int, capsys: pytest.CaptureFixture[str]
) -> None:
    check.check(archives[kind])
    assert f"grpo_kernels {grpo_kernels.__version__} works" in capsys.readouterr().out


# --- Versions ---


def test_users_get_ranges(archives: tuple[Path, Path]) -> None:
    metadata = Parser().parsestr(wheel_files(archives[0])[f"{NAME}.dist-info/METADATA"].decode())
    assert metadata.get_all("Provides-Extra") == ["trl", "verl"]
    required = metadata.get_all("Requires-Dist") or []
    assert {re.split(r"[^\w-]", line)[0] for line in required} == {
        *("torch", "triton", "typing-extensions", "trl", "verl")
    }
    assert all(">=" in line and "==" not in line.split(";")[0] for line in required)


def lines(path: Path) -> list[str]:
    """Return the requirements of a file and of those that it includes."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found += lines(path.with_name(line.removeprefix("-r ")))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.stem)
def test_every_version_is_pinned(path: Path) -> None:
    """`pip` takes the newest version of what is not pinned. For torch that can be several gigabytes."""
    version = r"[\w-]+(\[\w+\])?==[\w.]+(; (python_version|platform_system) .*)?"
    commit = r"[\w-]+ @ https://\S+/[0-9a-f]{40}\.tar\.gz(#\S+)?"
    for line in lines(path):
        assert re.fullmatch(f"{version}|{commit}", line), line


@pytest.mark.parametrize("name", [*SHARED, *TRAINERS, "verl"])
def test_every_environment_pins_torch(name: str) -> None:
    found = lines(ROOT / "requirements" / f"{name}.txt")
    assert [line for line in found if line.startswith("torch==")]


@pytest.mark.parametrize("names", [SHARED, *((name,) for name in (*TRAINERS, "verl"))], ids=str)
def test_files_agree_on_versions(names: tuple[str, ...]) -> None:
    """The files of an environment state one version of each package."""
    stated: dict[str, set[str]] = {}
    for path in REQUIREMENTS:
        for line in lines(path) if path.stem.removesuffix("-nodeps") in names else []:
            name, _, rest = line.partition("==")
            stated.setdefault(f"{name};{rest.partition(';')[2]}", set()).add(rest)
    assert all(len(versions) == 1 for versions in stated.values()), stated
