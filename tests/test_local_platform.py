# SPDX-License-Identifier: MIT
"""The local platform itself: what it accepts, what it refuses, what it runs, what it leaves."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import local_platform
from local_platform import API_PATH, Platform

LIMIT = 10.0  # seconds after which a test gives up on an event
SCRIPT = Path(local_platform.__file__)
OK_RUN = {"profile": "codex", "args": ["printf", "OK"]}


class Reply(NamedTuple):
    status: int
    document: Any

    @property
    def error(self) -> Any:
        return self.document["error"]


def call(
    platform: Platform,
    method: str,
    path: str,
    body: object = None,
    *,
    authorization: str | None = "",
    content_type: str | None = "application/json",
) -> Reply:
    """One request; `path` is below the API's, `body` bytes as they are or a value as JSON."""
    url = urllib.parse.urlsplit(platform.url)
    headers = {}
    if authorization is not None:
        headers["Authorization"] = authorization or f"Bearer {platform.token()}"
    if body is not None and content_type:
        headers["Content-Type"] = content_type
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(str(url.hostname), url.port or 0, timeout=LIMIT)
    try:
        connection.request(method, url.path + API_PATH + path, data, headers)
        response = connection.getresponse()
        text = response.read()
        assert response.getheader("Content-Type") == "application/json"
        assert response.getheader("Content-Length") == str(len(text)) or method == "HEAD"
        return Reply(response.status, json.loads(text) if text else None)
    finally:
        connection.close()


def run(platform: Platform, *args: str, **fields: object) -> Any:
    """The document of a run of the `codex` profile."""
    reply = call(platform, "POST", "/runs", {"profile": "codex", "args": list(args), **fields})
    assert reply.status == 200, reply
    return reply.document


def items(platform: Platform, path: str = "/runs") -> list[Any]:
    listed = call(platform, "GET", path).document["items"]
    assert isinstance(listed, list)
    return listed


def other(platform: Platform) -> str:
    return f"Bearer {platform.token(account=platform.other_account)}"


def wait_for(event: Callable[[], Any], what: str) -> Any:
    """What `event` gives once it gives something."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        value = event()
        if value:
            return value
        time.sleep(0.005)
    return pytest.fail(f"waited {LIMIT} s for {what}")


def content(path: Path) -> Callable[[], str]:
    """An event: the file is there and has its line."""
    return lambda: path.read_text() if path.exists() and path.read_text().endswith("\n") else ""


def gone(pid: int) -> Callable[[], bool]:
    """An event: the process has ended, whether or not somebody has reaped it."""

    def event() -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return not Path("/proc/self/stat").exists() or not Path(f"/proc/{pid}").exists()

    return event


class Background:
    """A call in a thread of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._call, args=args, kwargs=options)
        self._thread.start()

    def _call(self, *args: Any, **options: Any) -> None:
        try:
            self.reply = call(*args, **options)
        except (OSError, http.client.HTTPException) as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()

    def result(self) -> Reply:
        self.join()
        assert self.reply, self.error
        return self.reply


def sleeper(pid_file: Path) -> dict[str, object]:
    """A run that writes the ids of itself and a child, and would sleep for a minute."""
    script = f"sleep 60 & echo $$ $! > '{pid_file}'; wait"
    return {"profile": "codex", "args": ["sh", "-c", script]}


def pids_in(pid_file: Path) -> list[int]:
    return [int(pid) for pid in wait_for(content(pid_file), "the run to begin").split()]


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as shared:
        yield shared


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def forged(platform: Platform) -> str:
    """Another account's claims under a good signature of our own."""
    head, _, signature = platform.token().split(".")
    claims = platform.token(account=platform.other_account).split(".")[1]
    return f"{head}.{claims}.{signature}"


def another_algorithm(platform: Platform) -> str:
    """Good but for its header, which does not say HS256."""
    claims = platform.token().split(".")[1]
    said = json.loads(base64.urlsafe_b64decode(claims + "=="))
    return local_platform.mint(said, platform._key, "none")


def unsigned(platform: Platform) -> str:
    header = local_platform.mint({}, b"", "none").split(".")[0]
    return f"{header}.{platform.token().split('.')[1]}."


