# SPDX-License-Identifier: MIT
"""The stand-in platform: what it accepts, refuses, runs and leaves: promises 1.3, 1.4 and 1.6.

Who relies on the tests relies on this: it checks requests as strictly as the real provider does.
"""

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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import local_platform
from local_platform import API_PATH, Platform
from support import LIMIT, tiers

SCRIPT = Path(local_platform.__file__)
OK_RUN = {"profile": "codex", "args": ["printf", "OK"]}
IMAGE_RUN = {"image": "alpine:3", "command": ["printf", "OK"]}
RUN_JSON = json.dumps(OK_RUN).encode()


class Reply(NamedTuple):
    status: int
    document: Any

    @property
    def error(self) -> Any:
        return self.document["error"]


def address(platform: Platform) -> tuple[str, int]:
    url = urllib.parse.urlsplit(platform.url)
    return str(url.hostname), url.port or 0


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
    headers = {}
    if authorization is not None:
        headers["Authorization"] = authorization or f"Bearer {platform.token()}"
    if body is not None and content_type:
        headers["Content-Type"] = content_type
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(*address(platform), timeout=LIMIT)
    try:
        prefix = urllib.parse.urlsplit(platform.url).path
        connection.request(method, prefix + API_PATH + path, data, headers)
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


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Reply]]]:
    """Make calls in threads of their own."""
    with ThreadPoolExecutor(64) as pool:
        yield lambda *args: pool.submit(call, *args)


def sleeper(pid_file: Path) -> dict[str, object]:
    """A run that writes the ids of itself and a child, and would sleep for a minute."""
    script = f"sleep 60 & echo $$ $! > '{pid_file}'; wait"
    return {"profile": "codex", "args": ["sh", "-c", script]}


def pids_in(pid_file: Path) -> list[int]:
    return [int(pid) for pid in wait_for(content(pid_file), "the run to begin").split()]


# --- tokens -----------------------------------------------------------------------------------


def another_algorithm(platform: Platform) -> str:
    """Good but for its header, which does not say HS256."""
    claims = platform.token().split(".")[1]
    said = json.loads(base64.urlsafe_b64decode(claims + "=="))
    return local_platform.mint(said, platform._key, "none")


def with_claims_of(other: str, token: str) -> str:
    """Another token's claims under the good signature of this one."""
    head, _, signature = token.split(".")
    return f"{head}.{other.split('.')[1]}.{signature}"


REFUSED_TOKENS: dict[str, Callable[[Platform], str | None]] = {
    "no-header": lambda p: None,
    "no-bearer": lambda p: f"Basic {p.token()}",
    "no-token": lambda p: "Bearer ",
    "scheme-only": lambda p: "Bearer",
    "not-a-jwt": lambda p: "Bearer opaque",
    "not-ascii": lambda p: "Bearer \xe9.\xe9.\xe9",
    "another-platforms": lambda p: f"Bearer {Platform().token(account=p.account)}",
    "forged": lambda p: "Bearer " + with_claims_of(p.token(account="other"), p.token()),
    "unsigned": lambda p: "Bearer " + ".".join([*p.token().split(".")[:2], ""]),
    "signature-cut": lambda p: f"Bearer {p.token()[:-1]}",
    "signature-longer": lambda p: f"Bearer {p.token()}!",
    "algorithm": lambda p: f"Bearer {another_algorithm(p)}",
}
REFUSED_CLAIMS: dict[str, dict[str, Any]] = {
    "expired": {"expires_in": -1}, "no-expiry": {"expires_in": None},
    "expiry-is-text": {"exp": "2999-01-01"}, "not-yet": {"not_before": 60},
    "another-audience": {"audience": "ai.hg.fi/internal"},
    "longer-audience": {"audience": "ai.hg.fi/api/2"},
    "other-audiences": {"audience": ["ai.hg.fi", "api"]}, "no-audience": {"audience": None},
    "no-scope": {"scope": None}, "empty-scope": {"scope": ""},
    "other-scopes": {"scope": "container:run container:readx"}, "no-subject": {"sub": None},
}  # fmt: skip
ACCEPTED_CLAIMS: list[dict[str, Any]] = [
    {}, {"scope": "container:read"}, {"audience": ["x", local_platform.AUDIENCE]},
    {"not_before": -1}, {"iss": "local", "jti": "1"}, {"account": "other"},
]  # fmt: skip
UNAUTHORIZED = {"type": "invalid_auth", "message": "missing or invalid bearer token"}


