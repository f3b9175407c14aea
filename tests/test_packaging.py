# SPDX-License-Identifier: MIT
"""The wheel, the sdist, and the module copied into other programs: each holds what it should."""

from __future__ import annotations

import ast
import email
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import local_platform
from conftest import ROOT, Program, Result

SOURCE = ROOT / "bus_containers.py"
VERSION = "1.0.0"
SUMMARY = (ast.get_docstring(ast.parse(SOURCE.read_bytes())) or "").splitlines()[0]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Result]:
    """Run this Python with an empty HOME and no Bus variable set."""
    (tmp_path / "home").mkdir()
    return Program([sys.executable], tmp_path / "home")


# ---- Wheel, sdist and pip ------------------------------------------------------------------------


def pip(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment in which the build backend can be imported: it alone is downloaded."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    requires = re.search(r"(?m)^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text())
    assert requires
    folder = tmp_path_factory.mktemp("backend")
    done = pip("install", "--retries=1", "--target", folder, *json.loads(requires[1]))
    if "(from versions: none)" in done.stderr:  # nothing of that name, old or new: no index at all
        pytest.skip("offline: no package index has the build backend")
    assert done.returncode == 0, done.stderr
    environ = Program([], folder).environ
    return {**environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout as it is once the tests have been run in it."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skip)
    for folder in (tree, tree / "tests", tree / "zipapp"):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "left.cpython-39.pyc").touch()
    return tree


def built(what: str, tree: Path, backend: dict[str, str], folder: Path) -> Path:
    """Build a wheel or an sdist as pip does: by the hook of PEP 517, in the tree."""
    code = "import sys, flit_core.buildapi as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    command = [sys.executable, "-c", code, what, str(folder)]
    subprocess.run(command, cwd=tree, env=backend, check=True)
    (path,) = folder.iterdir()
    return path


def test_wheel(tree: Path, backend: dict[str, str], tmp_path: Path) -> None:
    done = pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, env=backend)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == f"bus_containers-{VERSION}-py3-none-any.whl"
    info = f"bus_containers-{VERSION}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        assert sorted(wheel.namelist()) == [
            f"{info}/METADATA",
            f"{info}/RECORD",
            f"{info}/WHEEL",
            f"{info}/entry_points.txt",
            f"{info}/licenses/LICENSE",
            "bus_containers.py",
        ]
        assert wheel.read("bus_containers.py") == SOURCE.read_bytes()
        scripts = wheel.read(f"{info}/entry_points.txt").decode().split()
        header, _, readme = wheel.read(f"{info}/METADATA").partition(b"\n\n")
    assert scripts == ["[console_scripts]", "bus-containers=bus_containers:console"]
    metadata = email.message_from_bytes(header)
    wanted = {
        "Name": "bus-containers",
        "Version": VERSION,
        "Summary": SUMMARY,
        "Requires-Python": ">=3.9",
        "License-Expression": "MIT",
        "License-File": "LICENSE",
    }
    assert {name: metadata[name] for name in wanted} == wanted
    needed = metadata.get_all("Requires-Dist", [])
    assert [need for need in needed if "extra ==" not in need] == []
    assert sorted(metadata.get_all("Provides-Extra", [])) == ["dev", "test"]
    assert readme.strip() == (ROOT / "README.md").read_bytes().strip()


def test_sdist(tree: Path, backend: dict[str, str], tmp_path: Path) -> None:
    path = built("sdist", tree, backend, tmp_path)
    assert path.name == f"bus_containers-{VERSION}.tar.gz"
    with tarfile.open(path) as sdist:
        names = [name.split("/", 1) for name in sdist.getnames()]
    assert {top for top, _ in names} == {f"bus_containers-{VERSION}"}
    wanted = [
        "CHANGELOG.md",
        "Dockerfile",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "bus_containers.py",
        "pyproject.toml",
    ]
    for folder in ("tests", "zipapp"):
        files = (path for path in (tree / folder).rglob("*") if path.is_file())
        wanted += [str(file.relative_to(tree)) for file in files if file.suffix != ".pyc"]
    assert sorted(name for _, name in names) == sorted(wanted)


