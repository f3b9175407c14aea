# SPDX-License-Identifier: MIT
"""The fixtures of all tests, and the two tiers; tests/README.md says how to use them.

`pytest --target=PATH` runs the same suite against another copy of the program: a `.pyz` built by
another Python, an installed script, a vendored file. The default is the module in this checkout.
`pytest --all` runs the second tier, too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hostile import Api, ApiServer, Certificates, Hostile, why_no_openssl
from local_platform import Platform
from support import CANARY, ROOT, InProcess, Program, is_ours, skip_if


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", default=str(ROOT / "bus_containers.py"), help="program under test")
    parser.addoption("--all", action="store_true", help="run the second tier of tests, too")


def pytest_configure(config: pytest.Config) -> None:
    """Make `import bus_containers` give the program under test, and let signals arrive at it.

    In the background of a script SIGINT is ignored and under nohup SIGHUP, here and so by all that
    a test starts.
    """
    target = Path(config.getoption("--target"))
    if not target.exists():
        raise pytest.UsageError(
            f"{target} does not exist: build it first with `python3 zipapp/build.py`"
        )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    target = target.resolve()
    sys.path.insert(0, str(target if target.suffix == ".pyz" else target.parent))


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--all"):
        return "both tiers of tests, which takes some minutes"
    return "first tier of tests, a minute or two; `pytest --all` runs the second tier, too"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("second_tier")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("second_tier")]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in process see no proxy, token or URL of the person who runs them."""
    for name in list(os.environ):
        if is_ours(name):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def canary() -> str:
    """A token that may turn up in no output whatever."""
    return CANARY


# --- the program ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def command(request: pytest.FixtureRequest) -> list[str]:
    """The words that start the program under test."""
    target = Path(request.config.getoption("--target")).resolve()
    return [sys.executable, str(target)] if target.suffix in (".py", ".pyz") else [str(target)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HOME."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, in which `cli` and `program` work."""
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


@pytest.fixture
def program(command: list[str], home: Path, folder: Path) -> Program:
    """The program as processes; all else is as for `cli`."""
    return Program(command, home, folder)


@pytest.fixture
def cli(home: Path, folder: Path) -> InProcess:
    """`main` in this process, with an empty HOME, in an empty folder, with no Bus variable set."""
    return InProcess(home, folder)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """In process a request is repeated, and `--wait` looks again, after a moment.

    For tests that are about what is repeated. How long the pauses are is held elsewhere.
    """
    import bus_containers

    monkeypatch.setattr(bus_containers, "_RETRY_PAUSE_SECONDS", 0.03)
    monkeypatch.setattr(bus_containers, "_WAIT_PAUSE_SECONDS", 0.1)


# --- servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _platform() -> Iterator[Platform]:
    with Platform() as platform:
        yield platform


@pytest.fixture
def platform(_platform: Platform) -> Platform:
    """The faithful stand-in of the API, one server a session, as good as new for each test."""
    _platform.reset()
    return _platform


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def api(api_server: ApiServer) -> Iterator[Api]:
    """A server that gives the answers a test puts in, one server a session, a URL for each test."""
    with api_server.open() as api:
        yield api


@pytest.fixture
def serve() -> Iterator[Callable[..., Hostile]]:
    """Start a `Hostile` of these scripts, which ends with the test."""
    with ExitStack() as stack:
        yield lambda *scripts, **options: stack.enter_context(Hostile(*scripts, **options))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certification authority and what it has issued."""
    skip_if(why_no_openssl())
    return Certificates(tmp_path_factory.mktemp("certificates"))