@pytest.mark.parametrize("name", [*REFUSED_TOKENS, *REFUSED_CLAIMS])
def test_token_refused(name: str, platform: Platform) -> None:
    if name in REFUSED_TOKENS:
        token = REFUSED_TOKENS[name](platform)
    else:
        token = f"Bearer {platform.token(**REFUSED_CLAIMS[name])}"
    reply = call(platform, "GET", "/status", authorization=token)
    assert reply == (401, {"error": UNAUTHORIZED})


def test_token_accepted(platform: Platform) -> None:
    for claims in ACCEPTED_CLAIMS:
        for scheme in ("Bearer", "bearer"):
            token = f"{scheme} {platform.token(**claims)}"
            assert call(platform, "GET", "/status", authorization=token).status == 200, claims


@pytest.mark.parametrize("line", ["GET /status", "GET /runs", "POST /runs", "DELETE /runs/unknown"])
def test_scope(line: str, platform: Platform) -> None:
    method, path = line.split()
    words = {"GET": "read", "POST": "run", "DELETE": "delete"}
    scope, status = f"container:{words[method]}", 404 if method == "DELETE" else 200
    body = OK_RUN if method == "POST" else None
    for scopes, expected in ((scope, status), (local_platform.SCOPE.replace(scope, ""), 401)):
        token = f"Bearer {platform.token(scope=scopes)}"
        assert call(platform, method, path, body, authorization=token).status == expected


# --- bodies -----------------------------------------------------------------------------------

