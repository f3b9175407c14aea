# SPDX-License-Identifier: MIT
"""Nothing hangs and nothing is left behind: promises 6.5 to 6.8, and 3.3 for `--timeout 0`.

A table of places to get stuck at; a deadline and a signal end a call at each. Time is measured in
the process that is under test, and only to be well below what a hang would take.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from hostile import (
    Api,
    Certificates,
    Connection,
    FullPort,
    Hostile,
    NameServer,
    Script,
    again_and_again,
    answer,
    close,
    drip,
    drip_at_once,
    hold_at_once,
    html,
    message,
    never_read,
    reset,
    silent,
    then_hold,
    why_no_name_server,
    why_no_namespace,
    with_files,
)
from support import (
    BODIES,
    CANARY,
    LIMIT,
    Env,
    InProcess,
    Program,
    api_commands,
    check_each,
    check_failure,
    failure_code,
    second_tier,
    skip_if,
    tiers,
    words,
)

SOON = 5.0
"""Seconds within which a call has ended that was to end in less than one, on a busy machine too."""

RUN = words("run")
# More than the buffers of two sockets take when the reader does not read.
LARGE = ("x" * 100_000,) * 19
Serve = Callable[..., Hostile]

# --- places to get stuck at -------------------------------------------------------------------


class Trap(NamedTuple):
    """Where a call is stuck: `wait` until it is, and afterwards until its connection is gone."""

    url: str
    wait: Callable[[], bool]
    is_left: Callable[[], bool]
    env: dict[str, str] = {}
    files: dict[str, Path] = {}  # of /etc, for that program alone


class Tools(NamedTuple):
    folder: Path
    certificates: Certificates


SetUp = Callable[[Tools], "AbstractContextManager[Trap]"]


def at_server(script: Script, tls: bool = False, left: bool = True, **options: Any) -> SetUp:
    @contextmanager
    def set_up(tools: Tools) -> Iterator[Trap]:
        certificates = tools.certificates
        context = certificates.context(certificates.good) if tls else None
        env = {"SSL_CERT_FILE": str(certificates.ca)} if tls else {}
        with Hostile(script, tls=context, **options) as server:
            is_left = (lambda: server.left.wait(LIMIT)) if left else (lambda: True)
            yield Trap(server.url, lambda: server.reached.wait(LIMIT), is_left, env)

    return set_up


def at_proxy(script: Script) -> SetUp:
    @contextmanager
    def set_up(tools: Tools) -> Iterator[Trap]:
        with at_server(script)(tools) as trap:
            yield trap._replace(url="https://platform.test", env={"HTTPS_PROXY": trap.url})

    return set_up


@contextmanager
def hanging_resolver(tools: Tools) -> Iterator[Trap]:
    skip_if(why_no_name_server())
    with NameServer(lambda _: None) as names:
        wait = lambda: names.reached.wait(LIMIT)  # noqa: E731
        yield Trap("http://platform.test", wait, lambda: True, files=names.files(tools.folder))


def connecting_to(*addresses: str) -> SetUp:
    @contextmanager
    def set_up(tools: Tools) -> Iterator[Trap]:
        with FullPort(*addresses) as full:

            def is_left() -> bool:
                end = time.monotonic() + LIMIT
                while full.clients() and time.monotonic() < end:
                    time.sleep(0.01)
                return full.clients() == 0

            trap = Trap(full.url, full.await_client, is_left)
            if len(addresses) > 1:
                skip_if(why_no_namespace())
                files = {"/etc/hosts": hosts(tools.folder, *addresses)}
                trap = trap._replace(url=f"http://platform.test:{full.port}", files=files)
            yield trap

    return set_up


def hosts(folder: Path, *addresses: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{address} platform.test\n" for address in addresses))
    return path


def drip_tunnel(connection: Connection) -> None:
    connection.read_head()
    connection.drip(b"HTTP/1.1 200 Connection established\r\nVia: " + b"x" * 1000)


class Stuck(NamedTuple):
    """A place to get stuck at, and whether a byte of the request may have left by then."""

    id: str
    set_up: SetUp
    sent: bool
    command: tuple[str, ...] = ("true",)


def run(case: Stuck) -> tuple[str, ...]:
    return ("run", "--", *case.command)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SLOW_HEAD = drip(b"X-Slow: " + b"y" * 1000, first=HEAD)
SLOW_BODY = drip(b" " * 1000, first=message(b"", length=1000))
SLOW_CHUNKS = drip(b"1\r\n \r\n" * 200, first=HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
SLOW_TLS = drip_at_once(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 1000)
UNREAD: dict[str, Any] = {"left": False, "receive_buffer": 4096}
IN_FILES = [
    Stuck("resolver", hanging_resolver, sent=False),
    Stuck("connect-to-3-addresses", connecting_to("127.0.0.1", "127.0.0.2", "127.0.0.3"), False),
]
STUCK = [
    Stuck("connect", connecting_to("127.0.0.1"), sent=False),
    Stuck("silent-port", at_server(hold_at_once()), sent=True),
    Stuck("silent-after-head", at_server(then_hold(HEAD + b"\r\n")), sent=True),
    Stuck("status-line-dripped", at_server(drip(b"HTTP/1.1 200 " + b"O" * 1000)), sent=True),
    Stuck("headers-dripped", at_server(SLOW_HEAD), sent=True),
    Stuck("body-dripped", at_server(SLOW_BODY), sent=True),
    Stuck("chunks-dripped", at_server(SLOW_CHUNKS), sent=True),
    Stuck("interim-for-ever", at_server(again_and_again(b"HTTP/1.1 102 P\r\n\r\n")), sent=True),
    Stuck("request-not-read", at_server(never_read(), **UNREAD), sent=True, command=LARGE),
    Stuck("tls-silent-port", at_server(hold_at_once(), scheme="https"), sent=False),
    Stuck("tls-handshake-dripped", at_server(SLOW_TLS, scheme="https"), sent=False),
    Stuck("tls-silent", at_server(silent(), tls=True), sent=True),
    Stuck("tls-headers-dripped", at_server(SLOW_HEAD, tls=True), sent=True),
    Stuck("tls-body-dripped", at_server(SLOW_BODY, tls=True), sent=True),
    Stuck("tls-request-not-read", at_server(never_read(), tls=True, **UNREAD), True, LARGE),
    Stuck("proxy-silent", at_proxy(hold_at_once()), sent=False),
    Stuck("proxy-dripping", at_proxy(drip_tunnel), sent=False),
]


@pytest.fixture
def tools(tmp_path: Path, certificates: Certificates) -> Tools:
    return Tools(tmp_path, certificates)


# --- deadlines --------------------------------------------------------------------------------


def strangers(known: set[threading.Thread]) -> list[str]:
    """The threads that are neither known nor a server's own, after a moment to end in."""
    end = time.monotonic() + LIMIT
    while True:
        names = [thread.name for thread in set(threading.enumerate()) - known]
        names = [name for name in names if not name.startswith("hostile")]
        if not names or time.monotonic() > end:
            return names
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["run", "delete"])
def test_a_deadline_ends_a_call_wherever_it_is(name: str, tools: Tools) -> None:
    """Promises 6.5 and 6.7: it ends in time, says what is known, and leaves nothing behind."""

    def check(case: Stuck) -> None:
        with case.set_up(tools) as trap:
            environ = {"BUS_AI_API_URL": trap.url, "BUS_AI_TOKEN": CANARY, **trap.env}
            client = bus_containers.Client.from_env(environ)
            client.timeout = 0.4
            start = time.monotonic()
            with pytest.raises(bus_containers.DeadlineError) as caught:
                if name == "run":
                    client.run(case.command, timeout=0.4)
                else:
                    client.delete("run-1")
            assert time.monotonic() - start < SOON
            assert "no whole answer within 0.4 s" in str(caught.value)
            state = "unknown" if case.sent else "not_sent"
            assert caught.value.run_state == (state if name == "run" else None)
            assert ("bus-containers delete" in str(caught.value)) == (name == "run" and case.sent)
            assert trap.is_left(), "the connection is still there"

    before = set(threading.enumerate())
    cases = [case for case in STUCK if name == "run" or case.command == ("true",)]
    check_each(check, cases, workers=len(cases))
    assert strangers(before) == []


