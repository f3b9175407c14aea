# SPDX-License-Identifier: MIT
"""What ships: wheel, sdist, archive, and the one file copied anywhere: promise 4.1.

Each holds what it should, nothing else, and is the same program.
"""

from __future__ import annotations

import ast
import email
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bus_containers
from local_platform import Platform
from support import ROOT, Env, Program, Result, python, second_tier, tiers

SOURCE = ROOT / "bus_containers.py"
BUILD = Path("zipapp", "build.py")
VERSION = bus_containers.__version__
VERSION_LINE = f"bus-containers {VERSION}\n".encode()
MOST_BYTES = 120_000
Start = Callable[..., Result]


@pytest.fixture
def start(home: Path) -> Start:
    """Run a command with an empty HOME and no Bus variable set, which may write byte code."""

    def run(*command: str | Path, env: Env | None = None, **options: Any) -> Result:
        words = [str(word) for word in command]
        env = {"PYTHONDONTWRITEBYTECODE": None, **(env or {})}
        return Program(words[:1], home)(*words[1:], env=env, **options)

    return run


def check_command(start: Start, *command: str | Path, **options: Any) -> None:
    """It gives the container's exit code and its document, and knows its options."""
    run = start(*command, "run", "sh", "-c", "exit 37", **options)
    assert (run.code, run.document["exit_code"], run.err) == (37, 37, b"")
    usage = start(*command, "status", "--no-such-option", **options)
    assert (usage.code, usage.out, "--no-such-option" in usage.error) == (2, b"", True)


# --- wheel, sdist and pip -----------------------------------------------------------------------


def test_the_metadata_is_true() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'bus-containers = "bus_containers:console"' in text
    assert callable(bus_containers.console)
    assert 'requires-python = ">=3.9"' in text
    assert "\ndependencies = []\n" in text
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    latest = re.search(r"(?m)^## \[?([0-9]+\.[0-9]+\.[0-9]+)", changes)
    assert latest and latest[1] == VERSION, "CHANGELOG.md does not begin with this version"