REFUSED_TOKENS: dict[str, Callable[[Platform], str | None]] = {
    "no header": lambda p: None,
    "no bearer": lambda p: f"Basic {p.token()}",
    "no token": lambda p: "Bearer ",
    "scheme only": lambda p: "Bearer",
    "no JWT": lambda p: "Bearer opaque",
    "not ASCII": lambda p: "Bearer \xe9.\xe9.\xe9",
    "another platform's": lambda p: f"Bearer {Platform().token(account=p.account)}",
    "forged": lambda p: f"Bearer {forged(p)}",
    "unsigned": lambda p: f"Bearer {unsigned(p)}",
    "signature cut": lambda p: f"Bearer {p.token()[:-1]}",
    "signature longer": lambda p: f"Bearer {p.token()}!",
    "algorithm": lambda p: f"Bearer {another_algorithm(p)}",
    "expired": lambda p: f"Bearer {p.token(expires_in=-1)}",
    "no expiry": lambda p: f"Bearer {p.token(expires_in=None)}",
    "expiry is text": lambda p: f"Bearer {p.token(exp='2999-01-01')}",
    "not yet": lambda p: f"Bearer {p.token(not_before=60)}",
    "another audience": lambda p: f"Bearer {p.token(audience='ai.hg.fi/internal')}",
    "longer audience": lambda p: f"Bearer {p.token(audience='ai.hg.fi/api/2')}",
    "other audiences": lambda p: f"Bearer {p.token(audience=['ai.hg.fi', 'api'])}",
    "no audience": lambda p: f"Bearer {p.token(audience=None)}",
    "no scope": lambda p: f"Bearer {p.token(scope=None)}",
    "empty scope": lambda p: f"Bearer {p.token(scope='')}",
    "other scopes": lambda p: f"Bearer {p.token(scope='container:run container:readx')}",
    "no subject": lambda p: f"Bearer {p.token(sub=None)}",
}

ACCEPTED_TOKENS: dict[str, Callable[[Platform], str]] = {
    "default": lambda p: f"Bearer {p.token()}",
    "scheme in lower case": lambda p: f"bearer {p.token()}",
    "scope alone": lambda p: f"Bearer {p.token(scope='container:read')}",
    "audiences": lambda p: f"Bearer {p.token(audience=['x', local_platform.AUDIENCE])}",
    "not before now": lambda p: f"Bearer {p.token(not_before=-1)}",
    "more claims": lambda p: f"Bearer {p.token(iss='local', jti='1')}",
    "other account": other,
}


@pytest.mark.parametrize("token", REFUSED_TOKENS.values(), ids=REFUSED_TOKENS)
def test_token_refused(platform: Platform, token: Callable[[Platform], str | None]) -> None:
    reply = call(platform, "GET", "/status", authorization=token(platform))
    error = {"type": "invalid_auth", "message": "missing or invalid bearer token"}
    assert reply == (401, {"error": error})


@pytest.mark.parametrize("token", ACCEPTED_TOKENS.values(), ids=ACCEPTED_TOKENS)
def test_token_accepted(platform: Platform, token: Callable[[Platform], str]) -> None:
    assert call(platform, "GET", "/status", authorization=token(platform)).status == 200


@pytest.mark.parametrize(
    ("method", "path", "scope", "status"),
    [
        ("GET", "/status", "container:read", 200),
        ("GET", "/runs", "container:read", 200),
        ("POST", "/runs", "container:run", 200),
        ("DELETE", "/runs/unknown", "container:delete", 404),
    ],
)
def test_scope(platform: Platform, method: str, path: str, scope: str, status: int) -> None:
    body = OK_RUN if method == "POST" else None
    alone = f"Bearer {platform.token(scope=scope)}"
    rest = f"Bearer {platform.token(scope=local_platform.SCOPE.replace(scope, ''))}"
    assert call(platform, method, path, body, authorization=alone).status == status
    assert call(platform, method, path, body, authorization=rest).status == 401


# ---------------------------------------------------------------------------------------------
# Bodies
# ---------------------------------------------------------------------------------------------

RUN_JSON = json.dumps(OK_RUN).encode()
IMAGE_RUN = {"image": "alpine:3", "command": ["printf", "OK"]}

NO_JSON = "one JSON document"
ONE_OF = "profile or image is required"
NO_LIMIT = "timeout_seconds is not a whole number >= 0"

