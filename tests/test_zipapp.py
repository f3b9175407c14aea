# SPDX-License-Identifier: MIT
"""The archive: reproducible bytes, the byte code in it, and every way and place to start it."""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import local_platform
from conftest import ROOT, Program, Result

VERSION = b"bus-containers 1.0.0\n"
MOST_BYTES = 100_000


def _find_pythons() -> dict[str, str]:
    """Return the Pythons on this machine as "3.9" -> path: those of pyenv, then those on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [str(path) for path in sorted(pyenv.glob("versions/*/bin/python"))]
    names = ["2.7", *(f"3.{minor}" for minor in range(6, 16))]
    candidates += filter(None, (shutil.which(f"python{name}") for name in names))
    found: dict[str, str] = {}
    ask = "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.executable)"
    for candidate in candidates:
        asked = subprocess.run([candidate, "-c", ask], capture_output=True, text=True)
        if asked.returncode == 0:  # a version manager's shim may only complain
            version, path = asked.stdout.splitlines()
            found.setdefault(version, path)
    return found


PYTHONS = _find_pythons()
OURS = "{}.{}".format(*sys.version_info)
PYTHONS[OURS] = sys.executable


def python(version: str) -> str:
    if version not in PYTHONS:
        pytest.skip(f"there is no Python {version} here")
    return PYTHONS[version]


def copy_tree(folder: Path) -> Path:
    """Copy what an archive is built from, and nothing else."""
    (folder / "zipapp").mkdir(parents=True)
    for name in ("bus_containers.py", "zipapp/build.py", "zipapp/__main__.py"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Result]:
    """Run a command with an empty HOME and no Bus variable set."""
    (tmp_path / "home").mkdir()

    def run(*words: str | Path, **options: Any) -> Result:
        command = [str(word) for word in words]
        return Program(command[:1], tmp_path / "home")(*command[1:], **options)

    return run


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "bus_containers.pyz"
    build = [sys.executable, str(ROOT / "zipapp" / "build.py"), "-o", str(path)]
    subprocess.run(build, check=True, capture_output=True)
    return path


def rewrite(archive: Path, path: Path, **changes: bytes | None) -> Path:
    """Copy the archive with the content of members changed, or without those that are None."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = changes.get(name.replace(".", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


