# SPDX-License-Identifier: MIT
"""What tests share that is neither a server nor a fixture.

The program is called in two ways that look alike: `InProcess` calls `main` here, which takes some
milliseconds, and `Program` starts a process, for what only a process shows. Both give a `Result`.

The tables of commands, options and variables are read from the program's own OpenCLI document, so
that a new command or option is under test without an edit. Nothing here looks at the machine when
it is imported.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import pytest

from local_platform import Platform

ROOT = Path(__file__).resolve().parent.parent

LIMIT = 20.0
"""Seconds after which a test gives up on something that has to happen."""

NOWHERE = "http://127.0.0.1:1"
"""An API URL at which nobody listens; the default of every call, as the real one is public."""

CANARY = "canary.Zm9yYmlkZGVu.c2VjcmV0LXNpZ25hdHVyZQ"
"""A token that may turn up in no output whatever."""

URL_VARIABLES = ("BUS_AI_API_URL", "BUS_API_BASE_URL")

# What the environment of the person who runs the tests must not change.
_OURS = (
    "BUS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_", "SSLKEYLOGFILE",
    "NO_COLOR", "REQUEST_METHOD", "XDG_CONFIG_HOME",
)  # fmt: skip

CaseT = TypeVar("CaseT")
OutcomeT = TypeVar("OutcomeT")
Env = dict[str, "str | None"]


def is_ours(variable: str) -> bool:
    """Whether a variable of this name would change what the program does."""
    return variable.upper().startswith(_OURS)


# --- tiers ------------------------------------------------------------------------------------

second_tier = pytest.mark.second_tier


def tiers(rows: Iterable[CaseT], *first: CaseT, ids: Callable[[CaseT], str] = str) -> list[Any]:
    """Parameters of which only `first` are in the first tier; the others repeat the same point."""
    return [
        pytest.param(row, id=ids(row), marks=() if row in first else second_tier) for row in rows
    ]


def skip_if(reason: str) -> None:
    """Skip this test where there is a reason; `hostile.why_no_...` look for one when called."""
    if reason:
        pytest.skip(reason)


# --- calling the program ----------------------------------------------------------------------


class HasUrl(Protocol):
    """A server: whatever has a `url`."""

    @property
    def url(self) -> str: ...


class Result(NamedTuple):
    """What one call of the program did; the streams are bytes."""

    code: int
    out: bytes
    err: bytes
    seconds: float

    @property
    def message(self) -> str:
        return self.err.decode("utf-8")

    @property
    def document(self) -> Any:
        """Standard output, which is one JSON document."""
        return json.loads(self.out)

    @property
    def spoken(self) -> Spoken:
        return spoken(self.err)

    @property
    def error(self) -> str:
        """The one line of an error on standard error; what -v adds is not an error's."""
        [line] = self.spoken.errors
        return line

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Standard error under `--error-format json`: one object per line, its shape checked."""
        assert self.err == b"" or self.err.endswith(b"\n"), self.err
        found = [json.loads(line) for line in self.message.splitlines()]
        for one in found:
            assert isinstance(one, dict), one
            assert isinstance(one["kind"], str), one
            assert isinstance(one["message"], str), one
            assert one["message"], one
        return found


class Caller:
    """An environment that is all the test's own, and how a call's changes are put on top of it.

    `at` is the server to ask: its URL is set, and a token: one of the account of a `Platform`, the
    canary for any other server. Without `at`, and without a URL in the call, the URL is NOWHERE;
    `env={"BUS_AI_API_URL": None}` takes that away. `env` wins over all else; None unsets.
    """

    def __init__(self, home: Path, folder: Path | None = None) -> None:
        self.home = home
        self.folder = folder  # where calls work unless told otherwise; None: where the tests do
        self.environ = {name: value for name, value in os.environ.items() if not is_ours(name)}
        self.environ.update(HOME=str(home), LC_ALL="C.UTF-8", PYTHONDONTWRITEBYTECODE="1")

    def env(self, **changes: str | None) -> dict[str, str]:
        merged = {**self.environ, **changes}
        return {name: value for name, value in merged.items() if value is not None}

    def _environment(
        self, args: Sequence[str | bytes], at: HasUrl | None, env: Env | None
    ) -> dict[str, str]:
        changes: Env = {**self.environ, **(env or {})}
        if at is not None:
            token = at.token() if isinstance(at, Platform) else CANARY
            changes = {"BUS_AI_API_URL": at.url, "BUS_AI_TOKEN": token, **(env or {})}
        elif not any(name in changes for name in URL_VARIABLES) and not any(
            os.fsencode(word).startswith(b"--api-url") for word in args
        ):
            changes["BUS_AI_API_URL"] = NOWHERE
        return self.env(**changes)


class Program(Caller):
    """The program under test as real processes."""

    def __init__(self, command: list[str], home: Path, folder: Path | None = None) -> None:
        super().__init__(home, folder)
        self.command = command

    def start(
        self,
        *args: str | bytes,
        at: HasUrl | None = None,
        env: Env | None = None,
        **popen: object,
    ) -> subprocess.Popen[bytes]:
        """Start it and return at once; the streams are pipes unless `popen` says otherwise."""
        options: dict[str, object] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.folder,
            "env": self._environment(args, at, env),
            **popen,
        }
        return subprocess.Popen([*self.command, *args], **options)  # type: ignore[call-overload, no-any-return]

    def __call__(
        self,
        *args: str | bytes,
        at: HasUrl | None = None,
        env: Env | None = None,
        limit: float = 60,
        input: bytes | None = None,  # noqa: A002 - as subprocess calls it
        **popen: object,
    ) -> Result:
        """Run it to its end; `limit` seconds is when the test gives up on it."""
        if input is not None:
            popen["stdin"] = subprocess.PIPE
        start = time.monotonic()
        with self.start(*args, at=at, env=env, **popen) as process:
            try:
                out, err = process.communicate(input, timeout=limit)
            except BaseException:
                process.kill()
                raise
        result = Result(process.returncode, out or b"", err or b"", time.monotonic() - start)
        assert_no_canary(result.out, result.err)
        return result


class _Captured:
    """The default of a stream: a file of its own, which the result holds."""


CAPTURED = _Captured()


class InProcess(Caller):
    """`main` called in this process, with an environment, a folder and streams of its own.

    The streams are text streams over real files, as in a process. `stdout` and `stderr` may also
    be a descriptor, which is duplicated, or any object, which is used as it is; None is a stream
    that is closed. What does not go to a file of the call's own is empty in the result. Streams,
    environment and folder belong to the whole process: one call at a time, in the main thread if
    signals matter.
    """

    def __call__(
        self,
        *args: str,
        at: HasUrl | None = None,
        env: Env | None = None,
        input: bytes = b"",  # noqa: A002 - as subprocess calls it
        cwd: Path | None = None,
        stdout: Any = CAPTURED,
        stderr: Any = CAPTURED,
    ) -> Result:
        import bus_containers

        out, err = _Stream(stdout), _Stream(stderr)
        environment = self._environment(args, at, env)
        try:
            with _swapped(out.stream, err.stream, input, environment, cwd or self.folder):
                start = time.monotonic()
                code = bus_containers.main([*args])
                seconds = time.monotonic() - start
        finally:
            written = (out.close(), err.close())
        result = Result(code, *written, seconds)
        assert type(code) is int, code
        assert_no_canary(result.out, result.err)
        return result


class _Stream:
    """A text stream for `sys.stdout` or `sys.stderr`, and what was written to it."""

    def __init__(self, given: Any) -> None:
        self._file = tempfile.TemporaryFile() if given is CAPTURED else None  # noqa: SIM115
        self._own = self._file is not None or isinstance(given, int)
        self.stream = given
        if self._own:
            descriptor = os.dup(self._file.fileno() if self._file else given)
            self.stream = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115

    def close(self) -> bytes:
        if self._own:
            try:
                self.stream.close()
            except OSError:  # what the program could not write it cannot write now either
                pass
        if self._file is None:
            return b""
        with self._file:
            self._file.seek(0)
            return self._file.read()


@contextmanager
def _swapped(
    out: Any, err: Any, given: bytes, environ: dict[str, str], cwd: Path | None
) -> Iterator[None]:
    """Streams, environment, folder and descriptor 0 of this process, for the length of a call."""
    before = (sys.stdin, sys.stdout, sys.stderr)
    own_environ, own_cwd, own_stdin = dict(os.environ), os.getcwd(), os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(given)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    with open(0, encoding="utf-8", closefd=False) as sys.stdin:
        sys.stdout, sys.stderr = out, err
        _set_environment(environ)
        os.chdir(cwd or own_cwd)
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before
            os.dup2(own_stdin, 0)
            os.close(own_stdin)
            _set_environment(own_environ)
            os.chdir(own_cwd)


def _set_environment(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


# --- side by side -----------------------------------------------------------------------------


def together(*calls: Callable[[], OutcomeT]) -> list[OutcomeT]:
    """Make calls side by side that mostly wait, and return what they return. No `InProcess`."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(LIMIT * 3) for future in [pool.submit(call) for call in calls]]


