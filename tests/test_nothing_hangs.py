# SPDX-License-Identifier: MIT
"""Nothing hangs and nothing is left behind: promises 6.5 to 6.8, and 3.3 for `--timeout 0`.

A table of places to get stuck at; a deadline and a signal end a call at each. Time is measured only
to be well below what a hang would take.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    drip,
    drip_at_once,
    hold_at_once,
    message,
    never_read,
    reset,
    silent,
    then_hold,
    why_no_ipv6,
    why_no_name_server,
    why_no_namespace,
    with_files,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    LIMIT,
    Env,
    InProcess,
    Program,
    Result,
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
Serve = Callable[..., Hostile]

# --- places to get stuck at -------------------------------------------------------------------


class Stuck(NamedTuple):
    """A place to get stuck at, and whether a byte of the request may have left by then."""

    id: str
    sent: bool
    script: Script | None = None  # without one the connection is not even made
    tls: bool = False
    scheme: str = ""
    via_proxy: bool = False


def drip_tunnel(connection: Connection) -> None:
    connection.read_head()
    connection.drip(b"HTTP/1.1 200 Connection established\r\nVia: " + b"x" * 1000)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SLOW_HEAD = drip(b"X-Slow: " + b"y" * 1000, first=HEAD)
SLOW_BODY = drip(b" " * 1000, first=message(b"", length=1000))
SLOW_CHUNKS = drip(b"1\r\n \r\n" * 200, first=HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
SLOW_TLS = drip_at_once(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\0" * 1000)
STUCK = [
    Stuck("connect", sent=False),
    Stuck("silent-port", True, hold_at_once()),
    Stuck("silent-after-head", True, then_hold(HEAD + b"\r\n")),
    Stuck("status-line-dripped", True, drip(b"HTTP/1.1 200 " + b"O" * 1000)),
    Stuck("headers-dripped", True, SLOW_HEAD),
    Stuck("body-dripped", True, SLOW_BODY),
    Stuck("chunks-dripped", True, SLOW_CHUNKS),
    Stuck("interim-for-ever", True, again_and_again(b"HTTP/1.1 102 P\r\n\r\n")),
    Stuck("request-not-read", True, never_read()),
    Stuck("tls-silent-port", False, hold_at_once(), scheme="https"),
    Stuck("tls-handshake-dripped", False, SLOW_TLS, scheme="https"),
    Stuck("tls-body-dripped", True, SLOW_BODY, tls=True),
    Stuck("tls-request-not-read", True, never_read(), tls=True),
    Stuck("proxy-silent", False, hold_at_once(), via_proxy=True),
    Stuck("proxy-dripping", False, drip_tunnel, via_proxy=True),
]


class Trap(NamedTuple):
    """What leads a call there; `wait` until it is stuck, and then until its connection is gone."""

    env: dict[str, str]
    command: list[str]
    wait: Callable[[], bool]
    is_left: Callable[[], bool]


@contextmanager
def trap_of(case: Stuck, certificates: Certificates) -> Iterator[Trap]:
    env = {"BUS_AI_TOKEN": CANARY, "SSL_CERT_FILE": str(certificates.ca)}
    if case.script is None:
        with FullPort() as full:
            env["BUS_AI_API_URL"] = full.url
            yield Trap(env, ["true"], full.await_client, lambda: soon(lambda: not full.clients()))
        return
    is_unread = case.id.endswith("not-read")
    context = certificates.context(certificates.good) if case.tls else None
    buffer = 4096 if is_unread else 0
    with Hostile(case.script, tls=context, scheme=case.scheme, receive_buffer=buffer) as server:
        env["BUS_AI_API_URL"] = server.url
        if case.via_proxy:
            env.update(BUS_AI_API_URL="https://platform.test", HTTPS_PROXY=server.url)
        # More than the buffers of two sockets take; whoever does not read sees nobody leave.
        command = ["x" * 100_000] * 19 if is_unread else ["true"]
        yield Trap(
            env,
            command,
            lambda: server.reached.wait(LIMIT),
            lambda: is_unread or server.left.wait(LIMIT),
        )


def soon(is_so: Callable[[], bool]) -> bool:
    """Whether this becomes true, after a moment for it."""
    end = time.monotonic() + LIMIT
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Promise 6.7, after each test; a server's own threads apart."""
    before = {*threading.enumerate()}
    yield

    def left() -> list[str]:
        names = [thread.name for thread in {*threading.enumerate()} - before]
        return [name for name in names if not name.startswith("hostile")]

    assert soon(lambda: not left()), left()