REFUSED_BODIES: dict[str, list[object]] = {
    "one JSON document": [
        b"", b"{", RUN_JSON.replace(b"OK", b"\xff"), b"\xef\xbb\xbf" + RUN_JSON,
        RUN_JSON + RUN_JSON, RUN_JSON + b" x", b"[" * 200_000,
    ],
    "not a JSON object": [[OK_RUN], b"null"],
    "profile or image is required": [{"args": ["true"]}, {}, {**OK_RUN, "image": "alpine"}],
    "only args": [
        {"profile": "codex", "command": ["x"]}, {**OK_RUN, "command": ["x"]},
        {**OK_RUN, "env": {}},
    ],
    "only command": [{"image": "alpine", "args": ["x"]}],
    "no such profile": [{**OK_RUN, "profile": "none"}],
    "profile is not a string": [{**OK_RUN, "profile": None}],
    "name of an image": [{**IMAGE_RUN, "image": ""}, {**IMAGE_RUN, "image": "-v/:/x"}],
    "image is not a string": [{**IMAGE_RUN, "image": 3}],
    "args is not a list": [
        {"profile": "codex"}, {**OK_RUN, "args": "true"}, {**OK_RUN, "args": ["sleep", 1]},
    ],
    "command is not a list": [{"image": "alpine"}],
    "args is empty": [{**OK_RUN, "args": []}],
    "NUL": [{**OK_RUN, "args": ["a\0b"]}],
    "timeout_seconds is not a whole number >= 0": [
        {**OK_RUN, "timeout_seconds": value} for value in (-1, 1.5, 1.0, "1", True, None, 2**63)
    ],
}  # fmt: skip
ACCEPTED_BODIES: list[object] = [
    OK_RUN, {**OK_RUN, "profile": "testing-agent"}, IMAGE_RUN, {**OK_RUN, "timeout_seconds": 0},
    {**IMAGE_RUN, "timeout_seconds": 1800}, b" \n" + RUN_JSON + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("told", REFUSED_BODIES)
def test_body_refused(told: str, platform: Platform) -> None:
    for body in REFUSED_BODIES[told]:
        reply = call(platform, "POST", "/runs", body)
        assert (reply.status, reply.error["type"]) == (400, "bad_request"), body
        assert told in reply.error["message"], body
    assert items(platform) == []


def test_body_accepted(platform: Platform) -> None:
    for body in ACCEPTED_BODIES:
        reply = call(platform, "POST", "/runs", body)
        assert (reply.status, reply.document["stdout"]) == (200, "OK"), body


def test_content_type(platform: Platform) -> None:
    json_type = "application/json"
    for kind in (json_type, f"{json_type}; charset=utf-8", "Application/JSON"):
        assert call(platform, "POST", "/runs", OK_RUN, content_type=kind).status == 200
    for other_kind in ("text/json", "application/x-www-form-urlencoded", None):
        reply = call(platform, "POST", "/runs", OK_RUN, content_type=other_kind)
        assert reply.status == 400
        assert "content type" in reply.error["message"]


def test_body_without_a_usable_length(platform: Platform) -> None:
    for head in ("Transfer-Encoding: chunked", "Content-Length: x", "Content-Length: 99999999999"):
        rest = f"{head}\r\nAuthorization: Bearer {platform.token()}\r\n\r\n"
        answer = raw(platform, rest.encode())
        assert b" 400 " in answer.partition(b"\r\n")[0], head
        assert b"Connection: close" in answer, head


def test_body_cut_off_runs_nothing(platform: Platform) -> None:
    head = f"Authorization: Bearer {platform.token()}\r\nContent-Type: application/json\r\n"
    length = f"Content-Length: {len(RUN_JSON) + 1}\r\n\r\n"
    assert raw(platform, (head + length).encode() + RUN_JSON) == b""
    assert items(platform) == []


def raw(platform: Platform, rest: bytes) -> bytes:
    """What comes back for a POST of a run whose head goes on with `rest`, until the end."""
    with socket.create_connection(address(platform), LIMIT) as connection:
        connection.sendall(f"POST {API_PATH}/runs HTTP/1.1\r\nHost: x\r\n".encode() + rest)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# --- routes, prefixes, lists ------------------------------------------------------------------


ROUTES = {
    (404, "not_found"): [
        "GET ", "GET /", "GET /none", "GET /status/", "GET /status/x", "DELETE /runs/",
        "DELETE /runs/a/b", "DELETE /runs/unknown", "DELETE /runs/a%2Fb",
    ],
    (405, "method_not_allowed"): [
        "POST /status", "PUT /runs", "PATCH /runs", "OPTIONS /runs", "DELETE /runs",
        "GET /runs/unknown",
    ],
    (200, ""): ["GET /status?x=1"],
}  # fmt: skip


@pytest.mark.parametrize(("status", "error_type"), ROUTES)
def test_route(status: int, error_type: str, platform: Platform) -> None:
    for line in ROUTES[status, error_type]:
        method, path = line.split(" ")
        reply = call(platform, method, path)
        found = (reply.status, reply.document.get("error", {}).get("type", ""))
        assert found == (status, error_type), line
    assert call(platform, "HEAD", "/runs") == (405, None)


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
    host, port = address(platform)
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), LIMIT)


def test_status(platform: Platform) -> None:
    item = {"id": "local-runner", "state": "ready", "details": {"runtime": "process"}}
    assert call(platform, "GET", "/status") == (200, {"items": [item]})


def test_runs_in_status(platform: Platform) -> None:
    platform.runs_in_status = True
    document = run(platform, "true")
    assert call(platform, "GET", "/runs").error["type"] == "not_found"
    assert call(platform, "PUT", "/runs").status == 405
    runner, listed = items(platform, "/status")
    assert runner["id"] == "local-runner"
    assert (listed["id"], listed["run_id"]) == (document["run_id"],) * 2
    assert listed["state"] == "exited"
    theirs = call(platform, "GET", "/status", authorization=other(platform))
    assert theirs.document["items"] == [runner]


def test_list_shows_own_runs_in_order(platform: Platform) -> None:
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


# --- billing ----------------------------------------------------------------------------------