def check_each(check: Callable[[CaseT], None], cases: Sequence[CaseT], workers: int = 4) -> None:
    """Check a whole table side by side in one test, and name every case that fails.

    For cases that mostly wait. All of it happens within the test, and nothing is left behind.
    """
    assert cases

    def attempt(case: CaseT) -> str:
        try:
            check(case)
        except Exception as error:
            return f"{getattr(case, 'id', case)}: {type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        failures = [failure for failure in pool.map(attempt, cases) if failure]
    assert not failures, "\n\n".join(failures)


# --- what a message of the client may and must say --------------------------------------------


class Spoken(NamedTuple):
    """The lines of standard error, sorted by what they are."""

    text: str
    errors: list[str]
    warnings: list[str]

    @property
    def advises(self) -> bool:
        """It says that the run may be executing, and how to find and stop it."""
        return "bus-containers runs" in self.text and "bus-containers delete" in self.text


def spoken(err: bytes) -> Spoken:
    """Read a program's standard error, with what holds for every message of the client."""
    text = err.decode("utf-8")
    assert "Traceback" not in text, text
    assert not re.search(r"(?i)</|<(!doctype|html|head|body|h1|hr|center|script)\b", text), text
    assert text.replace("\n", "").replace("\t", "").isprintable(), repr(text)
    told = [line for line in text.splitlines() if line.startswith("bus-containers: ")]
    warned = [line for line in told if line.startswith("bus-containers: warning")]
    return Spoken(text, [line for line in told if line not in warned], warned)


