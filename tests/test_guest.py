# SPDX-License-Identifier: MIT
"""A good guest in other people's processes, with whatever streams: promises 4.1 and 4.7."""

from __future__ import annotations

import errno
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
from hostile import (
    Api,
    Certificates,
    Connection,
    Hostile,
    Script,
    answer,
    end_unread,
    message,
    reset,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    Env,
    InProcess,
    Program,
    Result,
    as_json,
    check_failure,
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

LOADED = """
import os, sys, time
from bus_containers import BusContainersError, Client, DeadlineError

def say(text, write=os.write):
    write(1, f"{text} ".encode())

def failure(call, *args, **options):
    try:
        return call(*args, **options)
    except BusContainersError as error:
        return type(error).__name__

"""
PREAMBLE = LOADED + "client = Client.from_env()\n"


@pytest.fixture
def guest(home: Path, folder: Path) -> Guest:
    """Run a script that uses this library, after PREAMBLE, with warnings as errors."""
    place = os.path.dirname(inspect.getfile(bus_containers))

    def call(
        script: str, at: Api | Hostile, strict: bool = True, preamble: str = PREAMBLE
    ) -> Result:
        env = {"PYTHONPATH": place, "PYTHONWARNINGS": "error" if strict else None}
        command = [sys.executable, "-c", preamble + textwrap.dedent(script)]
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
        "destructor",
        """
        class Owner:
            def __init__(self, client): self.client, self.failure = client, failure
            def __del__(self, say=say, proxied=Client("http://a.test", "t", timeout=0.8)):
                say(self.client.run(["true"])["stdout"])
                say(self.failure(self.client.delete, "not-found"))
                say(self.failure(proxied.delete, "run-1"))
                self.client.api_url = "http://127.0.0.1:1"
                say(self.failure(self.client.run, ["true"], timeout=0.1))
        os.environ["HTTP_PROXY"] = "http://127.0.0.1:1"
        owner = Owner(client)
        """,
        "OK ApiError TransportError TransportError",
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
        "threads-a-child-and-atexit",
        """
        import asyncio, atexit, threading
        sys.stdin = sys.stdout = sys.stderr = None
        thread = threading.Thread(target=lambda: say(client.run(["true"])["stdout"]))
        thread.start(), thread.join()
        async def run():
            loop = asyncio.get_running_loop()
            say((await loop.run_in_executor(None, client.run, ["true"]))["stdout"])
        asyncio.run(run())
        child = os.fork()
        say(client.run(["true"])["stdout"])
        if not child:
            os._exit(0)
        say(os.waitpid(child, 0)[1])
        atexit.register(lambda: say(client.delete("run-1")["deleted"]))
        """,
        "OK OK OK OK 0 True",
    ),
    Host(
        "settings-of-its-own",
        """
        import http.client, signal, socket, urllib.request
        class Opener(urllib.request.OpenerDirector):
            def open(self, *_, **__): raise AssertionError("not the host's opener")
        urllib.request.install_opener(Opener())
        http.client.HTTPConnection.debuglevel = http.client.HTTPSConnection.debuglevel = 1
        socket.setdefaulttimeout(0.05)
        original, asked, alarms = socket.getaddrinfo, [], []
        socket.getaddrinfo = lambda *args: asked.append(1) or original(*args)  # as some do
        signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        client.api_url = client.api_url.replace("127.0.0.1", "localhost")
        say(client.run(["true"])["stdout"])
        client.timeout = 0.2
        say(failure(client.status))
        signal.setitimer(signal.ITIMER_REAL, 0)
        say((len(alarms) > 3, bool(asked), socket.getdefaulttimeout()))
        """,
        "OK DeadlineError (True, True, 0.05)",
        0.4,
    ),
    Host(
        "sockets-but-no-threads-of-its-own",
        """
        import socket, threading
        class Green(socket.socket): pass
        original, threads = socket.getaddrinfo, []
        socket.getaddrinfo = lambda *args: threads.append(threading.get_ident()) or original(*args)
        say(client.run(["true"])["stdout"])
        socket.socket = Green
        say(client.run(["true"])["stdout"])
        say([thread == threading.get_ident() for thread in threads])
        """,
        "OK OK [False, True]",
    ),
]


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
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all(); from gevent import sleep, spawn",
    "eventlet": "import eventlet; eventlet.monkey_patch(); from eventlet import sleep, spawn",
}
for package, patch in PATCHES.items():
    HOSTS.append(Host(package, f"{patch}\n{GREEN}", "OK True DeadlineError OK", 0.5))