# `main` in a process of its own, which says how long it took.
TIMED = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import bus_containers
start = time.monotonic()
code = bus_containers.main()
print("took", time.monotonic() - start, file=sys.stderr, flush=True)
os._exit(code)
"""


class Timed(NamedTuple):
    code: int
    out: bytes
    message: str
    seconds: float


def timed(cli: InProcess, files: dict[str, Path], url: str, *args: str) -> Timed:
    """Call `main` where these files of /etc are others, and measure it there."""
    folder = str(Path(bus_containers.__file__ or "").parent)
    program = Program(with_files([sys.executable, "-c", TIMED, folder], files), cli.home)
    environ = {"BUS_AI_API_URL": url, "BUS_AI_TOKEN": CANARY}
    result = program(*args, env={**environ})
    said, _, took = result.message.rpartition("took ")
    return Timed(result.code, result.out, said, float(took))


@pytest.mark.parametrize("case", tiers(IN_FILES, IN_FILES[0], ids=lambda case: case.id))
def test_a_deadline_covers_the_name_and_all_addresses(
    case: Stuck, cli: InProcess, tools: Tools
) -> None:
    with case.set_up(tools) as trap:
        result = timed(cli, trap.files, trap.url, "--timeout", "400ms", *RUN)
    assert (result.code, result.out) == (125, b"")
    assert result.seconds < SOON
    assert "no whole answer within 0.4 s; --timeout sets the limit\n" in result.message


@pytest.mark.parametrize("limit", ["0", "0s", "0m", "-0s"])
@pytest.mark.parametrize("name", tiers(api_commands(), "status", "run"))
def test_no_limit(name: str, limit: str, cli: InProcess, api: Api) -> None:
    """Promise 3.3."""
    result = cli("--timeout", limit, *words(name), at=api)
    assert (result.code, result.err) == (0, b"")


def test_no_limit_in_the_library(api: Api) -> None:
    client = bus_containers.Client(api.url, CANARY, timeout=0)
    assert client.status() == json.loads(BODIES["status"])
    assert client.run(["true"], timeout=0) == json.loads(BODIES["run"])
    assert client.run(["true"], timeout_seconds=0)["exit_code"] == 0


# --- signals ----------------------------------------------------------------------------------

PLACES = ["connect", "tls-handshake-dripped", "request-not-read", "proxy-silent", "body-dripped"]


@pytest.mark.parametrize(
    "case", tiers(STUCK, *(one for one in STUCK if one.id in PLACES), ids=lambda case: case.id)
)
def test_an_interrupt_ends_a_run_wherever_it_is(case: Stuck, cli: InProcess, tools: Tools) -> None:
    """Promise 6.7, in a process that lives on."""
    before = set(threading.enumerate())
    with case.set_up(tools) as trap:

        def interrupt() -> None:
            if trap.wait():
                os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt, name="hostile interrupter")
        interrupter.start()
        environ = {"BUS_AI_API_URL": trap.url, "BUS_AI_TOKEN": CANARY, **trap.env}
        result = cli("--timeout", "60s", *run(case), env={**environ})
        interrupter.join()
        check_failure(result, 130, "interrupted")
        assert result.spoken.advises == case.sent
        assert result.seconds < LIMIT + SOON
        assert trap.is_left(), "the connection is still there"
    assert strangers(before) == []


# --- connecting -------------------------------------------------------------------------------


GOOD = "127.0.0.3"


class Dead(NamedTuple):
    """The addresses that never answer, and those of a name as they are tried; others refuse."""

    id: str
    full: tuple[str, ...]
    listed: tuple[str, ...]


DEAD = [
    Dead("first-of-two", ("127.0.0.2",), ("127.0.0.2", GOOD)),
    Dead("first-of-three-and-one-refuses", ("127.0.0.2",), ("127.0.0.2", "127.0.0.4", GOOD)),
    Dead("two-of-three", ("127.0.0.2", "127.0.0.4"), ("127.0.0.2", "127.0.0.4", GOOD)),
    Dead("two-refuse", (), ("127.0.0.2", "127.0.0.4", GOOD)),
    Dead("last", ("127.0.0.2",), (GOOD, "127.0.0.2")),
]


@pytest.mark.parametrize("case", tiers(DEAD, DEAD[1], ids=lambda case: case.id))
def test_a_dead_address_costs_little(
    case: Dead, cli: InProcess, serve: Serve, tmp_path: Path
) -> None:
    """Promise 6.6: the next address is tried beside one that does not answer, and wins."""
    skip_if(why_no_namespace())
    server = serve(answer(BODIES["run"]), host=GOOD)
    with ExitStack() as stack:
        if case.full:
            stack.enter_context(FullPort(*case.full, port=server.port))
        check_dead(cli, {"/etc/hosts": hosts(tmp_path, *case.listed)}, server)


def check_dead(cli: InProcess, files: dict[str, Path], server: Hostile) -> None:
    result = timed(cli, files, f"http://platform.test:{server.port}", *RUN)
    assert (result.code, result.message) == (0, ""), result
    assert server.methods() == ["POST"]
    assert server.connections == 1
    assert result.seconds < SOON


def test_a_dead_ipv6_address_costs_little(cli: InProcess, serve: Serve, tmp_path: Path) -> None:
    """The same where a name server gives one address of each kind."""
    skip_if(why_no_name_server() or why_no_ipv6())
    server = serve(answer(BODIES["run"]))
    dead = FullPort("::1", port=server.port)
    with dead, NameServer(lambda _: "127.0.0.1", ipv6="::1") as names:
        check_dead(cli, names.files(tmp_path), server)


def why_no_ipv6() -> str:
    try:
        with FullPort("::1"):
            return ""
    except OSError as error:
        return f"no IPv6 loopback here: {error}"


@second_tier
@pytest.mark.parametrize("name", ["run", "status"])
def test_a_firewall_that_drops(name: str, cli: InProcess, tools: Tools) -> None:
    """Promise 6.6: it is told after 10 s, for all addresses together, and not tried again."""
    says = "cannot connect to the API: no answer within 10 s; check BUS_AI_API_URL; "
    code = failure_code(name)
    with FullPort() as full:
        result = cli(*words(name), env={"BUS_AI_API_URL": full.url, "BUS_AI_TOKEN": CANARY})
        check_failure(result, code, says)
        assert (result.spoken.advises, full.clients()) == (False, 0)
        assert result.seconds < 10 + SOON
    with IN_FILES[1].set_up(tools) as trap:
        three = timed(cli, trap.files, trap.url, *words(name))
        assert (three.code, says in three.message) == (code, True)
        assert three.seconds < 10 + SOON


def test_a_connection_is_kept_alive(cli: InProcess, serve: Serve) -> None:
    """Promise 6.5: before NAT forgets it, while a run of half an hour says nothing."""
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc/net/tcp to see the timers of a socket in")
    seen: list[str] = []

    def script(connection: Connection) -> None:
        connection.read_request()
        timer = rf":{connection.server.port:04X} 01 \S+ 02:(\S+) "
        seen.extend(re.findall(timer, table.read_text()))
        connection.send(message(BODIES["run"]))

    assert cli(*RUN, at=serve(script)).code == 0
    assert len(seen) == 1, "no timer of keep-alive runs"
    assert int(seen[0], 16) <= 3000  # hundredths of a second


# --- status --wait ----------------------------------------------------------------------------

STARTING = b'{"items":[{"id":"runner","state":"starting"}]}'
UNAVAILABLE = answer(b"{}", "503 Service Unavailable")
WAITS: dict[str, list[Script]] = {
    "ready-at-once": [],
    "refused-after-a-lost-one": [reset()],
    "closed": [close()] * 4,
    "503": [UNAVAILABLE] * 5,
    "502-504-html": [html("502 Bad Gateway", "502"), html("504 Gateway", "504")] * 2,
    "other-statuses": [answer(b"{}", f"{status} X") for status in (408, 425, 429, 500, 520, 529)],
    "starting": [answer(STARTING)] * 3,
    "other-shape": [answer(b'{"status":{"state":"Starting"}}')] * 2,
    "one-of-two": [answer(b'{"items":[{"state":"ready"},{"state":"PENDING"}]}')],
    "all-of-it": [UNAVAILABLE, answer(STARTING), reset(), answer(b"{}", "429 X")],
}


@pytest.mark.parametrize("name", tiers(WAITS, "ready-at-once", "all-of-it"))
def test_wait_goes_on_until_the_platform_is_ready(name: str, cli: InProcess, serve: Serve) -> None:
    """Promise 6.8."""
    server = serve(*WAITS[name], answer(BODIES["status"]))
    result = cli("status", "--wait", "60s", at=server)
    assert (result.code, result.err) == (0, b"")
    assert result.document == json.loads(BODIES["status"])
    assert len(server.requests) == len(WAITS[name]) + 1


def test_wait_for_a_platform_that_restarts(cli: InProcess, serve: Serve) -> None:
    """A lost connection and then refused ones, which are two tries with a state of their own."""

    def go_down(connection: Connection) -> None:
        connection.read_request()
        connection.server.refuse()
        threading.Timer(1.2, connection.server.listen).start()
        connection.reset()

    server = serve(go_down, answer(BODIES["status"]))
    result = cli("status", "--wait", "60s", at=server)
    assert (result.code, result.err) == (0, b"")
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", [".config/bus/auth/api-token", "a-name-of-many-letters.txt"])
def test_wait_for_a_token_file(name: str, cli: InProcess, api: Api, home: Path) -> None:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (home / "fresh").write_text(CANARY)
    options = ("--token-file", name) if path.parent == home else ()
    timer = threading.Timer(0.4, (home / "fresh").rename, [path])
    timer.start()
    env: Env = {"BUS_AI_TOKEN": None}
    result = cli(*options, "status", "--wait", "60s", at=api, env=env, cwd=home)
    timer.join()
    assert (result.code, result.err) == (0, b"")
    assert len(api.requests) == 1


@pytest.mark.parametrize("env", [{"BUS_AI_TOKEN": " "}, {"BUS_AI_TOKEN": None, "HOME": None}])
def test_wait_for_no_token_that_cannot_come(env: Env, cli: InProcess, api: Api) -> None:
    """A process's own variables do not change."""
    result = cli("status", "--wait", "60s", at=api, env=env)
    assert result.seconds < LIMIT
    assert "no token" in check_failure(result, 1)


