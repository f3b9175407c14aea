# SPDX-License-Identifier: MIT
"""What every test shares: the program under test, a stand-in platform, and a canary token.

`pytest --target=PATH` runs the same suite against another copy of the program: a `.pyz` built by
another Python, an installed script, a vendored file. The default is the module in this checkout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# What the environment of the person who runs the tests must not change.
_OURS = ("BUS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_", "NO_COLOR", "REQUEST_METHOD")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", default=str(ROOT / "bus_containers.py"), help="program under test")


def pytest_configure(config: pytest.Config) -> None:
    """Make `import bus_containers` give the program under test, and let signals arrive at it.

    In the background of a script SIGINT is ignored and under nohup SIGHUP, here and so by all that
    a test starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    target = Path(config.getoption("--target")).resolve()
    sys.path.insert(0, str(target if target.suffix == ".pyz" else target.parent))


class Result(NamedTuple):
    """What one process of the program did; the streams are bytes."""

    code: int
    out: bytes
    err: bytes
    seconds: float

    @property
    def message(self) -> str:
        return self.err.decode("utf-8")


class Program:
    """The program under test as real processes, in an environment that is all the test's own."""

    def __init__(self, command: list[str], home: Path) -> None:
        self.command = command
        self.home = home
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(_OURS)
        }
        self.environ.update(HOME=str(home), LC_ALL="C.UTF-8", PYTHONDONTWRITEBYTECODE="1")
        self.environ.pop("XDG_CONFIG_HOME", None)

    def env(self, **changes: str | None) -> dict[str, str]:
        merged = {**self.environ, **changes}
        return {name: value for name, value in merged.items() if value is not None}

    def start(
        self, *args: str | bytes, env: dict[str, str | None] | None = None, **popen: object
    ) -> subprocess.Popen[bytes]:
        """Start it and return at once; the streams are pipes unless `popen` says otherwise."""
        options: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "env": self.env(**(env or {})),
            **popen,
        }
        return subprocess.Popen([*self.command, *args], **options)  # type: ignore[call-overload, no-any-return]

    def __call__(
        self,
        *args: str | bytes,
        env: dict[str, str | None] | None = None,
        limit: float = 60,
        input: bytes | None = None,  # noqa: A002 - as subprocess calls it
        **popen: object,
    ) -> Result:
        """Run it to its end; `limit` seconds is when the test gives up on it."""
        if input is not None:
            popen["stdin"] = subprocess.PIPE
        start = time.monotonic()
        with self.start(*args, env=env, **popen) as process:
            try:
                out, err = process.communicate(input, timeout=limit)
            except BaseException:
                process.kill()
                raise
        return Result(process.returncode, out or b"", err or b"", time.monotonic() - start)


@pytest.fixture(scope="session")
def command(request: pytest.FixtureRequest) -> list[str]:
    target = Path(request.config.getoption("--target")).resolve()
    return [sys.executable, str(target)] if target.suffix in (".py", ".pyz") else [str(target)]


@pytest.fixture
def program(command: list[str], tmp_path: Path) -> Program:
    """The program with an empty HOME and no Bus variable set."""
    home = tmp_path / "home"
    home.mkdir()
    return Program(command, home)


@pytest.fixture(scope="session")
def canary() -> str:
    """A token that may turn up in no output whatever."""
    return "canary.Zm9yYmlkZGVu.c2VjcmV0LXNpZ25hdHVyZQ"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests in process see no proxy, token or URL of the person who runs them."""
    for name in list(os.environ):
        if name.upper().startswith(_OURS):
            monkeypatch.delenv(name)
    yield