REFUSED_BODIES: dict[str, tuple[object, str]] = {
    "no body": (b"", NO_JSON),
    "no JSON": (b"{", NO_JSON),
    "no UTF-8": (RUN_JSON.replace(b"OK", b"\xff"), NO_JSON),
    "byte order mark": (b"\xef\xbb\xbf" + RUN_JSON, NO_JSON),
    "trailing JSON": (RUN_JSON + RUN_JSON, NO_JSON),
    "trailing garbage": (RUN_JSON + b" x", NO_JSON),
    "deep": (b"[" * 200_000, NO_JSON),
    "list": ([OK_RUN], "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "neither": ({"args": ["true"]}, ONE_OF),
    "empty object": ({}, ONE_OF),
    "both": ({**OK_RUN, "image": "alpine"}, ONE_OF),
    "profile and command": ({"profile": "codex", "command": ["x"]}, "only args"),
    "image and args": ({"image": "alpine", "args": ["x"]}, "only command"),
    "args and command": ({**OK_RUN, "command": ["x"]}, "only args"),
    "unknown key": ({**OK_RUN, "env": {}}, "only args"),
    "unknown profile": ({**OK_RUN, "profile": "none"}, "no such profile"),
    "profile null": ({**OK_RUN, "profile": None}, "profile is not a string"),
    "image empty": ({**IMAGE_RUN, "image": ""}, "name of an image"),
    "image an option": ({**IMAGE_RUN, "image": "-v/:/x"}, "name of an image"),
    "image a number": ({**IMAGE_RUN, "image": 3}, "image is not a string"),
    "no args": ({"profile": "codex"}, "args is not a list"),
    "no command": ({"image": "alpine"}, "command is not a list"),
    "args text": ({**OK_RUN, "args": "true"}, "args is not a list"),
    "args of numbers": ({**OK_RUN, "args": ["sleep", 1]}, "args is not a list"),
    "args empty": ({**OK_RUN, "args": []}, "args is empty"),
    "NUL": ({**OK_RUN, "args": ["a\0b"]}, "NUL"),
    "timeout negative": ({**OK_RUN, "timeout_seconds": -1}, NO_LIMIT),
    "timeout fraction": ({**OK_RUN, "timeout_seconds": 1.5}, NO_LIMIT),
    "timeout 1.0": ({**OK_RUN, "timeout_seconds": 1.0}, NO_LIMIT),
    "timeout text": ({**OK_RUN, "timeout_seconds": "1"}, NO_LIMIT),
    "timeout true": ({**OK_RUN, "timeout_seconds": True}, NO_LIMIT),
    "timeout null": ({**OK_RUN, "timeout_seconds": None}, NO_LIMIT),
    "timeout huge": ({**OK_RUN, "timeout_seconds": 2**63}, NO_LIMIT),
}

ACCEPTED_BODIES: dict[str, object] = {
    "profile": OK_RUN,
    "another profile": {**OK_RUN, "profile": "testing-agent"},
    "image": IMAGE_RUN,
    "no limit": {**OK_RUN, "timeout_seconds": 0},
    "limit": {**IMAGE_RUN, "timeout_seconds": 1800},
    "white space": b" \n" + RUN_JSON + b"\n",
}


@pytest.mark.parametrize(("body", "message"), REFUSED_BODIES.values(), ids=REFUSED_BODIES)
def test_body_refused(platform: Platform, body: object, message: str) -> None:
    before = len(items(platform))
    reply = call(platform, "POST", "/runs", body)
    assert (reply.status, reply.error["type"]) == (400, "bad_request")
    assert message in reply.error["message"]
    assert len(items(platform)) == before


@pytest.mark.parametrize("body", ACCEPTED_BODIES.values(), ids=ACCEPTED_BODIES)
def test_body_accepted(platform: Platform, body: object) -> None:
    reply = call(platform, "POST", "/runs", body)
    assert (reply.status, reply.document["stdout"]) == (200, "OK")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("text/json", 400),
        ("application/x-www-form-urlencoded", 400),
        (None, 400),
    ],
)
def test_content_type(platform: Platform, content_type: str | None, status: int) -> None:
    reply = call(platform, "POST", "/runs", OK_RUN, content_type=content_type)
    assert reply.status == status
    assert status == 200 or "content type" in reply.error["message"]


@pytest.mark.parametrize(
    "head",
    ["Transfer-Encoding: chunked", "Content-Length: x", "Content-Length: 99999999999"],
)
def test_body_without_a_usable_length(platform: Platform, head: str) -> None:
    answer = raw(platform, f"{head}\r\nAuthorization: Bearer {platform.token()}\r\n\r\n".encode())
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert b"Connection: close" in answer


def test_body_cut_off_runs_nothing(platform: Platform) -> None:
    before = len(items(platform))
    head = f"Authorization: Bearer {platform.token()}\r\nContent-Type: application/json\r\n"
    length = f"Content-Length: {len(RUN_JSON) + 1}\r\n\r\n"
    assert raw(platform, (head + length).encode() + RUN_JSON) == b""
    assert len(items(platform)) == before


def raw(platform: Platform, rest: bytes) -> bytes:
    """What comes back for a POST of a run whose head goes on with `rest`, until the end."""
    url = urllib.parse.urlsplit(platform.url)
    with socket.create_connection((str(url.hostname), url.port or 0), LIMIT) as connection:
        connection.sendall(f"POST {API_PATH}/runs HTTP/1.1\r\nHost: x\r\n".encode() + rest)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_connection_is_kept(platform: Platform) -> None:
    """A refused body leaves nothing in the way of the next request on the same connection."""
    url = urllib.parse.urlsplit(platform.url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port or 0, timeout=LIMIT)
    headers = {"Authorization": f"Bearer {platform.token()}"}
    sockets = set()
    for method, path, body in (
        ("POST", "/runs", b"{}"),
        ("HEAD", "/runs", None),
        ("POST", "/none", b"x" * 100_000),
        ("GET", "/status", None),
    ):
        connection.request(method, API_PATH + path, body, headers)
        response = connection.getresponse()
        response.read()
        sockets.add(connection.sock)
    connection.close()
    assert response.status == 200
    assert len(sockets) == 1