# --- deadlines and signals --------------------------------------------------------------------


def test_a_deadline_ends_a_run_wherever_it_is(certificates: Certificates) -> None:
    """Promises 6.5 and 6.7: it ends in time, says what is known, and leaves nothing behind."""

    def check(case: Stuck) -> None:
        with trap_of(case, certificates) as trap:
            client = bus_containers.Client.from_env(trap.env)
            start = time.monotonic()
            with pytest.raises(bus_containers.DeadlineError) as caught:
                client.run(trap.command, timeout=0.4)
            assert time.monotonic() - start < SOON
            assert "no whole answer within 0.4 s" in str(caught.value)
            assert caught.value.run_state == ("unknown" if case.sent else "not_sent")
            assert ("bus-containers delete" in str(caught.value)) == case.sent
            assert trap.is_left(), "the connection is still there"

    check_each(check, STUCK, workers=len(STUCK))


@second_tier
def test_a_deadline_ends_a_flood(program: Program) -> None:
    """Of messages of TLS that OpenSSL skips, for as long as they come."""

    def flood(connection: Connection) -> None:
        connection.await_data()
        end = time.monotonic() + 3 * SOON
        while time.monotonic() < end:
            connection.send((b"\x16\x03\x03\x40\x00" + b"\0" * 0x4000) * 16)  # HelloRequests

    with Hostile(flood, scheme="https") as server:
        for _ in range(5):  # now and then there is a pause in what comes
            result = program("--timeout", "1s", *RUN, at=server)
            check_failure(result, 125, "no whole answer within 1 s")
            assert result.seconds < SOON


PLACES = ["connect", "tls-handshake-dripped", "request-not-read", "proxy-silent", "body-dripped"]


@pytest.mark.parametrize(
    "case", tiers(STUCK, *(one for one in STUCK if one.id in PLACES), ids=lambda case: case.id)
)
def test_an_interrupt_ends_a_run_wherever_it_is(
    case: Stuck, cli: InProcess, certificates: Certificates
) -> None:
    """Promise 6.7, in a process that lives on."""
    with trap_of(case, certificates) as trap:

        def interrupt() -> None:
            if trap.wait():
                os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt, name="hostile interrupter")
        interrupter.start()
        result = cli("--timeout", "60s", "run", "--", *trap.command, env={**trap.env})
        interrupter.join()
        check_failure(result, 130, "interrupted")
        assert result.spoken.advises == case.sent
        assert result.seconds < LIMIT + SOON
        assert trap.is_left(), "the connection is still there"


def test_a_call_that_is_over_reports_nothing_more(cli: InProcess, serve: Serve) -> None:
    """What had come of an answer at the deadline is told by the call itself, not amid the next."""

    def late(connection: Connection) -> None:
        connection.read_request()
        connection.server.ending.wait(0.2)  # for what would report the first answer
        connection.send(message(BODIES["status"]))

    server = serve(then_hold(message(length=9, status="500 Odd")), late)
    result = cli("-v", "--timeout", "300ms", *RUN, at=server)
    *_, told, error = result.message.splitlines()
    assert result.code == 125
    assert "runs: 500, 0 bytes" in told
    assert "HTTP 500 Odd" in error
    result = cli("-v", "status", at=server)
    assert (result.code, result.document) == (0, DOCUMENTS["status"])
    [line] = [line for line in result.message.splitlines() if "bytes" in line]
    assert "GET" in line


def test_no_limit(cli: InProcess, api: Api) -> None:
    """Promise 3.3; the library: test_library.py."""
    for name in ("run", "status"):
        assert cli("--timeout", "0", *words(name), at=api).code == 0


@second_tier
def test_runs_and_the_status_in_its_place_have_one_limit(cli: InProcess, serve: Serve) -> None:
    def late(connection: Connection) -> None:
        connection.read_request()
        time.sleep(6)
        connection.send(message(b"{}", "404 Not Found"))

    result = cli("--timeout", "7s", "runs", at=serve(late, silent()))
    check_failure(result, 1, "no whole answer within 7 s")
    assert result.seconds < 12


# --- names and connecting ---------------------------------------------------------------------

GOOD = "127.0.0.3"
Files = dict[str, Path]


def ask(program: Program, files: Files, port: int, *args: str) -> Result:
    """Ask platform.test, whose addresses these files of /etc tell."""
    named = Program(with_files(program.command, files), program.home)
    url = f"http://platform.test:{port}"
    return named(*args, env={"BUS_AI_API_URL": url, "BUS_AI_TOKEN": CANARY})


