# SPDX-License-Identifier: MIT
"""No run is started twice, and nothing is sent once a call has been given up: promises 6.1, 6.2.

That each fault alone never makes a second run is in `test_run_fate.py`. Deadlines wherever a call
is, while connecting, too, are in `test_nothing_hangs.py`, signals in `test_signals.py`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bus_containers
from hostile import (
    Connection,
    Hostile,
    NameServer,
    Script,
    answer,
    close,
    message,
    reset,
    why_no_name_server,
    with_files,
)
from support import (
    BODIES,
    CANARY,
    DOCUMENTS,
    LIMIT,
    InProcess,
    Program,
    check_each,
    check_failure,
    second_tier,
    skip_if,
    words,
)

Serve = Callable[..., Hostile]

# --- tries ------------------------------------------------------------------------------------

REFUSED = None  # stands among the scripts for a connection that is refused
METHODS = {"run": "POST", "delete": "DELETE", "status": "GET", "runs": "GET"}
ARGUMENTS: dict[str, list[Any]] = {"run": [["true"]], "delete": ["run-1"]}


class Case(NamedTuple):
    """What happens to each connection, and the outcome: the document, or the error's state."""

    id: str
    name: str
    steps: tuple[Script | None, ...]
    connects: int
    state: str | None = "fine"
    says: str = ""


NO_RUN = answer(b'{"error":{"type":"not_found","message":"no such run"}}', "404 Not Found")
FORBIDDEN = answer(b'{"error":{"type":"forbidden","message":"not yours"}}', "403 Forbidden")
UNAVAILABLE = answer(b'{"error":{"type":"unavailable","message":"m"}}', "503 Unavailable")
LOST_AMID_BODY = reset(message(b"{", length=99))
GOOD = {name: answer(body) for name, body in BODIES.items()}

CASES = [
    # GET and DELETE are sent again after a lost connection and a gateway's error, a run is not.
    Case("status-after-two", "status", (LOST_AMID_BODY, UNAVAILABLE, GOOD["status"]), 3),
    Case("delete-after-two", "delete", (close(), UNAVAILABLE, GOOD["delete"]), 3),
    Case("runs-after-two", "runs", (UNAVAILABLE, reset(), GOOD["runs"]), 3),
    Case("never-a-run", "run", (UNAVAILABLE, GOOD["run"]), 1, "unknown", "503"),
    Case("never-a-run-that-was-lost", "run", (LOST_AMID_BODY, GOOD["run"]), 1, "unknown", "lost"),
    # Whatever was refused never left.
    *(
        Case(f"{name}-refused-twice", name, (REFUSED, REFUSED, GOOD[name]), 3)
        for name in ("run", "status", "delete")
    ),
    Case("run-refused-3-times", "run", (REFUSED,), 3, "not_sent", "refused"),
    Case("delete-refused-3-times", "delete", (REFUSED,), 3, None, "refused"),
    # What is known of a try is that try's own.
    Case("status-lost-then-refused", "status", (reset(), REFUSED, GOOD["status"]), 3),
    Case("status-lost-then-only-refused", "status", (close(), REFUSED), 3, None, "refused"),
    Case("run-refused-then-lost", "run", (REFUSED, reset(), GOOD["run"]), 2, "unknown", "lost"),
    Case("run-refused-then-503", "run", (REFUSED, UNAVAILABLE), 2, "unknown", "503"),
    Case("run-refused-then-403", "run", (REFUSED, FORBIDDEN), 2, "refused", "not yours"),
    Case("delete-refused-then-404", "delete", (REFUSED, NO_RUN), 2, None, "no such run"),
    # The last reason is the one that is told.
    Case("the-last-reason", "status", (reset(), close(), UNAVAILABLE), 3, None, "503"),
    Case("delete-lost-then-403", "delete", (reset(), FORBIDDEN), 2, None, "not yours"),
]

WATCHED: dict[int, Callable[[], None]] = {}


