# SPDX-License-Identifier: MIT
"""A good guest in other people's processes, with whatever streams: promises 4.1 and 4.7."""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import inspect
import io
import json
import os
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from hostile import Api, Connection, Hostile, Script, message
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    InProcess,
    Program,
    Result,
    as_json,
    second_tier,
    skip_if,
    spoken,
    tiers,
)

Serve = Callable[..., Hostile]
Guest = Callable[..., Result]
RUN = ("run", "--", "true")
PRINTED = as_json(DOCUMENTS["run"])


def slowly(seconds: float) -> Script:
    """A run of this length: it goes on while the host does something else."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.server.ending.wait(seconds)
        connection.send(message(BODIES["run"]))

    return script


# --- the library in another program -----------------------------------------------------------

PREAMBLE = """
import os, sys, time
from bus_containers import BusContainersError, Client, DeadlineError

def say(text, write=os.write):
    write(1, f"{text} ".encode())

def failure(call, *args, **options):
    try:
        return call(*args, **options)
    except BusContainersError as error:
        return type(error).__name__

client = Client.from_env()
"""


@pytest.fixture
def guest(home: Path, folder: Path) -> Guest:
    """Run a script that uses this library, after PREAMBLE, with warnings as errors."""
    place = os.path.dirname(inspect.getfile(bus_containers))

    def call(script: str, at: Api | Hostile, strict: bool = True) -> Result:
        env = {"PYTHONPATH": place, "PYTHONWARNINGS": "error" if strict else None}
        command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)]
        return Program(command, home, folder)(at=at, env=env)

    return call


class Host(NamedTuple):
    """What a host program does, and what it says when all works."""

    id: str
    script: str
    says: str
    seconds: float = 0  # how long a run takes


IN_SUBINTERPRETER = (
    PREAMBLE + 'say(client.run(["true"])["stdout"]); say(client.delete("x")["deleted"])'
)
HOSTS = [
    Host(
        "atexit",
        """
        import atexit
        atexit.register(lambda: say(client.delete("run-1")["deleted"]))
        """,
        "True",
    ),
    Host(
        "destructor",
        """
        class Owner:
            def __init__(self, client): self.client = client
            def __del__(self, say=say): say(self.client.delete("run-1")["deleted"])
        owner = Owner(client)
        """,
        "True",
    ),
    Host(
        "destructor-after-a-call",
        """
        class Owner:
            def __init__(self, client): self.client = client
            def __del__(self, say=say): say(self.client.delete("run-1")["deleted"])
        say(client.run(["true"])["stdout"])
        owner = Owner(client)
        """,
        "OK True",
    ),
    Host(
        "destructor-that-fails",
        """
        class Owner:
            def __init__(self, client): self.client, self.failure = client, failure
            def __del__(self, say=say):
                say(self.failure(self.client.run, ["true"]))
                self.client.api_url = "http://127.0.0.1:1"
                say(self.failure(self.client.run, ["true"], timeout=0.1))
        client = Client(client.api_url + "/404", "t")
        owner = Owner(client)
        """,
        "ApiError TransportError",
    ),
    Host(
        "destructor-with-a-proxy",
        """
        class Owner:
            def __init__(self, client): self.client, self.failure = client, failure
            def __del__(self, say=say): say(self.failure(self.client.delete, "run-1"))
        os.environ["HTTP_PROXY"] = "http://127.0.0.1:1"
        owner = Owner(Client("http://a.test", "t"))
        """,
        "TransportError",
    ),
    Host(
        "subinterpreter",
        f"""
        try:
            import _interpreters as interpreters  # 3.13
        except ImportError:
            import _xxsubinterpreters as interpreters
        interpreter = interpreters.create()
        problem = interpreters.run_string(interpreter, {IN_SUBINTERPRETER!r})
        assert problem is None, problem
        interpreters.destroy(interpreter)
        """,
        "OK True",
    ),
    Host(
        "limit-of-processes",
        """
        import resource, threading
        client.status()  # what it loads may be where only root may read
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        if os.geteuid() == 0:
            os.setuid(54321)  # root has no such limit
        try:
            threading.Thread(target=int).start()
        except RuntimeError:
            say("no thread")
        say(client.run(["true"])["stdout"])
        client.api_url = client.api_url.replace("127.0.0.1", "localhost")
        say(client.delete("x")["deleted"])
        """,
        "no thread OK True",
    ),
    Host(
        "forked-child",
        """
        client.status()
        child = os.fork()
        say(client.run(["true"])["stdout"])
        if child:
            say(os.waitpid(child, 0)[1])
        else:
            os._exit(0)
        """,
        "OK OK 0",
    ),
    Host(
        "other-threads",
        """
        import asyncio, threading
        thread = threading.Thread(target=lambda: say(client.run(["true"])["stdout"]))
        thread.start(), thread.join()
        async def run():
            loop = asyncio.get_running_loop()
            say((await loop.run_in_executor(None, client.run, ["true"]))["stdout"])
            say(client.run(["true"])["stdout"])
        asyncio.run(run())
        """,
        "OK OK OK",
    ),
    Host(
        "debug-level",
        """
        import http.client
        http.client.HTTPConnection.debuglevel = http.client.HTTPSConnection.debuglevel = 1
        say(client.run(["true"])["stdout"])
        """,
        "OK",
    ),
    Host(
        "timers",
        """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        calls = []
        say(client.run(["true"])["stdout"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(len(calls) > 3)
        """,
        "OK True",
        0.4,
    ),
    Host(
        "default-timeout",
        """
        import socket
        socket.setdefaulttimeout(0.05)
        say(client.run(["true"])["stdout"])
        say(socket.getdefaulttimeout())
        """,
        "OK 0.05",
        0.4,
    ),
    Host(
        "an-opener-and-a-resolver-of-its-own",
        """
        import socket, urllib.request
        class Opener(urllib.request.OpenerDirector):
            def open(self, *_, **__): raise AssertionError("not the host's opener")
        urllib.request.install_opener(Opener())
        original = socket.getaddrinfo
        socket.getaddrinfo = lambda *args, **more: asked.append(1) or original(*args, **more)
        asked = []
        client.api_url = client.api_url.replace("127.0.0.1", "localhost")
        say(client.run(["true"])["stdout"])
        say(bool(asked))
        """,
        "OK True",
    ),
    Host(
        "no-streams",
        """
        sys.stdin = sys.stdout = sys.stderr = None
        say(client.run(["true"])["stdout"])
        """,
        "OK",
    ),
    Host(
        "a-deadline",
        """
        client.timeout = 0.2
        say(failure(client.status))
        """,
        "DeadlineError",
        9,
    ),
]


ALIKE = (
    "destructor-after-a-call",
    "other-threads",
    "no-streams",
    "an-opener-and-a-resolver-of-its-own",
)


@pytest.mark.parametrize(
    "host",
    tiers(HOSTS, *(host for host in HOSTS if host.id not in ALIKE), ids=lambda host: host.id),
)
def test_the_library_in(host: Host, guest: Guest, api: Api, serve: Serve) -> None:
    """Promise 4.7: it works, it says nothing, and no warning is its fault."""
    server: Any = api
    if host.seconds:
        server = serve(slowly(host.seconds))
    elif "/404" in host.script:
        api.answers({"error": {"type": "not_found"}}, status="404 Not Found")
    result = guest(host.script, at=server)
    assert (result.code, result.out.decode().split(), result.err) == (0, host.says.split(), b"")


GREEN = """
ticks = []
def tick():
    while True:
        ticks.append(1)
        sleep(0.01)
spawn(tick)
say(client.run(["true"])["stdout"])
say(len(ticks) > 3)
client.timeout = 0.2
say(failure(client.status))
say(Client(client.api_url.replace("127.0.0.1", "localhost"), "t").run(["true"])["stdout"])
"""
PATCHED = {
    "gevent": "from gevent import monkey; monkey.patch_all(); from gevent import sleep, spawn",
    "eventlet": "import eventlet; eventlet.monkey_patch(); from eventlet import sleep, spawn",
}


@second_tier
@pytest.mark.parametrize("package", PATCHED)
def test_under_green_threads(package: str, guest: Guest, serve: Serve) -> None:
    """Promise 4.7: one that waits lets the others go on."""
    skip_if("" if importlib.util.find_spec(package) else f"{package} is not installed")
    result = guest(f"{PATCHED[package]}\n{GREEN}", at=serve(slowly(0.5)), strict=False)
    assert (result.code, result.out) == (0, b"OK True DeadlineError OK "), result


@pytest.mark.parametrize("name", ["TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"])
def test_a_kernel_that_refuses_an_option_of_sockets(
    name: str, cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.5: keep-alive as far as the system has it. No kernel has an option 250."""
    monkeypatch.setattr(socket, name, 250, raising=False)
    assert cli(*RUN, at=api)[:3] == (0, PRINTED, b"")
    monkeypatch.delattr(socket, name)
    assert cli(*RUN, at=api)[:3] == (0, PRINTED, b"")


def test_the_debug_level_of_the_host(
    cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 3.12 on the request, token included, would be in the result."""
    for kind in (http.client.HTTPConnection, http.client.HTTPSConnection):
        monkeypatch.setattr(kind, "debuglevel", 1)
    assert cli(*RUN, at=api)[:3] == (0, PRINTED, b"")


# --- streams of the host ----------------------------------------------------------------------


class Bare:
    """All that `print` asks of a stream."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


class WithoutDescriptor(Bare):
    """As in some consoles of IDEs and services."""

    encoding = None

    def fileno(self) -> int:
        return -1

    def isatty(self) -> bool:
        return False


class Raising(WithoutDescriptor):
    """As of what is closed, or is a stream in memory."""

    failure: Exception = OSError("no descriptor")

    def fileno(self) -> int:
        raise self.failure


class Unsupported(Raising):
    """As `io` says it."""

    failure = io.UnsupportedOperation("fileno")


class NotThere(Raising):
    """As a proxy object says it."""

    failure = AttributeError("fileno")


class Tee(WithoutDescriptor):
    """Whose descriptor is that of another stream, past which nothing may go."""

    def fileno(self) -> int:
        return 2


STREAMS: list[Callable[[], Any]] = [
    Bare, WithoutDescriptor, Raising, Unsupported, NotThere, Tee, io.StringIO,
]  # fmt: skip


@pytest.mark.parametrize("make", STREAMS, ids=lambda make: str(make.__name__))
def test_a_stream_of_the_hosts_own(
    make: Callable[[], Any], cli: InProcess, api: Api, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = {**DOCUMENTS["run"], "stdout": "\u00e4\u20ac\0\ud800\n", "stderr": "\u00fc"}
    api.answers(run)
    for form in ("json", "text", "tsv"):
        expected = cli("-vf", form, *RUN, at=api)
        out, err = make(), make()
        assert cli("-vf", form, *RUN, at=api, stdout=out, stderr=err).code == 0
        said = [getattr(one, "text", None) or one.getvalue() for one in (out, err)]
        assert said[0].encode() == expected.out
        lines = zip(said[1].splitlines(), expected.message.splitlines())
        assert all(ours[:25] == theirs[:25] for ours, theirs in lines)
        assert CANARY not in said[1]
    out, err = make(), make()
    assert cli("no-such-command", at=api, stdout=out, stderr=err).code == 2
    assert cli("--version", at=api, stdout=out, stderr=err).code == 0
    assert capfdbinary.readouterr() == (b"", b"")


def test_what_the_host_printed_before_comes_first(cli: InProcess, api: Api, folder: Path) -> None:
    with open(folder / "out", "w") as out, open(folder / "err", "w", buffering=1) as err:
        for file in (out, err):
            file.write("before ")
        assert cli("-v", *RUN, at=api, stdout=out, stderr=err).code == 0
        for file in (out, err):
            file.write("after")
    for name in ("out", "err"):
        text = (folder / name).read_text()
        assert (text[:7], text[-5:]) == ("before ", "after")
        assert len(text) > 50


def test_a_stream_in_memory_with_bytes_below(cli: InProcess, api: Api) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert cli(*RUN, at=api, stdout=out).code == 0
    out.flush()
    buffer: Any = out.buffer
    assert buffer.getvalue() == PRINTED


def test_streams_that_lack_a_letter(cli: InProcess, api: Api) -> None:
    """Promise 3.17: what the host's encoding cannot say is escaped, and the rest is not lost."""
    api.answers({**DOCUMENTS["run"], "stdout": "caf\u00e9", "stderr": "th\u00e9 boom"})
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    assert cli("-f", "text", *RUN, at=api, stdout=out, stderr=err).code == 0
    said = [stream.detach().getvalue() for stream in (out, err)]
    assert said[0] == b"caf\\xe9"
    assert said[1].startswith(b"th\\xe9 boom\n")


def test_a_stream_that_compresses(cli: InProcess, api: Api, folder: Path) -> None:
    """It has a descriptor, but of what is compressed."""
    with gzip.open(folder / "out.gz", "wt", encoding="utf-8") as out:
        assert cli(*RUN, at=api, stdout=out).code == 0
    assert gzip.decompress((folder / "out.gz").read_bytes()) == PRINTED


class Refusing(Bare):
    def write(self, text: str) -> None:
        raise RuntimeError(text)


@pytest.mark.parametrize("stream", ["closed", "full", "raising"])
def test_a_standard_error_that_takes_nothing(stream: str, cli: InProcess, api: Api) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    stderr: Any = {"closed": None, "full": full, "raising": Refusing()}[stream]
    try:
        for form, out in (("json", PRINTED), ("text", b"OK")):
            assert cli("-vvf", form, *RUN, at=api, stderr=stderr)[:2] == (0, out)
        assert cli("--bogus", stderr=stderr).code == 2
        assert cli("delete", "a", stderr=stderr).code == 1
        assert cli(*RUN, stderr=stderr).code == 125
    finally:
        os.close(full)


@pytest.mark.parametrize(
    "closed",
    tiers(["", "0", "1", "2", "01", "02", "12", "012"], "012", ids=lambda n: n or "none"),
)
def test_descriptors_closed_at_the_start(
    closed: str, program: Program, api: Api, folder: Path
) -> None:
    """A socket or file that took the number of a closed stream would get what is meant for it."""
    script = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed)
    bare = Program(["sh", "-c", script, "sh", *program.command], program.home, folder)
    told = "2" not in closed
    into_file = bare("-v", "-o", "out", *RUN, at=api)
    assert (into_file.code, into_file.out, bool(into_file.err)) == (0, b"", told)
    assert (folder / "out").read_bytes() == PRINTED
    printed = bare("-v", *RUN, at=api)
    assert printed[:2] == ((125, b"") if "1" in closed else (0, PRINTED))
    assert bool(spoken(printed.err).text) is told
    assert len(api.requests) == (1 if "1" in closed else 2)
    if "1" in closed:
        by_path = bare("-o", "/dev/stdout", *RUN, at=api)
        assert (by_path.code, by_path.out, bool(by_path.err)) == (125, b"", told)
        assert len(api.requests) == 1
    if "0" in closed:
        blind = bare("--token-file", "-", *RUN, at=api)
        says = b"standard output" if "1" in closed else b"standard input"
        assert (blind.code, blind.out, says in blind.err) == (125, b"", told)
    failed = bare("-o", "out", "delete", "a", at=api.answers({}, status="404 Not Found"))
    assert (failed.code, failed.out, bool(failed.err)) == (1, b"", told)
    assert (folder / "out").read_bytes() == PRINTED


@pytest.mark.parametrize("words", [RUN, ("status",)], ids=["run", "status"])
def test_standard_input_is_left_to_the_next_reader(
    words: tuple[str, ...], program: Program, api: Api
) -> None:
    script = '"$@" > /dev/null; cat'
    piped = Program(["sh", "-c", script, "sh", *program.command], program.home, program.folder)
    assert piped(*words, at=api, input=b"for the next\n")[:3] == (0, b"for the next\n", b"")


# --- Pythons in unusual modes -----------------------------------------------------------------

EVERY_FILE = """
import sys, bus_containers
for words in (
    ["status"], ["runs", "-f", "tsv"], ["delete", "a", "-f", "text"], ["help"], ["help", "run"],
    ["-o", "out", "run", "--", "true"], ["-o", "out", "runs"], ["-o", "/dev/null", "help"],
    ["--token-file", "token", "status"], ["--token-file", "-", "status"], ["help", "-f", "json"],
    ["status", "--wait", "1s"], ["--bogus"], ["--token-file", "no", "status"], ["-o", ".", "runs"],
):
    sys.stderr.write(f"{bus_containers.main(words)} ")
"""


def test_a_python_that_complains_of_everything(program: Program, api: Api, folder: Path) -> None:
    """Promise 4.7: no warning of encodings, of files left open, of what is to go."""
    (folder / "token").write_text("t")
    place = os.path.dirname(inspect.getfile(bus_containers))
    options = ["-X", "dev", "-X", "warn_default_encoding", "-W", "error", "-bb"]
    host = Program([sys.executable, *options, "-c", EVERY_FILE], program.home, folder)
    env: dict[str, str | None] = {"PYTHONPATH": place, "PYTHONWARNDEFAULTENCODING": "1"}
    result = host(at=api, env=env, input=b"t\n")
    said = spoken(result.err)
    assert "Warning" not in said.text
    assert [word for word in said.text.split() if word.isdigit()] == [*"000000000000211"]


@pytest.mark.parametrize("options", tiers([("-OO",), ("-I", "-S"), ("-X", "dev")], ("-OO",)))
def test_a_python_with_options(options: tuple[str, ...], program: Program, api: Api) -> None:
    command = [sys.executable, *options, *program.command[1:]]
    skip_if("" if len(program.command) == 2 else "the program is not started by a Python here")
    odd = Program(command, program.home, program.folder)
    assert odd(*RUN, at=api)[:3] == (0, PRINTED, b"")
    assert odd("help", "run")[:3] == program("help", "run")[:3]


@second_tier
@pytest.mark.parametrize("name", ["POSIX", "no_SUCH.locale", "ascii", "latin-1:strict", "utf-16"])
def test_the_same_bytes_in_every_locale(name: str, program: Program, api: Api) -> None:
    """Promise 3.13; the first names are of locales, the others of Python's encoding of streams."""
    run = {**DOCUMENTS["run"], "run_id": "\u00e9", "stdout": "\u20ac\ud800", "stderr": "\U0001f600"}
    denial = {"error": {"type": "quota_\u00e9", "message": "\u20ac 10", "action": "\u00e4"}}
    locale = name in ("POSIX", "no_SUCH.locale")
    env: dict[str, str | None] = {"LC_ALL" if locale else "PYTHONIOENCODING": name}
    for answer, status in ((run, "200 OK"), (denial, "402 Payment Required")):
        api.answers(answer, status=status)
        expected = program("-f", "text", "run", "--", "\u00e4\U0001f600", at=api)
        assert (
            program("-f", "text", "run", "--", "\u00e4\U0001f600", at=api, env=env)[:3]
            == (expected[:3])
        )
    sent = [json.loads(request.partition(b"\r\n\r\n")[2])["args"] for request in api.requests]
    assert sent == 4 * [["\u00e4\U0001f600"]]