def test_install(tree: Path, backend: dict[str, str], tmp_path: Path) -> None:
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(tmp_path / "venv")
    context = builder.ensure_directories(tmp_path / "venv")
    ask = [context.env_exe, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    modules = Path(subprocess.check_output(ask, text=True).strip())
    scripts = Path(context.bin_path)
    before = {*scripts.iterdir(), *modules.iterdir()}
    done = pip(
        "--python",
        context.env_exe,
        "install",
        "--no-build-isolation",
        "--no-compile",
        tree,
        env=backend,
    )
    assert done.returncode == 0, done.stderr
    new = {*scripts.iterdir(), *modules.iterdir()} - before
    assert new == {
        modules / "bus_containers.py",
        modules / f"bus_containers-{VERSION}.dist-info",
        scripts / "bus-containers",
    }
    run = Program([str(scripts / "bus-containers")], tmp_path)
    assert run("--version")[:3] == (0, f"bus-containers {VERSION}\n".encode(), b"")
    assert run("status", "--no-such-option").code == 2


# ---- Copied into other programs ------------------------------------------------------------------


@pytest.fixture(scope="module")
def platform() -> Iterator[local_platform.Platform]:
    with local_platform.Platform() as platform:
        yield platform


LIBRARY = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
assert module.__file__.startswith(sys.argv[1]), module.__file__
client = module.Client(os.environ["URL"], os.environ["TOKEN"])
print(module.__version__, client.run(["sh", "-c", "printf OK"])["stdout"])
"""

MODES = [
    pytest.param([], {}, id="plain"),
    pytest.param(["-I", "-S", "-E", "-B"], {}, id="-I -S -E -B"),
    pytest.param(["-OO"], {}, id="-OO"),
    pytest.param([], {"PYTHONSAFEPATH": "1"}, id="PYTHONSAFEPATH"),
]


@pytest.mark.parametrize(("flags", "env"), MODES)
@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param("bus_containers.py", "bus_containers", id="one file"),
        pytest.param("client.py", "client", id="renamed"),
        pytest.param(
            "othername/_vendor/bus_containers.py", "othername._vendor.bus_containers", id="vendored"
        ),
        pytest.param("app.zip", "bus_containers", id="in a zip"),
    ],
)
def test_library_from_a_copy(
    place: str,
    name: str,
    flags: list[str],
    env: dict[str, str],
    tmp_path: Path,
    platform: local_platform.Platform,
    start: Callable[..., Result],
) -> None:
    copy = tmp_path / "app" / place
    copy.parent.mkdir(parents=True)
    if copy.suffix == ".zip":
        with zipfile.ZipFile(copy, "w") as zipped:
            zipped.write(SOURCE, "bus_containers.py")
    else:
        shutil.copy(SOURCE, copy)
    path = str(copy if copy.suffix == ".zip" else tmp_path / "app")
    access = {"URL": platform.url, "TOKEN": platform.token()}
    result = start(*flags, "-c", LIBRARY, path, name, env={**env, **access}, cwd=tmp_path)
    assert result[:3] == (0, f"{VERSION} OK\n".encode(), b"")


@pytest.mark.parametrize(("flags", "env"), MODES)
@pytest.mark.parametrize("name", ["bus_containers.py", "bus-containers"])
def test_command_from_a_copy(
    name: str,
    flags: list[str],
    env: dict[str, str | None],
    tmp_path: Path,
    platform: local_platform.Platform,
    start: Callable[..., Result],
) -> None:
    copy = tmp_path / "app" / name
    copy.parent.mkdir()
    shutil.copy(SOURCE, copy)
    env = {**env, "PYTHONDONTWRITEBYTECODE": None}
    env.update(BUS_AI_API_URL=platform.url, BUS_AI_TOKEN=platform.token())
    version = start(*flags, copy, "--version", env=env)
    assert version[:3] == (0, f"bus-containers {VERSION}\n".encode(), b"")
    run = start(*flags, copy, "run", "--", "sh", "-c", "printf OK", env=env)
    assert (run.code, json.loads(run.out)["stdout"], run.err) == (0, "OK", b"")
    assert start(*flags, copy, "--help", env=env).out.startswith(b"NAME\n")
    assert list(copy.parent.iterdir()) == [copy]  # nothing was written beside it


# ---- What it imports -----------------------------------------------------------------------------

NETWORK = {"_socket", "_ssl", "asyncio", "email", "http", "selectors", "socket", "ssl"}


def imported(result: Result) -> set[str]:
    """Return the modules that `-X importtime` told of."""
    lines = (line for line in result.message.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param(["-c", "import bus_containers"], 0, id="import"),
        pytest.param([str(SOURCE), "--version"], 0, id="--version"),
        pytest.param([str(SOURCE), "--help"], 0, id="--help"),
        pytest.param([str(SOURCE), "run", "--help"], 0, id="run --help"),
        pytest.param([str(SOURCE), "status", "--no-such-option"], 2, id="usage error"),
    ],
)
def test_no_network_module_is_imported(
    words: list[str], code: int, start: Callable[..., Result]
) -> None:
    result = start("-S", "-X", "importtime", *words, cwd=ROOT)
    modules = imported(result)
    assert result.code == code
    assert {"site", "runpy"}.isdisjoint(modules)  # what is seen is the module's own doing
    assert "argparse" in modules or code == 0
    network = {name for name in modules if name.split(".")[0] in NETWORK}
    assert network | (modules & {"urllib.request", "importlib.metadata"}) == set()


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


def test_platform_without_posix(
    tmp_path: Path, platform: local_platform.Platform, start: Callable[..., Result]
) -> None:
    env = {"BUS_AI_API_URL": platform.url, "BUS_AI_TOKEN": platform.token()}
    output = tmp_path / "result.json"
    words = ["-o", output, "run", "--", "sh", "-c", "printf OK; exit 37"]
    result = start("-c", ELSEWHERE, SOURCE, *words, env=env)
    assert (result.code, result.out, result.err) == (37, b"", b"")
    assert json.loads(output.read_text())["stdout"] == "OK"