# ---------------------------------------------------------------------------------------------
# Routes, prefixes, lists
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/none", 404, "not_found"),
        ("GET", "/status/", 404, "not_found"),
        ("GET", "/status/x", 404, "not_found"),
        ("DELETE", "/runs/", 404, "not_found"),
        ("DELETE", "/runs/a/b", 404, "not_found"),
        ("DELETE", "/runs/unknown", 404, "not_found"),
        ("DELETE", "/runs/a%2Fb", 404, "not_found"),
        ("POST", "/status", 405, "method_not_allowed"),
        ("PUT", "/runs", 405, "method_not_allowed"),
        ("PATCH", "/runs", 405, "method_not_allowed"),
        ("OPTIONS", "/runs", 405, "method_not_allowed"),
        ("DELETE", "/runs", 405, "method_not_allowed"),
        ("GET", "/runs/unknown", 405, "method_not_allowed"),
        ("GET", "/status?x=1", 200, ""),
    ],
)
def test_route(platform: Platform, method: str, path: str, status: int, kind: str) -> None:
    reply = call(platform, method, path)
    assert reply.status == status
    assert reply.document.get("error", {}).get("type", "") == kind


def test_head_is_refused_without_a_body(platform: Platform) -> None:
    assert call(platform, "HEAD", "/runs") == (405, None)


def test_requests_are_recorded(platform: Platform) -> None:
    before = len(platform.requests)
    call(platform, "GET", "/status?a=b", authorization=None)
    call(platform, "DELETE", "/runs/x%20y")
    assert platform.requests[before:] == [
        ("GET", f"{API_PATH}/status?a=b"),
        ("DELETE", f"{API_PATH}/runs/x%20y"),
    ]


@pytest.mark.parametrize("prefix", ["/CAP/v1", "CAP/v1/"])
def test_prefix(prefix: str) -> None:
    with Platform(prefix=prefix) as platform:
        assert platform.url.endswith("/CAP/v1")
        assert run(platform, "true")["exit_code"] == 0
        assert call(platform, "DELETE", f"/runs/{items(platform)[0]['run_id']}").status == 200
        platform.url = platform.url[: -len("/CAP/v1")]
        assert call(platform, "GET", "/status").status == 404


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 has to be set up")
def test_only_its_own_address(platform: Platform) -> None:
    url = urllib.parse.urlsplit(platform.url)
    assert url.hostname == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", url.port or 0), LIMIT)


def test_status(platform: Platform) -> None:
    item = {"id": "local-runner", "state": "ready", "details": {"runtime": "process"}}
    assert call(platform, "GET", "/status") == (200, {"items": [item]})


def test_runs_in_status() -> None:
    with Platform(runs_in_status=True) as platform:
        document = run(platform, "true")
        assert call(platform, "GET", "/runs").error["type"] == "not_found"
        assert call(platform, "PUT", "/runs").status == 405
        runner, listed = items(platform, "/status")
        assert runner["id"] == "local-runner"
        assert (listed["id"], listed["run_id"]) == (document["run_id"],) * 2
        assert listed["state"] == "exited"
        theirs = call(platform, "GET", "/status", authorization=other(platform))
        assert theirs.document["items"] == [runner]


def test_list_shows_own_runs_in_order() -> None:
    with Platform() as platform:
        mine = [run(platform, "sh", "-c", f"exit {code}")["run_id"] for code in (3, 0)]
        call(platform, "POST", "/runs", IMAGE_RUN, authorization=other(platform))
        first, second = items(platform)
        theirs = call(platform, "GET", "/runs", authorization=other(platform)).document["items"]
    assert [first["run_id"], second["run_id"]] == mine
    assert [item["image"] for item in theirs] == ["alpine:3"]
    assert isinstance(first.pop("duration_ms"), int)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first.pop("started_at"))
    assert first == {
        "run_id": mine[0],
        "owner_identity_id": platform.account,
        "state": "exited",
        "image": "localhost/codex",
        "args": ["sh", "-c", "exit 3"],
        "exit_code": 3,
    }


# ---------------------------------------------------------------------------------------------
# Billing
# ---------------------------------------------------------------------------------------------