def pip(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@second_tier
def test_wheel_and_sdist(tmp_path: Path) -> None:
    """Built from a copy of the checkout as it is once the tests have been run in it."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    tree, wheels, sdists, backend = (tmp_path / name for name in "twsb")
    requires = re.search(r"(?m)^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text())
    assert requires
    done = pip("install", "--retries=1", "--target", backend, *json.loads(requires[1]))
    if "(from versions: none)" in done.stderr:  # nothing of that name, old or new: no index at all
        pytest.skip("offline: no package index has the build backend")
    assert done.returncode == 0, done.stderr
    env = {**Program([], tmp_path).environ, "PYTHONPATH": str(backend)}
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skip)
    inner = {str(path.relative_to(tree)) for path in tree.rglob("*/*") if path.is_file()}
    for folder in (tree, tree / "tests", tree / "zipapp"):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "left.cpython-39.pyc").touch()

    code = "import sys, flit_core.buildapi as backend; backend.build_sdist(sys.argv[1])"
    sdists.mkdir()
    subprocess.run([sys.executable, "-c", code, sdists], cwd=tree, env=env, check=True)
    (path,) = sdists.iterdir()
    with tarfile.open(path) as sdist:
        names = sdist.getnames()
    wanted = "CHANGELOG.md Dockerfile LICENSE PKG-INFO README.md bus_containers.py pyproject.toml"
    expected = sorted({*wanted.split(), *inner})
    assert path.name == f"bus_containers-{VERSION}.tar.gz"
    assert sorted(names) == [f"bus_containers-{VERSION}/{name}" for name in expected]

    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", wheels, tree, env=env)
    assert done.returncode == 0, done.stderr
    (path,) = wheels.iterdir()
    assert path.name == f"bus_containers-{VERSION}-py3-none-any.whl"
    info = f"bus_containers-{VERSION}.dist-info"
    own = "METADATA RECORD WHEEL entry_points.txt licenses/LICENSE"
    with zipfile.ZipFile(path) as wheel:
        names = [*(f"{info}/{name}" for name in own.split()), "bus_containers.py"]
        assert sorted(wheel.namelist()) == names
        assert wheel.read("bus_containers.py") == SOURCE.read_bytes()
        header, _, readme = wheel.read(f"{info}/METADATA").partition(b"\n\n")
    metadata = email.message_from_bytes(header)
    summary = (ast.get_docstring(ast.parse(SOURCE.read_bytes())) or "").splitlines()[0]
    assert (metadata["Name"], metadata["Version"]) == ("bus-containers", VERSION)
    assert (metadata["Summary"], metadata["Requires-Python"]) == (summary, ">=3.9")
    assert all("extra ==" in need for need in metadata.get_all("Requires-Dist", []))
    assert readme.strip() == (ROOT / "README.md").read_bytes().strip()


# --- the one file, copied -------------------------------------------------------------------------

LIBRARY = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
assert module.__file__.startswith(sys.argv[1]), module.__file__
client = module.Client(os.environ["BUS_AI_API_URL"], os.environ["BUS_AI_TOKEN"])
print(module.__version__, client.run(["sh", "-c", "printf OK"])["stdout"])
"""
COPIES = {  # the file, the name to import it by, and how Python is started
    "bus_containers.py": ("bus_containers", []),
    "othername/_vendor/client.py": ("othername._vendor.client", ["-OO"]),
    "app.zip": ("bus_containers", []),
}


@pytest.mark.parametrize("file", tiers(COPIES, "othername/_vendor/client.py"))
def test_a_copy(file: str, tmp_path: Path, platform: Platform, start: Start) -> None:
    """As a library and as a command, under any name, and nothing is written beside it."""
    name, flags = COPIES[file]
    app = tmp_path / "app"
    copy = app / file
    copy.parent.mkdir(parents=True)
    if copy.suffix == ".zip":
        with zipfile.ZipFile(copy, "w") as zipped:
            zipped.write(SOURCE, "bus_containers.py")
    else:
        shutil.copy(SOURCE, copy)
    files = sorted(app.rglob("*"))
    path = copy if copy.suffix == ".zip" else app
    command = [sys.executable, *flags]
    result = start(*command, "-B", "-c", LIBRARY, path, name, at=platform, cwd=tmp_path)
    assert result[:3] == (0, f"{VERSION} OK\n".encode(), b"")
    if copy.suffix == ".py":
        check_command(start, *command, copy, at=platform)
        assert start(*command, copy, "--help").out.startswith(b"NAME\n")
    assert sorted(app.rglob("*")) == files


@pytest.fixture
def with_python3(tmp_path: Path) -> Env:
    """An environment in which `python3` is this Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_file_can_be_made_executable(tmp_path: Path, with_python3: Env, start: Start) -> None:
    copy = tmp_path / "bus-containers"
    shutil.copy(SOURCE, copy)
    copy.chmod(0o755)
    by_name = [sys.executable, "-B", "-m", "bus_containers"]
    for command in ([copy], by_name):
        result = start(*command, "--version", env=with_python3, cwd=SOURCE.parent)
        assert result[:3] == (0, VERSION_LINE, b"")


ELSEWHERE = """
import importlib, os, runpy, signal, socket, sys
import http.client, ssl, tempfile, urllib.request

# What Windows lacks: whole modules, and parts of those that it has.
for name in "fcntl grp posix pwd readline resource syslog termios tty".split():
    sys.modules[name] = None
for module, names in {
    os: "O_NOFOLLOW O_NONBLOCK fchmod fchown fork geteuid getuid mkfifo set_blocking uname",
    signal: "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 alarm pthread_sigmask setitimer",
    socket: "AF_UNIX TCP_USER_TIMEOUT",
}.items():
    for name in names.split():
        vars(module).pop(name, None)
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_system_that_is_not_posix(tmp_path: Path, platform: Platform, start: Start) -> None:
    words = ["-o", tmp_path / "result.json", "run", "--", "sh", "-c", "printf OK; exit 37"]
    result = start(sys.executable, "-c", ELSEWHERE, SOURCE, *words, at=platform)
    assert (result.code, result.out, result.err) == (37, b"", b"")
    assert json.loads((tmp_path / "result.json").read_text())["stdout"] == "OK"


# --- building the archive -------------------------------------------------------------------------


def copy_tree(folder: Path) -> Path:
    """Copy what an archive is built from, and nothing else."""
    (folder / "zipapp").mkdir(parents=True)
    for name in ("bus_containers.py", "zipapp/build.py", "zipapp/__main__.py"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("version", tiers(["ours", "3.9", "3.13"], "ours"))
def test_same_tree_and_python_give_the_same_bytes(
    version: str, tmp_path: Path, start: Start
) -> None:
    builder = sys.executable if version == "ours" else python(version)
    one, other = copy_tree(tmp_path / "one"), copy_tree(tmp_path / "another\u00e9 place" / "deeper")
    for path in other.rglob("*"):
        os.utime(path, (981173106, 981173106))
    noise = tmp_path / "noise"
    noise.mkdir()
    # Names that the module uses too, held by the process that builds: marshal would tell.
    (noise / "sitecustomize.py").write_text("import argparse, json, urllib.request\n")
    loud: Env = {
        "PYTHONHASHSEED": "2",
        "PYTHONOPTIMIZE": "2",
        "PYTHONNODEBUGRANGES": "1",
        "PYTHONPATH": str(noise),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    first = start(builder, BUILD, umask=0o022, cwd=one)
    second = start(builder, other / BUILD, "-o", "x.pyz", env=loud, umask=0o077, cwd=noise)
    paths = [one / "dist" / "bus_containers.pyz", noise / "x.pyz"]
    for path, shown, result in zip(paths, [paths[0], "x.pyz"], [first, second]):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (result.code, result.out) == (0, f"{digest}  {shown}\n".encode()), result.err
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in noise.iterdir()) == ["sitecustomize.py", "x.pyz"]
    # Whichever Python built it, the other ones take its source.
    assert start(sys.executable, paths[0], "--version")[:3] == (0, VERSION_LINE, b"")


DATES = {
    "": (1980, 1, 1, 0, 0, 0),  # is unset
    "1700000000": (2023, 11, 14, 22, 13, 20),
    "-1": (1980, 1, 1, 0, 0, 0),  # the first that there is
    "9" * 20: (2107, 12, 31, 23, 59, 58),  # and the last
}


@pytest.mark.parametrize("epoch", tiers(DATES, "1700000000"))
def test_source_date_epoch(epoch: str, tmp_path: Path, start: Start) -> None:
    path = tmp_path / "dated.pyz"
    env: Env = {"SOURCE_DATE_EPOCH": epoch, "TZ": "Asia/Tokyo"}
    start(sys.executable, ROOT / BUILD, "-o", path, env=env)
    with zipfile.ZipFile(path) as zipped:
        assert {info.date_time for info in zipped.infolist()} == {DATES[epoch]}


@pytest.mark.parametrize("fault", tiers(["SOURCE_DATE_EPOCH", "module", "place"], "module"))
def test_failed_build_leaves_the_old_archive(fault: str, tmp_path: Path, start: Start) -> None:
    tree = copy_tree(tmp_path / "tree")
    old = tree / "dist" / "bus_containers.pyz"
    old.parent.mkdir()
    env: Env = {"SOURCE_DATE_EPOCH": "yesterday"} if fault == "SOURCE_DATE_EPOCH" else {}
    if fault == "place":
        old.mkdir()
    else:
        old.write_bytes(b"old")
    if fault == "module":
        (tree / "bus_containers.py").write_text("no python\n")
    result = start(sys.executable, tree / BUILD, env=env)
    assert (result.code, result.out) == (1, b"")
    assert result.message.splitlines()[-1].startswith("build.py: ")
    assert list(old.parent.iterdir()) == [old]
    assert old.is_dir() or old.read_bytes() == b"old"


# --- the archive ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "bus_containers.pyz"
    build = [sys.executable, str(ROOT / BUILD), "-o", str(path)]
    subprocess.run(build, check=True, capture_output=True)
    return path


def test_what_is_in_the_archive(archive: Path) -> None:
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\nPK")
    assert archive.stat().st_size <= MOST_BYTES
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.comment == b""
        entries = [
            (info.filename, info.date_time, info.create_system, info.external_attr >> 16)
            for info in zipped.infolist()
        ]
        content = {info.filename: zipped.read(info) for info in zipped.infolist()}
    names = ("__main__.py", "__main__.pyc", "bus_containers.py", "bus_containers.pyc")
    assert entries == [(name, (1980, 1, 1, 0, 0, 0), 3, 0o100644) for name in names]
    for name, source in (("bus_containers", SOURCE), ("__main__", ROOT / "zipapp" / "__main__.py")):
        assert content[f"{name}.py"] == source.read_bytes()
        compiled, flags = content[f"{name}.pyc"], b"\1\0\0\0"  # PEP 552: by hash, never checked
        digest = importlib.util.source_hash(content[f"{name}.py"])
        assert compiled.startswith(importlib.util.MAGIC_NUMBER + flags + digest)


WAYS = {
    "python X.pyz": ["python3", "bus_containers.pyz"],
    "on PATH": ["bus-containers"],
    "isolated": ["python3", "-I", "-S", "-E", "-B", "-OO", "./bus-containers"],
}


@pytest.mark.parametrize("way", tiers(WAYS, "on PATH"))
def test_ways_to_start(
    way: str, archive: Path, tmp_path: Path, platform: Platform, with_python3: Env, start: Start
) -> None:
    """From a read-only folder on PATH, under its own name and the command's."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("bus_containers.pyz", "bus-containers"):
        shutil.copy(archive, place / name)
        (place / name).chmod(0o555)
    place.chmod(0o555)
    before = sorted(place.iterdir())
    env: Env = {"PATH": f"{place}:{with_python3['PATH']}"}
    # `env` looks on the PATH that it is given.
    check_command(start, "env", *WAYS[way], cwd=place, env=env, at=platform)
    code = "import bus_containers; print(bus_containers.__file__)"
    library = start(sys.executable, "-c", code, env={"PYTHONPATH": str(archive)}, cwd=place)
    assert library.out == f"{archive / 'bus_containers.pyc'}\n".encode()
    assert sorted(place.iterdir()) == before
    place.chmod(0o755)


def slim(library: Path, folder: Path) -> Path:
    """A PYTHONHOME with a package less, as python3-minimal has it."""
    place = folder / library.parent.name / library.name
    place.mkdir(parents=True)
    for path in library.iterdir():
        if path.name not in ("http", "site-packages"):
            (place / path.name).symlink_to(path)
    return folder


CANNOT_IMPORT = """
import runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == "bus_containers":
            raise eval(sys.argv[2])
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[1])
"""


def test_a_python_that_will_not_do_is_told(archive: Path, tmp_path: Path, start: Start) -> None:
    code = "import runpy, sys; sys.version_info = (3, 8); runpy.run_path(sys.argv[1])"
    told = f"bus-containers: needs Python 3.9 or newer; this is 3.8 ({sys.executable})\n"
    assert start(sys.executable, "-c", code, archive)[:3] == (2, b"", told.encode())
    told = (
        "bus-containers: this Python has no `http`: install `python3`,"
        f" python3-minimal is not enough ({sys.executable})\n"
    )
    env: Env = {"PYTHONHOME": str(slim(Path(sysconfig.get_path("stdlib")), tmp_path / "slim"))}
    assert start(sys.executable, archive, "--version", env=env)[:3] == (2, b"", told.encode())
    code = "import runpy, sys; sys.modules['zlib'] = None; runpy.run_path(sys.argv[1])"
    told = (
        "bus-containers: this Python has no `zlib`, to unpack this:"
        f" take the file bus_containers.py ({sys.executable})\n"
    )
    assert start(sys.executable, "-c", code, archive)[:3] == (2, b"", told.encode())
    for error, reason in (
        ("MemoryError()", "there is not enough memory"),
        ("ImportError('no room for zlib')", "no room for zlib"),
    ):
        told = f"bus-containers: cannot start: {reason} ({sys.executable})\n"
        result = start(sys.executable, "-c", CANNOT_IMPORT, archive, error)
        assert result[:3] == (2, b"", told.encode())


@second_tier
@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
def test_an_old_python_is_told(version: str, archive: Path, start: Start) -> None:
    path = python(version)
    told = f"bus-containers: needs Python 3.9 or newer; this is {version} ({path})\n"
    assert start(path, archive, "--version")[:3] == (2, b"", told.encode())