@second_tier
def test_wait_for_a_name(cli: InProcess, serve: Serve, tmp_path: Path) -> None:
    skip_if(why_no_name_server())
    server = serve(answer(BODIES["status"]))
    with NameServer(lambda count: "127.0.0.1" if count >= 4 else "") as names:
        url = f"http://platform.test:{server.port}"
        result = timed(cli, names.files(tmp_path), url, "status", "--wait", "60s")
    assert (result.code, result.message) == (0, "")
    assert names.queries >= 5


@pytest.mark.parametrize(
    ("wait", "ready_after"),
    [
        pytest.param("1s", 0.8, id="1s"),
        pytest.param("3s", 2.4, id="3s", marks=second_tier),
    ],
)
def test_wait_looks_a_last_time_at_its_end(
    wait: str, ready_after: float, cli: InProcess, serve: Serve
) -> None:
    """The pauses have grown by then, and the next look would come after the end."""
    first: list[float] = []

    def script(connection: Connection) -> None:
        connection.read_request()
        first.append(time.monotonic())
        ready = first[-1] - first[0] > ready_after
        connection.send(message(BODIES["status"] if ready else STARTING))

    result = cli("status", "--wait", wait, at=serve(script))
    assert (result.code, result.err) == (0, b"")


@pytest.mark.parametrize(
    ("status", "after"),
    [
        pytest.param("429 Too Many Requests", 1, id="429"),
        pytest.param("429 Too Many Requests", 9, id="429-nine", marks=second_tier),
        pytest.param("503 Service Unavailable", 2, id="503"),
    ],
)
def test_wait_keeps_a_short_retry_after(
    status: str, after: int, cli: InProcess, serve: Serve
) -> None:
    """So it does not ask meanwhile."""
    first: list[float] = []

    def script(connection: Connection) -> None:
        connection.read_request()
        first.append(time.monotonic())
        later = message(b"{}", status, f"Retry-After: {after}")
        ready = first[-1] - first[0] > after * 0.7
        connection.send(message(BODIES["status"]) if ready else later)

    server = serve(script)
    result = cli("status", "--wait", "60s", at=server)
    assert (result.code, result.err) == (0, b"")
    assert len(server.requests) <= 2


@second_tier
def test_runs_and_the_status_in_its_place_have_one_limit(cli: InProcess, serve: Serve) -> None:
    def late(connection: Connection) -> None:
        connection.read_request()
        time.sleep(6)
        connection.send(message(b"{}", "404 Not Found"))

    result = cli("--timeout", "7s", "runs", at=serve(late, silent()))
    check_failure(result, 1, "no whole answer within 7 s")
    assert result.seconds < 12


@pytest.mark.parametrize("value", ["11", "soon", "-5", "9" * 400])
def test_wait_does_not_keep_a_long_retry_after(value: str, cli: InProcess, serve: Serve) -> None:
    server = serve(
        answer(b"{}", "429 Too Many Requests", f"Retry-After: {value}"), answer(BODIES["status"])
    )
    result = cli("status", "--wait", "60s", at=server)
    assert (result.code, result.err) == (0, b"")
    assert result.seconds < SOON