NO_THREADS = """
from gevent import monkey
monkey.patch_all(thread=False)
def free():
    os.close(free := os.dup(1))
    return free
say(client.run(["true"])["stdout"])
before = free()
for _ in range(5):
    client.status()
say(free() - before)
"""
HOSTS.append(Host("gevent-without-threads", NO_THREADS, "OK 0"))


@pytest.mark.parametrize("host", tiers(HOSTS, *HOSTS[:-3], ids=lambda host: host.id))
def test_the_library_in(host: Host, guest: Guest, api: Api, serve: Serve) -> None:
    """Promise 4.7: it works, it says nothing, no warning is its fault, and green threads go on."""
    package, _, _ = host.id.partition("-")
    is_green = package in PATCHES
    skip_if("" if not is_green or importlib.util.find_spec(package) else f"{package} is missing")
    server: Any = api
    if host.seconds:
        server = serve(slowly(host.seconds))
    elif "not-found" in host.script:
        api.sends(message(BODIES["run"]), message(b"{}", "404 Not Found"))
    result = guest(host.script, at=server, strict=not is_green)
    assert (result.code, result.out.decode().split()) == (0, host.says.split()), result
    assert is_green or result.err == b""


@second_tier
def test_a_handler_that_raises_while_modules_are_loaded(guest: Guest, api: Api) -> None:
    """Promise 4.9. The frame that it breaks into is one of the import's, which no traceback has."""
    script = """
    import random, signal
    class Soft(Exception): pass
    def soft(signum, frame): raise Soft
    signal.signal(signal.SIGALRM, soft)
    ends = []
    for seed in range(60):
        child = os.fork()
        if not child:
            seconds, code = random.Random(seed).uniform(0.0005, 0.045), 0
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                Client(os.environ["BUS_AI_API_URL"], "t")
            except BusContainersError as error:
                code = 3 if "Soft" in str(error) else 0
            except Soft:
                code = 2
            os._exit(code)  # an alarm that comes now makes it 1
        ends.append(os.waitpid(child, 0)[1] >> 8)
    say((ends.count(3), ends.count(2) > 0))
    """
    result = guest(script, at=api, preamble=LOADED)
    assert (result.code, result.out) == (0, b"(0, True) ")


@pytest.mark.parametrize("is_secure", [False, True], ids=["http", "https"])
def test_a_host_that_a_broken_pipe_would_end(
    is_secure: bool, guest: Guest, serve: Serve, certificates: Certificates
) -> None:
    """Promise 4.7: as after the line that many have for `| head`; the run's state is told."""
    tls = certificates.context(certificates.good) if is_secure else None
    script = f"""
    import signal
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ["SSL_CERT_FILE"] = {str(certificates.ca)!r}
    say(failure(client.run, ["x" * 8_000_000]))
    """
    result = guest(script, at=serve(end_unread(message(b"", "413 Too Large")), tls=tls))
    assert (result.code, result.err) == (0, b"")
    assert result.out in (b"ApiError ", b"TransportError ")  # a reset may take the answer away