BILLING_ERRORS: dict[Any, dict[str, object]] = {
    "required": {
        "type": "billing_required",
        "message": "billing is not set up for this account",
        "action": "setup_billing",
        "command": "bus billing setup",
    },
    "quota": {
        "type": "quota_exceeded",
        "message": "the container runtime of this month is used up",
        "action": "upgrade_plan",
        "command": "bus billing setup",
        "plan_id": "local-small",
        "recommended_plan": "local-large",
        "usage": {
            "feature": "container:run",
            "meter_event_name": "bus_container_runtime_seconds",
            "window": "month",
            "used": 3600,
            "limit": 3600,
            "remaining": 0,
            "exceeded": True,
            "upgrade_plan_id": "local-large",
        },
    },
}


@pytest.mark.parametrize("billing", BILLING_ERRORS)
def test_billing(billing: Any) -> None:
    with Platform(billing=billing) as platform:
        assert call(platform, "POST", "/runs", OK_RUN) == (402, {"error": BILLING_ERRORS[billing]})
        assert call(platform, "POST", "/runs", {}).status == 400
        assert items(platform) == []
        assert call(platform, "DELETE", "/runs/unknown").status == 404


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[list[str], int, str, str]] = {
    "output": (["printf", "OK"], 0, "OK", ""),
    "both streams": (["sh", "-c", "printf o; printf e >&2"], 0, "o", "e"),
    "exit code": (["sh", "-c", "exit 37"], 37, "", ""),
    "killed": (["sh", "-c", "printf x; kill -9 $$"], 137, "x", ""),
    "terminated": (["sh", "-c", "kill -15 $$"], 143, "", ""),
    "no such command": (["no-such-command"], 127, "", "no-such-command: command not found\n"),
    "no such file": (["./none"], 127, "", "./none: command not found\n"),
    "no program": (["/etc/passwd"], 126, "", "/etc/passwd: Permission denied\n"),
    "directory": (["/"], 126, "", "/: Permission denied\n"),
    "words": (["printf", "<%s>", "a b", "", "--", "-x", "é\n"], 0, "<a b><><--><-x><é\n>", ""),
    "lone surrogate": (["printf", "a\ud800b"], 0, "a\ufffdb", ""),
    "no UTF-8": (["printf", "a\\377b"], 0, "a\ufffdb", ""),
    "no input": (["cat"], 0, "", ""),
    "empty folder": (["ls", "-A"], 0, "", ""),
    "named streams": (["sh", "-c", "echo a; echo b > /dev/stdout; echo c"], 0, "a\nb\nc\n", ""),
    "much output": (["sh", "-c", "yes | head -c 300000"], 0, "y\n" * 150_000, ""),
    "output closed": (["sh", "-c", "exec >&- 2>&-; sleep 0.05; exit 3"], 3, "", ""),
    "child goes on": (["sh", "-c", "sleep 60 & printf x"], 0, "x", ""),
}


@pytest.mark.parametrize(("args", "code", "out", "err"), RUNS.values(), ids=RUNS)
def test_run(platform: Platform, args: list[str], code: int, out: str, err: str) -> None:
    document = run(platform, *args)
    assert (document["exit_code"], document["stdout"], document["stderr"]) == (code, out, err)
    assert document["duration_ms"] < 5000


def test_run_document(platform: Platform) -> None:
    document = call(platform, "POST", "/runs", IMAGE_RUN).document
    assert re.fullmatch("run_[0-9a-f]{32}", document["run_id"])
    assert type(document["duration_ms"]) is int
    assert list(document.items()) == [
        ("run_id", document["run_id"]),
        ("owner_identity_id", platform.account),
        ("runner_name", "local-runner"),
        ("image", "alpine:3"),
        ("args", ["printf", "OK"]),
        ("exit_code", 0),
        ("stdout", "OK"),
        ("stderr", ""),
        ("duration_ms", document["duration_ms"]),
        ("runtime", "process"),
    ]


def test_run_has_its_own_folder_and_environment(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUS_API_TOKEN", "canary")
    names = run(platform, "env")["stdout"].splitlines()
    assert sorted(line.partition("=")[0] for line in names) == ["HOME", "LANG", "PATH"]
    script = (
        "import os; print(os.getcwd(), os.environ['HOME'], os.getpgrp(), os.getpid());"
        "open('left', 'w').close(); os.mkdir('locked', 0)"
    )
    folder, home, group, pid = run(platform, sys.executable, "-c", script)["stdout"].split()
    assert folder == home
    assert group == pid
    assert not Path(folder).exists()


def test_run_ends_with_all_that_it_started(platform: Platform) -> None:
    pid = int(run(platform, "sh", "-c", "sleep 60 > /dev/null 2>&1 & echo $!")["stdout"])
    wait_for(gone(pid), "the run's child to end")


def test_run_does_not_wait_for_what_left_its_group(platform: Platform) -> None:
    script = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); os.write(1, b'%d\\n' % os.getpid()); os.write(write, b'x')\n"
        "    time.sleep(60); os._exit(0)\n"
        "os.read(read, 1)\n"
    )
    document = run(platform, sys.executable, "-c", script)
    pid = int(document["stdout"])
    assert not gone(pid)()
    os.kill(pid, signal.SIGKILL)
    assert document["duration_ms"] < 5000