def check_failure(result: Result, code: int, *says: str) -> str:
    """A failure of this exit code, without a result, told in one line that says all of these."""
    assert result.code == code, result
    assert result.out == b"", result
    for words in says:
        assert words in result.error, (words, result.error)
    return result.error


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that hang behind it."""
    waiting: list[Any] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]


# --- secrets ----------------------------------------------------------------------------------

WINDOW = 8
"""So many characters of a secret in a row are a leak; a piece of it is as bad as the whole."""


@lru_cache(maxsize=64)
def _pieces(secret: str) -> re.Pattern[bytes]:
    forms = [secret, *(base64.b64encode(f"{pad}{secret}".encode()).decode() for pad in ("", ":"))]
    pieces = {form[i : i + WINDOW] for form in forms for i in range(len(form) - WINDOW + 1)}
    return re.compile("|".join(map(re.escape, sorted(pieces))).encode())


def leaks(secret: str, *texts: bytes) -> list[bytes]:
    """The pieces of the secret, plain or in base64, that turn up in the texts."""
    return sorted({found for text in texts for found in _pieces(secret).findall(text)})


def assert_no_canary(*texts: bytes) -> None:
    for text in texts:
        if CANARY.encode() in text or (len(text) < 100_000 and leaks(CANARY, text)):
            raise AssertionError(f"the token is in the output: {text[:2000]!r}")


def files_of(*folders: Path) -> list[bytes]:
    """The content of every file below the folders."""
    return [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]


def jwt(payload: bytes | object) -> str:
    """A token of three parts whose middle says this. `Platform.token` makes signed ones."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return f"e30.{base64.urlsafe_b64encode(data).decode().rstrip('=')}.c2ln"


# --- documents --------------------------------------------------------------------------------

# A proper answer of the API to each command, as `json` prints it.
DOCUMENTS: dict[str, dict[str, Any]] = {
    "status": {"items": [{"id": "runner", "state": "ready", "details": {"runtime": "docker"}}]},
    "run": {
        "run_id": "run-1", "owner_identity_id": "me", "runner_name": "runner", "image": "codex",
        "args": ["true"], "exit_code": 0, "stdout": "OK", "stderr": "", "duration_ms": 7,
        "runtime": "docker",
    },
    "runs": {"items": [{"run_id": "run-1", "state": "exited", "exit_code": 0, "image": "codex"}]},
    "delete": {"deleted": True, "run_id": "run-1", "owner_identity_id": "me"},
}  # fmt: skip
BODIES = {name: json.dumps(document).encode() for name, document in DOCUMENTS.items()}


def as_json(document: object) -> bytes:
    """A document as the format `json` prints it."""
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


# --- tables out of the OpenCLI document -------------------------------------------------------


class Option(NamedTuple):
    """An option of one command; `value` is the name of its value, empty for a flag."""

    command: str
    name: str
    aliases: tuple[str, ...]
    value: str
    repeatable: bool
    default: str

    @property
    def id(self) -> str:
        return f"{self.command}{self.name}"