def hosts(folder: Path, *addresses: str) -> Files:
    path = folder / "hosts"
    path.write_text("".join(f"{address} platform.test\n" for address in addresses))
    return {"/etc/hosts": path}


THREE = ("127.0.0.1", "127.0.0.2", GOOD)


def test_a_deadline_covers_the_name_and_all_addresses(program: Program, tmp_path: Path) -> None:
    """Promise 6.5."""
    skip_if(why_no_name_server())
    with NameServer(lambda _: None) as names, FullPort(*THREE) as full:
        for files in (names.files(tmp_path), hosts(tmp_path, *THREE)):
            result = ask(program, files, full.port, "--timeout", "400ms", *RUN)
            check_failure(result, 125, "no whole answer within 0.4 s; --timeout sets the limit")
            assert result.seconds < SOON


@pytest.mark.parametrize(
    ("dead", "others"), [("127.0.0.2", ("127.0.0.4", GOOD)), ("::1", (GOOD,))], ids=["ipv4", "ipv6"]
)
def test_a_dead_address_costs_little(
    dead: str, others: tuple[str, ...], program: Program, serve: Serve, tmp_path: Path
) -> None:
    """Promise 6.6: the next is tried beside one that does not answer; one refuses, one wins."""
    skip_if(why_no_namespace() or (why_no_ipv6() if ":" in dead else ""))
    server = serve(answer(BODIES["run"]), host=GOOD)
    with FullPort(dead, port=server.port):
        result = ask(program, hosts(tmp_path, dead, *others), server.port, *RUN)
    assert (result.code, result.err) == (0, b"")
    assert (server.methods(), server.connections) == (["POST"], 1)
    assert result.seconds < SOON


SAYS = "cannot connect to the API: no answer within {} s; check BUS_AI_API_URL; "