def test_run_over_its_limit_is_killed(platform: Platform, tmp_path: Path) -> None:
    pid_file = tmp_path / "pids"
    body = {**sleeper(pid_file), "timeout_seconds": 1}
    reply = call(platform, "POST", "/runs", body)
    assert reply.document["exit_code"] == 124
    assert 1000 <= reply.document["duration_ms"] < 5000
    assert items(platform)[-1]["exit_code"] == 124
    for pid in pids_in(pid_file):
        wait_for(gone(pid), "the run's processes to end")


# ---------------------------------------------------------------------------------------------
# Deleting
# ---------------------------------------------------------------------------------------------


def test_delete_of_a_run_in_progress(tmp_path: Path) -> None:
    with Platform() as platform:
        post = Background(platform, "POST", "/runs", sleeper(tmp_path / "pids"))
        pids = pids_in(tmp_path / "pids")
        (item,) = items(platform)
        assert (item["state"], item["exit_code"]) == ("running", None)
        path = f"/runs/{item['run_id']}"
        assert call(platform, "DELETE", path, authorization=other(platform)).status == 403
        assert items(platform)[0]["state"] == "running"
        deleted = {
            "deleted": True,
            "run_id": item["run_id"],
            "owner_identity_id": platform.account,
        }
        assert call(platform, "DELETE", path) == (200, deleted)
        assert gone(pids[0])()
        assert items(platform) == []
        reply = post.result()
        assert (reply.status, reply.document["exit_code"]) == (200, 137)
        assert reply.document["run_id"] == item["run_id"]
        assert call(platform, "DELETE", path).status == 404
        wait_for(gone(pids[1]), "the run's child to end")


def test_delete_of_a_finished_run() -> None:
    with Platform() as platform:
        run_id = run(platform, "true")["run_id"]
        reply = call(platform, "DELETE", f"/runs/{run_id}", authorization=other(platform))
        assert (reply.status, reply.error["type"]) == (403, "forbidden")
        quoted = run_id.replace("_", "%5F")
        assert call(platform, "DELETE", f"/runs/{quoted}").document["run_id"] == run_id
        for authorization in ("", other(platform)):
            reply = call(platform, "DELETE", f"/runs/{run_id}", authorization=authorization)
            assert (reply.status, reply.error["type"]) == (404, "not_found")


# ---------------------------------------------------------------------------------------------
# Clients that go away, many clients, the end
# ---------------------------------------------------------------------------------------------