# ---- Building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
def test_same_tree_and_python_give_the_same_bytes(
    version: str, tmp_path: Path, start: Callable[..., Result]
) -> None:
    one, other = copy_tree(tmp_path / "one"), copy_tree(tmp_path / "another\u00e9 place" / "deeper")
    for path in other.rglob("*"):
        os.utime(path, (981173106, 981173106))
    noise = tmp_path / "noise"
    noise.mkdir()
    # Names that the module uses too, held by the process that builds: marshal would tell.
    (noise / "sitecustomize.py").write_text("import argparse, json, urllib.request\n")
    quiet: dict[str, str | None] = {"PYTHONHASHSEED": "1"}
    loud: dict[str, str | None] = {
        "PYTHONHASHSEED": "2",
        "PYTHONOPTIMIZE": "2",
        "PYTHONNODEBUGRANGES": "1",
        "PYTHONPATH": str(noise),
        "PYTHONDEVMODE": "1",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    build = Path("zipapp", "build.py")
    first = start(python(version), build, env=quiet, umask=0o022, cwd=one)
    second = start(python(version), other / build, "-o", "x.pyz", env=loud, umask=0o077, cwd=noise)
    paths = [one / "dist" / "bus_containers.pyz", noise / "x.pyz"]
    for path, shown, result in zip(paths, [paths[0], Path("x.pyz")], [first, second]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (result.code, result.out) == (0, f"{digest}  {shown}\n".encode()), result.err
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in noise.iterdir()) == ["sitecustomize.py", "x.pyz"]

    # Whichever Python built it, the other ones take its source.
    for runner in (version, OURS):
        assert start(PYTHONS[runner], paths[0], "--version")[:3] == (0, VERSION, b"")


@pytest.mark.parametrize(
    ("epoch", "date"),
    [
        pytest.param("", (1980, 1, 1, 0, 0, 0), id="empty is unset"),
        pytest.param("1700000000", (2023, 11, 14, 22, 13, 20), id="honoured, in UTC"),
        pytest.param("-1", (1980, 1, 1, 0, 0, 0), id="before the first date of zip"),
        pytest.param("99999999999999999999", (2107, 12, 31, 23, 59, 58), id="after the last"),
    ],
)
def test_source_date_epoch(
    epoch: str, date: tuple[int, ...], tmp_path: Path, start: Callable[..., Result]
) -> None:
    path = tmp_path / "dated.pyz"
    env = {"SOURCE_DATE_EPOCH": epoch, "TZ": "Asia/Tokyo"}
    start(sys.executable, ROOT / "zipapp" / "build.py", "-o", path, env=env)
    with zipfile.ZipFile(path) as zipped:
        assert {info.date_time for info in zipped.infolist()} == {date}


@pytest.mark.parametrize("fault", ["SOURCE_DATE_EPOCH", "module", "place"])
def test_failed_build_leaves_the_old_archive(
    fault: str, tmp_path: Path, start: Callable[..., Result]
) -> None:
    tree = copy_tree(tmp_path / "tree")
    dist = tree / "dist"
    dist.mkdir()
    old = dist / "bus_containers.pyz"
    old.write_bytes(b"old")
    env: dict[str, str | None] = {}
    if fault == "SOURCE_DATE_EPOCH":
        env[fault] = "yesterday"
    elif fault == "module":
        (tree / "bus_containers.py").write_text("no python\n")
    else:
        old.unlink()
        old.mkdir()
    result = start(sys.executable, tree / "zipapp" / "build.py", env=env)
    assert (result.code, result.out) == (1, b"")
    assert result.message.splitlines()[-1].startswith("build.py: ")
    assert [path.name for path in dist.iterdir()] == ["bus_containers.pyz"]
    assert old.is_dir() or old.read_bytes() == b"old"


# ---- What is in it -------------------------------------------------------------------------------


def test_entries(archive: Path) -> None:
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.testzip() is None
        assert zipped.comment == b""
        entries = [
            (info.filename, info.date_time, info.create_system, info.external_attr >> 16)
            for info in zipped.infolist()
        ]
        names = ("__main__.py", "__main__.pyc", "bus_containers.py", "bus_containers.pyc")
        assert entries == [(name, (1980, 1, 1, 0, 0, 0), 3, 0o100644) for name in names]
        assert zipped.read("bus_containers.py") == (ROOT / "bus_containers.py").read_bytes()
        assert zipped.read("__main__.py") == (ROOT / "zipapp" / "__main__.py").read_bytes()


def test_size(archive: Path) -> None:
    assert archive.stat().st_size <= MOST_BYTES


def _constants(code: types.CodeType) -> Iterator[object]:
    """Yield a code object and all that it holds, however deep."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant)
        else:
            yield constant


@pytest.mark.parametrize("name", ["__main__", "bus_containers"])
def test_byte_code(name: str, archive: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        source, compiled = zipped.read(f"{name}.py"), zipped.read(f"{name}.pyc")
    magic, flags, digest = compiled[:4], compiled[4:8], compiled[8:16]
    assert magic == importlib.util.MAGIC_NUMBER
    assert flags == b"\1\0\0\0"  # PEP 552: by hash, and never checked
    assert digest == importlib.util.source_hash(source)
    constants = list(_constants(marshal.loads(compiled[16:])))
    files = {code.co_filename for code in constants if isinstance(code, types.CodeType)}
    assert files == {f"{name}.py"}
    # Before 3.12 the hash of None, and so of what holds it, is an address: no seed fixes its order.
    held = [item for constant in constants if isinstance(constant, frozenset) for item in constant]
    assert all(isinstance(item, (str, int, bytes)) for item in held)


def test_byte_code_is_what_runs(
    archive: Path, tmp_path: Path, start: Callable[..., Result]
) -> None:
    bad = b"raise SystemExit(99)\n"
    path = rewrite(archive, tmp_path / "x.pyz", bus_containers_py=bad, __main___py=bad)
    assert start(sys.executable, path, "--version")[:3] == (0, VERSION, b"")
    checked = start(sys.executable, "--check-hash-based-pycs", "always", path, "--version")
    assert checked.code == 99


def test_source_runs_where_byte_code_is_foreign(
    archive: Path, tmp_path: Path, start: Callable[..., Result]
) -> None:
    with zipfile.ZipFile(archive) as zipped:
        foreign = b"\0\0\r\n" + zipped.read("bus_containers.pyc")[4:]
    changes = {"bus_containers_pyc": foreign, "__main___pyc": foreign}
    path = rewrite(archive, tmp_path / "x.pyz", **changes)
    assert start(sys.executable, path, "--version")[:3] == (0, VERSION, b"")
    changes["bus_containers_py"] = b"raise SystemExit(99)\n"
    path = rewrite(archive, tmp_path / "y.pyz", **changes)
    assert start(sys.executable, path, "--version").code == 99


# ---- Ways and places -----------------------------------------------------------------------------


@pytest.fixture
def place(archive: Path, tmp_path: Path) -> Iterator[Path]:
    """A read-only folder on PATH with the archive in it, under its own name and the command's."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "python3").symlink_to(Path(sys.executable).resolve())
    for name in ("bus_containers.pyz", "bus-containers"):
        shutil.copy(archive, place / name)
        (place / name).chmod(0o555)
    place.chmod(0o555)
    yield place
    place.chmod(0o755)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["python3", "bus_containers.pyz"], id="python X.pyz"),
        pytest.param(["./bus_containers.pyz"], id="./X.pyz"),
        pytest.param(["bus-containers"], id="bus-containers on PATH"),
        pytest.param(["python3", "-I", "-S", "-E", "-B", "bus-containers"], id="isolated"),
        pytest.param(["python3", "-OO", "bus-containers"], id="without docstrings"),
    ],
)
def test_ways_to_start(command: list[str], place: Path, start: Callable[..., Result]) -> None:
    before = sorted(place.iterdir())
    env = {"PATH": f"{place}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": None}
    assert start(*command, "--version", cwd=place, env=env)[:3] == (0, VERSION, b"")
    usage = start(*command, "status", "--no-such-option", cwd=place, env=env)
    assert (usage.code, usage.out) == (2, b"")
    assert usage.message.startswith("bus-containers: ")
    assert "--no-such-option" in usage.message
    assert sorted(place.iterdir()) == before