def test_a_firewall_that_drops(cli: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 6.6: it is told after 10 s, here less, and not tried again."""
    assert bus_containers._CONNECT_SECONDS == 10
    monkeypatch.setattr(bus_containers, "_CONNECT_SECONDS", 0.3)
    with FullPort() as full:
        for name in ("run", "status"):
            env: Env = {"BUS_AI_API_URL": full.url, "BUS_AI_TOKEN": CANARY}
            result = cli("--error-format", "json", "-v", *words(name), env=env)
            *notes, error = [one["text"] for one in result.objects]
            assert (result.code, result.out) == (failure_code(name), b"")
            assert SAYS.format("0.3") in error
            assert [note for note in notes if "trying again" in note] == []
            assert ("bus-containers delete" in error, full.clients()) == (False, 0)
            assert result.seconds < SOON


@second_tier
def test_a_firewall_in_front_of_three_addresses(program: Program, tmp_path: Path) -> None:
    skip_if(why_no_namespace())
    with FullPort(*THREE) as full:
        result = ask(program, hosts(tmp_path, *THREE), full.port, "status")
    check_failure(result, 1, SAYS.format(10))
    assert result.seconds < 10 + SOON


def test_a_connection_is_kept_alive(cli: InProcess, serve: Serve) -> None:
    """Promise 6.5: before NAT forgets it, while a run of half an hour says nothing."""
    table = Path("/proc/net/tcp")
    skip_if("" if table.exists() else "no /proc/net/tcp to see the timers of a socket in")
    seen: list[str] = []

    def script(connection: Connection) -> None:
        connection.read_request()
        timer = rf":{connection.server.port:04X} 01 \S+ 02:(\S+) "
        seen.extend(re.findall(timer, table.read_text()))
        connection.send(message(BODIES["run"]))

    assert cli(*RUN, at=serve(script)).code == 0
    assert len(seen) == 1, "no timer of keep-alive runs"
    assert int(seen[0], 16) <= 3000  # hundredths of a second


# --- status --wait: which answers it waits for is in test_command_line.py ---------------------

STARTING = answer(b'{"items":[{"id":"runner","state":"starting"}]}')
READY = answer(BODIES["status"])


def waits(cli: InProcess, server: Api | Hostile, *options: str, **more: Any) -> Result:
    result = cli(*options, "status", "--wait", "60s", at=server, **more)
    assert (result.code, result.err) == (0, b"")
    assert result.document == json.loads(BODIES["status"])
    return result


@pytest.mark.usefixtures("hasty")
def test_wait_goes_on_until_the_platform_is_ready(cli: InProcess, serve: Serve) -> None:
    """Promise 6.8: it restarts, and refuses connections for a while."""

    def go_down(connection: Connection) -> None:
        connection.read_request()
        connection.server.refuse()
        threading.Timer(0.2, connection.server.listen).start()
        connection.reset()

    unavailable = answer(b"{}", "503 Service Unavailable")
    server = serve(unavailable, reset(), STARTING, go_down, answer(b"{}", "429 X"), READY)
    waits(cli, server)
    assert len(server.requests) == 6


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", [".config/bus/auth/api-token", "a-name-of-many-letters.txt"])
def test_wait_for_a_token_file(name: str, cli: InProcess, api: Api, home: Path) -> None:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (home / "fresh").write_text(CANARY)
    options = ("--token-file", str(path)) if path.parent == home else ()
    timer = threading.Timer(0.25, (home / "fresh").rename, [path])
    timer.start()
    waits(cli, api, *options, env={"BUS_AI_TOKEN": None})
    timer.join()
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ((), {"BUS_AI_TOKEN": " "}),
        ((), {"BUS_AI_TOKEN": None, "HOME": None}),
        (("--token-file", "eyJhbGciOiJIUzI1NiJ9.e30.abc"), {}),
    ],
)
def test_wait_for_no_token_that_cannot_come(
    options: tuple[str, ...], env: Env, cli: InProcess, api: Api
) -> None:
    """A process's own variables do not change, nor does its command line."""
    result = cli(*options, "status", "--wait", "60s", at=api, env=env)
    assert result.seconds < LIMIT
    assert "no token" in check_failure(result, 1)


def test_an_error_of_many_texts_is_soon_looked_through(cli: InProcess, api: Api) -> None:
    """For the token, which is longer than each of them."""
    api.answers({"error": {"message": "no", "texts": ["a"] * 500_000}}, status="403 Forbidden")
    result = cli("status", at=api, env={"BUS_AI_TOKEN": "/" + "x" * 1000})
    check_failure(result, 1, "403")
    assert result.seconds < LIMIT


def test_wait_of_no_time(cli: InProcess, serve: Serve) -> None:
    """It is no success where the platform is not ready."""
    result = cli("status", "--wait", "0s", at=serve(STARTING))
    check_failure(result, 1, "not ready after 0 s: the runner is starting")


@pytest.mark.usefixtures("hasty")
def test_what_a_wait_tells_of_a_token_that_never_comes(cli: InProcess, api: Api) -> None:
    """In the words of the command line, and each line once."""
    result = cli("-v", "status", "--wait", "300ms", at=api, env={"BUS_AI_TOKEN": None})
    [told, last] = result.message.splitlines()
    assert told.startswith(f"bus-containers: API URL {api.url} from ")
    assert "not ready after 0.3 s: no token: looked at --token-file, BUS_AI_TOKEN, " in last


def changing(seconds: float, before: bytes, first: list[float]) -> Script:
    """Answer so, and that the platform is ready when this time has passed since the first."""

    def script(connection: Connection) -> None:
        connection.read_request()
        first.append(time.monotonic())
        is_ready = first[-1] - first[0] > seconds
        connection.send(message(BODIES["status"]) if is_ready else before)

    return script


def test_wait_looks_a_last_time_at_its_end(cli: InProcess, serve: Serve) -> None:
    """After a look that was held up until then."""
    result = cli("status", "--wait", "1s", at=serve(hold_at_once(), READY))
    assert (result.code, result.err) == (0, b"")


@second_tier
def test_wait_looks_a_last_time_instead_of_too_late(cli: InProcess, serve: Serve) -> None:
    """The pauses have grown by then, and the next look would come after the end."""
    starting = message(b'{"items":[{"id":"runner","state":"starting"}]}')
    result = cli("status", "--wait", "3s", at=serve(changing(2, starting, [])))
    assert (result.code, result.err) == (0, b"")
    assert result.seconds < SOON


def test_wait_keeps_a_short_retry_after(cli: InProcess, serve: Serve) -> None:
    """So it does not ask meanwhile."""
    later = message(b"{}", "429 Too Many Requests", "Retry-After: 1")
    looks: list[float] = []
    waits(cli, serve(changing(0.7, later, looks)))
    assert len(looks) == 2


def test_wait_does_not_keep_a_long_retry_after(cli: InProcess, serve: Serve) -> None:
    for value in ("11", "soon", "-5"):
        later = answer(b"{}", "429 Too Many Requests", f"Retry-After: {value}")
        assert waits(cli, serve(later, READY)).seconds < SOON