@cache
def opencli() -> dict[str, Any]:
    """The program's description of itself for machines."""
    with tempfile.TemporaryDirectory() as home:
        result = InProcess(Path(home))("help", "--format", "opencli")
    assert (result.code, result.err) == (0, b""), result
    return dict(result.document)


def _command(name: str) -> dict[str, Any]:
    [found] = [one for one in opencli()["commands"] if one["name"] == name]
    return dict(found)


def all_commands() -> list[str]:
    """The names of the commands, `help` included."""
    return [one["name"] for one in opencli()["commands"]]


def api_commands() -> list[str]:
    """The names of the commands that ask the API."""
    return [name for name in all_commands() if name != "help"]


def options_of(command: str) -> list[Option]:
    """The options that this command takes, those of every command included."""
    keys = ("name", "aliases", "valueName", "repeatable", "default")
    rows = ([row[key] for key in keys] for row in _command(command)["options"])
    return [Option(command, name, tuple(aliases), *rest) for name, aliases, *rest in rows]


def common_options() -> list[str]:
    """The names of the options that every command takes."""
    names = [{option.name for option in options_of(command)} for command in all_commands()]
    return sorted(set.intersection(*names))


def variables() -> list[dict[str, Any]]:
    """The documented environment variables, as the document has them."""
    return list(opencli()["metadata"]["io.busdk.environment"]["variables"])


def failure_code(command: str) -> int:
    """The exit code of a failure that is neither a usage error nor the container's own."""
    return 125 if 125 in [row["code"] for row in _command(command)["exitCodes"]] else 1


def words(command: str) -> tuple[str, ...]:
    """The shortest command line of a command: its name and the arguments it requires."""
    required = [one["name"] for one in _command(command)["arguments"] if one["required"]]
    return (command, *("run-1" if name.lower() == "run_id" else "true" for name in required))


# --- terminals --------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal in raw mode, so that what is written to it arrives as it is.

    Pass `end` to a process or to `InProcess` as a stream, `release()` it, and read.
    """

    def __init__(self, columns: int = 80) -> None:
        self.controller, self.end = pty.openpty()
        tty.setraw(self.end)
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.controller)
        self.release()

    def release(self) -> None:
        """Let the program be the only one that holds the other end."""
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    def read_until(self, found: Callable[[bytes], bool], limit: float = LIMIT) -> bytes:
        """Read until it has shown this, or nobody can write to it any more."""
        end = time.monotonic() + limit
        while not found(self.shown):
            left = end - time.monotonic()
            assert left > 0, self.shown
            if not select.select([self.controller], [], [], left)[0]:
                continue
            try:
                data = os.read(self.controller, 65536)
            except OSError:  # EIO: all who could write are gone
                break
            if not data:
                break
            self.shown += data
        return self.shown

    def read_all(self) -> bytes:
        """All that is written until every writer is gone."""
        self.release()
        return self.read_until(lambda _: False)


def fill(descriptor: int) -> None:
    """Write to a pipe or a terminal until nothing more goes in, as after Ctrl-S."""
    os.set_blocking(descriptor, False)
    try:
        while True:
            os.write(descriptor, b"x" * 512)
    except BlockingIOError:
        os.set_blocking(descriptor, True)


# --- Pythons ----------------------------------------------------------------------------------


@cache
def pythons() -> dict[str, str]:
    """The Pythons of this machine, "3.9" -> path: this one, a version manager's, those on PATH.

    Asked for by the tests that need them only: what cannot be read or run is left out.
    """
    found = {"{}.{}".format(*sys.version_info): sys.executable}
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    try:
        candidates = [str(path) for path in sorted(pyenv.glob("versions/*/bin/python"))]
    except OSError:
        candidates = []
    names = ["2.7", *(f"3.{minor}" for minor in range(6, 16))]
    candidates += filter(None, (shutil.which(f"python{name}") for name in names))
    ask = "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.executable)"
    for candidate in candidates:
        try:
            asked = subprocess.run(
                [candidate, "-c", ask], capture_output=True, text=True, timeout=LIMIT
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if asked.returncode == 0:  # a version manager's shim may only complain
            version, path = asked.stdout.splitlines()
            found.setdefault(version, path)
    return found


def python(version: str) -> str:
    """The path of a Python of this version; skips the test where there is none."""
    if version not in pythons():
        pytest.skip(f"there is no Python {version} here")
    return pythons()[version]