@pytest.mark.parametrize("billing", ["required", "quota"])
def test_billing(billing: Any, platform: Platform) -> None:
    """In the shape of CONTRACT.md; what the client makes of it is in `test_guidance.py`."""
    platform.billing = billing
    reply = call(platform, "POST", "/runs", OK_RUN)
    keys = ["type", "message", "action", "command"]
    assert reply.status == 402
    if billing == "quota":
        keys += ["plan_id", "recommended_plan", "usage"]
        usage = "feature meter_event_name window used limit remaining exceeded upgrade_plan_id"
        assert list(reply.error["usage"]) == usage.split()
    assert list(reply.error) == keys
    assert call(platform, "POST", "/runs", {}).status == 400
    assert items(platform) == []
    assert call(platform, "DELETE", "/runs/unknown").status == 404


# --- runs -------------------------------------------------------------------------------------

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
def test_run(args: list[str], code: int, out: str, err: str, platform: Platform) -> None:
    document = run(platform, *args)
    assert (document["exit_code"], document["stdout"], document["stderr"]) == (code, out, err)
    assert document["duration_ms"] < 5000


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
    assert reply.document["duration_ms"] < 10_000
    assert items(platform)[-1]["exit_code"] == 124
    for pid in pids_in(pid_file):
        wait_for(gone(pid), "the run's processes to end")


# --- deleting ---------------------------------------------------------------------------------


def test_delete_of_a_run_in_progress(
    tmp_path: Path, platform: Platform, background: Callable[..., Future[Reply]]
) -> None:
    post = background(platform, "POST", "/runs", sleeper(tmp_path / "pids"))
    pids = pids_in(tmp_path / "pids")
    (item,) = items(platform)
    assert (item["state"], item["exit_code"]) == ("running", None)
    path = f"/runs/{item['run_id']}"
    assert call(platform, "DELETE", path, authorization=other(platform)).status == 403
    assert items(platform)[0]["state"] == "running"
    deleted = {"deleted": True, "run_id": item["run_id"], "owner_identity_id": platform.account}
    assert call(platform, "DELETE", path) == (200, deleted)
    assert gone(pids[0])()
    assert items(platform) == []
    reply = post.result(LIMIT)
    assert (reply.status, reply.document["exit_code"]) == (200, 137)
    assert reply.document["run_id"] == item["run_id"]
    assert call(platform, "DELETE", path).status == 404
    wait_for(gone(pids[1]), "the run's child to end")


# --- clients that go away, many clients, the end ----------------------------------------------


def test_run_goes_on_without_its_client(platform: Platform, tmp_path: Path) -> None:
    begun, go, done = tmp_path / "begun", tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    script = f"echo x > '{begun}'; read line < '{go}'; echo y > '{done}'"
    body = json.dumps({"profile": "codex", "args": ["sh", "-c", script]}).encode()
    with socket.create_connection(address(platform), LIMIT) as connection:
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


@pytest.mark.parametrize("clients", tiers([8, 64], 8))
def test_many_clients_at_once(
    clients: int, background: Callable[..., Future[Reply]]
) -> None:
    start = time.monotonic()
    with Platform() as platform:
        body = {"profile": "codex", "args": ["sleep", "60"]}
        posts = [background(platform, "POST", "/runs", body) for _ in range(clients)]
        wait_for(lambda: len(items(platform)) == clients, "all runs to begin")
        assert {item["state"] for item in items(platform)} == {"running"}
    for post in posts:
        assert isinstance(post.exception(LIMIT), (OSError, http.client.HTTPException))
    assert time.monotonic() - start < LIMIT


def test_end_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: Callable[..., Future[Reply]],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    threads = threading.active_count()
    with Platform() as platform:
        idle = socket.create_connection(address(platform), LIMIT)
        post = background(platform, "POST", "/runs", sleeper(tmp_path / "pids"))
        pids = pids_in(tmp_path / "pids")
        assert platform.config_dir.is_dir()
    assert isinstance(post.exception(LIMIT), (OSError, http.client.HTTPException))
    assert idle.recv(1) == b""
    idle.close()
    assert threading.active_count() == threads + 1  # the one that made the call
    assert list((tmp_path / "tmp").iterdir()) == []
    for pid in pids:
        wait_for(gone(pid), "the run's processes to end")
    with pytest.raises(ConnectionRefusedError):
        call(platform, "GET", "/status")


