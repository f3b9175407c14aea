# SPDX-License-Identifier: MIT
"""No run is started twice, and nothing is sent once a call has been given up: promises 6.1, 6.2.

Signals at any moment are in `test_signals.py`.
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
    Api,
    Connection,
    FullPort,
    Hostile,
    NameServer,
    Script,
    answer,
    close,
    hold_at_once,
    html,
    message,
    raw,
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
    second_tier,
    skip_if,
    words,
)

Serve = Callable[..., Hostile]

# --- tries ------------------------------------------------------------------------------------


class _Refuse:
    """Stands among the answers for a connection that is refused."""


REFUSED = _Refuse()
Step = "Script | _Refuse"


class Tries:
    """Calls of the library to a server that does something else with each connection.

    A hook sees each of this process's connections before it is made, and lets the server refuse
    or accept it. There is no way to remove an audit hook, so all tests share one.
    """

    _watched: dict[int, Callable[[], None]] = {}
    _installed = False

    def __init__(self, *steps: Script | _Refuse) -> None:
        self._steps = steps
        self.connects = 0
        self.server = Hostile(*(step for step in steps if not isinstance(step, _Refuse)))
        if not Tries._installed:
            Tries._installed = True
            sys.addaudithook(Tries._hook)

    @staticmethod
    def _hook(event: str, args: Any) -> None:
        if event == "socket.connect" and args[1][1] in Tries._watched:
            Tries._watched[args[1][1]]()

    def _before_connect(self) -> None:
        step = self._steps[min(self.connects, len(self._steps) - 1)]
        try:
            if isinstance(step, _Refuse):
                self.server.refuse()
            else:
                self.server.listen()
        except OSError as error:  # which the client would take for the network's
            raise AssertionError("a mistake in the test") from error
        self.connects += 1

    def call(self, name: str) -> Any:
        """What a method of a client returns or raises."""
        with self.server:
            client = bus_containers.Client(self.server.url, CANARY, timeout=LIMIT)
            Tries._watched[self.server.port] = self._before_connect
            try:
                return call_of(client, name)()
            except bus_containers.BusContainersError as error:
                return error
            finally:
                del Tries._watched[self.server.port]


def call_of(client: Any, name: str) -> Callable[[], Any]:
    args: dict[str, list[Any]] = {"run": [["true"]], "delete": ["run-1"]}
    return lambda: getattr(client, name)(*args.get(name, []))


class Case(NamedTuple):
    """What happens to each connection, and the outcome: the document, or the error's state."""

    id: str
    name: str
    steps: tuple[Script | _Refuse, ...]
    connects: int
    state: str | None = "fine"
    says: str = ""


NO_RUN = answer(b'{"error":{"type":"not_found","message":"no such run"}}', "404 Not Found")
FORBIDDEN = answer(b'{"error":{"type":"forbidden","message":"not yours"}}', "403 Forbidden")
LOST = {
    "reset": reset(),
    "reset-amid-headers": reset(b"HTTP/1.1 200 OK\r\n"),
    "reset-amid-body": reset(message(b"{", length=99)),
    "closed": close(),
    "body-cut": raw(message(b"{", length=99)),
    "chunk-cut": raw(message(b"40\r\n{", "200 OK", "Transfer-Encoding: chunked")),
}
GATEWAY = {
    "502": answer(b"", "502 Bad Gateway"),
    "503": answer(b'{"error":{"type":"unavailable","message":"m"}}', "503 Unavailable"),
    "504": html("504 Gateway Time-out", "504 Gateway Time-out"),
    # The status of an error counts, whatever its body.
    "503-unknown-coding": answer(b"\x1f", "503 Unavailable", "Content-Encoding: gzip"),
    "503-bad-length": answer(b"", "503 Unavailable", "Content-Length: zz"),
    "503-and-reset": reset(message(b"<", "503 Unavailable", length=9)),
}
FINAL = {
    "400": answer(b"{}", "400 Bad Request"),
    "401": answer(b"{}", "401 Unauthorized"),
    "429": answer(b"{}", "429 Too Many Requests"),
    "500": answer(b"{}", "500 Internal Server Error"),
    "501": answer(b"{}", "501 Not Implemented"),
    "505": answer(b"{}", "505 HTTP Version Not Supported"),
    "nonsense": raw(b"SSH-2.0\r\n"),
    "bad-json": answer(b"{"),
}
GOOD = {name: answer(body) for name, body in BODIES.items()}
STATE_OF = {"400": "refused", "401": "refused", "429": "refused"}