@pytest.fixture(scope="module", autouse=True)
def _watch_connections() -> None:
    """Call a hook before this process connects to a port; there is no way to remove it."""

    def hook(event: str, args: Any) -> None:
        if event == "socket.connect" and args[1][1] in WATCHED:
            WATCHED[args[1][1]]()

    sys.addaudithook(hook)


def check_tries(case: Case) -> None:
    """Make a call of the library whose connections the server refuses or accepts, as they come."""
    taken: list[Script | None] = []
    server = Hostile(*filter(None, case.steps))

    def before_connect() -> None:
        taken.append(case.steps[min(len(taken), len(case.steps) - 1)])
        try:
            server.listen() if taken[-1] else server.refuse()
        except OSError as error:  # which the client would take for the network's
            raise AssertionError("a mistake in the test") from error

    outcome: Any
    with server:
        client = bus_containers.Client(server.url, CANARY, timeout=LIMIT)
        WATCHED[server.port] = before_connect
        try:
            outcome = getattr(client, case.name)(*ARGUMENTS.get(case.name, []))
        except bus_containers.BusContainersError as error:
            outcome = error
        finally:
            del WATCHED[server.port]
    assert len(taken) == case.connects
    assert server.methods() == [METHODS[case.name] for step in taken if step]
    if case.state == "fine":
        assert outcome == DOCUMENTS[case.name]
    else:
        assert outcome.run_state == case.state
        assert case.says in str(outcome)


@pytest.mark.usefixtures("hasty")
def test_tries() -> None:
    """Promise 6.1, over a table: how often a request is sent, and what is then known of it."""
    check_each(check_tries, CASES, workers=len(CASES))


def test_tries_stay_within_the_deadline(serve: Serve) -> None:
    """The pause before the second try would end after the deadline, so there is no second."""
    server = serve(UNAVAILABLE)
    with pytest.raises((bus_containers.ApiError, bus_containers.DeadlineError)):
        bus_containers.Client(server.url, CANARY, timeout=0.2).status()
    assert server.connections == 1


@pytest.mark.parametrize(
    ("failures", "code"),
    [pytest.param(1, 0, id="found-at-last"), pytest.param(3, 125, id="never", marks=second_tier)],
)
def test_a_name_that_is_not_resolved(
    failures: int, code: int, program: Program, serve: Serve, tmp_path: Path
) -> None:
    skip_if(why_no_name_server())
    server = serve(GOOD["run"])
    with NameServer(lambda count: "" if count < failures else "127.0.0.1") as names:
        resolving = Program(with_files(program.command, names.files(tmp_path)), program.home)
        url = f"http://platform.test:{server.port}"
        result = resolving(*words("run"), at=server, env={"BUS_AI_API_URL": url})
    assert (result.code, names.queries) == (code, 3 if code else 2)
    assert server.methods() == ["POST"] * (code == 0)
    if code:
        assert "platform.test" in result.error
        assert not result.spoken.advises


# --- nothing is sent once a call has been given up --------------------------------------------


def read_late(given_up: threading.Event, early: bytes = b"") -> Script:
    """Read the request when the client has given up, and count it if it is whole."""

    def script(connection: Connection) -> None:
        connection.send(early)
        given_up.wait(LIMIT)
        try:
            connection.read_request()
        finally:
            connection.server.left.set()

    return script


LARGE = ["x" * 100_000, "x" * 100_000]
# What a server, or a gateway before it, says before it has read the request, and what is told.
EARLY = {
    "nothing": (b"", "no whole answer within 0.3 s"),
    "half an answer": (message(b"{", length=9), "no whole answer within 0.3 s"),
    "half an error": (message(b"{", "429 X", length=9), "HTTP 429 X"),
    "an error": (message(b"{}", "503 X"), "HTTP 503 X"),
    "a page": (message(b"<html>"), "the answer is an HTML page"),
    "another protocol": (message(b"", "101 X"), "HTTP 101"),
}