def test_exit_code_of_a_run_arrives(archive: Path, start: Callable[..., Result]) -> None:
    with local_platform.Platform() as platform:
        env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token()}
        result = start(sys.executable, archive, "run", "--", "sh", "-c", "exit 37", env=env)
    assert result.code == 37
    assert b'"exit_code": 37' in result.out


def test_library_in_the_archive(archive: Path, start: Callable[..., Result]) -> None:
    code = "import bus_containers as b; print(b.__file__, b.__version__, b.Client.__name__)"
    env = {"PYTHONPATH": str(archive)}
    result = start(sys.executable, "-c", code, env=env, cwd=archive.parent)
    assert result.out == f"{archive / 'bus_containers.pyc'} 1.0.0 Client\n".encode()


# ---- Pythons that will not do --------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
def test_old_python_is_told(version: str, archive: Path, start: Callable[..., Result]) -> None:
    path = python(version)
    result = start(path, archive, "--version")
    assert (result.code, result.out) == (2, b"")
    assert result.message == (
        f"bus-containers: needs Python 3.9 or newer; this is {version} ({path})\n"
    )


def test_python_without_http_is_told(
    archive: Path, tmp_path: Path, start: Callable[..., Result]
) -> None:
    # This interpreter with its own standard library, one package less, as python3-minimal has it.
    library = Path(sysconfig.get_path("stdlib"))
    slim = tmp_path / "slim" / library.parent.name / library.name
    slim.mkdir(parents=True)
    for path in library.iterdir():
        if path.name not in ("http", "site-packages"):
            (slim / path.name).symlink_to(path)
    result = start(sys.executable, archive, "--version", env={"PYTHONHOME": str(tmp_path / "slim")})
    assert (result.code, result.out) == (2, b"")
    assert result.message == (
        "bus-containers: this Python has no `http`: install `python3`,"
        f" python3-minimal is not enough ({sys.executable})\n"
    )