def test_a_process_with_odd_modules(
    cli: InProcess, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6.5: keep-alive as far as the system has it. No kernel has an option 250.

    With the host's debug level of http.client the request would be in the result.
    """
    for kind in (http.client.HTTPConnection, http.client.HTTPSConnection):
        monkeypatch.setattr(kind, "debuglevel", 1)
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    for name in names:
        monkeypatch.setattr(socket, name, 250, raising=False)
    assert cli(*RUN, at=api)[:3] == (0, PRINTED, b"")
    for name in names:
        monkeypatch.delattr(socket, name)
    assert cli(*RUN, at=api)[:3] == (0, PRINTED, b"")


# --- streams of the host ----------------------------------------------------------------------


class Stream:
    """All that `print` asks of a stream, and more."""

    def __init__(self, more: dict[str, Any]) -> None:
        self.text = ""
        vars(self).update(more)

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def no_descriptor() -> int:
    raise io.UnsupportedOperation("fileno")


STREAMS: dict[str, dict[str, Any]] = {
    "bare": {},
    # Whose descriptor is that of another stream, past which nothing may go.
    "tee": {"encoding": None, "fileno": lambda: 2, "isatty": lambda: False},
    "proxy": {"encoding": "ascii", "fileno": no_descriptor, "isatty": lambda: True},
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_the_hosts_own(
    name: str, cli: InProcess, api: Api, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = {**DOCUMENTS["run"], "stdout": "\u00e4\u20ac\0\ud800\n", "stderr": "\u00fc"}
    api.answers(run)
    for form in ("json", "text", "tsv"):
        expected = cli("-vf", form, *RUN, at=api)
        out, err = Stream(STREAMS[name]), Stream(STREAMS[name])
        assert cli("-vf", form, *RUN, at=api, stdout=out, stderr=err).code == 0
        assert out.text.encode() == expected.out
        lines = zip(err.text.splitlines(), expected.message.splitlines())
        assert all(ours[:25] == theirs[:25] for ours, theirs in lines)
        assert CANARY not in err.text
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


def test_streams_that_lack_a_letter(cli: InProcess, api: Api) -> None:
    """Promise 3.17: it is escaped, and the rest is not lost."""
    api.answers({**DOCUMENTS["run"], "stdout": "caf\u00e9", "stderr": "th\u00e9 boom"})
    for encoding in ("ascii", "koi8-r"):  # the error for the latter names no encoding of Python's
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        assert cli("-f", "text", *RUN, at=api, stdout=out, stderr=err).code == 0
        said = [stream.detach().getvalue() for stream in (out, err)]
        assert said[0] == b"caf\\u00e9"
        assert said[1].startswith(b"th\\u00e9 boom\n")


def test_json_for_a_stream_that_lacks_a_letter(cli: InProcess, api: Api) -> None:
    """Promise 3.17: it is escaped as JSON has it."""
    document = {**DOCUMENTS["run"], "stdout": "\u00e9 \U0001f600"}
    out = io.TextIOWrapper(io.BytesIO(), encoding="shift_jis")
    assert cli(*RUN, at=api.answers(document), stdout=out).code == 0
    assert json.loads(out.detach().getvalue()) == document


def test_a_stream_that_compresses(cli: InProcess, api: Api, folder: Path) -> None:
    """It has a descriptor, but of what is compressed."""
    with gzip.open(folder / "out.gz", "wt", encoding="utf-8") as out:
        assert cli(*RUN, at=api, stdout=out).code == 0
    assert gzip.decompress((folder / "out.gz").read_bytes()) == PRINTED


MUTE = """
import bus_containers, sys
def write(self, text):
    if sys.argv[1] != "-o" or "cannot write" in text:
        raise MemoryError
sys.stderr = type("Stream", (), {"write": write, "flush": lambda self: None})()
bus_containers.console()
"""


def test_no_memory_for_a_message(program: Program, api: Api, serve: Serve) -> None:
    """A message is not worth more than a result, but the last one is told by other means."""
    host = Program([sys.executable, "-c", MUTE], program.home)
    env: Env = {"PYTHONPATH": os.path.dirname(str(bus_containers.__file__))}
    document = {**DOCUMENTS["run"], "exit_code": 127}
    assert host(*RUN, at=api.answers(document), env=env)[:3] == (127, as_json(document), b"")
    server = serve(answer(b"{}"), answer(b"{}", "403 Forbidden"), answer(b"{}"))
    result = host("-f", "text", "delete", "a", "bad", "c", at=server, env=env)
    assert result[:2] == (1, b"deleted a\ndeleted c\n")
    check_failure(host(*RUN, at=serve(reset()), env=env), 125, "out of memory")
    host = Program(["sh", "-c", 'exec "$@" >/dev/full', "sh", *host.command], program.home)
    result = host("-o", "/dev/full", "-f", "text", *RUN, at=api, env=env)
    check_failure(result, 125, "out of memory")  # though the next message finds some


def test_both_reasons_where_the_container_s_words_are_lost(cli: InProcess, api: Api) -> None:
    """Promise 6.13."""

    def write(text: str) -> None:
        if "bad" in text:
            raise OSError(errno.EMSGSIZE, "Message too long")
        stream.text += text

    stream = Stream({"write": write})
    api.answers({**DOCUMENTS["run"], "stdout": "good", "stderr": "bad"})
    result = cli("-f", "text", "-o", "/dev/full", *RUN, at=api, stderr=stream)
    assert result[:2] == (125, b"good")
    for reason in ("cannot write to /dev/full: ", "the result is on standard output", "too long"):
        assert reason in stream.text


def no_write(text: str) -> None:
    raise RuntimeError(text)


def test_a_standard_error_that_takes_nothing(cli: InProcess, api: Api) -> None:
    with open("/dev/full", "wb") as full:
        for stderr in (None, full.fileno(), Stream({"write": no_write})):
            for form, out in (("json", PRINTED), ("text", b"OK")):
                assert cli("-vvf", form, *RUN, at=api, stderr=stderr)[:2] == (0, out)
            api.answers({**DOCUMENTS["run"], "stderr": "bad"})
            assert cli("-f", "text", *RUN, at=api, stderr=stderr).code == 125
            api.answers(DOCUMENTS["run"])
            assert cli("--bogus", stderr=stderr).code == 2
            assert cli("delete", "a", stderr=stderr).code == 1
            assert cli(*RUN, stderr=stderr).code == 125


@pytest.mark.parametrize("closed", tiers(["0", "1", "2", "012"], "012"))
def test_descriptors_closed_at_the_start(
    closed: str, program: Program, api: Api, folder: Path
) -> None:
    """A socket or file that took the number of a closed stream would get what is meant for it."""
    script = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed)
    bare = Program(["sh", "-c", script, "sh", *program.command], program.home, program.folder)
    told = "2" not in closed
    into_file = bare("-v", "-o", "out", *RUN, at=api)
    assert (into_file.code, into_file.out, bool(into_file.err)) == (0, b"", told)
    printed = bare("-v", *RUN, at=api)
    assert printed[:2] == ((125, b"") if "1" in closed else (0, PRINTED))
    assert bool(spoken(printed.err).text) is told
    assert len(api.requests) == (1 if "1" in closed else 2)
    if "1" in closed:
        by_path = bare("-o", "/dev/stdout", *RUN, at=api)
        assert (by_path.code, by_path.out, bool(by_path.err)) == (125, b"", told)
        assert len(api.requests) == 1
    if "0" in closed:
        by_path = bare("-o", "/dev/fd/0", *RUN, at=api)
        assert (by_path.code, by_path.out, bool(by_path.err)) == (125, b"", told)
    if closed == "0":
        check_failure(bare("--token-file", "-", *RUN, at=api), 125, "standard input")
    failed = bare("-o", "out", "delete", "a", at=api.answers({}, status="404 Not Found"))
    assert (failed.code, failed.out, bool(failed.err)) == (1, b"", told)
    assert (folder / "out").read_bytes() == PRINTED


def test_standard_input_is_left_to_the_next_reader(program: Program, api: Api) -> None:
    piped = Program(["sh", "-c", '"$@"; cat', "sh", *program.command], program.home)
    assert piped("-q", *RUN, at=api, input=b"for the next\n")[:3] == (0, b"for the next\n", b"")


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


@pytest.mark.parametrize("options", tiers([("-OO",), ("-I", "-S")], ("-OO",)))
def test_a_python_with_options(options: tuple[str, ...], program: Program, api: Api) -> None:
    command = [sys.executable, *options, *program.command[1:]]
    skip_if("" if len(program.command) == 2 else "the program is not started by a Python here")
    odd = Program(command, program.home, program.folder)
    assert odd(*RUN, at=api)[:3] == (0, PRINTED, b"")
    assert odd("help", "run")[:3] == program("help", "run")[:3]