@pytest.mark.parametrize("case", EARLY)
def test_the_kernel_does_not_send_on(case: str, cli: InProcess, serve: Serve) -> None:
    """What it had taken of a request, and the server did not, goes nowhere any more."""
    given_up = threading.Event()
    early, says = EARLY[case]
    server = serve(read_late(given_up, early), receive_buffer=4096)
    check_failure(cli("--timeout", "300ms", "run", "--", *LARGE, at=server), 125, says)
    given_up.set()
    assert server.left.wait(LIMIT)
    assert server.requests == []


@second_tier
def test_an_interrupt_amid_the_end_of_what_was_given_up(serve: Serve) -> None:
    """Whoever keeps it, as the message about it does, keeps the deadline's frames by it."""

    def run(wanted: int) -> tuple[str, BaseException]:
        """Give up a run, and be interrupted at a line of its end; return where, and by what."""
        place = ""
        passed = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal passed, place
            name = frame.f_code.co_name
            is_deadline = event == "exception" and argument[0] is bus_containers.DeadlineError
            if name in ("perform", "__exit__", "close", "_real_close") and (passed or is_deadline):
                passed += 1
            if passed == wanted:
                place = f"{name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            bus_containers.Client(server.url, CANARY).run(LARGE, timeout=0.1)
        except (KeyboardInterrupt, bus_containers.DeadlineError) as error:
            return place, error
        finally:
            sys.settrace(None)
        raise AssertionError("this has an answer")

    places: list[str] = []
    while not places or places[-1]:
        given_up = threading.Event()
        server = serve(read_late(given_up), receive_buffer=4096)
        place, kept = run(len(places) + 1)
        given_up.set()
        assert server.left.wait(LIMIT)
        assert server.requests == [], place
        assert isinstance(kept, KeyboardInterrupt) == bool(place)
        places.append(place)
    assert len({place for place in places if place.startswith("close")}) > 1
    assert len(places) > 10


def bytes_on_their_way(port: int) -> int:
    """What the kernel holds of the connections of a port, in both directions."""
    total = 0
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, sizes, *_ = row.split()
        if f":{port:04X}" in (local[-5:], remote[-5:]):
            total += sum(int(size, 16) for size in sizes.split(":"))
    return total


def test_the_kernel_does_not_send_on_for_a_process_that_was_killed(
    program: Program, serve: Serve
) -> None:
    """So no signal can come too early for that, between a deadline and a close."""
    skip_if("" if sys.platform == "linux" else "what is on its way is read from /proc")
    given_up = threading.Event()
    server = serve(read_late(given_up), receive_buffer=4096)
    with program.start("run", "--", *LARGE, at=server) as process:
        end = time.monotonic() + LIMIT
        while bytes_on_their_way(server.port) < 200_000:
            assert time.monotonic() < end
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=LIMIT)
    given_up.set()
    assert server.left.wait(LIMIT)
    assert server.requests == []


def test_a_call_that_was_given_up_says_no_more(cli: InProcess, serve: Serve) -> None:
    """Its error is the last that is said of it, whatever comes of its connection later."""

    def stuck(connection: Connection) -> None:
        connection.read_request()
        connection.send(message(b"", "500 Oops", length=99))
        connection.hold()

    def after_it(connection: Connection) -> None:
        connection.read_request()
        assert connection.server.left.wait(LIMIT)
        connection.server.ending.wait(0.2)  # time for what must not be said
        connection.send(message(json.dumps({"deleted": True, "run_id": "run-2"}).encode()))

    server = serve(stuck, after_it)
    options = ("-v", "--error-format", "json", "--timeout", "1s")
    result = cli(*options, "delete", "run-1", "run-2", at=server)
    assert result.code == 1
    assert [item["run_id"] for item in result.document] == ["run-2"]
    first = [one for one in result.objects if "/runs/run-1: " in one["text"]]
    assert [one["kind"] for one in first if one["kind"] != "verbose"] == [first[-1]["kind"]]
    assert result.objects[-1]["text"].startswith(
        f"DELETE {server.url}/api/v1/containers/runs/run-2: 200"
    )