def test_run_goes_on_without_its_client(platform: Platform, tmp_path: Path) -> None:
    begun, go, done = tmp_path / "begun", tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    script = f"echo x > '{begun}'; read line < '{go}'; echo y > '{done}'"
    body = json.dumps({"profile": "codex", "args": ["sh", "-c", script]}).encode()
    url = urllib.parse.urlsplit(platform.url)
    with socket.create_connection((str(url.hostname), url.port or 0), LIMIT) as connection:
        connection.sendall(
            f"POST {API_PATH}/runs HTTP/1.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {platform.token()}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_for(content(begun), "the run to begin")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    go.write_text("\n")
    wait_for(content(done), "the run to go on")
    wait_for(lambda: items(platform)[-1]["state"] == "exited", "the run to be listed as exited")
    assert items(platform)[-1]["exit_code"] == 0


def test_many_clients_at_once() -> None:
    clients = 64
    start = time.monotonic()
    with Platform() as platform:
        body = {"profile": "codex", "args": ["sleep", "60"]}
        posts = [Background(platform, "POST", "/runs", body) for _ in range(clients)]
        wait_for(lambda: len(items(platform)) == clients, "all runs to begin")
        assert {item["state"] for item in items(platform)} == {"running"}
    for post in posts:
        post.join()
    assert time.monotonic() - start < LIMIT


def test_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    threads = threading.active_count()
    with Platform() as platform:
        url = urllib.parse.urlsplit(platform.url)
        idle = socket.create_connection((str(url.hostname), url.port or 0), LIMIT)
        post = Background(platform, "POST", "/runs", sleeper(tmp_path / "pids"))
        pids = pids_in(tmp_path / "pids")
        assert platform.config_dir.is_dir()
    post.join()
    assert (post.reply, idle.recv(1)) == (None, b"")
    idle.close()
    assert threading.active_count() == threads
    assert list((tmp_path / "tmp").iterdir()) == []
    for pid in pids:
        wait_for(gone(pid), "the run's processes to end")
    with pytest.raises(ConnectionRefusedError):
        call(platform, "GET", "/status")


# ---------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------

# Its containers are processes of a session of their own, as an engine's are no children of its
# client; only `kill` with the container's name ends them.
ENGINE = """#!/bin/sh
cd '{folder}'
echo "$@" >> log
case $1 in
run)
    name=$3
    shift 5
    exec {python} -c 'import subprocess, sys
child = subprocess.Popen(sys.argv[2:], start_new_session=True)
print(child.pid, file=open(sys.argv[1], "w"))
sys.exit(child.wait())' "$name" "$@" ;;
kill) kill -9 "$(cat "$2")" ;;
esac
"""


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    tool = tmp_path / "engine"
    tool.write_text(ENGINE.format(folder=tmp_path, python=sys.executable))
    tool.chmod(0o755)
    return tool


def test_engine_runs(engine: Path) -> None:
    with Platform(engine=[str(engine), "run", "--rm"]) as platform:
        document = run(platform, "sh", "-c", "printf OK; exit 5")
        assert call(platform, "GET", "/status").document["items"][0]["details"] == {
            "runtime": "engine"
        }
    assert (document["stdout"], document["exit_code"]) == ("OK", 5)
    assert (document["image"], document["runtime"]) == ("localhost/codex", "engine")
    log = (engine.parent / "log").read_text()
    assert log == f"run --name {document['run_id']} --rm localhost/codex sh -c printf OK; exit 5\n"


def test_engine_stops_the_container(engine: Path) -> None:
    with Platform(engine=[str(engine), "run", "--rm"]) as platform:
        post = Background(platform, "POST", "/runs", {"image": "a", "command": ["sleep", "60"]})
        run_id = wait_for(lambda: items(platform), "the run to begin")[0]["run_id"]
        pid = int(wait_for(content(engine.parent / run_id), "the container to begin"))
        assert call(platform, "DELETE", f"/runs/{run_id}").status == 200
        assert post.result().document["exit_code"] == 137
        wait_for(gone(pid), "the container to end")
    words = (engine.parent / "log").read_text().splitlines()[1:]
    assert words == [f"kill {run_id}", f"rm --force {run_id}"]


def test_engine_words_stand_before_image_and_command() -> None:
    images = {"codex": "registry/codex:1", "mine": "own"}
    with Platform(engine=["echo", "-n"], profile_images=images) as platform:
        assert run(platform, "a", "b")["stdout"] == "registry/codex:1 a b"
        assert run(platform, "a", profile="mine")["stdout"] == "own a"
        assert run(platform, "a", profile="testing-agent")["stdout"] == "localhost/testing-agent a"


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Script:
    """The platform as a process, with its temporary folders in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def start(self, *args: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "TMPDIR": str(self.folder), **environ},
            start_new_session=True,  # its own group, as in a terminal
        )

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Its exit code and streams, once it has ended and has left nothing behind."""
        with process:
            try:
                out, err = process.communicate(timeout=LIMIT)
            finally:
                process.kill()
        assert list(self.folder.iterdir()) == []
        return process.returncode, out, err

    def __call__(self, *args: str, **environ: str) -> tuple[int, str, str]:
        return self.end(self.start(*args, **environ))


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "tmp")


# A client for COMMAND: posts the run of sys.argv[1] and prints what came back.
CLIENT = """
import json, os, sys, urllib.request
token = open(os.environ["BUS_CONFIG_DIR"] + "/auth/api-token").read().strip()
request = urllib.request.Request(
    os.environ["BUS_AI_API_URL"] + "/api/v1/containers/runs",
    sys.argv[1].encode(),
    {"Authorization": "Bearer " + token, "Content-Type": "application/json"},
)
print(json.load(urllib.request.urlopen(request))["stdout"])
"""