# --- engines ----------------------------------------------------------------------------------

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


def test_engine_stops_the_container(
    engine: Path, background: Callable[..., Future[Reply]]
) -> None:
    with Platform(engine=[str(engine), "run", "--rm"]) as platform:
        post = background(platform, "POST", "/runs", {"image": "a", "command": ["sleep", "60"]})
        run_id = wait_for(lambda: items(platform), "the run to begin")[0]["run_id"]
        pid = int(wait_for(content(engine.parent / run_id), "the container to begin"))
        assert call(platform, "DELETE", f"/runs/{run_id}").status == 200
        assert post.result(LIMIT).document["exit_code"] == 137
        wait_for(gone(pid), "the container to end")
    words = (engine.parent / "log").read_text().splitlines()[1:]
    assert words == [f"kill {run_id}", f"rm --force {run_id}"]


# --- the command line -------------------------------------------------------------------------


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
    "exit-code": (["sh", "-c", "echo out; echo err >&2; exit 3"], (3, "out\n", "err\n")),
    "killed": (["sh", "-c", "kill -9 $$"], (137, "", "")),
    "not-found": (["none"], (127, "", "local_platform.py: none: command not found\n")),
    "no-program": (["/"], (126, "", "local_platform.py: /: Permission denied\n")),
    "words": (["printf", "<%s>", "--billing", "-h", "--", "a b", ""],
              (0, "<--billing><-h><--><a b><>", "")),
    "options": (["--billing", "quota", "--prefix=/p", "--runs-in-status", "printf", "%s", "-v"],
                (0, "-v", "")),
    "two-dashes": (["--prefix", "p", "--", "printf", "%s", "--"], (0, "--", "")),
    "prefix": (["--prefix", "/p", "sh", "-c", "echo ${BUS_AI_API_URL##*/}"], (0, "p\n", "")),
}  # fmt: skip


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


USAGE_ERRORS = {
    "--none true": "--none",
    "--bill quota true": "--bill",
    "--billing free true": "--billing free",
    "--engine": "--engine",
    "--engine no-such-engine true": "--engine no-such-engine",
    "--engine ' true": "--engine",
    "--profile-image codex true": "--profile-image NAME=IMAGE",
}


@pytest.mark.parametrize("line", [*USAGE_ERRORS, "--help true"])
def test_usage_errors_and_help(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        local_platform.main(line.split())
    out, err = capsys.readouterr()
    if line == "--help true":
        assert (leaving.value.code, err) == (0, "")
        assert "--runs-in-status" in out
    else:
        assert (leaving.value.code, out) == (2, "")
        assert all(word in err.splitlines()[-1] for word in USAGE_ERRORS[line].split())


@pytest.mark.parametrize(
    "number", tiers([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], signal.SIGINT)
)
def test_serve_until_a_signal(script: Script, number: signal.Signals, tmp_path: Path) -> None:
    """Without COMMAND: the two exports work in a shell, and a run ends with the platform.

    Standard error says what this is and how it ends; standard output is for `eval`.
    """
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
    code, out, err = script.end(process)
    assert (code, out) == (0, "")
    assert "until Ctrl-C" in err
    for pid in pids:
        wait_for(gone(pid), "the run's processes to end")
    assert client.wait(LIMIT) == 1


@pytest.mark.parametrize(
    ("send", "code"),
    [
        (lambda process: process.send_signal(signal.SIGTERM), 143),
        (lambda process: os.killpg(process.pid, signal.SIGINT), 5),
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


def test_token_files_are_good(platform: Platform) -> None:
    auth = platform.config_dir / "auth"
    owners = {"api-token": platform.account, "other-token": platform.other_account}
    for name, account in owners.items():
        authorization = f"Bearer {(auth / name).read_text().strip()}"
        reply = call(platform, "POST", "/runs", OK_RUN, authorization=authorization)
        assert reply.document["owner_identity_id"] == account
        assert stat.S_IMODE((auth / name).stat().st_mode) == 0o600