CASES = [
    # GET and DELETE are sent again after a lost connection and a gateway's error ...
    *(
        Case(f"{name}-after-two-{fault}", name, (step, step, GOOD[name]), 3)
        for name in ("status", "delete")
        for fault, step in {**LOST, **GATEWAY}.items()
    ),
    Case("runs-too", "runs", (reset(), close(), GOOD["runs"]), 3),
    # ... and after nothing else; a run is sent again after none of them.
    *(
        Case(f"status-never-after-{fault}", "status", (step, GOOD["status"]), 1, None)
        for fault, step in FINAL.items()
    ),
    *(
        Case(f"run-never-after-{fault}", "run", (step, GOOD["run"]), 1,
             STATE_OF.get(fault, "unknown"))
        for fault, step in {**LOST, **GATEWAY, **FINAL}.items()
    ),
    # Whatever was refused never left.
    *(
        Case(f"{name}-refused-{count}-times", name, (*[REFUSED] * count, GOOD[name]), count + 1)
        for name in ("run", "status", "delete")
        for count in range(3)
    ),
    Case("run-refused-3-times", "run", (REFUSED,), 3, "not_sent", "refused"),
    Case("delete-refused-3-times", "delete", (REFUSED,), 3, None, "refused"),
    # What is known of a try is that try's own.
    Case("status-lost-then-refused", "status", (reset(), REFUSED, GOOD["status"]), 3),
    Case("status-lost-then-only-refused", "status", (close(), REFUSED), 3, None, "refused"),
    Case("run-refused-then-lost", "run", (REFUSED, reset(), GOOD["run"]), 2, "unknown", "lost"),
    Case("run-refused-then-503", "run", (REFUSED, GATEWAY["503"]), 2, "unknown", "503"),
    Case("run-refused-then-403", "run", (REFUSED, FORBIDDEN), 2, "refused", "not yours"),
    Case("delete-refused-then-404", "delete", (REFUSED, NO_RUN), 2, None, "no such run"),
    # The last reason is the one that is told.
    Case("three-tries-and-no-more", "status", (reset(),), 3, None, "reset"),
    Case("the-last-reason", "status", (reset(), close(), GATEWAY["503"]), 3, None, "503"),
    Case("delete-at-most-three", "delete", (GATEWAY["503"],), 3, None, "503"),
    Case("delete-lost-then-403", "delete", (reset(), FORBIDDEN), 2, None, "not yours"),
]  # fmt: skip


def check_tries(case: Case) -> None:
    tries = Tries(*case.steps)
    outcome = tries.call(case.name)
    assert tries.connects == case.connects
    method = {"run": "POST", "delete": "DELETE"}.get(case.name, "GET")
    refusals = sum(isinstance(step, _Refuse) for step in case.steps[: case.connects])
    if isinstance(case.steps[-1], _Refuse):
        refusals += max(case.connects - len(case.steps), 0)
    assert tries.server.methods() == [method] * (case.connects - refusals)
    if case.state == "fine":
        assert outcome == DOCUMENTS[case.name]
    else:
        assert isinstance(outcome, bus_containers.BusContainersError), outcome
        assert outcome.run_state == case.state
        assert case.says in str(outcome)


def test_tries() -> None:
    """Promise 6.1, over a table: how often a request is sent, and what is then known of it."""
    check_each(check_tries, CASES, workers=len(CASES))


def test_a_retry_is_reported(cli: InProcess, serve: Serve) -> None:
    server = serve(reset(), GATEWAY["503"], GOOD["status"])
    result = cli("-v", "--error-format", "json", "status", at=server)
    texts = [one["text"] for one in result.objects if one["kind"] == "verbose"]
    again = [text for text in texts if text.endswith(("again in 0.3 s", "again in 0.7 s"))]
    assert (result.code, len(again)) == (0, 2)
    assert "reset" in again[0]
    assert "503" in again[1]
    assert cli("status", at=serve(reset(), GOOD["status"])).err == b""


def test_a_reset_while_the_run_is_being_sent(cli: InProcess, serve: Serve) -> None:
    def script(connection: Connection) -> None:
        connection.sock.recv(1)
        connection.reset()

    server = serve(script)
    result = cli(*words("run"), at=server)
    assert result.code == 125
    assert result.spoken.advises
    assert server.connections == 1


def test_tries_stay_within_the_deadline(serve: Serve) -> None:
    """The pause before the second try would end after the deadline, so there is no second."""
    server = serve(GATEWAY["503"])
    client = bus_containers.Client(server.url, CANARY, timeout=0.2)
    with pytest.raises(bus_containers.BusContainersError) as caught:
        client.status()
    assert isinstance(caught.value, (bus_containers.ApiError, bus_containers.DeadlineError))
    assert server.connections == 1


@pytest.mark.parametrize(
    ("failures", "code"),
    [pytest.param(2, 0, id="found-at-last"), pytest.param(3, 125, id="never", marks=second_tier)],
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
    assert (result.code, names.queries) == (code, 3)
    assert server.methods() == ["POST"] * (code == 0)
    if code:
        assert "platform.test" in result.error
        assert not result.spoken.advises


# --- nothing is sent once a call has been given up --------------------------------------------


def test_nothing_is_sent_after_a_deadline_while_connecting() -> None:
    """Promise 6.2: the connection that was being made is gone, so nothing can follow on it."""
    with FullPort() as full:
        client = bus_containers.Client(full.url, CANARY)
        with pytest.raises(bus_containers.DeadlineError) as caught:
            client.run(["true"], timeout=0.3)
        assert caught.value.run_state == "not_sent"
        end = time.monotonic() + LIMIT
        while full.clients() and time.monotonic() < end:
            time.sleep(0.01)
        assert full.clients() == 0


def test_nothing_is_sent_after_a_deadline_in_a_handshake(serve: Serve) -> None:
    server = serve(hold_at_once(), scheme="https")
    with pytest.raises(bus_containers.DeadlineError) as caught:
        bus_containers.Client(server.url, CANARY).run(["true"], timeout=0.3)
    assert caught.value.run_state == "not_sent"
    assert server.left.wait(LIMIT)


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


def test_many_runs_at_once_are_one_each(api: Api) -> None:
    """A Client of many threads sends each run once."""
    client = bus_containers.Client(api.url, CANARY)
    threads = [threading.Thread(target=client.run, args=([f"{n}"],)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in api.requests]
    assert sorted(body["args"] for body in bodies) == sorted([f"{n}"] for n in range(16))