CODES: dict[str, tuple[list[str], tuple[int, str, str]]] = {
    "success": (["true"], (0, "", "")),
    "exit code": (["sh", "-c", "echo out; echo err >&2; exit 3"], (3, "out\n", "err\n")),
    "killed": (["sh", "-c", "kill -9 $$"], (137, "", "")),
    "not found": (["none"], (127, "", "local_platform.py: none: command not found\n")),
    "no program": (["/"], (126, "", "local_platform.py: /: Permission denied\n")),
    "words": (
        ["printf", "<%s>", "--billing", "-h", "--", "a b", ""],
        (0, "<--billing><-h><--><a b><>", ""),
    ),
    "options": (
        ["--billing", "quota", "--prefix=/p", "--runs-in-status", "printf", "%s", "--verbose"],
        (0, "--verbose", ""),
    ),
    "two dashes": (["--prefix", "p", "--", "printf", "%s", "--"], (0, "--", "")),
    "prefix": (["--prefix", "/p", "sh", "-c", "echo ${BUS_AI_API_URL##*/}"], (0, "p\n", "")),
}


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """`main` takes signals for itself; afterwards they are pytest's again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(("args", "result"), CODES.values(), ids=CODES)
def test_command(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    args: list[str],
    result: tuple[int, str, str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = threading.active_count()
    code = local_platform.main(args)
    assert (code, *capfd.readouterr()) == result
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_command_environment(script: Script) -> None:
    """The variables and files that COMMAND finds, and those it does not."""
    report = (
        'cd "$BUS_CONFIG_DIR" && stat -c "%a %n" . auth auth/*; '
        'echo "$BUS_AI_TOKEN$BUS_API_TOKEN$BUS_API_BASE_URL$KEPT"; echo "$BUS_AI_API_URL"'
    )
    others = {"BUS_AI_TOKEN": "a", "BUS_API_TOKEN": "b", "BUS_API_BASE_URL": "c", "KEPT": "kept"}
    if sys.platform != "linux":
        report = report.replace('-c "%a %n"', '-f "%Lp %N"')
    code, out, err = script("sh", "-c", report, **others)
    *lines, url = out.splitlines()
    assert lines == ["700 .", "700 auth", "600 auth/api-token", "600 auth/other-token", "kept"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    assert (code, err) == (0, "")


def test_command_can_run_and_verbose_logs_without_the_token(script: Script) -> None:
    code, out, err = script("--verbose", sys.executable, "-c", CLIENT, json.dumps(OK_RUN))
    assert (code, out) == (0, "OK\n")
    assert f'"POST {API_PATH}/runs HTTP/1.1" 200' in err
    assert "Bearer" not in err and "eyJ" not in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--none", "true"], ["--none"]),
        (["--bill", "quota", "true"], ["--bill"]),
        (["--billing", "free", "true"], ["--billing", "free"]),
        (["--engine"], ["--engine"]),
        (["--engine", "no-such-engine run", "true"], ["--engine", "no-such-engine"]),
        (["--engine", "'", "true"], ["--engine"]),
        (["--profile-image", "codex", "true"], ["--profile-image", "NAME=IMAGE"]),
    ],
)
def test_usage_errors(
    capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        local_platform.main(args)
    out, err = capsys.readouterr()
    assert (leaving.value.code, out) == (2, "")
    assert all(word in err.splitlines()[-1] for word in words)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        local_platform.main(["--help", "true"])
    out, err = capsys.readouterr()
    assert (leaving.value.code, err) == (0, "")
    assert "--runs-in-status" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_until_a_signal(script: Script, number: signal.Signals, tmp_path: Path) -> None:
    """Without COMMAND: the two exports work in a shell, and a run ends with the platform."""
    process = script.start()
    assert process.stdout
    exports = process.stdout.readline() + process.stdout.readline()
    names = [line.split("=")[0] for line in exports.splitlines()]
    assert names == ["export BUS_CONFIG_DIR", "export BUS_AI_API_URL"]
    body = json.dumps(sleeper(tmp_path / "pids"))
    client = subprocess.Popen(
        ["sh", "-c", exports + 'exec "$@"', "sh", sys.executable, "-c", CLIENT, body],
        stderr=subprocess.DEVNULL,
    )
    pids = pids_in(tmp_path / "pids")
    process.send_signal(number)
    assert script.end(process) == (0, "", "")
    for pid in pids:
        wait_for(gone(pid), "the run's processes to end")
    assert client.wait(LIMIT) == 1


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (lambda process: process.send_signal(signal.SIGTERM), 143),
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_signal_while_a_command_runs(
    script: Script, tmp_path: Path, send: Callable[[Any], None], code: int
) -> None:
    """COMMAND gets it, and its end is the end, also of the run that it waits for."""
    trap = f'trap \'exit {code}\' INT TERM; {sys.executable} -c "$0" "$1" 2> /dev/null & wait'
    body = json.dumps(sleeper(tmp_path / "pids"))
    process = script.start("sh", "-c", trap, CLIENT, body)
    pids = pids_in(tmp_path / "pids")
    send(process)
    assert script.end(process) == (code, "", "")
    for pid in pids:
        wait_for(gone(pid), "the run's processes to end")


def test_ctrl_c_leaves_the_end_to_the_command(script: Script) -> None:
    command = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    process = script.start("sh", "-c", command)
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert script.end(process) == (5, "caught\n", "")


def test_token_files_are_good(platform: Platform) -> None:
    auth = platform.config_dir / "auth"
    owners = {"api-token": platform.account, "other-token": platform.other_account}
    for name, account in owners.items():
        authorization = f"Bearer {(auth / name).read_text().strip()}"
        reply = call(platform, "POST", "/runs", OK_RUN, authorization=authorization)
        assert reply.document["owner_identity_id"] == account
        assert stat.S_IMODE((auth / name).stat().st_mode) == 0o600
